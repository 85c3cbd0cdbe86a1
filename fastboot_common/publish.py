# SPDX-License-Identifier: Apache-2.0
"""Publishing: from a raw disk to packs, a manifest and a journal entry."""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import pathlib
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from fastboot_common import (
    blocks,
    dedup,
    exception,
    extents,
    files,
    journal,
    manifest,
    pack,
    qcow2,
    store,
)
from fastboot_common import trace as traces
from fastboot_common.repository import Repository

LOG = logging.getLogger(__name__)

#: Plain bytes that are read and hashed as one piece of work.
_BATCH: Final = 4 * pack.FRAME
#: Plain bytes of a pack: bounds its index, and what gc can free at once.
PACK: Final = 256 << 20
#: New blocks that another publisher stored meanwhile are stored twice up to
#: this share of ours; beyond it, publishing starts again.
_TOLERATED_DUPLICATES: Final = 0.05
_ATTEMPTS: Final = 4

#: Blocks whose digests are gathered at once.
_PIECE: Final = 1 << 16

ROOT_DTYPE: Final = np.dtype([('block', '<u8'), ('digest', 'V32')])


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A piece of the disk: its blocks that are not zeros."""

    blocks: blocks.Blocks
    digests: list[bytes]
    data: list[memoryview]
    length: int


@dataclasses.dataclass(frozen=True)
class Published:
    """What publishing did.

    :ivar new_bytes: plain bytes that were new to the repository.
    :ivar stored_bytes: bytes of the new packs.
    """

    image: journal.Image
    created: bool
    new_bytes: int = 0
    stored_bytes: int = 0


class _Repeat(Exception):
    """Others changed the repository so that the work must be done anew."""


class Publisher:
    """Publishes images into one repository."""

    def __init__(self, repository: Repository, cache: pathlib.Path, *,
                 level: int = 3, boot_level: int = 9,
                 threads: int | None = None) -> None:
        """Open the publisher.

        :param cache: directory for the index of known blocks.
        :param level: of zstd, for all blocks but the boot set's.
        :param boot_level: of zstd, for the blocks that every host takes.
        :param threads: hashing and compressing; None: one a CPU.
        """
        self._repository = repository
        self._target: Any = repository.store
        self._index_path = cache / f'dedup-{repository.id}.sqlite'
        self._level = level
        self._boot_level = boot_level
        self._threads = threads or len(os.sched_getaffinity(0))

    def publish(self, raw: pathlib.Path, draft: manifest.Manifest, *,
                visibility: str = 'public', owner: str = '',
                progress: Callable[[int], None] | None = None) -> Published:
        """Publish the disk in `raw` as an image.

        :param raw: its guest-visible bytes.
        :param draft: a manifest with everything but root, packs and extents.
        :param progress: told the bytes done, of what is no hole in `raw`.
        :raises Exists: the id is registered with other content.
        :raises Invalid: the draft has no sense.
        :raises ImageRejected: no manifest can describe the disk.
        :raises NoSpace: the store is full; nothing was registered.
        """
        _check_draft(draft, self._repository.block_size)
        try:
            return self._publish(raw, draft, visibility, owner, progress)
        except sqlite3.OperationalError as error:
            raise exception.NoSpace(
                f'{self._index_path.parent}: {error}') from error

    def _publish(self, raw: pathlib.Path, draft: manifest.Manifest,
                 visibility: str, owner: str,
                 progress: Callable[[int], None] | None) -> Published:
        index = dedup.DedupIndex(self._index_path)
        try:
            with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                for _ in range(_ATTEMPTS):
                    work = _Work(self, index, pool, raw, draft, progress)
                    try:
                        return work.run(visibility, owner)
                    except _Repeat as reason:
                        LOG.info('image %s: publishing again: %s',
                                 draft.image_id, reason)
                        progress = None
                    except sqlite3.DatabaseError as error:
                        if isinstance(error, sqlite3.OperationalError):
                            raise
                        LOG.warning('%s: making it anew: %s',
                                    self._index_path, error)
                        index.discard()
                    finally:
                        work.clean()
        finally:
            index.close()
        raise exception.Busy(f'image {draft.image_id}: others kept changing '
                             f'the repository; repeat later')


class _Work:
    """One attempt at publishing one image."""

    def __init__(self, publisher: Publisher, index: dedup.DedupIndex,
                 pool: concurrent.futures.Executor, raw: pathlib.Path,
                 draft: manifest.Manifest,
                 progress: Callable[[int], None] | None) -> None:
        self._repository = publisher._repository
        self._target = publisher._target
        self._levels = (publisher._boot_level, publisher._level)
        self._window = 2 * publisher._threads
        self._index = index
        self._pool = pool
        self._raw = raw
        self._draft = draft
        self._progress = progress or (lambda count: None)
        self._writers: list[pack.PackWriter] = []
        #: Digests of packs that cannot be read.
        self._unread: set[str] = set()
        self._refs: list[pack.PackRef] = []
        self._parts: list[extents.Extents] = []
        self._boot_digests: list[tuple[int, bytes]] = []
        self._root = hashlib.sha256()

    def run(self, visibility: str, owner: str) -> Published:
        draft = self._draft
        state = self._repository.state()
        self._remembered = bool(self._index.packs())
        self._catch_up(state)
        self._read_disk()
        self._refs = [writer.finish() for writer in self._writers]
        draft.root = self._root.hexdigest()
        self._draft.extents, self._draft.packs = self._map()
        data = self._pack()
        digest = hashlib.sha256(data).hexdigest()
        self._prove(data, digest)
        image = {
            'image_id': draft.image_id, 'name': draft.name,
            'manifest': digest, 'manifest_size': len(data),
            'virtual_size': draft.virtual_size, 'visibility': visibility,
            'owner': owner, 'os_hash': draft.os_hash,
        }
        created = False

        def build(now: journal.State) -> dict[str, Any] | None:
            nonlocal created
            created = False
            if self._registered(now):
                return None
            self._check_against(now)
            self._store(data)
            created = True
            return {'image': image, 'packs': [
                {'digest': ref.digest, 'size': ref.size}
                for ref in self._refs]}

        after = self._repository.append('register', build)
        if created:
            # What was there already, gc may have taken for a leftover
            # before the entry said otherwise.
            self._store(data)
        return Published(
            after.images[draft.image_id], created,
            sum(ref.blocks for ref in self._refs) * draft.block_size,
            sum(ref.size for ref in self._refs))

    def _pack(self) -> bytes:
        """The manifest; without its trace if it is too large with it."""
        try:
            return self._draft.pack()
        except exception.ImageRejected as error:
            if not len(self._draft.trace):
                raise
            LOG.warning('%s: leaving its trace out', error)
            self._draft.trace = traces.empty()
            return self._draft.pack()

    def _prove(self, data: bytes, digest: str) -> None:
        """Whatever went wrong in index or map: it is not registered.

        A known pack may have been damaged since: without it, the work can be
        done.
        """
        writers = dict(zip((ref.digest for ref in self._refs),
                           self._writers, strict=True))

        def load(ref: pack.PackRef) -> pack.PackIndex:
            if ref.digest in writers:
                return self._own_index(ref, writers[ref.digest])
            return self._repository.pack_index(ref)

        try:
            made = manifest.Manifest.unpack(data, digest)
            if content_root(made, load) == made.root:
                return
        except exception.UNREADABLE as error:
            if not self._remembered:
                raise
            LOG.warning('image %s: %s', self._draft.image_id, error)
            self._repository.state()  # or is it the whole store?
        self._index.discard()
        raise _Repeat('the index of known blocks was wrong')

    def clean(self) -> None:
        """Remove what did not get into the store."""
        self._index.forget()
        for writer in self._writers:
            writer.abandon()

    # What others did

    def _catch_up(self, state: journal.State) -> None:
        # Nothing new is to need a pack that is on its way out.
        lacking = self._index.keep(state.packs.keys() - state.retired.keys())
        refs = self._repository.pack_refs(state, lacking - self._unread)
        for _, ref in sorted(refs.items()):
            try:
                self._index.add(self._repository.pack_index(ref))
            except exception.UNREADABLE as error:
                LOG.warning('nothing is deduplicated against a pack: %s',
                            error)
                self._unread.add(ref.digest)
                # If the whole store is away, nothing is to be stored twice.
                self._repository.state()

    def _registered(self, state: journal.State) -> bool:
        existing = state.images.get(self._draft.image_id)
        if existing is None:
            return False
        known = self._repository.read_manifest(existing.manifest)
        if (known.root, known.virtual_size) == (
                self._draft.root, self._draft.virtual_size):
            return True
        raise exception.Exists(
            f'image {existing.image_id} is registered with other content '
            f'(serial {existing.serial}); remove it first')

    def _check_against(self, state: journal.State) -> None:
        ours = {ref.digest for ref in self._refs}
        gone = {
            ref.digest for ref in self._draft.packs
        } - ours - state.packs.keys()
        if gone:
            raise _Repeat(f'{len(gone)} packs were dropped meanwhile')
        others = (state.packs.keys() - state.retired.keys()
                  - self._index.packs().keys() - ours - self._unread)
        if not others:
            return
        self._catch_up(state)
        self._index.forget()
        duplicates = sum(
            len(self._index.find([
                value.tobytes()
                for value in self._own_index(ref, writer).digests]))
            for ref, writer in zip(self._refs, self._writers, strict=True))
        total = sum(ref.blocks for ref in self._refs)
        if duplicates > _TOLERATED_DUPLICATES * total:
            raise _Repeat(f'{duplicates} of {total} new blocks were stored '
                          f'by others meanwhile')

    def _own_index(self, ref: pack.PackRef,
                   writer: pack.PackWriter) -> pack.PackIndex:
        if not writer.path.exists():
            return self._repository.pack_index(ref)
        return writer.index(ref)

    def _store(self, data: bytes) -> None:
        for ref, writer in zip(self._refs, self._writers, strict=True):
            if writer.path.exists():
                # The same blocks may make the same pack.
                self._target.put(store.object_name('packs', ref.digest),
                                 writer.path, ref.digest in self._unread)
        self._repository.keep_manifest(data)

    # The disk

    def _read_disk(self) -> None:
        fd = os.open(self._raw, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._phase(fd, self._boot_runs(), self._levels[0],
                        self._place_boot)
            boot = np.sort(self._draft.boot)
            rows = self._boot_rows()
            emitted = 0

            def place(scanned: Scanned) -> None:
                nonlocal emitted
                self._place(scanned)
                if not len(scanned.blocks):
                    return
                upto = int(np.searchsorted(rows['block'],
                                           scanned.blocks[-1]))
                self._hash_rows(scanned, rows[emitted:upto])
                emitted = upto

            self._phase(fd, self._rest_runs(fd, boot), self._levels[1], place)
            self._root.update(rows[emitted:].tobytes())
            # Zeros that the boot read are in its trace only.
            self._draft.boot = self._draft.boot[
                np.isin(self._draft.boot, rows['block'].astype(np.int64))]
        finally:
            os.close(fd)

    def _boot_rows(self) -> Any:
        rows = np.array(self._boot_digests, ROOT_DTYPE)
        rows.sort(order='block')
        return rows

    def _hash_rows(self, scanned: Scanned, boot: Any) -> None:
        rows = np.empty(len(scanned.blocks), ROOT_DTYPE)
        rows['block'] = scanned.blocks
        rows['digest'] = np.frombuffer(b''.join(scanned.digests), 'V32')
        if len(boot):
            rows = np.concatenate([rows, boot])
            rows = rows[np.argsort(rows['block'])]
        self._root.update(rows.tobytes())

    def _boot_runs(self) -> Iterator[list[tuple[int, int]]]:
        return _batches(blocks.runs(self._draft.boot),
                        _BATCH // self._draft.block_size)

    def _rest_runs(self, fd: int, boot: blocks.Blocks,
                   ) -> Iterator[list[tuple[int, int]]]:
        size, block = self._draft.virtual_size, self._draft.block_size
        limit = _BATCH // block
        done = 0
        for start, end in files.data_ranges(fd, 0, size):
            first = max(start // block, done)
            last = -(-end // block)
            while first < last:
                count = min(limit, last - first)
                yield _without(first, count, boot)
                first += count
            done = max(done, last)

    def _phase(self, fd: int, batches: Iterable[list[tuple[int, int]]],
               level: int, place: Callable[[Scanned], None]) -> None:
        """Scan on the pool, place in order; ends the pack it wrote."""
        self._level = level
        self._writer: pack.PackWriter | None = None
        waiting: deque[concurrent.futures.Future[Scanned]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(
                    _scan, fd, batch, self._draft.block_size,
                    self._draft.virtual_size))
                if len(waiting) >= self._window:
                    self._take(waiting.popleft(), place)
            while waiting:
                self._take(waiting.popleft(), place)
        finally:
            # The pool must be done with `fd` before it is closed.
            concurrent.futures.wait(waiting)

    def _take(self, future: concurrent.futures.Future[Scanned],
              place: Callable[[Scanned], None]) -> None:
        scanned = future.result()
        place(scanned)
        self._progress(scanned.length)

    def _place_boot(self, scanned: Scanned) -> None:
        self._place(scanned)
        self._boot_digests.extend(
            zip(scanned.blocks.tolist(), scanned.digests, strict=True))

    def _place(self, scanned: Scanned) -> None:
        """Find each block's place, storing those that have none."""
        if not scanned.digests:
            return
        places = self._index.find(scanned.digests)
        fresh = []
        for digest, data in zip(scanned.digests, scanned.data, strict=True):
            if digest not in places:
                writer = self._open_writer()
                place = (-len(self._writers), writer.add(digest, data))
                places[digest] = place
                fresh.append((digest, *place))
        self._index.remember(fresh)
        where = np.array([places[digest] for digest in scanned.digests],
                         np.int64)
        # The pack numbers become positions in the manifest later.
        self._parts.append(extents.merge(
            scanned.blocks, where[:, 0] & 0xFFFFFFFF, where[:, 1]))

    def _open_writer(self) -> pack.PackWriter:
        full = PACK // self._draft.block_size
        if self._writer is None or self._writer.blocks >= full:
            self._writer = pack.PackWriter(
                self._target.scratch(), self._draft.block_size, self._level,
                self._pool, ahead=self._window)
            self._writers.append(self._writer)
        return self._writer

    def _map(self) -> tuple[extents.Extents, list[pack.PackRef]]:
        """Extents with positions in the list of packs that they use."""
        whole = extents.concatenate(self._parts)
        known = self._index.refs()
        refs = []
        positions = np.zeros(len(whole), np.uint32)
        for position, number in enumerate(np.unique(whole['pack']).tolist()):
            positions[whole['pack'] == number] = position
            refs.append(known.get(number)
                        or self._refs[(1 << 32) - number - 1])
        whole['pack'] = positions
        return whole, refs


def content_root(image: manifest.Manifest, load: Callable[
        [pack.PackRef], pack.PackIndex]) -> str:
    """The root that follows from an image's map and its packs' indexes."""
    indexes = [load(ref) for ref in image.packs]
    whole = hashlib.sha256()
    for part in extents.pieces(image.extents, _PIECE):
        numbers, packs, ordinals = extents.expand(part)
        rows = np.empty(len(numbers), ROOT_DTYPE)
        rows['block'] = numbers
        for position in np.unique(packs).tolist():
            which = packs == position
            rows['digest'][which] = indexes[position].digests[
                ordinals[which]]
        whole.update(rows.tobytes())
    return whole.hexdigest()


def _check_draft(draft: manifest.Manifest, block_size: int) -> None:
    journal.validate_image_id(draft.image_id)
    if draft.block_size != block_size:
        raise exception.Invalid(
            f'image {draft.image_id}: blocks of {draft.block_size} bytes, '
            f'the repository has {block_size}')
    if not qcow2.fits(draft.virtual_size, block_size):
        raise exception.Invalid(
            f'image {draft.image_id}: a disk of {draft.virtual_size} bytes; '
            f'it must be a multiple of 512 that a slot can hold')
    boot = draft.boot
    if len(np.unique(boot)) != len(boot) or (
            (boot < 0) | (boot >= draft.block_count)).any():
        raise exception.Invalid(
            f'image {draft.image_id}: its boot set has blocks twice, or '
            f'behind the end')


def _batches(found: list[tuple[int, int]], limit: int,
             ) -> Iterator[list[tuple[int, int]]]:
    """Runs, cut and gathered into lists of `limit` blocks."""
    batch: list[tuple[int, int]] = []
    room = limit
    for first, count in found:
        while count:
            part = min(count, room)
            batch.append((first, part))
            first, count, room = first + part, count - part, room - part
            if not room:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _without(first: int, count: int,
             excluded: blocks.Blocks) -> list[tuple[int, int]]:
    """The runs of a range that are not in `excluded` (sorted)."""
    low, high = np.searchsorted(excluded, (first, first + count))
    if low == high:
        return [(first, count)]
    numbers = np.arange(first, first + count)
    return blocks.runs(np.setdiff1d(numbers, excluded[low:high], True))


def _scan(fd: int, batch: list[tuple[int, int]], block_size: int,
          virtual_size: int) -> Scanned:
    """Read and hash runs of blocks (on a thread of the pool)."""
    numbers, digests, data = [], [], []
    for first, count in batch:
        start = first * block_size
        # Behind the end of the disk lie zeros, whatever the file has there.
        inside = min(count * block_size, virtual_size - start)
        buffer = blocks.read_exactly(fd, inside, start)
        buffer.extend(bytes(count * block_size - inside))
        view = memoryview(buffer)
        which = blocks.nonzero(view, block_size)
        digests += blocks.digests(view, block_size, which)
        found = np.flatnonzero(which)
        numbers.append(first + found)
        data += [view[at:at + block_size]
                 for at in (found * block_size).tolist()]
    return Scanned(np.concatenate(numbers) if numbers
                   else np.empty(0, np.int64), digests, data,
                   sum(count for _, count in batch) * block_size)
