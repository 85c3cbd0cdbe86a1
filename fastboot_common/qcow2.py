# SPDX-License-Identifier: Apache-2.0
"""Just what slots need of qcow2: headers and table entries.

QEMU's ``docs/interop/qcow2.txt`` is the specification. This is no general
reader: images that users upload are read by QEMU only.
"""

import dataclasses
import struct
from typing import Final

from fastboot_common import exception

MAGIC: Final = 0x514649FB
#: Bytes of the slot of one serial in a volume.
SLOT: Final = 65536
#: A slot's header must fit one sector, so that a crash leaves the old or the
#: new one.
HEADER_LIMIT: Final = 512
#: Bytes of an L1 table: QEMU opens none that is longer.
L1_LIMIT: Final = 32 << 20
#: L2 entry: reads as zeros (version 3).
ZERO: Final = 1
#: L1 and L2 entry: the cluster is not shared with a snapshot.
COPIED: Final = 1 << 63
#: The bits of an L1 or L2 entry that are an offset.
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00

_HEADER: Final = struct.Struct('>IIQIIQIIQQIIQQQQII')
_LENGTH: Final = 112
_EXTENSION: Final = struct.Struct('>II')
_BACKING_FORMAT: Final = 0xE2792ACA


@dataclasses.dataclass(frozen=True)
class Header:
    """A qcow2 version 3 header as slots have it.

    Offsets are in bytes, relative to the header.
    """

    virtual_size: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    refcount_offset: int
    backing: str | None = None
    backing_format: str = 'raw'

    def pack(self) -> bytes:
        """The header's bytes, padded to one sector.

        :raises Invalid: the backing string does not fit.
        """
        extensions = b''
        backing = (self.backing or '').encode()
        if backing:
            name = self.backing_format.encode()
            extensions += _EXTENSION.pack(_BACKING_FORMAT, len(name))
            extensions += name.ljust(-(-len(name) // 8) * 8, b'\0')
        extensions += _EXTENSION.pack(0, 0)
        backing_offset = _LENGTH + len(extensions) if backing else 0
        header = _HEADER.pack(
            MAGIC, 3, backing_offset, len(backing), self.cluster_bits,
            self.virtual_size, 0, self.l1_entries, self.l1_offset,
            self.refcount_offset, 1, 0, 0, 0, 0, 0, 4, _LENGTH,
        )
        whole = header.ljust(_LENGTH, b'\0') + extensions + backing
        if len(whole) > HEADER_LIMIT:
            raise exception.Invalid(
                f'backing string of {len(backing)} bytes does not fit the '
                f'header of a slot; use a shorter socket path'
            )
        return whole.ljust(HEADER_LIMIT, b'\0')

    @classmethod
    def unpack(cls, data: bytes) -> 'Header':
        """Read a header that :meth:`pack` made.

        :param data: at least :data:`HEADER_LIMIT` bytes.
        :raises NotFound: there is none (an empty slot).
        :raises Corrupt: there is something else.
        """
        if len(data) < HEADER_LIMIT:
            raise exception.Corrupt('qcow2 header cut short')
        if data[:4] == b'\0\0\0\0':
            raise exception.NotFound('no qcow2 header: the slot is empty')
        (magic, version, backing_offset, backing_length, cluster_bits,
         size, crypt, l1_entries, l1_offset, refcount_offset, _clusters,
         snapshots, _snap_offset, incompatible, _compatible, _autoclear,
         _order, length) = _HEADER.unpack_from(data)
        if (magic != MAGIC or version != 3 or crypt or snapshots
                or incompatible or length != _LENGTH
                or not 12 <= cluster_bits <= 16
                or backing_offset + backing_length > HEADER_LIMIT):
            raise exception.Corrupt('not the qcow2 header of a slot')
        try:
            backing = data[
                backing_offset:backing_offset + backing_length
            ].decode() if backing_offset else None
        except UnicodeDecodeError as error:
            raise exception.Corrupt('backing string is not text') from error
        return cls(size, cluster_bits, l1_offset, l1_entries,
                   refcount_offset, backing)


def l1_entries(virtual_size: int, cluster: int) -> int:
    """How many L2 tables cover a disk (sizes in bytes)."""
    return -(-virtual_size // (cluster * (cluster // 8)))


def fits(virtual_size: int, cluster: int) -> bool:
    """Whether a slot can have a disk of that size (sizes in bytes)."""
    return (virtual_size >= 0 and virtual_size % 512 == 0
            and 8 * l1_entries(virtual_size, cluster) <= L1_LIMIT)
