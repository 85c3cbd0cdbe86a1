# SPDX-License-Identifier: Apache-2.0
"""Backing chains: every backing string and ``<backingStore>`` there is.

disk (the guest's overlay) → stub (``_base/…``) → slot in the volume → export.
Shapes that QEMU, qemu-img and libvirt's parser all understand: see
reference/volume.
"""

import dataclasses
import json
import os
import pathlib
from typing import Final
from xml.etree import ElementTree

from fastboot_common import exception, files, qemu, sockets

#: The file of a volume, and the directory of its complete names beside it.
VOLUME: Final = 'volume'
COMPLETE: Final = 'complete'


@dataclasses.dataclass(frozen=True)
class Link:
    """Where the slot of an image is (sizes and offsets in bytes).

    :ivar size: of the volume.
    :ivar complete: its complete name, while it has one.
    """

    image_id: str
    volume: pathlib.Path
    size: int
    start: int
    virtual_size: int
    complete: pathlib.Path | None = None

    @property
    def backing(self) -> str:
        """The backing string of a stub; its format is qcow2."""
        inner = {
            'driver': 'raw', 'offset': self.start,
            'size': self.size - self.start,
            'file': {'driver': 'file',
                     'filename': str(self.complete or self.volume)},
        }
        whole: dict[str, object] = {'file': inner}
        if self.complete:
            whole = {'backing': None, **whole}
        return 'json:' + json.dumps(whole, separators=(',', ':'))


def nbd(image_id: str, socket: pathlib.Path) -> str:
    """The backing string of an incomplete slot; its format is raw.

    :raises Invalid: the socket's path is too long for a socket.
    """
    if len(str(socket)) > sockets.PATH_LIMIT:
        raise exception.Invalid(
            f'{socket}: {len(str(socket))} characters, a socket may have '
            f'{sockets.PATH_LIMIT}; use a shorter state directory')
    return f'nbd+unix:///{image_id}?socket={socket}'


def make_stub(path: pathlib.Path, link: Link) -> None:
    """Make the small qcow2 at the place of Nova's base image, or replace it.

    Guests that have an older one open keep it; both name the same slot.
    Two at once for one path must be kept apart by the caller.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    qemu.create_overlay(temporary, link.backing, 'qcow2', link.virtual_size)
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.sync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    files.sync_directory(path.parent)


def make_disk(path: pathlib.Path, stub: pathlib.Path, size: int) -> None:
    """Make a guest's overlay on a stub, without opening the chain.

    :param size: of the guest's disk (bytes).
    """
    qemu.create_overlay(path, str(stub), 'qcow2', size)


def backing_store(stub: pathlib.Path, link: Link, socket: pathlib.Path,
                  device: pathlib.Path | None = None) -> ElementTree.Element:
    """The ``<backingStore>`` of a disk whose overlay lies on `stub`.

    libvirt must get all of it: it probes the volume's poison otherwise.

    :param device: a block device that has the volume's bytes, to be read in
        its place.
    """
    outer, source = _layer('file', 'qcow2')
    source.set('file', str(stub))
    _keep_owner(source)
    inner, source = _layer('block' if device else 'file', 'qcow2', outer)
    if device:
        source.set('dev', str(device))
    else:
        source.set('file', str(link.complete or link.volume))
    _keep_owner(source)
    slices = ElementTree.SubElement(source, 'slices')
    ElementTree.SubElement(
        slices, 'slice', type='storage', offset=str(link.start),
        size=str(link.size - link.start))
    if link.complete:
        ElementTree.SubElement(inner, 'backingStore')
        return outer
    export, source = _layer('network', 'raw', inner)
    source.set('protocol', 'nbd')
    source.set('name', link.image_id)
    ElementTree.SubElement(source, 'host', transport='unix',
                           socket=str(socket))
    ElementTree.SubElement(export, 'backingStore')
    return outer


def _layer(kind: str, image_format: str,
           parent: ElementTree.Element | None = None,
           ) -> tuple[ElementTree.Element, ElementTree.Element]:
    layer = ElementTree.Element('backingStore', type=kind)
    if parent is not None:
        parent.append(layer)
    ElementTree.SubElement(layer, 'format', type=image_format)
    return layer, ElementTree.SubElement(layer, 'source')


def _keep_owner(source: ElementTree.Element) -> None:
    # libvirt would chown the file to QEMU's user and leave it so.
    ElementTree.SubElement(source, 'seclabel', model='dac', relabel='no')
