# SPDX-License-Identifier: Apache-2.0
"""Bounding the space that is taken: images without guests go, least recently
used first."""

import os
import sys
import threading
from typing import Final, Protocol

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_nova import host

LOG = logging.getLogger(__name__)

#: What can wait begins only with so much more than must be free.
_MARGIN: Final = 1.25


class Beside(Protocol):
    """What else a host keeps there, and can do without."""

    def held(self) -> int: ...

    def make_room(self, wanted: int) -> int: ...


class Space:
    """The file system of a host's volumes.

    :param served: the host.
    :param min_free: bytes to keep free.
    :param evicted: told of each image that went.
    :param quota: bytes that volumes and mirror may take; 0: any.
    """

    def __init__(self, served: host.Host, min_free: int,
                 evicted: host.Evicted, quota: int = 0) -> None:
        self._host = served
        self._min_free = min_free
        self._evicted = evicted
        self._quota = quota
        self._lock = threading.Lock()
        #: Goes after the images, which cost less to have again.
        self.beside: Beside | None = None
        self._short = False

    def free(self) -> int:
        """Bytes that can still be written."""
        found = os.statvfs(self._host.path)
        return found.f_bavail * found.f_frsize

    def is_roomy(self, count: int) -> bool:
        """Whether `count` bytes may come that nobody waits for."""
        return (self.free() - count > self._min_free * _MARGIN
                and self._above() + count <= 0)

    def _above(self) -> int:
        """Bytes more than the quota; below 0: they may still come."""
        if not self._quota:
            return -sys.maxsize
        held = sum(self._host.held())
        if self.beside:
            held += self.beside.held()
        return held - self._quota

    def _evict(self, wanted: int) -> int:
        freed = self._host.make_room(wanted, self._evicted)
        if freed < wanted and self.beside:
            freed += self.beside.make_room(wanted - freed)
        return freed

    def keep(self) -> None:
        """Evict until there is enough free space, or nothing to evict."""
        with self._lock:
            wanted = max(self._min_free - self.free(), self._above())
            if wanted > 0:
                freed = self._evict(wanted)
                short = freed < wanted
                if short and not self._short:
                    LOG.warning(
                        '%s: %d bytes more should be free, and no image is '
                        'without guests or pins', self._host.path,
                        wanted - freed)
                self._short = short

    def make(self, count: int = 1) -> None:
        """Free at least `count` bytes, for something that found no room."""
        with self._lock:
            self._evict(count)

    def demand(self) -> None:
        """Have as much free as there must be.

        :raises NoSpace: there is not.
        """
        self.keep()
        if self.free() < self._min_free:
            raise exception.NoSpace(
                f'{self._host.path}: only {self.free() >> 20} MiB are free, '
                f'{self._min_free >> 20} must stay ([agent] min_free)')
        if self._above() > 0:
            raise exception.NoSpace(
                f'{self._host.path}: {self._above() >> 20} MiB more than '
                f'[agent] quota are taken')
