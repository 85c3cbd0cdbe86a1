# SPDX-License-Identifier: Apache-2.0
"""The map of an image: which block lies where in which pack.

Entries that are adjacent in the image and in the pack are one entry, and
zeros have none (VMAR, section 3.3.1).
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastboot_common import exception
from fastboot_common.blocks import Blocks

DTYPE: Final = np.dtype([
    ('block', '<u8'), ('count', '<u4'), ('pack', '<u4'), ('ordinal', '<u4'),
])

Extents = npt.NDArray[Any]


def merge(blocks: Blocks, packs: Blocks, ordinals: Blocks) -> Extents:
    """Extents of single blocks, in any order, each named once."""
    order = np.argsort(blocks, kind='stable')
    return _join(_columns(
        blocks[order], np.ones(len(blocks), np.int64), packs[order],
        ordinals[order]))


def concatenate(parts: list[Extents]) -> Extents:
    """One map of several that have no block in common."""
    if not parts:
        return np.empty(0, DTYPE)
    whole = np.concatenate(parts)
    return _join(whole[np.argsort(whole['block'], kind='stable')])


def _columns(block: Any, count: Any, pack: Any, ordinal: Any) -> Extents:
    result = np.empty(len(block), DTYPE)
    result['block'], result['count'] = block, count
    result['pack'], result['ordinal'] = pack, ordinal
    return result


def _join(extents: Extents) -> Extents:
    if len(extents) < 2:
        return extents
    block = extents['block'].astype(np.int64)
    count = extents['count'].astype(np.int64)
    ordinal = extents['ordinal'].astype(np.int64)
    pack = extents['pack']
    adjacent = (
        (block[1:] == block[:-1] + count[:-1])
        & (pack[1:] == pack[:-1])
        & (ordinal[1:] == ordinal[:-1] + count[:-1])
    )
    starts = np.flatnonzero(np.concatenate(([True], ~adjacent)))
    return _columns(block[starts], np.add.reduceat(count, starts),
                    pack[starts], ordinal[starts])


def validate(extents: Extents, block_count: int,
             pack_blocks: list[int]) -> None:
    """Check a map that came from outside.

    :param block_count: blocks of the image.
    :param pack_blocks: blocks of each pack that the map may name.
    :raises Corrupt: an extent is empty, out of order or out of bounds.
    """
    if not len(extents):
        return
    block, count = extents['block'], extents['count'].astype(np.uint64)
    limit = np.uint64(block_count)
    if (count == 0).any() or (block > limit).any() \
            or (count > limit - block).any():
        raise exception.Corrupt('an extent reaches behind the image')
    if (block[1:] < block[:-1] + count[:-1]).any():
        raise exception.Corrupt('extents overlap or are not sorted')
    if (extents['pack'] >= len(pack_blocks)).any():
        raise exception.Corrupt('an extent names a pack that is not listed')
    room = np.array(pack_blocks, np.uint64)[extents['pack']]
    if (extents['ordinal'] + count > room).any():
        raise exception.Corrupt('an extent reaches behind its pack')


def total(extents: Extents) -> int:
    """The number of blocks that the map covers."""
    return int(extents['count'].sum(dtype=np.int64))


def clip(extents: Extents, first: int, count: int) -> Extents:
    """The part of the map for `count` blocks from `first`."""
    if count < 1:
        return np.empty(0, DTYPE)
    block = extents['block'].astype(np.int64)
    low = int(np.searchsorted(block + extents['count'], first, side='right'))
    high = int(np.searchsorted(block, first + count, side='left'))
    part = extents[low:high].copy()
    if not len(part):
        return part
    starts = part['block'].astype(np.int64)
    ends = np.minimum(starts + part['count'], first + count)
    shift = np.maximum(first - starts, 0)
    return _columns(starts + shift, ends - starts - shift, part['pack'],
                    part['ordinal'] + shift)


def expand(extents: Extents) -> tuple[Blocks, Blocks, Blocks]:
    """Block, pack and ordinal of every single block, in the map's order."""
    count = extents['count'].astype(np.int64)
    inner = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count,
                                               count)
    return (
        np.repeat(extents['block'].astype(np.int64), count) + inner,
        np.repeat(extents['pack'].astype(np.int64), count),
        np.repeat(extents['ordinal'].astype(np.int64), count) + inner,
    )


def locate(extents: Extents, numbers: Blocks) -> tuple[Blocks, Blocks,
                                                       Blocks]:
    """Where single blocks lie; zeros are left out.

    :param numbers: in any order.
    :returns: those of `numbers` that have data, their packs and ordinals.
    """
    if not len(extents):
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    first = extents['block'].astype(np.int64)
    row = np.searchsorted(first, numbers, side='right') - 1
    inside = (row >= 0) & (
        numbers < first[row] + extents['count'][row].astype(np.int64))
    row, numbers = row[inside], numbers[inside]
    return (numbers, extents['pack'][row].astype(np.int64),
            extents['ordinal'][row].astype(np.int64) + numbers - first[row])


def within(extents: Extents, pack: int, first: int, end: int) -> Blocks:
    """The blocks that lie in a pack at ordinals from `first` to `end`."""
    ordinal = extents['ordinal'].astype(np.int64)
    rows = extents[(extents['pack'] == pack) & (ordinal < end)
                   & (ordinal + extents['count'] > first)]
    numbers, _packs, ordinals = expand(rows)
    return numbers[(ordinals >= first) & (ordinals < end)]


def pieces(extents: Extents, limit: int) -> Iterator[Extents]:
    """The map in parts of at most about `limit` blocks, to bound memory."""
    if not len(extents):
        return
    first = int(extents['block'][0])
    end = int(extents['block'][-1]) + int(extents['count'][-1])
    while first < end:
        part = clip(extents, first, limit)
        if len(part):
            yield part
            first += limit
        else:
            # Skip the zeros at once: a sparse image may have terabytes.
            position = int(np.searchsorted(extents['block'], first))
            first = int(extents['block'][position])
