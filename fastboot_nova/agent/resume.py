# SPDX-License-Identifier: Apache-2.0
"""Guests that paused because the export was away: they go on.

With ``error_policy='stop'`` and ``rerror_policy='stop'`` a write or read that
fails pauses the guest. The first
resume after an outage often pauses again, because QEMU connects anew only
then; so it is tried until the guest runs.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging

from fastboot_nova import hold
from fastboot_nova.agent import domains, worker
from fastboot_nova.agent.domains import libvirt

LOG = logging.getLogger(__name__)

_INTERVAL: Final = 2.0
#: Resumes of one guest in a row, and seconds between them.
_TRIES: Final = 8
_PAUSE: Final = 0.25
#: Longest wait before a guest is tried again that pauses each time.
_LONGEST: Final = 60.0


class Resumer:
    """Looks for paused guests.

    :param uri: of libvirt.
    :param places: paths: a guest with one below these is ours.
    :param reachable: whether the export answers.
    :param resumed: called for each guest that runs again.
    """

    def __init__(self, uri: str, places: list[pathlib.Path],
                 reachable: Callable[[], bool],
                 resumed: Callable[[], None]) -> None:
        self._domains = domains.Domains(uri)
        self._places = places
        self._reachable = reachable
        self._resumed = resumed
        #: By guest: tries in vain, and when to try again (monotonic).
        self._failures: dict[str, tuple[int, float]] = {}
        self.worker = worker.Worker('resume', self._step, _INTERVAL)

    def start(self) -> None:
        """Begin, if there is libvirt's module."""
        if libvirt is None:
            LOG.warning('libvirt\'s Python module is not installed: guests '
                        'that pause must be resumed by hand')
            return
        self.worker.start()

    def _step(self) -> None:
        if not self._reachable():
            return
        try:
            self.look()
        except libvirt.libvirtError as error:
            LOG.debug('libvirt: %s', error)

    def look(self) -> None:
        """Resume the guests that wait for it.

        :raises libvirt.libvirtError: libvirt does not answer.
        """
        waiting = {
            guest.UUIDString(): guest for guest in self._domains.listed(
                libvirt.VIR_CONNECT_LIST_DOMAINS_PAUSED)
            if self._is_ours(guest)}
        self._failures = {key: value for key, value in self._failures.items()
                          if key in waiting}
        for key, guest in waiting.items():
            failures, moment = self._failures.get(key, (0, 0.0))
            if time.monotonic() < moment:
                continue
            if self._resume(guest):
                self._failures.pop(key, None)
                LOG.warning('guest %s had paused, and runs again',
                            guest.name())
                self._resumed()
            else:
                self._failures[key] = failures + 1, time.monotonic() + min(
                    _INTERVAL * 2 ** failures, _LONGEST)

    def _is_ours(self, guest: Any) -> bool:
        try:
            if guest.state() != hold.WAITING:
                return False
            # Its own disk is full: resuming would not help.
            if libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE in (
                    guest.diskErrors().values()):
                return False
            tree = domains.description(guest)
        except libvirt.libvirtError:
            return False  # it ended meanwhile
        if hold.is_marked(tree):
            return False
        names = [value for source in tree.iterfind('.//disk//source')
                 for element in (source, *source.findall('host'))
                 for value in element.attrib.values()]
        return any(pathlib.PurePath(name).is_relative_to(place)
                   for name in names for place in self._places)

    def _resume(self, guest: Any) -> bool:
        with contextlib.suppress(libvirt.libvirtError):
            for _ in range(_TRIES):
                guest.resume()
                if hold.is_marked(domains.description(guest)):
                    # Its owner paused it while this was decided.
                    guest.suspend()
                    return False
                if not self.worker.pause(_PAUSE):
                    return False
                state = guest.state()
                if state != hold.WAITING:
                    return bool(state[0] != libvirt.VIR_DOMAIN_PAUSED)
        return False
