# SPDX-License-Identifier: Apache-2.0
"""Blocks of a disk: finding the data, telling zeros, hashing."""

import errno
import hashlib
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from fastboot_common import exception

BLOCK_SIZES: Final = (4096, 8192, 16384, 32768, 65536)
#: Chosen by measurement: doc/source/reference/block-size.rst.
DEFAULT_BLOCK_SIZE: Final = 16384
DIGEST: Final = 32
#: Bytes of a page of memory. No block is smaller.
PAGE: Final = 4096
#: Bytes that are looked at at once.
_PIECE: Final = 1 << 20

Blocks = npt.NDArray[np.int64]


def validate_block_size(size: int) -> int:
    """Return `size` (bytes) if a repository may have it.

    :raises Invalid: it is no power of two from 4 KiB to 64 KiB.
    """
    if size not in BLOCK_SIZES:
        raise exception.Invalid(
            f'block size {size!r} is not one of {BLOCK_SIZES}'
        )
    return size


def read_exactly(fd: int, length: int, offset: int) -> bytearray:
    """`length` bytes at `offset`; what lies behind the end is zeros."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    done = 0
    while done < length:
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return buffer


def write_exactly(fd: int, data: bytes | bytearray | memoryview,
                  offset: int) -> None:
    """All of `data` at `offset`.

    :raises NoSpace: the device is full.
    """
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view = view[count:]
            offset += count
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise exception.NoSpace(
                f'writing {len(view)} bytes at {offset}: {error.strerror}'
            ) from error
        raise


def are_zeros(fd: int, start: int, end: int) -> bool:
    """Whether no byte from `start` to `end` is set."""
    return not any(
        any(read_exactly(fd, min(_PIECE, end - at), at))
        for at in range(start, end, _PIECE))


def nonzero(data: bytes | bytearray | memoryview,
            block_size: int) -> npt.NDArray[np.bool_]:
    """For each block of `data` (whole blocks), whether it has a byte set."""
    words = np.frombuffer(data, dtype=np.uint64)
    return np.asarray(words.reshape(-1, block_size // 8).any(axis=1))


def digests(data: bytes | bytearray | memoryview, block_size: int,
            which: npt.NDArray[np.bool_]) -> list[bytes]:
    """SHA-256 of the blocks of `data` that `which` chooses, in order."""
    view = memoryview(data)
    return [
        hashlib.sha256(view[start:start + block_size]).digest()
        for start in (np.flatnonzero(which) * block_size).tolist()
    ]


def runs(blocks: Blocks) -> list[tuple[int, int]]:
    """Consecutive numbers of `blocks`, in its order: (first, count)."""
    if not len(blocks):
        return []
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(blocks)]))
    return list(zip(blocks[starts].tolist(), (ends - starts).tolist(),
                    strict=True))
