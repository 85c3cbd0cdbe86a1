# SPDX-License-Identifier: Apache-2.0
"""Guests that were resumed and reboot from inside: they start as defined.

The running machine of such a server is the template's and ends with a
reboot (``on_reboot`` is ``destroy``). libvirt says that it shut down, as of a
guest that switched itself off; only QEMU knows why (libvirt 9.0, QEMU 7.2).
Nova waits 15 seconds before it takes a server that ended for a stopped one,
and forgets that if it runs again by then.

Guests whose resume fails may end in the same way: a machine that was loaded
wrong resets itself. Those are nova-compute's, which boots them from another
disk under the same name.

And Nova may be about to switch off, move or delete a guest that reboots just
then. It says so (:meth:`Reboots.leave`), and the guest stays as it is.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging

from fastboot_nova.agent import worker
from fastboot_nova.agent.domains import libvirt
from fastboot_nova.microvm.pool import Fate

try:
    import libvirt_qemu

    from fastboot_nova.microvm import connection as connections
except ImportError:
    libvirt_qemu = None

LOG = logging.getLogger(__name__)

_INTERVAL: Final = 2.0
_SOON: Final = 0.25
#: Within this after its end, a guest is started; later Nova says it is
#: stopped, and so it shall be.
_PATIENCE: Final = 12.0


class Reboots:
    """Starts them.

    :param uri: of libvirt.
    :param started: called for each guest that was started.
    :param fate: how the resume of the guest with a UUID goes.
    """

    def __init__(self, uri: str, started: Callable[[], None],
                 fate: Callable[[str], Fate] = lambda uuid: Fate.NONE,
                 ) -> None:
        self._uri = uri
        self._started = started
        self._fate = fate
        self._connection: Any = None
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        #: Until when the guests that ended may be started (monotonic).
        self._due: dict[str, float] = {}
        #: Until when no reboot counts of guests that Nova sees to.
        self._left: dict[str, float] = {}
        #: Held while a guest is started, or left to Nova.
        self._mutex = threading.Lock()
        self.worker = worker.Worker('reboots', self._step, _INTERVAL)

    def start(self) -> None:
        """Begin, if there are libvirt's modules."""
        if libvirt_qemu is not None:
            # Before anybody opens a connection, says libvirt.
            connections.run_events()
            self.worker.start()

    @property
    def watching(self) -> bool:
        """Whether a reboot would be seen now."""
        return self._connection is not None

    def leave(self, uuid: str) -> None:
        """Start a guest no more: Nova is about to end it.

        One that is being started then runs when this returns.
        """
        now = time.monotonic()
        with self._mutex:
            self._due.pop(uuid, None)
            for one, until in list(self._left.items()):
                if until <= now:
                    self._left.pop(one, None)
            self._left[uuid] = now + _PATIENCE

    def follow(self, uuid: str) -> None:
        """See to the reboots of a guest that is about to be resumed."""
        # Without the mutex: it waits for no other guest's start.
        self._left.pop(uuid, None)

    def _step(self) -> None:
        try:
            self._watch()
            while not self.worker.stopping():
                self._hear()
                if not self._due:
                    return
                for uuid in list(self._due):
                    with self._mutex:
                        if uuid in self._due:
                            self._try(uuid)
                self.worker.pause(_SOON)
        except libvirt.libvirtError as error:
            LOG.debug('libvirt: %s', error)
            self._forget()

    def _watch(self) -> None:
        """Be told of ends by libvirt.

        :raises libvirt.libvirtError: it does not answer.
        """
        if self._connection is not None and self._connection.isAlive():
            return
        self._forget()
        connection = libvirt.open(self._uri)
        with contextlib.suppress(libvirt.libvirtError):
            # Not all drivers know it.
            connection.setKeepAlive(5, 3)
        libvirt_qemu.qemuMonitorEventRegister(
            connection, None, 'SHUTDOWN', self._ended, None)
        self._connection = connection

    def _forget(self) -> None:
        connection, self._connection = self._connection, None
        with contextlib.suppress(libvirt.libvirtError):
            if connection is not None:
                connection.close()

    def _ended(self, connection: Any, guest: Any, event: str, seconds: int,
               micros: int, details: str, opaque: Any) -> None:
        """Called by libvirt's thread, which must not wait for libvirt."""
        with contextlib.suppress(ValueError):
            if json.loads(details or '{}').get('reason') == 'guest-reset':
                self._heard.put(guest.UUIDString())
                self.worker.wake()

    def _hear(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                uuid, now = self._heard.get_nowait(), time.monotonic()
                with self._mutex:
                    if self._left.get(uuid, now) <= now:
                        self._due[uuid] = now + _PATIENCE

    def _try(self, uuid: str) -> None:
        """Start a guest, unless it is still ending."""
        fate = self._fate(uuid)
        if fate is Fate.FAILED:
            del self._due[uuid]
            return
        if fate is Fate.COMING:
            self._wait(uuid, 'its resume is not over')
            return
        try:
            guest = self._connection.lookupByUUIDString(uuid)
            if guest.isActive():
                self._wait(uuid, f'{guest.name()} does not end')
                return
            guest.create()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                del self._due[uuid]  # deleted, or never to be kept
                return
            if not self._connection.isAlive():
                raise
            self._wait(uuid, str(error))
        else:
            del self._due[uuid]
            LOG.info('guest %s rebooted, and runs on its own machine now',
                     guest.name())
            self._started()

    def _wait(self, uuid: str, reason: str) -> None:
        if time.monotonic() > self._due[uuid]:
            del self._due[uuid]
            LOG.warning('guest %s rebooted, but was not started: %s; Nova '
                        'has it stopped', uuid, reason)
