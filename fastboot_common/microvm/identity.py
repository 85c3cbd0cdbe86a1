# SPDX-License-Identifier: Apache-2.0
"""The UUID that a guest has read from its firmware, in its saved memory.

A guest learns UUID and serial number of its machine once, at its boot, and
keeps them in its kernel: nothing inside can change them later. So the baked
guest has a UUID that nothing else has, and whoever resumes a copy writes the
instance's in its place. All forms of it have the same length. In a stream
something stands in front of each page, and a form that lies on two pages is
in two pieces there.
"""

import dataclasses
import mmap
import os
from collections.abc import Iterator
from typing import Any, Final, Self
from uuid import UUID

from fastboot_common import exception
from fastboot_common.blocks import PAGE
from fastboot_common.microvm import stream, template

_CHUNK: Final = 4 << 20
#: Bytes of its forms.
_BINARY: Final = 16
_TEXT: Final = 36
#: Bytes in front of a written UUID within which the product's name must be.
#: It also lies in logs and in the heaps of programs; those are left alone.
_NEAR: Final = 160
_OVERLAP: Final = _NEAR + _TEXT
_PLACES: Final = 64
#: No file is as long.
_OFFSET_LIMIT: Final = 1 << 62

#: Where one form is: offset and length of each piece (bytes), in order.
Place = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the UUID is, in bytes from the beginning of the save file.

    :ivar uuid: the UUID that is there.
    :ivar binary: as SMBIOS has it: 16 bytes, the first fields reversed.
    :ivar text: as 36 characters.
    """

    uuid: UUID
    binary: tuple[Place, ...]
    text: tuple[Place, ...]

    @property
    def end(self) -> int:
        """Where the last of them ends."""
        return max((at + length for place in self.binary + self.text
                    for at, length in place), default=0)

    def to_json(self) -> dict[str, Any]:
        """As it is in ``microvm.json``."""
        return {'uuid': str(self.uuid),
                'binary': [_plain(place) for place in self.binary],
                'text': [_plain(place) for place in self.text]}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read it back.

        :raises Corrupt: it makes no sense.
        """
        try:
            if set(value) != {'uuid', 'binary', 'text'}:
                raise ValueError('other members')
            known = UUID(value['uuid'])
            if str(known) != value['uuid']:
                raise ValueError('the UUID is not written plainly')
            return cls(known, _read(value['binary'], _BINARY),
                       _read(value['text'], _TEXT))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise exception.Corrupt(f'identity: {error}') from error

    def patch(self, fd: int, new: UUID) -> Self:
        """Write another UUID to all places of a private copy.

        :returns: the same places with that one.
        :raises Corrupt: the old one is not at all of them; nothing was
            written.
        """
        pairs = [(place, self.uuid.bytes_le, new.bytes_le)
                 for place in self.binary]
        pairs += [(place, str(self.uuid).encode(), str(new).encode())
                  for place in self.text]
        for place, old, _ in pairs:
            if b''.join(os.pread(fd, length, at)
                        for at, length in place) != old:
                raise exception.Corrupt(
                    f'identity: {self.uuid} is not at {place[0][0]}')
        for place, _, wanted in pairs:
            for at, length in place:
                os.pwrite(fd, wanted[:length], at)
                wanted = wanted[length:]
        return dataclasses.replace(self, uuid=new)


def find(fd: int, start: int, known: UUID) -> Places:
    """Look for a UUID in a stream.

    :param start: where the stream begins, in bytes.
    :raises Corrupt: it is not there, or in more places than a guest has.
    """
    binary: set[Place] = set()
    text: set[Place] = set()
    for at, data in _chunks(fd, start):
        binary.update(((at + place, _BINARY),)
                      for place in _every(data, known.bytes_le))
        text.update(((at + place, _TEXT),)
                    for place in _words(data, known))
    for first, second, data in _seams(fd, start):
        binary.update(_pieces(first, second, at, _BINARY)
                      for at in _every(data, known.bytes_le))
        text.update(_pieces(first, second, at, _TEXT)
                    for at in _words(data, known))
    if not binary or len(binary) + len(text) > _PLACES:
        raise exception.Corrupt(
            f'identity: {known} is {len(binary)} times in the memory as '
            f'SMBIOS has it, {len(text)} times in words')
    return Places(known, tuple(sorted(binary)), tuple(sorted(text)))


def _seams(fd: int, start: int) -> Iterator[tuple[int, int, bytes]]:
    """Where one page follows another: what lies on both ends there.

    They may be no neighbours in memory; nothing is found there then.

    :returns: where the end of the one begins, and the other, in bytes of the
        file; both.
    """
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as data:
            pages = stream.pages(data, start)
        for one, two in zip(pages, pages[1:], strict=False):
            first = one + PAGE - _OVERLAP
            yield (first, two, mapped[first:one + PAGE]
                   + mapped[two:two + _OVERLAP])


def _pieces(first: int, second: int, at: int, length: int) -> Place:
    """The place of what begins at `at` in a seam."""
    if at >= _OVERLAP:
        return ((second + at - _OVERLAP, length),)
    before = min(_OVERLAP - at, length)
    if before == length:
        return ((first + at, length),)
    return ((first + at, before), (second, length - before))


def _chunks(fd: int, start: int) -> Iterator[tuple[int, bytes]]:
    """All of a file from `start`, with overlaps: place and bytes."""
    while data := os.pread(fd, _CHUNK, start):
        yield start, data
        if len(data) <= _OVERLAP:
            return
        start += len(data) - _OVERLAP


def _every(data: bytes, wanted: bytes) -> Iterator[int]:
    place = data.find(wanted)
    while place >= 0:
        yield place
        place = data.find(wanted, place + 1)


def _words(data: bytes, known: UUID) -> Iterator[int]:
    """Where it is written behind the product's name."""
    product = template.PRODUCT.encode()
    for place in _every(data, str(known).encode()):
        if product in data[max(place - _NEAR, 0):place]:
            yield place


def _plain(place: Place) -> Any:
    """An offset; what is in pieces: of each, offset and length."""
    return place[0][0] if len(place) == 1 else [list(one) for one in place]


def _read(value: Any, length: int) -> tuple[Place, ...]:
    if not isinstance(value, list) or len(value) > _PLACES:
        raise ValueError('no places')
    found = [((one, length),) if type(one) is int else
             tuple((at, size) for at, size in one) for one in value]
    for place in found:
        if (sum(size for _, size in place) != length or len(place) > 2
                or any(type(at) is not int or type(size) is not int
                       or not 0 < at < _OFFSET_LIMIT or size < 1
                       for at, size in place)):
            raise ValueError('no place')
    ends = [piece for place in found for piece in place]
    if any(at + size > after for (at, size), (after, _) in zip(
            ends, ends[1:], strict=False)):
        raise ValueError('places out of order')
    return tuple(found)
