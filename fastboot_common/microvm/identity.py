# SPDX-License-Identifier: Apache-2.0
"""The UUID that a guest has read from its firmware, in its saved memory.

A guest learns UUID and serial number of its machine once, at its boot, and
keeps them in its kernel: nothing inside can change them later. So the baked
guest has a UUID that nothing else has, and whoever resumes a copy writes the
instance's in its place. All forms of it have the same length.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Final, Self
from uuid import UUID

from fastboot_common import exception
from fastboot_common.microvm import template

_CHUNK: Final = 4 << 20
#: Bytes in front of a written UUID within which the product's name must be.
#: It also lies in logs and in the heaps of programs; those are left alone.
_NEAR: Final = 160
_OVERLAP: Final = _NEAR + 36
_PLACES: Final = 64
#: No file is as long.
_OFFSET_LIMIT: Final = 1 << 62


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the UUID is, in bytes from the beginning of the save file.

    :ivar uuid: the UUID that is there.
    :ivar binary: as SMBIOS has it: 16 bytes, the first fields reversed.
    :ivar text: as 36 characters.
    """

    uuid: UUID
    binary: tuple[int, ...]
    text: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As it is in ``microvm.json``."""
        return {'uuid': str(self.uuid), 'binary': list(self.binary),
                'text': list(self.text)}

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
            return cls(known, _offsets(value['binary']),
                       _offsets(value['text']))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise exception.Corrupt(f'identity: {error}') from error

    def patch(self, fd: int, new: UUID) -> Self:
        """Write another UUID to all places of a private copy.

        :returns: the same places with that one.
        :raises Corrupt: the old one is not at all of them; nothing was
            written.
        """
        pairs = [(at, self.uuid.bytes_le, new.bytes_le)
                 for at in self.binary]
        pairs += [(at, str(self.uuid).encode(), str(new).encode())
                  for at in self.text]
        for at, old, _ in pairs:
            if os.pread(fd, len(old), at) != old:
                raise exception.Corrupt(
                    f'identity: {self.uuid} is not at {at}')
        for at, _, wanted in pairs:
            os.pwrite(fd, wanted, at)
        return dataclasses.replace(self, uuid=new)


def find(fd: int, start: int, known: UUID) -> Places:
    """Look for a UUID in a stream.

    :param start: where the stream begins, in bytes.
    :raises Corrupt: it is not there, or in more places than a guest has.
    """
    binary: set[int] = set()
    text: set[int] = set()
    written = str(known).encode()
    product = template.PRODUCT.encode()
    for at, data in _chunks(fd, start):
        binary.update(at + place for place in _every(data, known.bytes_le))
        text.update(
            at + place for place in _every(data, written)
            if product in data[max(place - _NEAR, 0):place])
    if not binary or len(binary) + len(text) > _PLACES:
        raise exception.Corrupt(
            f'identity: {known} is {len(binary)} times in the memory as '
            f'SMBIOS has it, {len(text)} times in words')
    return Places(known, tuple(sorted(binary)), tuple(sorted(text)))


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


def _offsets(value: Any) -> tuple[int, ...]:
    if (not isinstance(value, list) or len(value) > _PLACES
            or any(type(one) is not int or not 0 < one < _OFFSET_LIMIT
                   for one in value)):
        raise ValueError('no places')
    if value != sorted(set(value)):
        raise ValueError('places out of order')
    return tuple(value)
