# SPDX-License-Identifier: Apache-2.0
"""Where a disk differs from an image, told by the image's digests.

Nova sets a server that comes off the shelf on the base of its first image
again, and compares both to find what its disk must keep. Of an image that
is not all here, that would bring all of it over the network. Digests tell
the same, and no block of the image is read.
"""

import errno
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from fastboot_common import blocks, exception, extents, manifest, pack

Digests = npt.NDArray[np.uint8]
#: Of a range of blocks (first, count), a digest each; zeros have none.
Window = Callable[[int, int], Digests]

#: Blocks whose digests are compared at once.
_PIECE: Final = 4096


def find(one: Window, other: Window, count: int,
         ) -> Iterator[tuple[int, int]]:
    """The blocks that are not alike in both, as runs (first, count).

    :param count: of the blocks of the longer one.
    """
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        unlike = (one(first, size) != other(first, size)).any(axis=1)
        yield from blocks.runs(first + np.flatnonzero(unlike))


def of_image(image: manifest.Manifest,
             index: Callable[[pack.PackRef], pack.PackIndex]) -> Window:
    """The digests of an image's blocks.

    :param index: gives the index of a pack.
    """
    def window(first: int, count: int) -> Digests:
        found = _none(count)
        numbers, packs, ordinals = extents.expand(
            extents.clip(image.extents, first, count))
        for at in np.unique(packs).tolist():
            here = packs == at
            found[numbers[here] - first] = index(
                image.packs[at]).digests[ordinals[here]].view(
                    np.uint8).reshape(-1, blocks.DIGEST)
        return found

    return window


def of_file(fd: int, block_size: int) -> Window:
    """The digests of a raw file's blocks; behind its end are zeros."""
    def window(first: int, count: int) -> Digests:
        found = _none(count)
        begin, end = first * block_size, (first + count) * block_size
        if not _has_data(fd, begin, end):
            return found
        data = blocks.read_exactly(fd, end - begin, begin)
        which = blocks.nonzero(data, block_size)
        if which.any():
            found[which] = np.frombuffer(b''.join(blocks.digests(
                data, block_size, which)), np.uint8).reshape(
                    -1, blocks.DIGEST)
        return found

    return window


def open_base(path: pathlib.Path) -> int:
    """Open what a disk lies on, to read it.

    :raises NotFound: no such file can be opened.
    :raises Invalid: it is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                     | os.O_NONBLOCK)
    except OSError as error:
        raise exception.NotFound(f'{path}: {error.strerror}') from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise exception.Invalid(f'{path} is no file')
    return fd


def _has_data(fd: int, begin: int, end: int) -> bool:
    try:
        return os.lseek(fd, begin, os.SEEK_DATA) < end
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False  # nothing but a hole, or behind the end


def _none(count: int) -> Digests:
    return np.zeros((count, blocks.DIGEST), np.uint8)
