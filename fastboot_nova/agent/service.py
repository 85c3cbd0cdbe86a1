# SPDX-License-Identifier: Apache-2.0
"""``fastboot-agent``: one per compute host.

The local API answers from the first moment, also when the repository was
never reached, or the message bus is away: whoever asks then takes the stock
path. The export and its shield run beside it and outlive it.
"""

import contextlib
import grp
import http.client
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log as logging

from fastboot_common import exception, files, localapi, nbdkit
from fastboot_common.cli import base
from fastboot_common.conf import opts
from fastboot_nova.agent import (
    agent,
    api,
    exports,
    metrics,
    report,
    systemd,
    window,
    worker,
)
from fastboot_nova.cli.base import open_host

LOG = logging.getLogger(__name__)

#: Groups of options that are ours.
_GROUPS: Final = ('DEFAULT', 'repository', 'host', 'export', 'agent',
                  'microvm')
_EXPORT_SECONDS: Final = 1.0
#: Before systemd is told that we are ready without a repository.
_OPEN_SECONDS: Final = 3.0
_STOP_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 10.0


class Service:
    """The process: sockets, signals, service manager.

    :param conf: the configuration.
    """

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        self._env = base.Environment(conf)
        self._name = conf.agent.host or socket.gethostname()
        self._told = metrics.Metrics()
        self._agent: agent.Agent | None = None
        self._reason = 'the agent is starting'
        self._stopping = threading.Event()
        self._socket = self._env.run / 'agent.sock'
        self._gid = _group_id(conf.export.group)
        self._exports = self._make_exports()

    def _make_exports(self) -> exports.Exports:
        group = self._conf.export
        export = nbdkit.Export(
            self._env.host_path, self._env.run / 'export.sock',
            agent=self._socket, wait=group.wait)
        shield = nbdkit.Shield(self._env.shield_socket, export.path,
                               wait=group.shield_wait)
        return exports.Exports(
            [exports.Keeper(export, group.group, nbdkit.PLUGIN),
             exports.Keeper(shield, group.group)],
            self._conf.agent.manage_export)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        :raises FastbootError: it cannot be done as it is configured.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        self._share()
        if self._conf.agent.metrics_port:
            self._told.serve(self._conf.agent.metrics_address,
                             self._conf.agent.metrics_port)
        with localapi.Server(
                self._socket, api.routes(self._serving, self.status),
                self._conf.agent.group or self._conf.export.group):
            watch = worker.Worker('export', self._exports.check,
                                  _EXPORT_SECONDS, longest=2.0)
            watch.start()
            opener = threading.Thread(target=self._open, daemon=True,
                                      name='open')
            opener.start()
            opener.join(_OPEN_SECONDS)
            systemd.notify('READY=1')
            LOG.info('serving %s', self._socket)
            self._wait()
            systemd.notify('STOPPING=1')
            LOG.info('stopping')
            self._reason = 'the agent is stopping'
            ended, self._agent = self._agent, None
            watch.stop()
        if ended:
            ended.close(time.monotonic() + _STOP_SECONDS)

    def status(self) -> dict[str, Any]:
        """What GET /v1/status answers."""
        found = self._agent
        parts = found.status() if found else {
            'state': 'waiting', 'version': 0, 'repository': self._reason}
        return {'host': self._name, 'software': report.software(),
                'export': self._exports.healthy, **parts}

    def _serving(self) -> agent.Agent:
        """:raises Unavailable: not yet, or not any more."""
        found = self._agent
        if found is None:
            raise exception.Unavailable(self._reason)
        return found

    def _share(self) -> None:
        """QEMU and nova-compute reach the sockets, QEMU reads the volumes.

        What we make from now on belongs to QEMU's group; what is there
        already is given to it.
        """
        os.umask(0o027)
        if self._conf.export.group:
            os.setegid(self._gid)
        host_path = self._env.host_path
        for path in (self._env.run, host_path / 'volumes'):
            files.make_directory(path)
        # nova-compute's group is another: it may pass, and list nothing.
        for path in (self._env.state_dir, self._env.run):
            path.chmod(0o751)
        with contextlib.suppress(PermissionError):
            for path in (host_path, host_path / 'volumes',
                         *host_path.glob('volumes/*'),
                         *host_path.glob('volumes/*/complete'),
                         *host_path.glob('volumes/*/volume'),
                         *host_path.glob('microvms'),
                         *host_path.glob('microvms/*'),
                         *host_path.glob('microvms/artifacts/*'),
                         *host_path.glob('microvms/artifacts/*/*')):
                if path.stat().st_gid != self._gid:
                    os.chown(path, -1, self._gid)

    def _open(self) -> None:
        """Open the host, as soon as its repository is known."""
        pause = 1.0
        while not self._stopping.is_set():
            try:
                with contextlib.ExitStack() as stack:
                    served = stack.enter_context(open_host(self._env))
                    found = agent.Agent(self._conf, self._name, served,
                                        self._told, self._exports, self._gid)
                    stack.pop_all()
                found.start()
                self._agent = found
                return
            except exception.FastbootError as error:
                LOG.warning('nothing can be served yet: %s', error)
                self._reason = str(error)
            except Exception as error:
                LOG.exception('nothing can be served yet')
                self._reason = repr(error)
            self._stopping.wait(pause)
            pause = min(2 * pause, 60.0)

    def _wait(self) -> None:
        """Until it is time to stop; show the watchdog that we answer."""
        seconds = systemd.watchdog_seconds()
        while not self._stopping.wait(seconds or None):
            if _answers(self._socket):
                systemd.notify('WATCHDOG=1')


def _check(conf: Any) -> None:
    """A typing error should end us now, not a thread of ours later.

    :raises ConfigError: an option cannot work.
    :raises oslo_config.cfg.Error: it does not even have its type.
    """
    for group, options in opts.list_opts():
        for option in options if group in _GROUPS else ():
            getattr(conf if group == 'DEFAULT' else conf[group], option.dest)
    window.Window(conf.agent.window)


def _group_id(name: str | None) -> int:
    """:raises ConfigError: there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid if name else os.getegid()
    except KeyError:
        raise exception.ConfigError(
            f'[export] group: there is no group {name}') from None


def _answers(path: pathlib.Path) -> bool:
    """Whether the local API answers."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_PROBE_SECONDS)
        try:
            line.connect(os.fspath(path))
            line.sendall(b'GET /v1/status HTTP/1.1\r\nHost: agent\r\n'
                         b'Connection: close\r\n\r\n')
            answer = http.client.HTTPResponse(line)
            answer.begin()
            return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False


def main(argv: Sequence[str] | None = None) -> int:
    """The program.

    :returns: 2 if it was called wrongly; else it ends the process.
    """
    # The global one: oslo.messaging registers some of its options there.
    conf: Any = opts.register(cfg.CONF)
    logging.register_options(conf)
    try:
        conf(sys.argv[1:] if argv is None else list(argv),
             project='fastboot', prog='fastboot-agent')
    except cfg.Error as error:
        print(f'fastboot-agent: {error}', file=sys.stderr)
        return 2
    logging.setup(conf, 'fastboot')
    status = 0
    try:
        _check(conf)
        Service(conf).run()
    except (exception.FastbootError, cfg.Error) as error:
        LOG.error('%s', error)
        status = 1
    # Threads that a hanging repository or broker keeps would keep us, too;
    # all that they do is safe to interrupt.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    main()
