# SPDX-License-Identifier: Apache-2.0
"""Rewriting packs of which little is needed any more.

The blocks that images need go into new packs, in the order that they had;
the images get new manifests of the same content, all in one journal entry.
The old packs are retired: ``gc`` drops them after the retention time, when
every host has heard of it.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastboot_common import (
    exception,
    extents,
    journal,
    manifest,
    pack,
    publish,
    store,
)
from fastboot_common.repository import Repository

LOG = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
#: Blocks of a map that are looked at in one go, to bound memory.
_PIECE: Final = 1 << 20
#: Blocks that one run moves: it remembers 200 bytes or so of each.
_MOVED: Final = 1 << 21

_Live = npt.NDArray[np.bool_]


@dataclasses.dataclass
class Repacked:
    """What was done, or would be (bytes).

    :ivar retired: packs whose blocks are elsewhere now.
    :ivar before: bytes of these.
    :ivar after: bytes of the packs that have their blocks.
    """

    retired: int = 0
    images: int = 0
    before: int = 0
    after: int = 0


class _Repeat(Exception):
    """What was done so far is of no use."""


def repack(repository: Repository, below: float, *, level: int = 9,
           threads: int | None = None, dry_run: bool = False) -> Repacked:
    """Rewrite the packs of which less than a share is needed.

    Those first of which least is; what is too much for one run is left to
    the next. Safe to interrupt: without the entry, nothing has changed. What
    cannot be read is left as it is, with a warning.

    :param below: of a pack's blocks, from 0 to 1.
    :param level: of zstd.
    :param threads: for compressing; None: one a CPU.
    :raises Busy: others kept changing the images.
    """
    with concurrent.futures.ThreadPoolExecutor(
            threads or len(os.sched_getaffinity(0))) as pool:
        left: set[str] = set()
        for _ in range(_ATTEMPTS):
            work = _Work(repository, below, level, pool, left)
            try:
                return work.run(dry_run)
            except _Repeat as reason:
                LOG.info('repacking again: %s', reason)
            finally:
                work.clean()
    raise exception.Busy('others kept changing the images; repeat later')


class _Work:
    """One attempt.

    :ivar left: images that keep their packs, because they cannot be
        described otherwise.
    """

    def __init__(self, repository: Repository, below: float, level: int,
                 pool: concurrent.futures.Executor, left: set[str]) -> None:
        self._left = left
        self._repository = repository
        self._target: Any = repository.store
        self._state = repository.state()
        self._below = below
        self._level = level
        self._pool = pool
        self._refs: dict[str, pack.PackRef] = {}
        #: The packs of each image.
        self._uses: dict[str, set[str]] = {}
        self._writers: list[pack.PackWriter] = []
        self._new: list[pack.PackRef] = []
        #: Of each old pack: the writer and the ordinal of each block.
        self._moved: dict[str, tuple[Any, Any]] = {}
        #: The same by digest: publishers who raced stored some twice.
        self._places: dict[bytes, tuple[int, int]] = {}

    def run(self, dry_run: bool) -> Repacked:
        chosen = self._choose()
        result = Repacked(len(chosen), before=sum(
            self._refs[digest].size for digest in chosen))
        if dry_run or not chosen:
            return result
        for digest, live in sorted(chosen.items()):
            self._move(self._refs[digest], live)
        self._new = [writer.finish() for writer in self._writers]
        made = self._rewrite_all(set(chosen))
        self._publish(chosen.keys(), made)
        result.images = len(made)
        result.after = sum(ref.size for ref in self._new)
        return result

    def clean(self) -> None:
        """Remove what did not get into the store."""
        for writer in self._writers:
            writer.abandon()

    # What to do

    def _choose(self) -> dict[str, _Live]:
        """The packs to rewrite, and which of their blocks are needed."""
        live: dict[str, _Live] = {}
        try:
            for image in self._state.images.values():
                self._mark(image, live)
            # Who was deregistered keeps its old manifest, and its packs.
            keep = [gone.image.manifest
                    for gone in self._state.removed.values()]
            keep += [image.manifest for image in self._state.images.values()
                     if image.image_id in self._left]
            held = {ref.digest for digest in keep
                    for ref in self._repository.read_manifest(digest).packs}
        except exception.UNREADABLE as error:
            # No pack is collected meanwhile: it would only take more room.
            LOG.warning('nothing is repacked: %s', error)
            return {}
        chosen: dict[str, _Live] = {}
        room = _MOVED
        for digest, used in sorted(live.items(),
                                   key=lambda item: item[1].mean()):
            if digest in held or digest in self._state.retired:
                continue
            if used.mean() >= self._below:
                break
            if not self._is_whole(self._refs[digest], used):
                continue
            room -= int(used.sum())
            if room < 0:
                break
            chosen[digest] = used
        return chosen

    def _is_whole(self, ref: pack.PackRef, live: _Live) -> bool:
        try:
            index = self._repository.pack_index(ref)
            for frame in _frames(index, live):
                self._repository.pack_plain(index, frame)
        except exception.UNREADABLE as error:
            LOG.warning('pack %s is not rewritten: %s', ref.digest, error)
            return False
        return True

    def _mark(self, image: journal.Image, live: dict[str, _Live]) -> None:
        found = self._repository.read_manifest(image.manifest)
        self._uses[image.image_id] = {ref.digest for ref in found.packs}
        for ref in found.packs:
            self._refs[ref.digest] = ref
            live.setdefault(ref.digest, np.zeros(ref.blocks, bool))
        for row in found.extents.tolist():
            _, count, position, ordinal = row
            live[found.packs[position].digest][ordinal:ordinal + count] = True

    def _images(self, chosen: set[str]) -> list[journal.Image]:
        return [image for image in self._state.images.values()
                if chosen & self._uses[image.image_id]]

    # Doing it

    def _move(self, ref: pack.PackRef, live: _Live) -> None:
        """Copy the needed blocks of a pack into the newest one."""
        index = self._repository.pack_index(ref)
        size = self._repository.block_size
        writers = np.full(ref.blocks, -1, np.int64)
        ordinals = np.zeros(ref.blocks, np.int64)
        for frame in _frames(index, live):
            plain = memoryview(self._repository.pack_plain(index, frame))
            first, end = index.first[frame:frame + 2].tolist()
            for ordinal in range(first, end):
                if live[ordinal]:
                    at = (ordinal - first) * size
                    writers[ordinal], ordinals[ordinal] = self._place(
                        index.digests[ordinal].tobytes(),
                        plain[at:at + size])
        self._moved[ref.digest] = writers, ordinals

    def _place(self, digest: bytes, data: memoryview) -> tuple[int, int]:
        found = self._places.get(digest)
        if found is None:
            ordinal = self._writer().add(digest, data)
            found = self._places[digest] = len(self._writers) - 1, ordinal
        return found

    def _writer(self) -> pack.PackWriter:
        size = self._repository.block_size
        if not self._writers or (
                self._writers[-1].blocks >= publish.PACK // size):
            self._writers.append(pack.PackWriter(
                self._target.scratch(), size, self._level, self._pool))
        return self._writers[-1]

    def _rewrite_all(self, chosen: set[str]) -> dict[str, bytes]:
        made, before = {}, len(self._left)
        for image in self._images(chosen):
            try:
                made[image.image_id] = self._rewrite(image)
            except (exception.ImageRejected,
                    *exception.UNREADABLE) as error:
                LOG.warning('the packs of image %s are not rewritten: %s',
                            image.image_id, error)
                self._left.add(image.image_id)
        if len(self._left) > before:
            raise _Repeat('some images keep their packs')
        return made

    def _rewrite(self, image: journal.Image) -> bytes:
        """The new manifest of an image, proven to have its content."""
        old = self._repository.read_manifest(image.manifest)
        places: dict[str, int] = collections.defaultdict(
            lambda: len(places))
        refs = {ref.digest: ref for ref in (*old.packs, *self._new)}
        parts = [self._replace(old.packs, part, places)
                 for part in extents.pieces(old.extents, _PIECE)]
        data = dataclasses.replace(
            old, extents=extents.concatenate(parts),
            packs=[refs[digest] for digest in places]).pack()
        made = manifest.Manifest.unpack(
            data, hashlib.sha256(data).hexdigest())
        if publish.content_root(made, self._index) != old.root:
            raise exception.Corrupt(
                f'image {image.image_id}: repacking it gave other content; '
                f'nothing was changed')
        return data

    def _replace(self, packs: list[pack.PackRef], part: extents.Extents,
                 places: dict[str, int]) -> extents.Extents:
        numbers, positions, ordinals = extents.expand(part)
        after = np.zeros(len(positions), np.int64)
        for position in np.unique(positions).tolist():
            which = positions == position
            digest = packs[position].digest
            if digest not in self._moved:
                after[which] = places[digest]
                continue
            writers, moved = self._moved[digest]
            old = ordinals[which]
            ordinals[which] = moved[old]
            after[which] = [places[self._new[writer].digest]
                            for writer in writers[old].tolist()]
        return extents.merge(numbers, after, ordinals)

    def _index(self, ref: pack.PackRef) -> pack.PackIndex:
        for writer, new in zip(self._writers, self._new, strict=True):
            if new.digest == ref.digest and writer.path.exists():
                return writer.index(ref)
        return self._repository.pack_index(ref)

    def _publish(self, chosen: Any, made: dict[str, bytes]) -> None:
        manifests = {image_id: {
            'manifest': hashlib.sha256(data).hexdigest(),
            'manifest_size': len(data)} for image_id, data in made.items()}

        def build(state: journal.State) -> dict[str, Any]:
            if any(state.images.get(image_id)
                   != self._state.images[image_id] for image_id in made) \
                    or not chosen <= state.packs.keys():
                raise _Repeat('the images have changed')
            self._store(made)
            return {'manifests': manifests, 'retired': sorted(chosen),
                    'packs': [{'digest': ref.digest, 'size': ref.size}
                              for ref in self._new]}

        self._repository.append('repack', build)
        # What was there already, gc may have taken for a leftover before
        # the entry said otherwise.
        self._store(made)

    def _store(self, made: dict[str, bytes]) -> None:
        for ref, writer in zip(self._new, self._writers, strict=True):
            if writer.path.exists():
                self._target.put(store.object_name('packs', ref.digest),
                                 writer.path)
        for data in made.values():
            self._repository.keep_manifest(data)


def _frames(index: pack.PackIndex, live: _Live) -> list[int]:
    """The frames of a pack that have needed blocks."""
    found: list[int] = np.unique(
        index.frame_of(np.flatnonzero(live))).tolist()
    return found
