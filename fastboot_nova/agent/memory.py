# SPDX-License-Identifier: Apache-2.0
"""Boot sets locked in memory: never read from disk, however scarce it is.

The clusters of the volume are mapped and locked, so their pages stay in the
page cache, where QEMU finds them. A cluster that several images share is
locked once.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Final

import numpy as np
from oslo_log import log as logging

from fastboot_common import blocks, exception, journal, volume
from fastboot_nova import host
from fastboot_nova.agent import worker

LOG = logging.getLogger(__name__)

_INTERVAL: Final = 60.0
_FAILED: Final = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
                       ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

#: A volume's file, and a run of it: start and length (bytes).
_Run = tuple[str, int, int]


class Memory:
    """Locks boot sets, the first images first, as far as a budget goes.

    :param served: the host.
    :param budget: bytes.
    :param images: ids; those that are pinned follow.
    :param roomy: whether so many bytes may be written for it.
    """

    def __init__(self, served: host.Host, budget: int, images: list[str],
                 roomy: Callable[[int], bool]) -> None:
        self._host = served
        self._budget = budget
        self._images = images
        self._roomy = roomy
        self._locked: dict[_Run, int] = {}
        self.worker = worker.Worker('memory', self.follow, _INTERVAL)

    @property
    def bytes(self) -> int:
        """What is locked."""
        return sum(length for _, _, length in list(self._locked))

    def follow(self) -> None:
        """Lock what should be locked now, and nothing else."""
        wanted = self._wanted()
        for run in self._locked.keys() - wanted.keys():
            _libc.munmap(self._locked.pop(run), run[2])
        for run in wanted:
            if run not in self._locked:
                self._locked[run] = _lock(*run)

    def close(self) -> None:
        """Unlock all."""
        while self._locked:
            run, address = self._locked.popitem()
            _libc.munmap(address, run[2])

    def _wanted(self) -> dict[_Run, None]:
        taken: dict[str, set[int]] = {}
        wanted: dict[_Run, None] = {}
        left = self._budget
        for image in self._chosen():
            one, clusters = self._clusters(image)
            mine = taken.setdefault(str(one.file), set())
            fresh = np.array([place for place in clusters.tolist()
                              if place not in mine], np.int64)
            if len(fresh) * one.block_size > left:
                LOG.info('image %s is not locked in memory: [agent] '
                         'lock_memory is used up', image.image_id)
                continue
            left -= len(fresh) * one.block_size
            mine.update(fresh.tolist())
            for first, count in blocks.runs(fresh // one.block_size):
                wanted[str(one.file), first * one.block_size,
                       count * one.block_size] = None
        return wanted

    def _chosen(self) -> list[journal.Image]:
        registered = self._host.mirror.state.images
        damaged = self._host.damaged()
        pinned = [name for one in self._host.volumes()
                  for name in one.images() if one.pinned(name)]
        return [registered[name]
                for name in dict.fromkeys([*self._images, *pinned])
                if name in registered
                and registered[name].domain not in damaged
                and self._host.mirror.ready(registered[name])]

    def _clusters(self, image: journal.Image,
                  ) -> tuple[volume.Volume, 'np.typing.NDArray[np.int64]']:
        one = self._host.open_volume(image.domain)
        boot = self._host.mirror.read_manifest(image.manifest).boot
        try:
            if not self._host.is_thawed(image) and self._roomy(
                    len(boot) * one.block_size):
                self._host.thaw(image)
            return one, one.clusters(image.image_id, boot)
        except (exception.NotFound, exception.Invalid, exception.Corrupt):
            return one, np.empty(0, np.int64)


def _lock(file: str, start: int, length: int) -> int:
    """Map a run of a file and lock it.

    :returns: where it is mapped.
    :raises NoSpace: the process may not lock as much.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED,
                             fd, start)
    finally:
        os.close(fd)
    if address == _FAILED:
        raise _refusal(file, length)
    if _libc.mlock(address, length):
        error = _refusal(file, length)
        _libc.munmap(address, length)
        raise error
    return int(address)


def _refusal(file: str, length: int) -> exception.NoSpace:
    words = os.strerror(ctypes.get_errno())
    return exception.NoSpace(
        f'{file}: {length} bytes cannot be locked in memory: {words}; raise '
        f'LimitMEMLOCK of the service, or lower [agent] lock_memory')
