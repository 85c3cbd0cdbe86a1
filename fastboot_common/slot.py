# SPDX-License-Identifier: Apache-2.0
"""One image in a volume: its header and its tables. See reference/volume.

The entries are the record of what is on this host. A slot does no locking;
its writer is :class:`fastboot_common.volume.Volume`.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastboot_common import blocks, exception, files, qcow2

SLOT: Final = qcow2.SLOT
SLOTS_END: Final = 64 << 30
#: A refcount table that all slots name.
REFCOUNTS: Final = SLOTS_END
#: Its first entry names a block that QEMU cannot read; all others are empty.
#: Before the first write into a new cluster of an overlay, QEMU looks whether
#: what is beneath was preallocated: it counts the used clusters of the whole
#: file, with the guest stopped (qcow2_detect_metadata_preallocation, since
#: 4.1). In 8 TiB without refcounts that takes two seconds; the first error
#: ends it, and is no other harm. As an L1 entry (the poison's) it is empty.
UNCOUNTABLE: Final = (1 << 63).to_bytes(8, 'big')
#: An L2 table of zeros that all slots name where an image has no data.
ZERO_TABLE: Final = SLOTS_END + 65536
#: Tables and data begin here.
DATA: Final = SLOTS_END + 2 * 65536

Entries = npt.NDArray[np.uint64]
_BIG: Final = np.dtype('>u8')


class Slot:
    """The slot of one serial, if it has a header.

    :ivar start: its offset in the volume, S (bytes).
    """

    def __init__(self, fd: int, serial: int) -> None:
        """Read header and L1 table.

        :raises NotFound: the slot is empty.
        :raises Corrupt: it has no sense.
        """
        self._fd = fd
        self.serial = serial
        self.start = serial * SLOT
        self.header = qcow2.Header.unpack(
            os.pread(fd, qcow2.HEADER_LIMIT, self.start))
        self.cluster = 1 << self.header.cluster_bits
        self.per_table = self.cluster // 8
        self.block_count = -(-self.header.virtual_size // self.cluster)
        self._tables = self._read_l1()

    def _read_l1(self) -> npt.NDArray[np.int64]:
        header = self.header
        count = qcow2.l1_entries(header.virtual_size, self.cluster)
        if (header.l1_entries != count or header.l1_offset >= 1 << 62
                or not qcow2.fits(header.virtual_size, self.cluster)):
            raise exception.Corrupt(f'slot {self.serial}: header')
        raw = os.pread(self._fd, count * 8, self.start + header.l1_offset)
        if len(raw) != count * 8:
            raise exception.Corrupt(f'slot {self.serial}: L1 table')
        entries = np.frombuffer(raw, _BIG).astype(np.uint64)
        offsets = (entries & np.uint64(qcow2.OFFSET_MASK)).astype(np.int64)
        offsets += self.start
        if (offsets < SLOTS_END).any() or (offsets % self.cluster).any():
            raise exception.Corrupt(f'slot {self.serial}: L1 entry')
        return offsets

    @property
    def tables(self) -> npt.NDArray[np.int64]:
        """Offsets in the volume of this slot's own L2 tables."""
        return np.asarray(self._tables[self._tables != ZERO_TABLE])

    @property
    def l1_place(self) -> tuple[int, int]:
        """Offset in the volume and length (bytes) of the L1 table."""
        return (self.start + self.header.l1_offset,
                max(8 * self.header.l1_entries, 1))

    def chunks(self) -> Iterator[tuple[int, Entries]]:
        """First block and entries of each own L2 table."""
        for number in np.flatnonzero(self._tables != ZERO_TABLE).tolist():
            first = number * self.per_table
            count = min(self.per_table, self.block_count - first)
            yield first, self._table(number)[:count]

    def _table(self, number: int) -> Entries:
        raw = os.pread(self._fd, self.cluster, int(self._tables[number]))
        if len(raw) != self.cluster:
            raise exception.Corrupt(f'slot {self.serial}: L2 table {number}')
        return np.frombuffer(raw, _BIG).astype(np.uint64)

    def entries(self, numbers: blocks.Blocks) -> Entries:
        """The L2 entries of some blocks."""
        result = np.empty(len(numbers), np.uint64)
        tables = numbers // self.per_table
        for number in np.unique(tables).tolist():
            where = np.flatnonzero(tables == number)
            result[where] = self._table(number)[
                numbers[where] % self.per_table]
        return result

    def offsets(self, entries: Entries) -> npt.NDArray[np.int64]:
        """Where in the volume the clusters of (data) entries lie."""
        found = (entries & np.uint64(qcow2.OFFSET_MASK)).astype(np.int64)
        return found + self.start

    def missing(self) -> int:
        """The number of blocks that are not on this host."""
        return sum(int((entries == 0).sum()) for _, entries in self.chunks())

    def present(self) -> int:
        """The number of data blocks that are on this host."""
        return sum(int((entries > qcow2.ZERO).sum())
                   for _, entries in self.chunks())

    def clusters(self) -> npt.NDArray[np.int64]:
        """Offsets in the volume of all data clusters, unsorted."""
        found = [self.offsets(entries[entries > qcow2.ZERO])
                 for _, entries in self.chunks()]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def set(self, numbers: blocks.Blocks,
            offsets: npt.NDArray[np.int64]) -> None:
        """Say that blocks lie at offsets of the volume. Syncs nothing.

        :param numbers: ascending.
        """
        entries = (offsets - self.start).astype(np.uint64)
        raw = (entries | np.uint64(qcow2.COPIED)).astype(_BIG).tobytes()
        done = 0
        for first, count in blocks.runs(numbers):
            while count:
                table, inner = divmod(first, self.per_table)
                part = min(count, self.per_table - inner)
                files.store_words(
                    self._fd, int(self._tables[table]) + inner * 8,
                    raw[done * 8:(done + part) * 8])
                first, count, done = first + part, count - part, done + part

    def write_header(self, backing: str | None) -> None:
        """Replace the header by one with this backing. Syncs nothing."""
        self.header = dataclasses.replace(self.header, backing=backing)
        os.pwrite(self._fd, self.header.pack(), self.start)


def table_array(numbers: blocks.Blocks, per_table: int,
                ) -> tuple[blocks.Blocks, Any]:
    """L2 tables for an image whose blocks `numbers` have data.

    :returns: which tables (ascending), and their entries: 0 for those
        blocks, 1 for all others.
    """
    which = np.unique(numbers // per_table)
    array = np.full((len(which), per_table), qcow2.ZERO, _BIG)
    array[np.searchsorted(which, numbers // per_table),
          numbers % per_table] = 0
    return which, array
