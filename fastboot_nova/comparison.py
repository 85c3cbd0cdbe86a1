# SPDX-License-Identifier: Apache-2.0
"""Where a disk differs from an image, told by the image's digests.

Nova sets a server that comes off the shelf on the base of its first image
again, and compares both to find what its disk must keep. Of an image that
is not all here, that would bring all of it over the network. Digests tell
the same, and no block of the image is read.
"""

import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from fastboot_common import (
    blocks,
    exception,
    extents,
    files,
    manifest,
    pack,
)

Digests = npt.NDArray[np.uint8]
#: Of a range of blocks (first, count), a digest each; zeros have none.
Window = Callable[[int, int], Digests]

#: Bytes of either that are looked at at once.
_PIECE: Final = 16 << 20


def find(one: Window, other: Window, count: int, block_size: int,
         ) -> Iterator[tuple[int, int]]:
    """The blocks that are not alike in both, as runs (first, count).

    :param count: of the blocks of the longer one.
    """
    piece = _PIECE // block_size
    for first in range(0, count, piece):
        size = min(piece, count - first)
        unlike = (one(first, size) != other(first, size)).any(axis=1)
        yield from blocks.runs(first + np.flatnonzero(unlike))


def of_image(image: manifest.Manifest,
             index: Callable[[pack.PackRef], pack.PackIndex]) -> Window:
    """The digests of an image's blocks.

    :param index: gives the index of a pack.
    """
    # A mirror keeps those that guests' misses need.
    known: dict[int, pack.PackIndex] = {}

    def window(first: int, count: int) -> Digests:
        found = _none(count)
        numbers, packs, ordinals = extents.expand(
            extents.clip(image.extents, first, count))
        for at in np.unique(packs).tolist():
            if at not in known:
                known[at] = index(image.packs[at])
            here = packs == at
            found[numbers[here] - first] = known[at].digests[
                ordinals[here]].view(np.uint8).reshape(-1, blocks.DIGEST)
        return found

    return window


def of_file(fd: int, block_size: int) -> Window:
    """The digests of a raw file's blocks; behind its end are zeros."""
    def window(first: int, count: int) -> Digests:
        found = _none(count)
        begin, end = first * block_size, (first + count) * block_size
        if not any(files.data_ranges(fd, begin, end)):
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
    :raises Invalid: it is something else, or not everybody may read it: who
        asks may have less rights than we.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                     | os.O_NONBLOCK)
    except OSError as error:
        raise exception.NotFound(f'{path}: {error.strerror}') from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) and mode & stat.S_IROTH):
        os.close(fd)
        raise exception.Invalid(f'{path} is no file for everybody')
    return fd


def _none(count: int) -> Digests:
    return np.zeros((count, blocks.DIGEST), np.uint8)
