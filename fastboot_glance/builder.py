# SPDX-License-Identifier: Apache-2.0
"""The service ``fastboot-builder``: any number of them, anywhere where the
repository's directory is mounted.

Each runs workers that take jobs to build, and others that take those to
bake, from the jobboard, a listener for Glance's notifications, a steward that
audits, the endpoint that agents report to, and now and then upkeep. All of it
may be killed at any moment.
"""

import contextlib
import functools
import os
import pathlib
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log as logging
from oslo_service import systemd

from fastboot_common import (
    exception,
    journal,
    publish,
    repack,
    rpc,
    upkeep,
)
from fastboot_common.cli import base
from fastboot_common.conf import opts
from fastboot_common.microvm import key
from fastboot_common.repository import Repository
from fastboot_glance import (
    audit,
    bakery,
    bakes,
    cases,
    centre,
    endings,
    herald,
    images,
    jobs,
    logbooks,
    microvms,
    needs,
    observations,
    records,
    registry,
    staging,
    worker,
)
from fastboot_glance import eligibility as policies
from fastboot_glance import listener as notifications

LOG = logging.getLogger(__name__)

#: Seconds that a worker has to give back its job.
_STOP_SECONDS: Final = 40.0
#: Seconds to say goodbye to the message bus and the jobboard.
_CLOSE_SECONDS: Final = 5.0


def configure(arguments: Sequence[str]) -> Any:
    """Read the configuration and set up the log.

    :param arguments: of the command line.
    """
    # Not one of our own: oslo.messaging has options that only this one has.
    conf = opts.register(cfg.CONF)
    logging.register_options(conf)
    conf(list(arguments), project='fastboot', prog='fastboot-builder')
    logging.setup(conf, 'fastboot')
    return conf


class Builder:
    """All threads of the service."""

    def __init__(self, conf: Any) -> None:
        """Connect nothing yet.

        :raises ConfigError: the configuration cannot work.
        :raises NotFound: there is no repository.
        """
        self._conf = conf
        self._state_dir = pathlib.Path(conf.state_dir).absolute()
        self._workdir = pathlib.Path(
            conf.builder.workdir or self._state_dir / 'work').absolute()
        self._stop = threading.Event()
        endings.load(conf.capture)
        self._platform = _platform(conf.bakery)
        self._open()
        self._policies = policies.Policies(conf)
        self._records = records.Records(
            conf.database.connection,
            connection_recycle_time=conf.database.connection_recycle_time,
            max_pool_size=conf.database.max_pool_size)
        self._books = logbooks.Logbooks(conf.database.connection)
        self._glance = images.Images(conf)
        self._board = jobs.Board(conf)
        self._herald = herald.Herald(conf)
        self._desk = audit.Desk(self._steward, conf.builder.audit_interval)
        self._workers = [worker.Worker(self._tools, conf.builder.poll)
                         for _ in range(conf.builder.workers)]
        if self._platform:
            # Of their own: builds, which servers wait for, never wait for a
            # bake, which takes minutes.
            self._workers += [
                worker.Worker(self._tools, conf.builder.poll,
                              self._platform.text)
                for _ in range(conf.bakery.workers)]
        self._upkeep = threading.Thread(
            target=self._keep_up, name='upkeep', daemon=True)

    def run(self) -> None:
        """Work until :meth:`stop` is called."""
        servers: list[Any] = []
        threading.Thread(target=self._serve, args=(servers,), name='bus',
                         daemon=True).start()
        self._desk.start()
        self._upkeep.start()
        for one in self._workers:
            one.start()
        systemd.notify()
        LOG.info('fastboot-builder: %d workers', len(self._workers))
        # A signal that another thread gets does not wake this one.
        while not self._stop.wait(1):
            pass
        LOG.info('fastboot-builder stops')
        for one in self._workers:
            one.stop()
        self._desk.stop()
        for one in self._workers:
            if not one.join(_STOP_SECONDS):
                LOG.warning('a worker does not stop; its claim runs out')
        self._desk.join(1)
        closing = threading.Thread(target=self._close, args=(servers,),
                                   daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def stop(self) -> None:
        """Have :meth:`run` end."""
        self._stop.set()

    def _close(self, servers: list[Any]) -> None:
        for server in servers:
            server.stop()
        self._board.close()

    def _serve(self, servers: list[Any]) -> None:
        """Connect to the message bus, however long it is away."""
        found = notifications.start(self._conf, self._desk)
        if found:
            servers.append(found)
        servers.append(rpc.serve(
            rpc.transport(self._conf), rpc.CENTRE, socket.gethostname(),
            centre.Endpoint(
                self._records, None if self._conf.builder.refresh == 'never'
                else self._desk.put)))

    # What each thread has for itself

    def _open(self) -> Repository:
        return base.Environment(self._conf).writable_repository()

    def _registry(self) -> registry.Registry:
        return registry.Registry(self._open(), self._records, self._glance,
                                 self._herald, self._microvms())

    def _microvms(self) -> microvms.Microvms:
        return microvms.Microvms(base.Environment(self._conf))

    def _bakes(self, register: registry.Registry) -> bakes.Bakes:
        return bakes.Bakes(self._conf, self._board, self._policies,
                           self._records, register, self._platform)

    def _tools(self) -> cases.Tools:
        group = self._conf.repository
        register = self._registry()
        cache = self._state_dir / 'cache'
        return cases.Tools(
            conf=self._conf, board=self._board, books=self._books,
            glance=self._glance, policies=self._policies, registry=register,
            bakes=self._bakes(register), publisher=publish.Publisher(
                register.repository, cache, level=group.compression_level,
                boot_level=group.boot_compression_level,
                threads=group.threads or None),
            cache=cache, workdir=self._workdir, platform=self._platform)

    def _steward(self) -> audit.Steward:
        group, register = self._conf.builder, self._registry()
        return audit.Steward(
            self._board, self._glance, self._policies, self._records,
            register, observations.Refresher(
                self._records, register, group.refresh, group.refresh_hosts),
            self._bakes(register), group.audit_removals,
            group.error_hours * 3600)

    def _keep_up(self) -> None:
        """Collect garbage, first what builders left that died."""
        interval = self._conf.builder.upkeep_interval
        repository: Repository | None = None
        shelved = self._microvms()
        while True:
            with _survived():
                self._sweep()
            with _survived():
                repository = repository or self._open()
                self._collect(
                    repository, self._conf.repository.retention_days * 86400,
                    functools.partial(needs.keep, self._records))
                self._tidy(repository, shelved)
            # Builders that were started together should not all do it at
            # the same time.
            if self._stop.wait(interval * random.uniform(0.8, 1.2)):
                return

    def _sweep(self) -> None:
        # In this order: a job that comes between has no logbook yet.
        books = self._books.list()
        found = self._board.jobs()
        dead = books - {job.uuid for job in found}
        for job_id in dead:
            self._books.remove(job_id)
        removed = staging.sweep(self._workdir,
                                {job.image_id for job in found})
        if dead or removed:
            LOG.info('upkeep: removed %d logbooks and %d directories of '
                     'builders that died', len(dead), removed)

    def _tidy(self, images: Repository, shelved: microvms.Microvms) -> None:
        """The same for the µVMs, and those go that are of no use."""
        found = shelved.repository()
        if found is None:
            return
        with _survived():
            removed = shelved.tidy(images, self._records.platforms())
            if removed:
                LOG.info('upkeep: removed %d µVMs of no use', removed)
        self._collect(found, self._conf.bakery.retention_hours * 3600)

    def _collect(self, repository: Repository, retention: float,
                 needed: upkeep.Needed = upkeep.by_nobody) -> None:
        group = self._conf.repository
        # First: to rewrite packs takes room.
        with _survived():
            done = upkeep.collect(repository, retention,
                                  group.grace_hours * 3600, needed=needed)
            if done.files:
                LOG.info('upkeep: removed %d files, %d bytes, from the '
                         'repository', done.files, done.bytes)
        with _survived():
            moved = repack.repack(
                repository, group.repack_below / 100,
                level=group.boot_compression_level,
                threads=group.threads or None)
            if moved.retired:
                LOG.info('upkeep: rewrote %d packs, %d bytes into %d',
                         moved.retired, moved.before, moved.after)
        version = repository.state().version
        if version >= journal.SERIAL_WARNING:
            LOG.warning('repository %s: %s', repository.id,
                        journal.describe_serials(version))


@contextlib.contextmanager
def _survived() -> Iterator[None]:
    """Whatever is wrong with one part of upkeep, the others go on."""
    try:
        yield
    except exception.FastbootError as error:
        LOG.warning('upkeep: %s', error)
    except Exception:
        LOG.exception('a part of upkeep failed; it is tried again later')


def _platform(options: Any) -> key.Platform | None:
    """What this builder bakes for; None: it does not.

    Whatever is wrong with it, builds go on.
    """
    if not options.workers:
        return None
    try:
        return bakery.platform(options)
    except exception.FastbootError as error:
        LOG.warning('no µVMs are baked here: %s', error)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service.

    :param arguments: of the command line; None: the process's.
    :returns: the exit status if it cannot start; else it does not return.
    """
    try:
        conf = configure(sys.argv[1:] if arguments is None else arguments)
        service = Builder(conf)
    except (exception.FastbootError, cfg.Error) as error:
        print(f'fastboot-builder: {error}', file=sys.stderr)
        return 1
    # What it makes holds the content of images.
    os.umask(0o027)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run()
    # Threads that wait for a server that hangs must not keep the process.
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    sys.exit(main())
