# SPDX-License-Identifier: Apache-2.0
"""From an image file to a published image: inspect, boot, publish."""

import dataclasses
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fastboot_common import extents, files, manifest, publish, trace
from fastboot_glance import capture, source

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """An image that is to be published.

    :ivar image_format: what the uploader calls it; None: unknown.
    :ivar boot: whether to boot it; without, it has no boot set.
    """

    path: pathlib.Path
    image_id: str
    name: str
    visibility: str = 'public'
    owner: str = ''
    image_format: str | None = None
    boot: bool = True


@dataclasses.dataclass(frozen=True)
class Progress:
    """Who is told of what.

    :ivar phase: a phase begins: its name, and its bytes if known.
    :ivar bytes: bytes of the phase done since the last call.
    :ivar boot: see :data:`fastboot_glance.capture.Progress`.
    """

    phase: Callable[[str, int | None], None]
    bytes: Callable[[int], None]
    boot: capture.Progress


def build(request: Request, publisher: publish.Publisher, block_size: int,
          workdir: pathlib.Path, options: Any, progress: Progress,
          cancel: threading.Event | None = None) -> publish.Published:
    """Publish an image with the boot set that its boots show.

    An image that does not boot is published without one, and with the
    reason.

    :param block_size: of the repository (bytes).
    :param workdir: for temporary files as large as the image.
    :param options: the group ``[capture]``.
    :raises ImageRejected: the image may not be used.
    :raises Exists: its id is registered with other content.
    :raises NoSpace: no room in `workdir` or in the repository.
    """
    progress.phase('inspecting', None)
    with source.open_source(request.path, workdir,
                            claimed_format=request.image_format,
                            user=options.user, hashes=('sha512',),
                            cancel=cancel) as image:
        if request.boot and image.virtual_size:
            progress.phase('booting', None)
            captured = capture.capture(
                image.raw_path, image.virtual_size, workdir, options,
                progress=progress.boot, cancel=cancel)
        else:
            captured = capture.Capture(trace.empty(), 'none',
                                       'not asked for', None, [], '')
        if captured.state == 'failed':
            LOG.warning('image %s: no boot set: %s', request.image_id,
                        captured.reason)
        draft = _draft(request, image, captured, block_size)
        progress.phase('publishing', _data_bytes(image.raw_path))
        return publisher.publish(
            image.raw_path, draft, visibility=request.visibility,
            owner=request.owner, progress=progress.bytes)


def _draft(request: Request, image: source.Source,
           captured: capture.Capture, block_size: int) -> manifest.Manifest:
    return manifest.Manifest(
        image_id=request.image_id, name=request.name,
        virtual_size=image.virtual_size, block_size=block_size, root='',
        packs=[], extents=np.empty(0, extents.DTYPE),
        boot=trace.boot_set(captured.trace, block_size, image.virtual_size),
        trace=captured.trace, os_hash=image.os_hash,
        source={'format': image.format, 'size': image.size},
        capture=captured.header())


def _data_bytes(path: pathlib.Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return sum(end - start
                   for start, end in files.data_ranges(fd, 0, size))
    finally:
        os.close(fd)
