# SPDX-License-Identifier: Apache-2.0
"""Packs: write-once files of compressed blocks. See reference/repository.

The writer is beside the reader, so that the two cannot drift apart.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from fastboot_common import blocks, exception, files

MAGIC: Final = b'FBPACK1\n'
VERSION: Final = 1
#: Plain bytes of a frame: large enough to compress well and to be fetched as
#: one request (Nicolae et al., section 3.3, measured 512 KiB).
FRAME: Final = 512 << 10
#: Bounds what a reader allocates for an index: 1 GiB of 32-byte digests would
#: be a pack of 512 GiB.
INDEX_LIMIT: Final = 256 << 20

_HEADER: Final = struct.Struct('<8sII')
_TRAILER: Final = struct.Struct('<QII32s8s')
_TRAILER_MAGIC: Final = b'FBPACKIX'
FRAME_DTYPE: Final = np.dtype([
    ('offset', '<u8'), ('length', '<u4'), ('blocks', '<u4'),
    ('digest', 'V32'),
])

#: Reads `length` bytes at `offset` of one pack.
Read = Callable[[int, int], bytes]


@dataclasses.dataclass(frozen=True)
class PackRef:
    """What a manifest says of a pack: enough to trust a part of it."""

    digest: str
    size: int
    blocks: int
    index_offset: int
    index_digest: str

    @property
    def index_length(self) -> int:
        """Bytes of the index, without the trailer."""
        return self.size - self.index_offset - _TRAILER.size


class PackIndex:
    """Where the frames of a pack are and what its blocks hash to."""

    def __init__(self, ref: PackRef, data: bytes, block_size: int) -> None:
        """Parse and check an index.

        :param data: the bytes between frames and trailer.
        :raises Corrupt: they are not what `ref` says, or inconsistent.
        """
        self.ref = ref
        self.block_size = block_size
        if hashlib.sha256(data).hexdigest() != ref.index_digest:
            raise exception.Corrupt(f'pack {ref.digest}: index is damaged')
        frames_length = len(data) - ref.blocks * blocks.DIGEST
        count, rest = divmod(frames_length, FRAME_DTYPE.itemsize)
        if frames_length < 0 or rest:
            raise exception.Corrupt(f'pack {ref.digest}: index has no sense')
        self.frames = np.frombuffer(data, FRAME_DTYPE, count)
        self.digests = np.frombuffer(
            data, f'V{blocks.DIGEST}', ref.blocks, frames_length)
        ends = np.cumsum(self.frames['blocks'], dtype=np.int64)
        #: Ordinal of each frame's first block, and one behind the last.
        self.first: npt.NDArray[np.int64] = np.concatenate(([0], ends))
        self._check_frames()

    def _check_frames(self) -> None:
        frames, ref = self.frames, self.ref
        offsets = frames['offset'].astype(np.int64)
        ends = offsets + frames['length']
        bound = FRAME // self.block_size
        sane = (
            int(self.first[-1]) == ref.blocks
            and (not len(frames) or (
                int(offsets[0]) == _HEADER.size
                and int(ends[-1]) == ref.index_offset
                and bool((offsets[1:] == ends[:-1]).all())
                and bool((frames['blocks'] > 0).all())
                and bool((frames['blocks'] <= bound).all())
                and bool((frames['length'] <= 2 * FRAME).all())
            ))
        )
        if not sane:
            raise exception.Corrupt(f'pack {ref.digest}: index has no sense')

    @classmethod
    def load(cls, ref: PackRef, read: Read, block_size: int) -> 'PackIndex':
        """Read the index that a manifest names.

        :raises Corrupt: it is damaged.
        """
        if not 0 <= ref.index_length <= INDEX_LIMIT:
            raise exception.Corrupt(f'pack {ref.digest}: index of '
                                    f'{ref.index_length} bytes')
        return cls(ref, read(ref.index_offset, ref.index_length), block_size)

    def frame_of(self, ordinals: npt.NDArray[np.int64],
                 ) -> npt.NDArray[np.int64]:
        """The frames that hold the blocks with these ordinals."""
        found: npt.NDArray[np.int64] = np.searchsorted(
            self.first, ordinals, side='right') - 1
        return found

    def extent(self, frame: int) -> tuple[int, int]:
        """Offset and length (bytes) of a frame in the pack."""
        row = self.frames[frame]
        return int(row['offset']), int(row['length'])

    def intact(self, frame: int, data: bytes) -> bool:
        """Whether `data` is that frame's compressed bytes."""
        expected: bytes = self.frames[frame]['digest'].tobytes()
        return hashlib.sha256(data).digest() == expected

    def decode(self, frame: int, data: bytes) -> bytes:
        """The plain blocks of a frame.

        :param data: its compressed bytes.
        :raises Corrupt: they fail their digest or do not decompress.
        """
        name = f'pack {self.ref.digest}, frame {frame}'
        if not self.intact(frame, data):
            raise exception.Corrupt(f'{name}: digest does not match')
        length = int(self.frames[frame]['blocks']) * self.block_size
        return decompress(data, length, name)


def read_ref(digest: str, size: int, read: Read) -> tuple[PackRef, int]:
    """The reference to a pack of known digest, from its header and trailer.

    Unproven: the digest is that of the whole pack, which is not read.

    :returns: the reference, and the pack's block size (bytes).
    :raises Corrupt: it is no pack.
    :raises UnknownVersion: it is one of a newer format.
    """
    if size < _HEADER.size + _TRAILER.size:
        raise exception.Corrupt(f'pack {digest}: only {size} bytes')
    magic, version, block_size = _HEADER.unpack(read(0, _HEADER.size))
    if magic != MAGIC:
        raise exception.Corrupt(f'pack {digest}: not a pack')
    if version != VERSION:
        raise exception.UnknownVersion(f'pack {digest}: version {version}')
    if block_size not in blocks.BLOCK_SIZES:
        raise exception.Corrupt(f'pack {digest}: block size {block_size}')
    offset, _frames, count, index_digest, end = _TRAILER.unpack(
        read(size - _TRAILER.size, _TRAILER.size))
    if end != _TRAILER_MAGIC or offset > size - _TRAILER.size:
        raise exception.Corrupt(f'pack {digest}: trailer is damaged')
    ref = PackRef(digest, size, count, offset, index_digest.hex())
    return ref, block_size


_local = threading.local()


def decompress(data: bytes | memoryview, length: int, what: str) -> bytes:
    """A zstd frame's plain bytes, which must be `length`.

    :param what: named in errors.
    :raises Corrupt: it is no frame, or one of another length.
    """
    try:
        # What the frame claims is allocated, whatever limit is given.
        if zstandard.frame_content_size(data) not in (-1, length):
            raise exception.Corrupt(f'{what}: not of {length} plain bytes')
        plain: bytes = _decompressor().decompress(
            data, max_output_size=max(length, 1))
    except zstandard.ZstdError as error:
        raise exception.Corrupt(f'{what}: {error}') from error
    if len(plain) != length:
        raise exception.Corrupt(f'{what}: {len(plain)} plain bytes')
    return plain


def _decompressor() -> Any:
    # One a thread: python-zstandard's objects are not thread-safe.
    if not hasattr(_local, 'decompressor'):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor


def _compress(data: bytes, level: int) -> tuple[bytes, bytes]:
    compressors = _local.__dict__.setdefault('compressors', {})
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(level=level)
    packed: bytes = compressors[level].compress(data)
    return packed, hashlib.sha256(packed).digest()


class PackWriter:
    """Writes one pack to a file, compressing on a pool of threads.

    Memory is bounded: at most `ahead` frames wait for the pool.
    """

    def __init__(self, directory: pathlib.Path, block_size: int, level: int,
                 pool: concurrent.futures.Executor, ahead: int = 8) -> None:
        """Begin a pack.

        :param directory: where the file is made, under a temporary name.
        :param level: of zstd.
        """
        self._block_size = block_size
        self._level = level
        self._pool = pool
        self._ahead = ahead
        self._pending: deque[
            tuple[int, concurrent.futures.Future[tuple[bytes, bytes]]]
        ] = deque()
        self._buffer = bytearray()
        self._frames: list[tuple[int, int, int, bytes]] = []
        self._digests = bytearray()
        self._hash = hashlib.sha256()
        self._offset = 0
        # Not under its digest, which is not known yet.
        self.path = directory / f'pack-{os.getpid()}-{os.urandom(6).hex()}'
        self._fd = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        self._write(_HEADER.pack(MAGIC, VERSION, block_size))

    @property
    def blocks(self) -> int:
        """Blocks added so far; the next one's ordinal."""
        return len(self._digests) // blocks.DIGEST

    def add(self, digest: bytes, data: memoryview) -> int:
        """Append a block and return its ordinal.

        :raises NoSpace: the device is full.
        """
        ordinal = self.blocks
        self._digests += digest
        self._buffer += data
        if len(self._buffer) >= FRAME:
            self._submit()
        return ordinal

    def _submit(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        future = self._pool.submit(_compress, data, self._level)
        self._pending.append((len(data) // self._block_size, future))
        while len(self._pending) > self._ahead:
            self._store_oldest()

    def _store_oldest(self) -> None:
        count, future = self._pending.popleft()
        packed, digest = future.result()
        self._frames.append((self._offset, len(packed), count, digest))
        self._write(packed)

    def _write(self, data: bytes) -> None:
        blocks.write_exactly(self._fd, data, self._offset)
        self._hash.update(data)
        self._offset += len(data)

    def finish(self) -> PackRef:
        """Write index and trailer; sync; return what the pack is.

        The file stays at :attr:`path` for the caller to put into a store.

        :raises NoSpace: the device is full.
        """
        if self._buffer:
            self._submit()
        while self._pending:
            self._store_oldest()
        index = np.array(self._frames, FRAME_DTYPE).tobytes()
        index += bytes(self._digests)
        index_digest = hashlib.sha256(index)
        index_offset = self._offset
        self._write(index)
        self._write(_TRAILER.pack(
            index_offset, len(self._frames), self.blocks,
            index_digest.digest(), _TRAILER_MAGIC))
        files.sync(self._fd)
        os.close(self._fd)
        self._fd = -1
        return PackRef(self._hash.hexdigest(), self._offset, self.blocks,
                       index_offset, index_digest.hexdigest())

    def index(self, ref: PackRef) -> PackIndex:
        """The index of the finished pack, while its file is here.

        :param ref: from :meth:`finish`.
        """
        with self.path.open('rb') as file:
            return PackIndex.load(ref, lambda offset, length: os.pread(
                file.fileno(), length, offset), self._block_size)

    def abandon(self) -> None:
        """Close and remove the file, if it is still there."""
        for _count, future in self._pending:
            future.cancel()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
