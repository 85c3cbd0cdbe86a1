# SPDX-License-Identifier: Apache-2.0
"""The guests of this host, as libvirt knows them."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, Final
from xml.etree import ElementTree

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_common.microvm.key import Platform
from fastboot_nova.agent import worker
from fastboot_nova.microvm import compatible

try:
    import libvirt
except ImportError:  # not every host that serves images runs libvirt
    libvirt = None

#: Others take libvirt from here.
__all__ = ['Domains', 'Lazy', 'description', 'libvirt']

LOG = logging.getLogger(__name__)

_INTERVAL: Final = 30.0
#: Guests that are named at most; a report has its bounds.
_NAMED: Final = 1000


class Domains:
    """One libvirt. A connection that breaks is made anew.

    :param uri: of libvirt.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: Any = None

    def listed(self, flags: int) -> list[Any]:
        """The guests that these flags of listAllDomains choose.

        :raises libvirt.libvirtError: libvirt does not answer.
        """
        return list(self._ask(lambda known: known.listAllDomains(flags)))

    def platforms(self) -> list[Platform]:
        """What this host is, now.

        :raises Unavailable: libvirt does not answer, or its module is
            missing.
        """
        if libvirt is None:
            raise exception.Unavailable(
                "libvirt's Python module is not installed")
        try:
            found: list[Platform] = self._ask(compatible.platforms)
            return found
        except libvirt.libvirtError as error:
            raise exception.Unavailable(
                f'libvirt at {self._uri}: {error}') from error

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            if self._connection is None:
                # Errors come as exceptions; printing them too is its
                # default.
                libvirt.registerErrorHandler(
                    lambda context, error: None, None)
                self._connection = libvirt.open(self._uri)
            return question(self._connection)
        except libvirt.libvirtError:
            connection, self._connection = self._connection, None
            with contextlib.suppress(libvirt.libvirtError):
                if connection:
                    connection.close()
            raise


def description(guest: Any) -> ElementTree.Element:
    """A guest as it runs: its XML.

    :raises libvirt.libvirtError: it ended, or libvirt does not answer.
    """
    # libvirt's own words, not a stranger's.
    return ElementTree.fromstring(guest.XMLDesc())  # noqa: S314


class Lazy:
    """Finds the guests that need the export.

    A guest that was started before its image was complete reads through the
    export for as long as it runs, also when all of the image has come: QEMU
    has opened its disk so. Its next start takes the complete name.

    :param uri: of libvirt.
    :param socket: where guests reach the export.
    :param changed: called when they are others.
    """

    def __init__(self, uri: str, socket: pathlib.Path,
                 changed: Callable[[], None]) -> None:
        self._domains = Domains(uri)
        self._socket = str(socket)
        self._changed = changed
        #: Their ids, ascending; None: nobody knows.
        self.guests: list[str] | None = None
        self.worker = worker.Worker('lazy', self._step, _INTERVAL)

    def start(self) -> None:
        """Begin, if there is libvirt's module."""
        if libvirt is not None:
            self.worker.start()

    def _step(self) -> None:
        try:
            found = self._look()
        except libvirt.libvirtError as error:
            LOG.debug('libvirt: %s', error)
            found = None
        if found != self.guests:
            self.guests = found
            self._changed()

    def _look(self) -> list[str]:
        return sorted(
            guest.UUIDString() for guest in self._domains.listed(
                libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            if self._is_lazy(guest))[:_NAMED]

    def _is_lazy(self, guest: Any) -> bool:
        try:
            tree = description(guest)
        except libvirt.libvirtError:
            return False  # it ended meanwhile
        return any(host.get('socket') == self._socket for host in
                   tree.iterfind(".//disk//source[@protocol='nbd']/host"))
