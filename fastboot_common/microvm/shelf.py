# SPDX-License-Identifier: Apache-2.0
"""µVMs in a repository of their own, beside that of the images.

There each is an image whose boot set is all of it: packs, journal,
retention, mirrors and quotas take it for one. Blocks are pages, whatever
the images' are, so that µVMs share the pages that they have in common.
"""

import dataclasses
import hashlib
import logging
import mmap
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from fastboot_common import (
    contents,
    exception,
    extents,
    journal,
    manifest,
    publish,
)
from fastboot_common.blocks import PAGE
from fastboot_common.microvm import (
    artifact,
    blob,
    pages,
    savefile,
    stream,
)
from fastboot_common.repository import Repository

LOG = logging.getLogger(__name__)

_NAME: Final = re.compile(r'([^/]{1,64})/([0-9a-f]{64})')


@dataclasses.dataclass(frozen=True)
class Name:
    """What a µVM is of, and which hosts can run it.

    An image's id may fill all that an id can have, so those of µVMs are
    made from their names; an entry of the journal has both.

    :ivar image: id of the image.
    :ivar group: name of the class of hosts; see :class:`key.Key`.
    """

    image: str
    group: str

    @property
    def text(self) -> str:
        """The name in the repository."""
        return f'{self.image}/{self.group}'

    @property
    def id(self) -> str:
        """The id in the repository."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def of(cls, entry: journal.Image) -> 'Name':
        """What an entry of the journal is of.

        :raises Corrupt: it is no µVM.
        """
        match = _NAME.fullmatch(entry.name)
        if match is not None:
            found = cls(match[1], match[2])
            if found.id == entry.image_id:
                return found
        raise exception.Corrupt(f'{entry.image_id}: {entry.name!r:.200} is '
                                f'no µVM of that id')


@dataclasses.dataclass(frozen=True)
class Put:
    """What putting a µVM on the shelf did (bytes, seconds).

    :ivar pages: pages of memory and disk that are not zeros.
    :ivar shared: those of them that the image has.
    :ivar blob: bytes of the blob.
    """

    published: publish.Published
    name: Name
    pages: int
    shared: int
    blob: int
    seconds: dict[str, float]


def put(directory: pathlib.Path, image: journal.Image, images: Repository,
        publisher: publish.Publisher, workdir: pathlib.Path, *,
        origin: str | None = None,
        phase: Callable[[str], None] = lambda name: None,
        progress: Callable[[int], None] | None = None) -> Put:
    """Publish an artifact.

    :param directory: of the artifact.
    :param image: that it was baked from, in `images`.
    :param publisher: into the repository of the µVMs.
    :param workdir: for a temporary file as large as the blob.
    :param origin: the service that looks after it; None: whoever put it.
    :param phase: told what begins.
    :param progress: told the bytes published.
    :raises NotFound: there is no artifact.
    :raises Corrupt: it is damaged.
    :raises Invalid: it is of another image.
    :raises Exists: the image has another µVM of that class.
    :raises NoSpace: no room in `workdir` or in the repository.
    """
    description = artifact.read(directory)
    if description.virtual_size != image.virtual_size:
        raise exception.Invalid(
            f'{directory} is of an image of {description.virtual_size} '
            f'bytes; image {image.image_id} has {image.virtual_size}')
    name = Name(image.image_id, description.key.digest)
    source = images.read_manifest(image.manifest)
    begun = time.monotonic()
    phase('splitting')
    with tempfile.TemporaryDirectory(dir=workdir, prefix='blob-') as room:
        path = pathlib.Path(room, 'blob')
        made = _split(directory, description, path, image.image_id, source,
                      contents.Contents(images, source))
        size = path.stat().st_size
        split = time.monotonic()
        phase('publishing')
        published = publisher.publish(
            path, _draft(name, size, source, {
                'platform': description.key.platform.text,
                **({'origin': origin} if origin else {})}),
            progress=progress,
            visibility=image.visibility, owner=image.owner)
    counts = [sum(one.count(source) for one in made.values())
              for source in (pages.BLOB, pages.IMAGE)]
    return Put(published, name, sum(counts), counts[1], size, {
        'split': split - begun, 'publish': time.monotonic() - split})


def _split(directory: pathlib.Path, description: artifact.Description,
           path: pathlib.Path, image_id: str, image: manifest.Manifest,
           read: contents.Contents) -> dict[str, pages.Layout]:
    """Write the blob of an artifact."""
    builder = blob.Builder(blob.known(
        read.pages, image.boot, image.block_size // PAGE))
    for name, expected in description.parts.items():
        data = _mapped(directory / name)
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise exception.Corrupt(
                f'{directory / name}: its digest is another')
        builder.add(name, data, _known(data)
                    if name == artifact.MEMORY else [])
    text = (directory / artifact.DESCRIPTION).read_bytes()
    if artifact.Description.parse(text) != description:
        raise exception.Busy(f'{directory} changed while it was read')
    return builder.write(path, image_id, image.root, text).layouts


def _known(data: memoryview) -> Sequence[int]:
    """Where the guest's pages are in its memory."""
    try:
        start = savefile.SaveFile.parse(
            bytes(data[:savefile.HEADER + savefile.DATA_LIMIT])).stream
    except exception.Corrupt:
        start = len(data)
    return stream.pages(data, start)


def _mapped(path: pathlib.Path) -> memoryview:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Unmapped when nobody has a part of it any more.
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    finally:
        os.close(fd)


def platform_of(found: manifest.Manifest) -> str:
    """Of the hosts that a µVM is for: the text of a platform."""
    return str(found.source.get('platform'))


def named(found: manifest.Manifest) -> tuple[str, str]:
    """The platform that a µVM is for, and the root of its image."""
    return platform_of(found), str(found.source.get('root'))


def _draft(name: Name, size: int, source: manifest.Manifest,
           more: dict[str, str]) -> manifest.Manifest:
    return manifest.Manifest(
        image_id=name.id, name=name.text, virtual_size=size,
        block_size=PAGE, root='', packs=[],
        extents=np.empty(0, extents.DTYPE),
        boot=np.arange(size // PAGE, dtype=np.int64),
        source={'format': 'microvm', 'size': size, 'image': name.image,
                'root': source.root, **more})


def entries(state: journal.State) -> Iterator[tuple[Name, journal.Image]]:
    """All µVMs. An entry that is none is told, and hides no other."""
    for entry in state.images.values():
        try:
            yield Name.of(entry), entry
        except exception.Corrupt as error:
            LOG.warning('%s', error)


def find(state: journal.State, image_id: str,
         group: str | None = None) -> journal.Image:
    """The µVM of an image.

    :param group: the beginning of a class's name; None: there is only one.
    :raises NotFound: there is none.
    :raises Invalid: there are several.
    """
    found = {}
    for name, entry in entries(state):
        if name.image == image_id and name.group.startswith(group or ''):
            found[name.group] = entry
    if not found:
        raise exception.NotFound(
            f'image {image_id} has no µVM'
            + (f' of class {group}' if group else ''))
    if len(found) > 1:
        raise exception.Invalid(
            f'image {image_id} has {len(found)} µVMs; choose a class: '
            + ', '.join(sorted(found)))
    return found.popitem()[1]


def take(entry: journal.Image, microvms: contents.Source,
         image: journal.Image, images: contents.Source,
         directory: pathlib.Path,
         progress: Callable[[int], None] = lambda count: None,
         ) -> artifact.Description:
    """Make an artifact again.

    :param entry: of the journal of `microvms`.
    :param image: that it was baked from, in `images`.
    :param directory: empty.
    :param progress: told the bytes written.
    :raises Corrupt: the image is another now, or a repository is damaged;
        nothing is left in `directory`.
    :raises NoSpace: no room for it.
    """
    name = Name.of(entry)
    own = contents.Contents(
        microvms, microvms.read_manifest(entry.manifest))
    found = blob.Blob.read(own.pages, entry.virtual_size)
    source = images.read_manifest(image.manifest)
    if (found.image, found.root, image.image_id) != (
            name.image, source.root, name.image):
        raise exception.Corrupt(
            f'the µVM of image {name.image} is of another content of it')
    if artifact.Description.parse(
            found.description).key.digest != name.group:
        raise exception.Corrupt(
            f'the µVM of image {name.image} is of another class')
    return found.unpack(
        directory, own.pages, contents.Contents(images, source).pages,
        progress)
