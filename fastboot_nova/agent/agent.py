# SPDX-License-Identifier: Apache-2.0
"""The agent's parts, put together: what answers the local API.

Not the process (sockets, signals): that is
:mod:`fastboot_nova.agent.service`.
"""

import pathlib
import threading
import time
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_common.cli import base
from fastboot_nova import host, mirror
from fastboot_nova.agent import (
    bus,
    domains,
    exports,
    guests,
    hydrate,
    loopdevice,
    memory,
    metrics,
    microvms,
    network,
    observer,
    reboots,
    report,
    resume,
    space,
    sync,
    window,
    worker,
)

LOG = logging.getLogger(__name__)

_SPACE_SECONDS: Final = 20.0
#: Of one answer, which is then below a megabyte.
_EXTENTS: Final = 25_000


class Agent:
    """The parts that need a host whose repository is known.

    :param conf: the configuration.
    :param name: of this host.
    :param served: the host, opened for writing.
    :param told: counters.
    :param ways: the export and its shield.
    :param gid: QEMU's group.
    """

    def __init__(self, conf: Any, name: str, served: host.Host,
                 told: metrics.Metrics, ways: exports.Exports,
                 gid: int) -> None:
        group = conf.agent
        env = base.Environment(conf)
        self._name = name
        self._host = served
        self._told = told
        self._socket = env.shield_socket
        self._space = space.Space(served, group.min_free, self._evicted,
                                  group.quota)
        self._guests = guests.Guests(
            served, wait=group.acquire_wait, grace=group.lease_grace,
            reachable=lambda: ways.healthy,
            loops=loopdevice.LoopDevices(gid) if group.loop else None)
        self._sync = sync.Sync(
            served, self._space, told, times=window.Window(group.window),
            interval=group.interval, jitter=group.jitter,
            rate=group.sync_rate, eager=group.thaw == 'eager',
            evicted=self._evicted, changed=self._changed)
        self._hydrator = hydrate.Hydrator(
            served, self._space, told, policy=group.hydrate,
            rate=lambda: network.rate(group.hydrate_rate, env.locations()),
            delay=group.hydrate_delay,
            changed=self._changed,
            busy=lambda: bool(self._guests.coming))
        self._microvms = microvms.Microvms(
            served.path / 'microvms', served.mirror, self._space, told,
            enabled=conf.microvm.enabled,
            opened=lambda path: mirror.Mirror(
                path, env.open_microvm_replicas(), env.trust()),
            platforms=domains.Domains(group.libvirt_uri).platforms,
            times=window.Window(group.window), limit=self._sync.limit,
            interval=group.interval, jitter=group.jitter,
            lanes=conf.microvm.lanes, disk=conf.microvm.disk << 30,
            memory=conf.microvm.memory << 20,
            busy=lambda: bool(self._guests.coming), changed=self._changed)
        self._space.beside = self._microvms
        self._memory = memory.Memory(
            served, group.lock_memory, group.lock_images,
            self._space.is_roomy)
        self._resumer = resume.Resumer(
            group.libvirt_uri, [served.path / 'volumes', self._socket],
            lambda: ways.healthy, told.resumed.inc)
        self._reboots = reboots.Reboots(
            group.libvirt_uri, told.rebooted.inc, self._microvms.fate)
        self._lazy = domains.Lazy(group.libvirt_uri, self._socket,
                                  self._changed)
        self._bus: bus.Bus | None = None
        if group.messaging:
            self._bus = bus.Bus(conf, name, bus.Endpoint(
                self._sync, self._microvms))
        self._observer = observer.Observer(
            name, served, group.observe if self._bus else 0, self._observed)
        self.reporter = report.Reporter(
            name, served, self._sync, self._hydrator, self._space, told,
            lazy=lambda: self._lazy.guests, send=self._send,
            interval=group.report_interval, beside=self._microvms)
        self._workers = [
            worker.Worker('space', self._space.keep, _SPACE_SECONDS),
            worker.Worker('leases', self._reconcile, group.lease_interval),
            self._sync.worker, self._hydrator.worker, self.reporter.worker,
            self._observer.worker, *self._microvms.workers]
        #: They start only if there is libvirt's module.
        self._lookers: list[
            reboots.Reboots | domains.Lazy | resume.Resumer
        ] = [self._reboots, self._lazy]
        if group.resume_guests:
            self._lookers.append(self._resumer)
        if group.lock_memory:
            self._workers.append(self._memory.worker)
        told.follow('locked_bytes', 'Boot sets locked in memory',
                    lambda: self._memory.bytes)
        told.follow('lazy_guests', 'Guests that need the export',
                    lambda: len(self._lazy.guests or ()))
        told.follow('hydrate_left_bytes', 'Bytes that the image lacks which '
                    'is being completed', lambda: self._hydrator.left)
        told.follow('version_lag', 'Versions of the repository that this '
                    'host is behind', lambda: max(
                        0, self._sync.heard - self._sync.version))

    def start(self) -> None:
        """Begin to work."""
        for looker in self._lookers:
            looker.start()
        for one in self._workers:
            one.start()
        if self._bus:
            self._bus.start()

    def close(self, deadline: float) -> None:
        """End, until a moment of :func:`time.monotonic`.

        What has not ended by then is left as a crash would leave it.
        """
        if self._bus:
            self._bus.stop()
        workers = [*self._workers, *(one.worker for one in self._lookers)]
        for one in workers:
            one.stop()
        self._sync.close()
        self._guests.close()
        # Not "all(...)" of a generator: each is waited for.
        ended = [one.join(deadline) for one in workers]
        self._memory.close()
        if all(ended):
            closer = threading.Thread(target=self._host.close, daemon=True)
            closer.start()
            closer.join(max(0.0, deadline - time.monotonic()))

    # What the local API asks

    def ensure(self, image_id: str, offset: int, length: int) -> None:
        """Serve a guest's miss."""
        begun = time.monotonic()
        observed = self._observer.is_open(image_id)
        try:
            try:
                self._host.ensure(image_id, offset, length, observed)
            except exception.NoSpace:
                # A guest waits: more important than what is only kept.
                self._space.make(length)
                self._host.ensure(image_id, offset, length, observed)
        except BaseException:
            self._told.ensures.labels('error').inc()
            raise
        self._observer.note(image_id, offset, length)
        self._told.ensures.labels('ok').inc()
        self._told.ensure_bytes.inc(length)
        self._told.ensure_seconds.observe(time.monotonic() - begun)

    def acquire(self, image_id: str, holder: str, file: str,
                removed: bool) -> dict[str, Any]:
        """Lease an image for a guest."""
        try:
            done = self._guests.acquire(image_id, holder, file, removed)
        except exception.FastbootError as error:
            self._miss(image_id, error)
            raise
        self._told.hits.inc()
        self._told.acquire_seconds.observe(done.seconds)
        self._told.thaw_bytes.inc(done.thawed)
        if not done.link.complete:
            self._observer.open(image_id)
            self._hydrator.worker.wake()
        self._changed()
        link = done.link
        return {
            'image': image_id, 'volume': str(link.volume), 'size': link.size,
            'start': link.start, 'virtual_size': link.virtual_size,
            'complete': link.complete and str(link.complete),
            'socket': str(self._socket),
            'loop': done.device and str(done.device),
            'thawed': done.thawed, 'seconds': round(done.seconds, 6)}

    def _miss(self, image_id: str, error: exception.FastbootError) -> None:
        reason = 'error'
        if isinstance(error, guests.NotHereError):
            reason = 'absent'
            self._sync.ask(image_id)
        elif isinstance(error, exception.NotFound):
            reason = 'unknown'
            self._sync.look()
        elif isinstance(error, exception.NoSpace):
            reason = 'no_space'
            self._workers[0].wake()
        elif isinstance(error, exception.Busy):
            reason = 'busy'
        elif isinstance(error, exception.Unavailable):
            reason = 'unavailable'
        self._told.misses.labels(reason).inc()
        LOG.info('image %s is not served to a guest: %s', image_id, error)

    def release(self, image_id: str, holder: str, file: str) -> None:
        """End a guest's lease."""
        self._guests.release(image_id, holder, file)
        self._changed()

    def prepare(self, image_id: str) -> None:
        """Bring a whole image here, in the background.

        :raises NotFound: the image is not registered.
        """
        image = self._host.image(image_id)
        if image.image_id != image_id:
            raise exception.NotFound(f'no image has the id {image_id}')

        def complete(found: Any) -> None:
            self._host.thaw(found)
            self._host.open_volume(found.domain).touch(image_id)
            self._hydrator.ask(found)

        self._sync.ask(image_id, complete)

    def differences(self, image_id: str, base: pathlib.Path | str,
                    ) -> list[tuple[int, int]]:
        """See :meth:`host.Host.differences`.

        :raises Unavailable: they are too many to be told.
        """
        found = self._host.differences(image_id, base)
        if len(found) > _EXTENTS:
            raise exception.Unavailable(
                f'{base} and image {image_id} differ in {len(found)} '
                f'places; {_EXTENTS} are told at most')
        return found

    def sync(self) -> None:
        """Follow the repository now."""
        self._sync.everything()
        self._microvms.everything()

    def images(self) -> dict[str, Any]:
        """All images, and how far each is."""
        return {'images': self.reporter.images(),
                'version': self._sync.version}

    def microvms(self) -> dict[str, Any]:
        """All µVMs that this host can run."""
        return {'microvms': self._microvms.rows()}

    def take(self, image_id: str, holder: str) -> dict[str, Any]:
        """See :meth:`microvms.Microvms.take`.

        :raises NotFound: there is none here, or nobody would start the
            guest again when it reboots; and why.
        """
        self._reboots.follow(holder)
        return self._microvms.take(
            image_id, holder, '' if self._reboots.watching else
            'libvirt tells no reboots of guests to this host\'s agent')

    def dress(self, token: str, xml: str) -> None:
        """See :meth:`microvms.Microvms.dress`."""
        self._microvms.dress(token, xml)

    def give_back(self, token: str, outcome: str, phase: str, reason: str,
                  seconds: dict[str, float]) -> None:
        """See :meth:`microvms.Microvms.give_back`."""
        self._microvms.give_back(token, outcome, phase, reason, seconds)

    def leave(self, holder: str) -> None:
        """See :meth:`reboots.Reboots.leave`."""
        self._reboots.leave(holder)

    def status(self) -> dict[str, Any]:
        """The state of the parts; cheap."""
        last = self.reporter.last
        return {
            'state': 'serving', 'version': self._sync.version,
            'heard': self._sync.heard, 'repository': self._sync.error or 'ok',
            'messaging': self._bus.connected if self._bus else None,
            'locked_bytes': self._memory.bytes,
            'path': str(self._host.path),
            'free_bytes': self._space.free(),
            'lazy_guests': self._lazy.guests,
            'microvms': (self._microvms.reason or self._microvms.error
                         or 'ok'),
            'platforms': self._microvms.platforms,
            'microvm_bytes': self._microvms.held(),
            'hydrate_rate': self._hydrator.rate} | {
                key: last.get(key) for key in (
                    'volume_bytes', 'mirror_bytes')}

    # What the parts tell

    def _evicted(self, image_id: str, freed: int) -> None:
        self._told.evictions.inc()
        self._told.evicted_bytes.inc(max(freed, 0))
        if self._bus:
            self._bus.notify('fastboot.image.evict', {
                'host': self._name, 'image_id': image_id,
                'freed_bytes': freed})
        self._changed()

    def _observed(self, found: dict[str, Any]) -> None:
        self._told.observations.inc()
        if self._bus:
            self._bus.observe(found)

    def _changed(self) -> None:
        self.reporter.worker.wake()

    def _reconcile(self) -> None:
        self._guests.reconcile()

    def _send(self, told: report.Report) -> None:
        if self._bus:
            self._bus.report(told)
