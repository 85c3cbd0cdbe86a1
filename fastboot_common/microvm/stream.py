# SPDX-License-Identifier: Apache-2.0
"""Where the pages of a guest are in the stream that QEMU saved it to.

In the stream 8 bytes stand in front of each page, so equal pages of two
guests are at places that nothing compares. What is needed to find them is
read, strictly, and nothing else; numbers are big-endian::

    u32 "QEVM", u32 3
    7, u32 length, name of the machine
    1, u32 section, u8 length, "ram", u32 instance, u32 version: its blocks
    2, u32 section: records   (many)
    3, u32 section: records
    0x7e, u32 section         (behind each of these three)

A record is a u64: an address, and flags in the 12 bits that it has no use
for; then, unless it goes on with the block of the record before, u8 length
and the name of the block; then a byte, or a page. The flag EOS ends them.
Devices follow, whose length nothing says: there the reader stops, as it does
at all that it does not know (QEMU 7.2, migration/ram.c and savevm.c).
"""

import array
import struct
from collections.abc import Callable
from typing import Final

from fastboot_common.blocks import PAGE

_MAGIC: Final = 0x5145564D
_VERSION: Final = 3
_RAM_VERSION: Final = 4
_START, _PART, _END, _CONFIGURATION, _FOOTER = 1, 2, 3, 7, 0x7E
_ZERO, _SIZES, _PLAIN, _EOS, _CONTINUE = 2, 4, 8, 0x10, 0x20
_FLAGS: Final = PAGE - 1
_NAME_LIMIT: Final = 255
#: Blocks of memory; each ROM and each plugged DIMM is one.
_BLOCKS: Final = 1024

_U32: Final = struct.Struct('>I')
_U64: Final = struct.Struct('>Q')

#: Bytes that can be cut: of a file, or a mapping of one.
Buffer = bytes | memoryview


class _UnknownError(Exception):
    """Here is something that QEMU 7.2 does not write for a saved guest."""


def pages(data: Buffer, start: int) -> 'array.array[int]':
    """Where pages are, in bytes from the beginning, ascending.

    Never fails: what is not understood has no pages.

    :param start: where the stream begins.
    """
    found = array.array('Q')
    walk = _Walk(data, start, found)
    try:
        walk.head()
        while walk.section():
            pass
    except _UnknownError:
        pass
    return found


class _Walk:
    """One reading of a stream."""

    def __init__(self, data: Buffer, start: int,
                 found: 'array.array[int]') -> None:
        self._data = data
        self._at = start
        self._found = found
        self._section: int | None = None
        self._blocks: dict[bytes, int] = {}
        #: Of the block that the last record named: that goes on over the
        #: ends of sections.
        self._size = -1

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if self._at < 0 or end > len(self._data):
            raise _UnknownError
        taken = bytes(self._data[self._at:end])
        self._at = end
        return taken

    def _byte(self) -> int:
        return self._take(1)[0]

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _name(self) -> bytes:
        return self._take(self._byte())

    def _expect(self, is_so: bool) -> None:
        if not is_so:
            raise _UnknownError

    def head(self) -> None:
        """What is in front of the sections."""
        self._expect(self._u32() == _MAGIC and self._u32() == _VERSION)
        self._expect(self._byte() == _CONFIGURATION)
        length = self._u32()
        self._expect(0 < length <= _NAME_LIMIT)
        self._take(length)

    def section(self) -> bool:
        """Read a section; False: it was the last one of memory."""
        kind = self._byte()
        number = self._u32()
        if kind == _START:
            self._expect(self._section is None)
            self._section = number
            self._start()
        else:
            self._expect(kind in (_PART, _END) and number == self._section)
            self._records()
        self._expect(self._byte() == _FOOTER and self._u32() == number)
        return kind != _END

    def _start(self) -> None:
        """The blocks of memory: their names and sizes."""
        self._expect(self._name() == b'ram')
        self._expect(self._u32() == 0 and self._u32() == _RAM_VERSION)
        total = self._u64()
        self._expect(total & _FLAGS == _SIZES)
        total -= _SIZES
        while total:
            name, size = self._name(), self._u64()
            self._expect(0 < size <= total and name not in self._blocks
                         and len(self._blocks) < _BLOCKS)
            self._blocks[name] = size
            total -= size
        self._expect(self._u64() == _EOS)

    def _records(self) -> None:
        """The records of one section, up to their end."""
        data, unpack = self._data, _U64.unpack_from
        last = len(data) - 8
        note: Callable[[int], None] = self._found.append
        while True:
            if self._at > last:
                raise _UnknownError
            word: int = unpack(data, self._at)[0]
            self._at += 8
            if word == _EOS:
                return
            flags = word & _FLAGS
            if not flags & _CONTINUE:
                self._size = self._blocks.get(self._name(), -1)
            if (word & ~_FLAGS) + PAGE > self._size:
                raise _UnknownError
            kind = flags & ~_CONTINUE
            if kind == _PLAIN and self._at + PAGE <= len(data):
                note(self._at)
                self._at += PAGE
            elif kind == _ZERO and self._at < len(data):
                self._at += 1
            else:
                raise _UnknownError
