# SPDX-License-Identifier: Apache-2.0
"""A µVM as one file, beside the image that it was baked from.

What it has in common with the image's boot set is not in it: who resumes it
has that. Its pages are aligned, so that a repository finds those that other
µVMs have, too. Little-endian::

    0   8s   magic "FBUVM1\\n\\0"
    8   u32  version, 1
    12  u32  length of the header
    16       header, JSON: image, root, description, parts, pages
             microvm.json; then of memory and disk.qcow2 rows, and the rest
             zeros up to a multiple of 4096; pages
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np

from fastboot_common import blocks, exception, files, journal
from fastboot_common.blocks import PAGE
from fastboot_common.microvm import artifact, pages

MAGIC: Final = b'FBUVM1\n\0'
VERSION: Final = 1
PARTS: Final = (artifact.MEMORY, artifact.DISK)
_PREFIX: Final = struct.Struct('<8sII')
_HEADER_LIMIT: Final = 4096
#: Bytes in front of the pages. Rows and the rest of a guest of 512 MiB that
#: nothing is known of are 2 MiB.
_HEAD_LIMIT: Final = 512 << 20
_MEMBERS: Final = frozenset(
    ('image', 'root', 'description', 'parts', 'pages'))
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
_ZEROS: Final = bytes(PAGE)


class Builder:
    """Makes a blob of files that are mapped."""

    def __init__(self, known: Mapping[bytes, int]) -> None:
        """Begin.

        :param known: the image's page with a sha256.
        """
        self._known = known
        self._own: dict[bytes, int] = {}
        self._pages: list[memoryview] = []
        self._layouts: dict[str, pages.Layout] = {}

    def add(self, name: str, data: memoryview, known: Sequence[int]) -> None:
        """Take a part apart.

        :param data: stays as it is until :meth:`write` is over.
        :param known: where pages are; see :func:`pages.cut`.
        """
        self._layouts[name] = pages.Layout.of(
            data, pages.cut(len(data), known), self._find)

    def _find(self, data: memoryview) -> pages.Place:
        if data == _ZEROS:
            return pages.ZEROS, 0
        digest = hashlib.sha256(data).digest()
        number = self._known.get(digest)
        if number is not None:
            return pages.IMAGE, number
        number = self._own.setdefault(digest, len(self._pages))
        if number == len(self._pages):
            self._pages.append(data)
        return pages.BLOB, number

    def write(self, path: pathlib.Path, image: str, root: str,
              description: bytes) -> 'Blob':
        """Write the file, which must not be there, and say what it is.

        :param image: id of the image.
        :param root: of its manifest.
        :param description: the bytes of ``microvm.json``.
        :raises NoSpace: no room for it.
        """
        made = Blob(image, root, description, self._layouts,
                    len(self._pages))
        artifact.save(path, _pieces(made.head(), self._pages))
        return made


def _pieces(head: bytes, found: list[memoryview]) -> Iterator[bytes]:
    yield head
    step = artifact.BUFFER // PAGE
    for at in range(0, len(found), step):
        yield b''.join(found[at:at + step])


@dataclasses.dataclass(frozen=True)
class Blob:
    """A blob without its pages.

    :ivar image: id of the image.
    :ivar root: of its manifest: the content that pages are taken from.
    :ivar description: the bytes of ``microvm.json``.
    :ivar layouts: of its parts, by name.
    :ivar count: pages that it has.
    """

    image: str
    root: str
    description: bytes
    layouts: dict[str, pages.Layout]
    count: int

    def head(self) -> bytes:
        """The bytes in front of the pages."""
        header = json.dumps({
            'image': self.image, 'root': self.root, 'pages': self.count,
            'description': len(self.description),
            'parts': {name: {'rows': len(self.layouts[name].rows),
                             'rest': len(self.layouts[name].rest)}
                      for name in PARTS}}, sort_keys=True).encode()
        found = _PREFIX.pack(MAGIC, VERSION, len(header)) + header
        found += self.description
        for name in PARTS:
            found += self.layouts[name].rows.tobytes()
            found += self.layouts[name].rest
        return found + bytes(-len(found) % PAGE)

    @classmethod
    def read(cls, read: pages.Read, size: int) -> Self:
        """Read all but the pages.

        :param read: reads pages of the blob.
        :param size: of the blob, in bytes.
        :raises Corrupt: it is no blob.
        :raises UnknownVersion: it is of a newer format.
        """
        try:
            first = _read(read, 0, min(size, _PREFIX.size + _HEADER_LIMIT))
            magic, version, length = _PREFIX.unpack_from(first)
            if magic != MAGIC:
                raise ValueError('no µVM')
            if version != VERSION:
                raise exception.UnknownVersion(f'µVM: version {version}')
            if length > _HEADER_LIMIT:
                raise ValueError('its header is too long')
            header = json.loads(
                first[_PREFIX.size:_PREFIX.size + length])
            return cls._parse(header, _PREFIX.size + length, read, size)
        except (KeyError, TypeError, ValueError, AttributeError,
                RecursionError, struct.error, exception.Invalid) as error:
            raise exception.Corrupt(f'µVM: {error!r:.200}') from error

    @classmethod
    def _parse(cls, header: dict[str, Any], start: int, read: pages.Read,
               size: int) -> Self:
        if set(header) != _MEMBERS or set(header['parts']) != set(PARTS):
            raise ValueError('other members')
        if not _DIGEST.fullmatch(header['root']):
            raise ValueError('no root')
        count = _count(header['pages'])
        lengths = [_count(header['description'])]
        for name in PARTS:
            part = header['parts'][name]
            if set(part) != {'rows', 'rest'}:
                raise ValueError('a part is no part')
            lengths += [_count(part['rows']) * pages.DTYPE.itemsize,
                        _count(part['rest'])]
        used = start + sum(lengths)
        end = -(-used // PAGE) * PAGE
        if end > _HEAD_LIMIT or end + count * PAGE != size:
            raise ValueError(f'its parts are not {size} bytes')
        data = _read(read, 0, end)
        if data[used:].strip(b'\0'):
            raise ValueError('no zeros in front of the pages')
        found = []
        for length in lengths:
            found.append(data[start:start + length])
            start += length
        return cls(
            journal.validate_image_id(header['image']), header['root'],
            found[0],
            {name: pages.Layout.parse(rows, rest, count) for name, rows, rest
             in zip(PARTS, found[1::2], found[2::2], strict=True)}, count)

    def unpack(self, directory: pathlib.Path, blob: pages.Read,
               image: pages.Read, progress: Callable[[int], None],
               ) -> artifact.Description:
        """Make the artifact again, the same bytes as before.

        :param directory: empty.
        :param blob: reads pages of this blob.
        :param image: reads pages of the image.
        :param progress: told the bytes written.
        :raises Corrupt: they are not what they were; nothing is left.
        :raises NoSpace: no room for it.
        """
        description = artifact.Description.parse(self.description)
        skip = len(self.head()) // PAGE
        try:
            for name, expected in description.parts.items():
                found = artifact.save(
                    directory / name, _counted(self.layouts[name].join(
                        lambda numbers: blob(numbers + skip), image,
                        artifact.BUFFER), progress), expected.size)
                if found != expected:
                    raise exception.Corrupt(
                        f'µVM: its {name} is not what was baked')
            files.write_atomically(directory / artifact.DESCRIPTION,
                                   self.description)
        except BaseException:
            for name in PARTS:
                (directory / name).unlink(missing_ok=True)
            raise
        return description


def _counted(pieces: Iterable[bytes], progress: Callable[[int], None],
             ) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        progress(len(piece))


def _read(read: pages.Read, start: int, end: int) -> bytes:
    """Bytes of whole pages, cut."""
    last = -(-end // PAGE)
    data = read(np.arange(start // PAGE, last, dtype=np.int64))
    return data[:end - start]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError(f'not a length: {value!r:.50}')
    return value


def known(read: pages.Read, boot: blocks.Blocks, pages_of_block: int,
          ) -> dict[bytes, int]:
    """Pages of an image's boot set by their sha256, for :class:`Builder`.

    :param read: reads pages of the image.
    :param boot: its boot set, in blocks.
    """
    # In the order that they lie in: each frame is read once.
    numbers = boot[:, None] * pages_of_block + np.arange(pages_of_block)
    found: dict[bytes, int] = {}
    step = artifact.BUFFER // PAGE
    for at in range(0, numbers.size, step):
        part = numbers.reshape(-1)[at:at + step]
        data = memoryview(read(part))
        for number, start in zip(part.tolist(), range(0, len(data), PAGE),
                                 strict=True):
            digest = hashlib.sha256(data[start:start + PAGE]).digest()
            found.setdefault(digest, number)
    return found
