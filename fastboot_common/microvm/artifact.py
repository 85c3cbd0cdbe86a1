# SPDX-License-Identifier: Apache-2.0
"""What a bake leaves: a directory with two parts and a description.

::

    memory          a save file of libvirt's: header, XML, QEMU's stream
    disk.qcow2      what the first boot wrote, on top of the image
    microvm.json    what they are, and where they can run

The description is written last: a directory without one is no artifact.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, Self

from fastboot_common import exception, files
from fastboot_common.microvm import identity, template
from fastboot_common.microvm.key import Key

FORMAT: Final = 'fastboot-microvm'
VERSION: Final = 1
MEMORY: Final = 'memory'
DISK: Final = 'disk.qcow2'
DESCRIPTION: Final = 'microvm.json'
_LIMIT: Final = 256 << 10
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
_SIZE_LIMIT: Final = 1 << 46
_MEMBERS: Final = frozenset(
    ('format', 'version', 'key', 'machine', 'identity', 'virtual_size',
     'parts', 'baked'))
_MACHINE: Final = frozenset(('memory', 'max_memory', 'vcpus', 'slots'))
_GRAIN: Final = 4096
#: Bytes that are written at a time.
BUFFER: Final = 1 << 20
_ZEROS: Final = bytes(BUFFER)


@dataclasses.dataclass(frozen=True)
class Part:
    """A file: its bytes and their sha256."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """The limits that an instance must be within (MiB, counts)."""

    memory: int
    max_memory: int
    vcpus: int
    slots: int

    @classmethod
    def of(cls, config: template.Config) -> Self:
        """Those of a template."""
        return cls(config.memory, config.max_memory, config.vcpus,
                   config.slots)


@dataclasses.dataclass(frozen=True)
class Description:
    """``microvm.json``.

    :ivar virtual_size: bytes of the image's disk.
    :ivar parts: by name.
    :ivar baked: seconds since 1970.
    """

    key: Key
    machine: Machine
    identity: identity.Places
    virtual_size: int
    parts: dict[str, Part]
    baked: int

    def pack(self) -> bytes:
        """The file's bytes."""
        return json.dumps({
            'format': FORMAT, 'version': VERSION, 'key': self.key.to_json(),
            'machine': dataclasses.asdict(self.machine),
            'identity': self.identity.to_json(),
            'virtual_size': self.virtual_size, 'baked': self.baked,
            'parts': {name: dataclasses.asdict(part)
                      for name, part in self.parts.items()},
        }, sort_keys=True, indent=1).encode() + b'\n'

    @classmethod
    def parse(cls, data: bytes, what: str = DESCRIPTION) -> Self:
        """Read the file's bytes.

        :raises Corrupt: they make no sense.
        :raises UnknownVersion: they are of a newer format.
        """
        try:
            if len(data) > _LIMIT:
                raise ValueError('too long')
            value = json.loads(data)
            if value['format'] != FORMAT:
                raise ValueError('another format')
            if value['version'] != VERSION:
                raise exception.UnknownVersion(
                    f'{what}: version {value["version"]!r:.20}')
            return cls._parse(value)
        except (KeyError, TypeError, ValueError, RecursionError,
                AttributeError) as error:
            raise exception.Corrupt(f'{what}: {error!r:.200}') from error

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> Self:
        if set(value) != _MEMBERS or set(value['parts']) != {MEMORY, DISK}:
            raise ValueError('other members')
        if set(value['machine']) != _MACHINE:
            raise ValueError('other limits')
        machine = Machine(**{name: _number(number, 1 << 32) for name, number
                             in value['machine'].items()})
        found = cls(
            Key.from_json(value['key']), machine,
            identity.Places.from_json(value['identity']),
            _number(value['virtual_size']),
            {name: _part(part) for name, part in value['parts'].items()},
            _number(value['baked']))
        if found.identity.end > found.parts[MEMORY].size:
            raise ValueError('identity behind the end of the memory')
        return found


def read(directory: pathlib.Path) -> Description:
    """The description in a directory; its parts have the sizes it says.

    :raises NotFound: there is no artifact.
    :raises Corrupt: it makes no sense.
    """
    path = directory / DESCRIPTION
    try:
        with open(path, 'rb') as file:
            found = Description.parse(file.read(_LIMIT + 1), str(path))
        for name, part in found.parts.items():
            if (directory / name).stat().st_size != part.size:
                raise exception.Corrupt(f'{directory / name}: not '
                                        f'{part.size} bytes')
    except FileNotFoundError as error:
        raise exception.NotFound(
            f'{directory} is no µVM: {error.filename}') from error
    return found


def write(directory: pathlib.Path, description: Description) -> None:
    """Make the parts that are in a directory an artifact."""
    files.write_atomically(directory / DESCRIPTION, description.pack())


@contextlib.contextmanager
def copied(directory: pathlib.Path, description: Description, name: str,
           target: pathlib.Path) -> Iterator[None]:
    """A part as a new file, which is removed if it is not all right, or if
    the body fails.

    :raises Corrupt: the part is not what it was.
    :raises Exists: there is such a file; it stays.
    :raises NoSpace: no room for it.
    """
    try:
        with (directory / name).open('rb') as source:
            found = copy(source.fileno(), target)
        if found != description.parts[name]:
            raise exception.Corrupt(
                f'{directory / name}: its digest is another')
        yield
    except exception.Exists:
        raise
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def copy(source: int, target: pathlib.Path, limit: int = _SIZE_LIMIT
         ) -> Part:
    """Copy an open file to a new one; see :func:`save`."""
    return save(target, _pieces(source), limit)


def _pieces(source: int) -> Iterator[bytes]:
    at = 0
    while data := os.pread(source, BUFFER, at):
        yield data
        at += len(data)


def save(target: pathlib.Path, pieces: Iterable[bytes],
         limit: int = _SIZE_LIMIT) -> Part:
    """Write a new file, runs of zeros as holes; durably.

    :param pieces: its bytes, :data:`BUFFER` at a time.
    :param limit: bytes that it may have.
    :raises Exists: there is such a file.
    :raises Corrupt: it is longer than that.
    :raises NoSpace: no room for it.
    """
    try:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError as error:
        raise exception.Exists(f'{target} is there') from error
    try:
        return _save(fd, pieces, limit)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise exception.NoSpace(f'{target}: {error.strerror}') from error
        raise
    finally:
        os.close(fd)


def _save(fd: int, pieces: Iterable[bytes], limit: int) -> Part:
    digest, size = hashlib.sha256(), 0
    for data in pieces:
        digest.update(data)
        _write_sparsely(fd, data, size)
        size += len(data)
        if size > limit:
            raise exception.Corrupt(f'more than {limit} bytes to copy')
    os.ftruncate(fd, size)
    files.sync(fd)
    return Part(size, digest.hexdigest())


def _write_sparsely(fd: int, data: bytes, offset: int) -> None:
    """Write what is not zeros, in grains."""
    if data == _ZEROS[:len(data)]:
        return
    view = memoryview(data)
    start = 0
    for at in range(0, len(data), _GRAIN):
        piece = view[at:at + _GRAIN]
        if piece == _ZEROS[:len(piece)]:
            if at > start:
                os.pwrite(fd, view[start:at], offset + start)
            start = at + len(piece)
    if start < len(data):
        os.pwrite(fd, view[start:], offset + start)


def _part(value: Any) -> Part:
    if set(value) != {'size', 'sha256'} or not _DIGEST.fullmatch(
            value['sha256']):
        raise ValueError('a part is no part')
    return Part(_number(value['size']), value['sha256'])


def _number(value: Any, limit: int = _SIZE_LIMIT) -> int:
    if type(value) is not int or not 0 < value < limit:
        raise ValueError(f'not a size: {value!r:.50}')
    return value
