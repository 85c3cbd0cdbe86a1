# SPDX-License-Identifier: Apache-2.0
"""Manifests: what one image consists of. See reference/repository."""

import dataclasses
import hashlib
import json
import re
import struct
from typing import Any, Final

import numpy as np
import zstandard

from fastboot_common import blocks, exception, extents, pack, qcow2
from fastboot_common import trace as traces
from fastboot_common.extents import Extents
from fastboot_common.pack import PackRef

MAGIC: Final = b'FBMANIF1'
VERSION: Final = 1
#: A manifest is read whole. 64 MiB is an image of terabytes without order.
LIMIT: Final = 64 << 20
_PREFIX: Final = struct.Struct('<8sII')
_RECORDS_LIMIT: Final = 256 << 20
#: Blocks of a boot set: 16 GiB of the smallest. A few bytes name them all,
#: and reading them takes 35 bytes of memory each.
BOOT_LIMIT: Final = 1 << 22
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')

BOOT_DTYPE: Final = np.dtype([('block', '<u8'), ('count', '<u4')])
_SECTIONS: Final = {
    'extents': extents.DTYPE, 'boot': BOOT_DTYPE, 'trace': traces.DTYPE,
}


@dataclasses.dataclass
class Manifest:
    """One image: its map, its boot set and its trace.

    :ivar root: sha256 over (u64 block, digest) of all blocks that are not
        zeros, by ascending block: the content, however it is packed.
    :ivar boot: the boot set as blocks in access order.
    """

    image_id: str
    name: str
    virtual_size: int
    block_size: int
    root: str
    packs: list[PackRef]
    extents: Extents
    boot: blocks.Blocks = dataclasses.field(
        default_factory=lambda: np.empty(0, np.int64))
    trace: traces.Trace = dataclasses.field(
        default_factory=traces.empty)
    os_hash: dict[str, str] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    capture: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {'state': 'none', 'reason': None})

    @property
    def block_count(self) -> int:
        """Blocks of the disk, the last one perhaps cut."""
        return -(-self.virtual_size // self.block_size)

    def pack(self) -> bytes:
        """The manifest's bytes; their sha256 is its name.

        :raises ImageRejected: they are more than anybody reads.
        """
        runs = np.array(blocks.runs(self.boot), BOOT_DTYPE)
        arrays = {'extents': self.extents, 'boot': runs, 'trace': self.trace}
        sections, body = {}, b''
        compressor = zstandard.ZstdCompressor(level=9)
        for name, array in arrays.items():
            raw = array.tobytes()
            self._bound(len(raw), _RECORDS_LIMIT, f'its {name}')
            packed = compressor.compress(raw)
            sections[name] = {
                'offset': len(body), 'length': len(packed),
                'raw_length': len(raw), 'records': len(array),
            }
            body += packed
        header = json.dumps({
            'image_id': self.image_id, 'name': self.name,
            'virtual_size': self.virtual_size,
            'block_size': self.block_size, 'root': self.root,
            'packs': [dataclasses.asdict(ref) for ref in self.packs],
            'os_hash': self.os_hash, 'source': self.source,
            'capture': self.capture, 'sections': sections,
        }, sort_keys=True).encode()
        data = _PREFIX.pack(MAGIC, VERSION, len(header)) + header + body
        self._bound(len(data), LIMIT, 'its manifest')
        return data

    def _bound(self, length: int, limit: int, what: str) -> None:
        if length > limit:
            raise exception.ImageRejected(
                f'image {self.image_id}: its blocks are too scattered: '
                f'{what} would take {length} bytes; at most {limit} are '
                f'allowed')

    @classmethod
    def unpack(cls, data: bytes, digest: str) -> 'Manifest':
        """Read a manifest.

        :param digest: its name, checked first.
        :raises Corrupt: digest, structure or bounds are wrong.
        :raises UnknownVersion: it is of a newer format.
        """
        what = f'manifest {digest}'
        if hashlib.sha256(data).hexdigest() != digest:
            raise exception.Corrupt(f'{what}: digest does not match')
        try:
            return cls._parse(data, what)
        except (KeyError, TypeError, ValueError, OverflowError,
                AttributeError, struct.error, RecursionError,
                exception.Invalid) as error:
            raise exception.Corrupt(f'{what}: {error!r}') from error

    @classmethod
    def _parse(cls, data: bytes, what: str) -> 'Manifest':
        magic, version, length = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise exception.Corrupt(f'{what}: not a manifest')
        if version != VERSION:
            raise exception.UnknownVersion(f'{what}: version {version}')
        header = json.loads(data[_PREFIX.size:_PREFIX.size + length])
        body = memoryview(data)[_PREFIX.size + length:]
        arrays = {
            name: _section(body, header['sections'][name], dtype, what)
            for name, dtype in _SECTIONS.items()
        }
        manifest = cls(
            image_id=str(header['image_id']), name=str(header['name']),
            virtual_size=_integer(header['virtual_size']),
            block_size=blocks.validate_block_size(
                _integer(header['block_size'])),
            root=str(header['root']),
            packs=[PackRef(**ref) for ref in header['packs']],
            extents=arrays['extents'],
            boot=_boot_blocks(arrays['boot'], header, what),
            trace=traces.unpack(arrays['trace'].tobytes(),
                                int(header['virtual_size'])),
            os_hash=_members(header['os_hash']),
            source=_members(header['source']),
            capture=_members(header['capture']),
        )
        manifest._check(what)
        return manifest

    def _check(self, what: str) -> None:
        if not qcow2.fits(self.virtual_size, self.block_size):
            raise exception.Corrupt(
                f'{what}: virtual size {self.virtual_size}')
        # Digests become file names.
        for ref in self.packs:
            if not (_DIGEST.fullmatch(ref.digest)
                    and _DIGEST.fullmatch(ref.index_digest)
                    and _integer(ref.size) < 1 << 63
                    and _integer(ref.index_offset) > 0
                    and _integer(ref.blocks) >= 0
                    and 0 <= ref.index_length <= pack.INDEX_LIMIT):
                raise exception.Corrupt(f'{what}: a pack has no sense')
        if len({ref.digest for ref in self.packs}) != len(self.packs):
            raise exception.Corrupt(f'{what}: a pack is listed twice')
        extents.validate(self.extents, self.block_count,
                         [ref.blocks for ref in self.packs])


def _section(body: memoryview, header: dict[str, int], dtype: Any,
             what: str) -> Any:
    start, length = header['offset'], header['length']
    raw_length = header['records'] * dtype.itemsize
    if not (0 <= start <= start + length <= len(body)
            and 0 <= raw_length == header['raw_length'] <= _RECORDS_LIMIT):
        raise exception.Corrupt(f'{what}: a section has no sense')
    raw = pack.decompress(body[start:start + length], raw_length, what)
    return np.frombuffer(raw, dtype)


def _integer(value: Any) -> int:
    # JSON's true, and numbers with a fraction, count as integers in Python.
    if type(value) is not int:
        raise ValueError(f'not an integer: {value!r}')
    return value


def _members(value: Any) -> dict[str, Any]:
    # A list of pairs would do for dict(), with any keys.
    if not isinstance(value, dict):
        raise ValueError(f'not an object: {value!r}')
    return value


def _boot_blocks(runs: Any, header: dict[str, Any],
                 what: str) -> blocks.Blocks:
    limit = -(-header['virtual_size'] // header['block_size'])
    counts = runs['count'].astype(np.int64)
    if counts.sum() > min(limit, BOOT_LIMIT) or (
            runs['block'] > np.uint64(limit)).any() or (
            runs['block'].astype(np.int64) + counts > limit).any():
        raise exception.Corrupt(f'{what}: boot set reaches behind the image')
    inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts,
                                                counts)
    return np.asarray(
        np.repeat(runs['block'].astype(np.int64), counts) + inner)
