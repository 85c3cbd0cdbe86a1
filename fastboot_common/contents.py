# SPDX-License-Identifier: Apache-2.0
"""The bytes of a published image, a page here and a page there.

For those who want some pages of it once, in any order: from the repository
itself, or from a host's mirror of it.
"""

import collections
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from fastboot_common import blocks, extents, manifest, pack
from fastboot_common.blocks import PAGE

#: Plain frames that stay in memory (:data:`pack.FRAME` bytes each).
_FRAMES: Final = 16

_Plain = npt.NDArray[np.uint8]


class Source(Protocol):
    """A repository, or a mirror of one."""

    def read_manifest(self, digest: str) -> manifest.Manifest: ...

    def pack_index(self, ref: pack.PackRef) -> pack.PackIndex: ...

    def pack_plain(self, index: pack.PackIndex, number: int) -> bytes: ...


class Contents:
    """One image. Use from one thread."""

    def __init__(self, source: Source,
                 image: manifest.Manifest) -> None:
        self._source = source
        self._image = image
        self._pages = image.block_size // PAGE
        self._indexes: dict[int, pack.PackIndex] = {}
        self._frames: collections.OrderedDict[
            tuple[int, int], _Plain] = collections.OrderedDict()

    def pages(self, numbers: blocks.Blocks) -> bytes:
        """Pages of the disk, one behind the other; zeros where none are.

        :param numbers: of pages, in any order.
        :raises Corrupt: the repository is damaged.
        """
        found = np.zeros((len(numbers), PAGE), np.uint8)
        wanted, inner = np.divmod(numbers, self._pages)
        # Pages that follow each other are mostly of one block.
        unique, where = np.unique(wanted, return_inverse=True)
        known, packs, ordinals = extents.locate(self._image.extents, unique)
        place = np.full((len(unique), 2), -1, np.int64)
        place[np.searchsorted(unique, known)] = np.column_stack(
            (packs, ordinals))
        packs, ordinals = place[where].T
        for position in np.unique(packs[packs >= 0]).tolist():
            rows = np.flatnonzero(packs == position)
            index = self._index(position)
            frames = index.frame_of(ordinals[rows])
            for frame in np.unique(frames).tolist():
                mine = rows[frames == frame]
                first = int(index.first[frame])
                found[mine] = self._plain(position, frame)[
                    (ordinals[mine] - first) * self._pages + inner[mine]]
        return found.tobytes()

    def _index(self, position: int) -> pack.PackIndex:
        if position not in self._indexes:
            self._indexes[position] = self._source.pack_index(
                self._image.packs[position])
        return self._indexes[position]

    def _plain(self, position: int, frame: int) -> Any:
        """The pages of a frame."""
        key = position, frame
        if key not in self._frames:
            index = self._index(position)
            plain = self._source.pack_plain(index, frame)
            self._frames[key] = np.frombuffer(plain, np.uint8).reshape(
                -1, PAGE)
            if len(self._frames) > _FRAMES:
                self._frames.popitem(last=False)
        return self._frames[key]
