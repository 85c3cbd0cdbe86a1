# SPDX-License-Identifier: Apache-2.0
"""What the files of a guest's disk say about its chain.

Overlay → stub → slot, found by reading them: no agent, no qemu-img, and
nothing is opened that could wait. True for the disks of old instances,
rescue disks and images that nobody knows any more.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Final

from fastboot_common import chain, exception, qcow2

#: Of every qcow2, any version: magic, version, place and length of the
#: backing string, cluster bits, size.
_HEADER: Final = struct.Struct('>IIQIIQ')
#: Where a header has the L1 table's number of entries and offset.
_L1: Final = slice(36, 48)
#: Of an extension: type and length. Those of version 2 come at once.
_EXTENSION: Final = struct.Struct('>II')
_EXTENSIONS_V2: Final = 72
_HEADER_LENGTH: Final = slice(100, 104)
#: Which has the format of the backing, and is QEMU's first.
_BACKING_FORMAT: Final = 0xE2792ACA
_EXTENSIONS_LIMIT: Final = 4096
#: What the specification allows (docs/interop/qcow2.txt).
_BACKING_LIMIT: Final = 1023
#: Bytes of the largest cluster; the string ends in the first one.
_CLUSTER_LIMIT: Final = 2 << 20
_DESCRIPTION_LIMIT: Final = 64 << 10
_PREFIX: Final = 'json:'
#: Behind the name that Nova gives an image's base: its stub.
SUFFIX: Final = '_sm'
#: The disks that Nova makes as overlays. Others a guest may write as it likes,
#: from the first byte: its config drive, for instance.
_DISKS: Final = re.compile(r'disk(\.(rescue|local|swap|eph\d+))?')
#: How Nova names a server's directory: its UUID, and an end now and then.
_SERVER: Final = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')


@dataclasses.dataclass(frozen=True)
class Stub:
    """What a stub says (bytes).

    :ivar directory: of the volume.
    :ivar start: where the slot is in the volume.
    :ivar size: from there to the volume's end.
    :ivar virtual_size: of the image.
    :ivar complete: it names the complete name.
    """

    directory: pathlib.Path
    start: int
    size: int
    virtual_size: int
    complete: bool


def base_name(image_id: str) -> str:
    """The name that Nova gives the base of an image (imagecache.py)."""
    return hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()


def read_backing(path: pathlib.Path) -> tuple[str | None, int] | None:
    """Backing string and virtual size (bytes) of a qcow2 file.

    :returns: None if it is no qcow2.
    :raises NotFound: there is no such file.
    :raises Corrupt: it looks like a qcow2, but is none.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return None
            magic, _, offset, length, _, size = _HEADER.unpack(head)
            if magic != qcow2.MAGIC:
                return None
            if not offset:
                return None, size
            if length > _BACKING_LIMIT or offset > _CLUSTER_LIMIT:
                raise exception.Corrupt(f'{path}: backing string of '
                                        f'{length} bytes at {offset}')
            file.seek(offset)
            return file.read(length).decode(), size
    except FileNotFoundError as error:
        raise exception.NotFound(f'{path} is not there') from error
    except (UnicodeDecodeError, OverflowError, ValueError) as error:
        raise exception.Corrupt(f'{path}: backing string: {error}') from error


def backing_format(path: pathlib.Path) -> str | None:
    """The format that a qcow2 file says its backing has.

    :returns: None if it does not say, or is no qcow2.
    :raises NotFound: there is no such file.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(_EXTENSIONS_LIMIT)
    except FileNotFoundError as error:
        raise exception.NotFound(f'{path} is not there') from error
    magic, version = head[:4], int.from_bytes(head[4:8], 'big')
    if int.from_bytes(magic, 'big') != qcow2.MAGIC:
        return None
    place = _EXTENSIONS_V2 if version == 2 else int.from_bytes(
        head[_HEADER_LENGTH], 'big')
    while place + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, place)
        place += _EXTENSION.size
        if kind == _BACKING_FORMAT:
            return head[place:place + length].decode(errors='replace')
        if not kind:
            break
        place += -(-length // 8) * 8
    return None


def is_empty(path: pathlib.Path) -> bool:
    """Whether nothing was ever written to an overlay.

    :raises NotFound: there is no such file.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(_L1.stop)
            if len(head) < _L1.stop or int.from_bytes(
                    head[:4], 'big') != qcow2.MAGIC:
                return False
            entries, offset = struct.unpack('>IQ', head[_L1])
            length = 8 * entries
            if length > qcow2.L1_LIMIT:
                return False
            table = os.pread(file.fileno(), length, offset)
            return len(table) == length and not any(table)
    except FileNotFoundError as error:
        raise exception.NotFound(f'{path} is not there') from error
    except OverflowError:
        return False


def disks(instances: pathlib.Path, server: str = '') -> list[pathlib.Path]:
    """The disks of servers that may be overlays.

    Not by pathlib's glob: a directory that cannot be read is an empty one
    there (of any error since Python 3.12, of permissions before), and disks
    would count as gone.

    :param instances: Nova's ``instances_path``.
    :param server: the directory of one of them; '': all.
    :raises OSError: what a server has cannot be read.
    """
    found: list[pathlib.Path] = []
    for name in [server] if server else sorted(os.listdir(instances)):
        try:
            files = os.listdir(instances / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            if server or _SERVER.match(name):
                raise
            continue  # lost+found, for instance, is root's
        found += [instances / name / file for file in sorted(files)
                  if _DISKS.fullmatch(file)]
    return found


def lying_on(base: pathlib.Path) -> Iterator[pathlib.Path]:
    """The disks of servers that name a base as their backing.

    Of all that share its directory of instances, and in whatever state:
    rescued, resized, on their way here.

    :param base: in Nova's directory of bases; it need not be there.
    :raises OSError: a disk cannot be read, so nobody can tell.
    """
    for disk in disks(base.parent.parent):
        with contextlib.suppress(exception.FastbootError):
            found = read_backing(disk)
            if found and found[0] == str(base):
                yield disk


def read_stub(path: pathlib.Path) -> Stub | None:
    """What a stub says; None for any other file.

    :raises NotFound: there is no such file.
    """
    found = read_backing(path)
    if not found or not found[0] or not found[0].startswith(_PREFIX):
        return None
    backing, virtual_size = found[0], found[1]
    try:
        outer = json.loads(backing[len(_PREFIX):])
        inner = outer['file']
        name = pathlib.Path(inner['file']['filename'])
        start, size = inner['offset'], inner['size']
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not (isinstance(start, int) and isinstance(size, int)
            and name.is_absolute() and start % qcow2.SLOT == 0):
        return None
    complete = name.parent.name == chain.COMPLETE
    if not complete and name.name != chain.VOLUME:
        return None
    link = chain.Link(
        '', name.parent.parent / chain.VOLUME if complete else name,
        start + size, start, virtual_size, name if complete else None)
    # Whatever is not exactly what we write is not ours.
    if link.backing != backing:
        return None
    return Stub(link.volume.parent, start, size, virtual_size, complete)


def needs_stub(disk: pathlib.Path, base: pathlib.Path) -> bool:
    """Whether a disk cannot be read without a stub at its base's name.

    An old resized base may have the name; it has no such content. Nor has
    what Nova's own driver makes there, in our absence, for a disk of ours.

    :raises NotFound: the disk is not there.
    """
    return (not base.exists() or backing_format(disk) == 'qcow2'
            or read_stub(base) is not None)


def follow(stub: pathlib.Path) -> chain.Link:
    """Where the slot under a stub is now, and whether it is complete.

    :param stub: named as Nova names bases, with anything behind it.
    :raises NotFound: it is not there, or is no stub, or its slot is gone.
    :raises Corrupt: stub and volume contradict each other.
    """
    found = read_stub(stub)
    if found is None:
        raise exception.NotFound(f'{stub} is not a stub')
    image_id = _image_id(found.directory, stub)
    serial, virtual_size = _description(
        found.directory / 'images' / image_id)
    if (serial * qcow2.SLOT, virtual_size) != (
            found.start, found.virtual_size):
        raise exception.Corrupt(
            f'{stub} names the slot at {found.start}, where image '
            f'{image_id} is not; it must not be used')
    complete = found.directory / chain.COMPLETE / image_id
    return chain.Link(
        image_id, found.directory / chain.VOLUME, found.start + found.size,
        found.start, found.virtual_size,
        complete if complete.exists() else None)


def _image_id(directory: pathlib.Path, stub: pathlib.Path) -> str:
    # A stub of a complete image could tell, one of a lazy image cannot.
    try:
        names = os.listdir(directory / 'images')
    except (OSError, ValueError) as error:
        # A stub may name what no file system can have.
        raise exception.NotFound(
            f'{directory} has no images for {stub}: {error}') from error
    for name in names:
        if stub.name.startswith(base_name(name)):
            return name
    raise exception.NotFound(
        f'{directory} has no image for {stub}; was it evicted?')


def _description(path: pathlib.Path) -> tuple[int, int]:
    """Serial and virtual size (bytes) of an image in a volume."""
    try:
        with open(path, 'rb') as file:
            raw = json.loads(file.read(_DESCRIPTION_LIMIT))
        return int(raw['serial']), int(raw['virtual_size'])
    except FileNotFoundError as error:
        raise exception.NotFound(f'{path} is not there') from error
    except (ValueError, KeyError, TypeError, OverflowError,
            RecursionError) as error:
        raise exception.Corrupt(f'{path}: {error!r}') from error
