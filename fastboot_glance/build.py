# SPDX-License-Identifier: Apache-2.0
"""From an image file to a published image: inspect, boot, publish."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import numpy as np

from fastboot_common import (
    exception,
    extents,
    files,
    manifest,
    publish,
    trace,
)
from fastboot_glance import capture, source

LOG = logging.getLogger(__name__)

#: Seconds that a guest may die before it is said that all is to stop.
_STOPPED: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Request:
    """An image that is to be published.

    :ivar image_format: what the uploader calls it; None: unknown.
    :ivar boot: whether to boot it; without, it has no boot set.
    :ivar origin: the service that it came from; None: a file.
    :ivar largest: bytes that its disk may have.
    :ivar copy_limit: bytes that its raw copy may take; None: any.
    """

    path: pathlib.Path
    image_id: str
    name: str
    visibility: str = 'public'
    owner: str = ''
    image_format: str | None = None
    boot: bool = True
    origin: str | None = None
    largest: int = source.LARGEST
    copy_limit: int | None = None


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


class Keeper(Protocol):
    """Keeps the capture of an image, should its build be repeated."""

    def read_capture(self, digest: str) -> capture.Capture | None:
        """What was kept for the image with this sha512, if anything."""

    def keep_capture(self, digest: str, found: capture.Capture) -> None:
        """Keep it."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image that was inspected and booted.

    :ivar draft: its manifest, as far as a capture tells it.
    """

    image: source.Source
    draft: manifest.Manifest


@contextlib.contextmanager
def prepare(request: Request, block_size: int, workdir: pathlib.Path,
            options: Any, progress: Progress,
            cancel: threading.Event | None = None,
            keeper: Keeper | None = None) -> Iterator[Prepared]:
    """Inspect and boot an image, and have its raw bytes for a while.

    :param block_size: of the repository (bytes).
    :param workdir: for temporary files as large as the image.
    :param options: the group ``[capture]``.
    :raises ImageRejected: the image may not be used.
    :raises NoSpace: no room in `workdir`.
    :raises Busy: cancelled.
    """
    progress.phase('inspecting', None)
    with source.open_source(request.path, workdir,
                            claimed_format=request.image_format,
                            user=options.user, hashes=('sha512',),
                            cancel=cancel, largest=request.largest,
                            copy_limit=request.copy_limit) as image:
        captured = _capture(request, image, workdir, options, progress,
                            cancel, keeper)
        if cancel and cancel.is_set():
            raise exception.Busy(f'image {request.image_id}: cancelled')
        if captured.state == 'failed':
            LOG.warning('image %s: no boot set: %s', request.image_id,
                        captured.reason)
        yield Prepared(image, _draft(request, image, captured, block_size))


def build(request: Request, publisher: publish.Publisher, block_size: int,
          workdir: pathlib.Path, options: Any, progress: Progress,
          cancel: threading.Event | None = None,
          keeper: Keeper | None = None) -> publish.Published:
    """Publish an image with the boot set that its boots show.

    An image that does not boot is published without one, and with the
    reason.

    :param cancel: when set, the build is given up.
    :param keeper: has the capture, or gets it; None: it is made anew.
    :raises ImageRejected: the image may not be used.
    :raises Exists: its id is registered with other content.
    :raises NoSpace: no room in `workdir` or in the repository.
    :raises Busy: cancelled.
    """
    def count(done: int) -> None:
        if cancel and cancel.is_set():
            raise exception.Busy(f'image {request.image_id}: cancelled')
        progress.bytes(done)

    with prepare(request, block_size, workdir, options, progress, cancel,
                 keeper) as ready:
        progress.phase('publishing', _data_bytes(ready.image.raw_path))
        return publisher.publish(
            ready.image.raw_path, ready.draft, visibility=request.visibility,
            owner=request.owner, progress=count)


def _capture(request: Request, image: source.Source, workdir: pathlib.Path,
             options: Any, progress: Progress, cancel: threading.Event | None,
             keeper: Keeper | None) -> capture.Capture:
    if not request.boot or not image.virtual_size:
        return capture.Capture(trace.empty(), 'none', 'not asked for', None,
                               [], '')
    digest = image.os_hash['sha512']
    kept = keeper.read_capture(digest) if keeper else None
    if kept:
        return kept
    progress.phase('booting', None)
    found = capture.capture(
        image.raw_path, image.virtual_size, workdir, options,
        progress=progress.boot, cancel=cancel)
    # Who stops a service may stop its guests first.
    if found.state == 'failed' and cancel and cancel.wait(_STOPPED):
        raise exception.Busy(f'image {request.image_id}: cancelled')
    if keeper and found.state != 'none':
        keeper.keep_capture(digest, found)
    return found


def _draft(request: Request, image: source.Source,
           captured: capture.Capture, block_size: int) -> manifest.Manifest:
    boot = trace.boot_set(captured.trace, block_size, image.virtual_size)
    return manifest.Manifest(
        image_id=request.image_id, name=request.name,
        virtual_size=image.virtual_size, block_size=block_size, root='',
        packs=[], extents=np.empty(0, extents.DTYPE),
        boot=boot[:manifest.BOOT_LIMIT], trace=captured.trace,
        os_hash=image.os_hash,
        source={'format': image.format, 'size': image.size} | (
            {'origin': request.origin} if request.origin else {}),
        capture=captured.header())


def _data_bytes(path: pathlib.Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return sum(end - start
                   for start, end in files.data_ranges(fd, 0, size))
    finally:
        os.close(fd)
