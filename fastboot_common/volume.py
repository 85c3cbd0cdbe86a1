# SPDX-License-Identifier: Apache-2.0
"""The volume: one sparse file that QEMU reads as many qcow2 images.

See reference/volume for the format, the order of writes and why. One process
writes; anyone may read.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastboot_common import (
    blockindex,
    blocks,
    exception,
    files,
    journal,
    qcow2,
    slot,
)

LOG = logging.getLogger(__name__)

DEFAULT_SIZE: Final = 8 << 40
_POISON_PREFIX: Final = '/nonexistent/fastboot'
#: What a libvirt or qemu-img that probes the file reports; so, what Nova's
#: own driver says when it is to start a server of ours.
POISON: Final = (f'{_POISON_PREFIX}/this-disk-needs-compute_driver='
                 f'fastboot.FastbootLibvirtDriver,'
                 f'or-fastbootctl-host-detach-before-that-is-removed')
#: L2 tables that are built in memory at once when a slot is made.
_TABLES_AT_ONCE: Final = 512
#: Bytes of tables that are written again at once.
_PIECE: Final = 1 << 20
#: What `check` lists of one image at most.
_PROBLEMS: Final = 100

Offsets = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Image:
    """An image in a volume: the content of ``images/<image id>``."""

    image_id: str
    serial: int
    manifest: str
    virtual_size: int


@dataclasses.dataclass(frozen=True)
class Lease:
    """Who needs an image here: the content of ``leases/<image id>/<name>``.

    :ivar holder: an instance's id, or a service.
    :ivar file: the lease lasts while that file exists; '': until it is
        released.
    :ivar since: when it was last asked for (seconds since the epoch).
    """

    name: str
    holder: str
    file: str
    since: float


@dataclasses.dataclass(frozen=True)
class Batch:
    """Blocks to put into a volume that come out of one frame.

    :ivar numbers: the image's blocks, each once.
    :ivar digests: their digests.
    :ivar positions: where each lies in what `load` gives (in blocks).
    :ivar load: gives the plain, verified bytes; called on a pool.
    """

    numbers: blocks.Blocks
    digests: list[bytes]
    positions: blocks.Blocks
    load: Callable[[], bytes]


#: Gives blocks and digests of an image, for rebuilding the index.
Resolve = Callable[[Image, blocks.Blocks], Iterable[bytes]]
#: Gives the digests of blocks of an image.
Digests = Callable[[blocks.Blocks], list[bytes]]
#: Told plain bytes as they are done.
Progress = Callable[[int], None]


class Volume:
    """One volume. Methods may be called from several threads."""

    def __init__(self, path: pathlib.Path, block_size: int, *,
                 backing: Callable[[str], str], resolve: Resolve,
                 size: int = DEFAULT_SIZE, writable: bool = True) -> None:
        """Open the volume in directory `path`, made if it is not there.

        :param backing: the backing string of an incomplete image's slot.
        :param resolve: gives digests of blocks, should the index be lost.
        :param size: apparent size (bytes) of a volume that is made.
        :param writable: become the writer.
        :raises Busy: another process is the writer.
        :raises Corrupt: the file is no volume.
        :raises Invalid: its cluster size is another.
        """
        self.path = path
        self.file = path / 'volume'
        self.block_size = block_size
        self._backing = backing
        self._resolve = resolve
        self._mutex = threading.RLock()
        #: Guards the two below; leases do not wait for those who fill.
        self._guests = threading.Condition()
        #: Images whose lease is being written: how many.
        self._arriving: collections.Counter[str] = collections.Counter()
        #: Images that are being evicted.
        self._leaving: set[str] = set()
        self._slots: dict[str, slot.Slot] = {}
        self._index: blockindex.BlockIndex
        #: Where the next cluster comes from, and where that run ends.
        self._gap = self._cursor = slot.DATA
        self._limit = size
        #: Behind the last cluster ever given out.
        self._end = slot.DATA
        #: Whether tables may differ from what the device has: a sync failed,
        #: perhaps one of the process before.
        self._lost = True
        #: Runs that the operation under way had from other gaps.
        self._given: list[tuple[int, int]] = []
        with contextlib.ExitStack() as stack:
            if writable:
                self._lock_fd = _lock(path)
                stack.callback(os.close, self._lock_fd)
                if not self.file.exists():
                    # One that is left names clusters of another file.
                    self._remove_index()
                    _make(self.file, block_size, size)
            self._fd = _open(self.file, writable)
            stack.callback(os.close, self._fd)
            self._check_poison()
            self.size = os.fstat(self._fd).st_size
            if writable:
                _end_counting(self._fd)
                self._open_index()
                stack.callback(lambda: self._index.close())
                self._follow_backing()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Close the files and give the lock back."""
        self._resources.close()

    def __enter__(self) -> 'Volume':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_poison(self) -> None:
        header = qcow2.Header.unpack(
            os.pread(self._fd, qcow2.HEADER_LIMIT, 0))
        if not (header.backing or '').startswith(_POISON_PREFIX):
            raise exception.Corrupt(f'{self.file}: not a volume')
        if 1 << header.cluster_bits != self.block_size:
            raise exception.Invalid(
                f'{self.file} has clusters of {1 << header.cluster_bits} '
                f'bytes, the repository blocks of {self.block_size}')

    # What is there

    def images(self) -> dict[str, Image]:
        """The images that have a slot, or are about to."""
        return {path.name: _read_image(path)
                for path in self._descriptions()}

    def _descriptions(self) -> list[pathlib.Path]:
        directory = self.path / 'images'
        return sorted(
            path for path in (directory.iterdir() if directory.exists()
                              else ()) if not path.name.startswith('.'))

    def image(self, image_id: str) -> Image | None:
        """The description of one image; None: it has no slot."""
        path = self.path / 'images' / journal.validate_image_id(image_id)
        try:
            return _read_image(path)
        except exception.NotFound:
            return None

    def slot_of(self, image_id: str) -> slot.Slot:
        """The slot of an image.

        :raises NotFound: it has none.
        """
        with self._mutex:
            if image_id not in self._slots:
                image = self.image(image_id)
                if image is None:
                    raise exception.NotFound(
                        f'image {image_id} is not in {self.path}')
                found = slot.Slot(self._fd, image.serial)
                if (found.cluster, found.header.virtual_size) != (
                        self.block_size, image.virtual_size):
                    raise exception.Corrupt(
                        f'image {image_id}: its slot in {self.file} is of '
                        f'another image')
                self._slots[image_id] = found
            return self._slots[image_id]

    def _slot_of_same(self, image: Image) -> slot.Slot:
        """The slot of an image, and of no other that has its id by now.

        :raises NotFound: it has none.
        """
        found = self.slot_of(image.image_id)
        if found.serial != image.serial:
            raise exception.NotFound(
                f'image {image.image_id} of serial {image.serial} is not in '
                f'{self.path} any more; {found.serial} is')
        return found

    def is_complete(self, image_id: str) -> bool:
        """Whether the image needs nothing from elsewhere."""
        return self.complete_name(image_id).exists()

    def complete_name(self, image_id: str) -> pathlib.Path:
        """The hard link that exists while the image is complete."""
        return (self.path / 'complete'
                / journal.validate_image_id(image_id))

    def is_sound(self) -> bool:
        """Whether all slots make sense; nothing is evicted otherwise."""
        try:
            self._check_slots()
            return True
        except exception.Corrupt:
            return False

    def disk_used(self) -> int:
        """Bytes of the device that the volume takes."""
        return os.fstat(self._fd).st_blocks * 512

    # Slots

    def make_slot(self, image: Image,
                  pieces: Iterable[blocks.Blocks]) -> slot.Slot:
        """Give an image a slot in which no data is present yet.

        :param pieces: the image's blocks that are not zeros, ascending.
        :raises NoSpace: the volume or its device is full.
        :raises Invalid: another serial of the image has a slot, or another
            image has the slot of this one.
        """
        if not qcow2.fits(image.virtual_size, self.block_size):
            raise exception.Invalid(
                f'image {image.image_id}: no slot can have a disk of '
                f'{image.virtual_size} bytes')
        with self._mutex:
            known = self.image(image.image_id)
            if known and known.serial != image.serial:
                raise exception.Invalid(
                    f'image {image.image_id} has the slot of serial '
                    f'{known.serial}, not {image.serial}')
            if known:
                with contextlib.suppress(exception.NotFound):
                    return self.slot_of(image.image_id)
            self._check_vacant(image)
            with self._operation():
                files.write_atomically(
                    self.path / 'images' / image.image_id,
                    journal.canonical(dataclasses.asdict(image)))
                self._write_slot(image, pieces)
            return self.slot_of(image.image_id)

    def _check_vacant(self, image: Image) -> None:
        """A slot in use is never written over: guests may read it.

        A journal gives a serial once. One that was restored from a backup,
        and written to, gives it again.

        :raises Invalid: another image has this serial.
        """
        for path in self._descriptions():
            # One that cannot be read is that image's trouble alone.
            with contextlib.suppress(exception.Corrupt, exception.NotFound):
                if path.name != image.image_id and (
                        _read_image(path).serial == image.serial):
                    raise exception.Invalid(
                        f'image {image.image_id} has serial {image.serial}, '
                        f'and so has {path.name}, which is in {self.path}: '
                        f'the journal is not the one that this host followed')
        with contextlib.suppress(exception.NotFound):
            slot.Slot(self._fd, image.serial)
            raise exception.Invalid(
                f'{self.path}: slot {image.serial} is in use, and nothing '
                f'says by which image')

    def _write_slot(self, image: Image,
                    pieces: Iterable[blocks.Blocks]) -> None:
        cluster = self.block_size
        start = image.serial * slot.SLOT
        count = qcow2.l1_entries(image.virtual_size, cluster)
        l1 = np.full(count, slot.ZERO_TABLE - start, np.uint64)
        for which, tables in _tables(pieces, cluster // 8):
            offset = self._allocate(tables.nbytes)
            blocks.write_exactly(self._fd, tables.tobytes(), offset)
            l1[which] = offset - start + np.arange(len(which)) * cluster
        l1_offset = self._allocate(max(count * 8, 1))
        blocks.write_exactly(
            self._fd, (l1 | np.uint64(qcow2.COPIED)).astype('>u8').tobytes(),
            l1_offset)
        self._sync()
        self._index.add([], self._end)
        header = qcow2.Header(
            image.virtual_size, cluster.bit_length() - 1, l1_offset - start,
            count, slot.REFCOUNTS - start, self._backing(image.image_id))
        os.pwrite(self._fd, header.pack(), start)
        self._sync()

    def describe(self, image: Image) -> None:
        """Replace an image's description (a repacked manifest)."""
        with self._mutex:
            known = self.image(image.image_id)
            if known and known.serial == image.serial:
                files.write_atomically(
                    self.path / 'images' / image.image_id,
                    journal.canonical(dataclasses.asdict(image)))

    # Filling

    def fill(self, image: Image, batches: list[Batch],
             pool: concurrent.futures.Executor) -> int:
        """Put blocks of an image into the volume; those there are skipped.

        New data lies in the order of `batches`. Nothing is named by the
        tables before it was synced.

        :param image: as it was found when `batches` were made. Its id alone
            would not do: the image may have been evicted since, and another
            been registered under it.
        :returns: bytes written (blocks that other images brought are not).
        :raises NotFound: its slot is gone.
        :raises NoSpace: volume or device are full.
        :raises Corrupt: a frame is damaged; nothing of `batches` counts.
        """
        with self._mutex, self._operation():
            target = self._slot_of_same(image)
            numbers, offsets, fresh, jobs = self._plan(target, batches)
            if not len(numbers):
                return 0
            self._write_all(jobs, pool)
            self._index.add(fresh, self._end)
            order = np.argsort(numbers)
            target.set(numbers[order], offsets[order])
            self._sync()
            return len(fresh) * self.block_size

    def _plan(self, target: slot.Slot, batches: list[Batch]) -> tuple[
            blocks.Blocks, Offsets, list[tuple[bytes, int]],
            list[tuple[Batch, blocks.Blocks, Offsets]]]:
        """Where each missing block goes, and which must be written."""
        places = self._index.find(
            [digest for batch in batches for digest in batch.digests])
        count = len({digest for batch in batches for digest in batch.digests
                     if digest not in places})
        free = itertools.chain.from_iterable(self._free(count))
        numbers, offsets, fresh, jobs = [], [], [], []
        for batch in batches:
            missing = np.flatnonzero(target.entries(batch.numbers) == 0)
            write, where = [], []
            for position in missing.tolist():
                digest = batch.digests[position]
                if digest not in places:
                    places[digest] = next(free)
                    fresh.append((digest, places[digest]))
                    write.append(int(batch.positions[position]))
                    where.append(places[digest])
                offsets.append(places[digest])
            numbers.append(batch.numbers[missing])
            if write:
                jobs.append((batch, np.array(write), np.array(where)))
        return (np.concatenate(numbers) if numbers else np.empty(0, np.int64),
                np.array(offsets, np.int64), fresh, jobs)

    def _free(self, count: int) -> list[range]:
        """Offsets of free clusters: in one run, so that a boot set is read
        sequentially (YOLO); in several where the volume has none as long.

        :raises NoSpace: it has too few.
        """
        if not count:
            return []
        size = self.block_size
        try:
            start = self._allocate(count * size)
        except exception.NoSpace:
            if count == 1:
                raise
            return [*self._free(count // 2), *self._free(count - count // 2)]
        return [range(start, start + count * size, size)]

    def _write_all(self, jobs: list[tuple[Batch, blocks.Blocks, Offsets]],
                   pool: concurrent.futures.Executor) -> None:
        running = [pool.submit(self._write, *job) for job in jobs]
        concurrent.futures.wait(running)
        try:
            for future in running:
                future.result()
        except exception.FastbootError:
            # Nothing names what was written: give it back, and go on.
            for _batch, _positions, offsets in jobs:
                for start, end in _spans(offsets, self.block_size):
                    files.punch(self._fd, start, end - start)
            self._sync()
            self._index.busy = False
            raise
        if running:
            self._sync()

    def _write(self, batch: Batch, positions: blocks.Blocks,
               offsets: Offsets) -> None:
        plain = memoryview(batch.load())
        size = self.block_size
        breaks = np.flatnonzero(
            (np.diff(positions) != 1) | (np.diff(offsets) != size)) + 1
        for part in np.split(np.arange(len(positions)), breaks):
            start = int(positions[part[0]]) * size
            blocks.write_exactly(
                self._fd, plain[start:start + len(part) * size],
                int(offsets[part[0]]))

    def clusters(self, image_id: str, numbers: blocks.Blocks) -> Offsets:
        """Where in the file blocks of an image lie that are here, sorted."""
        target = self.slot_of(image_id)
        entries = target.entries(np.unique(numbers))
        return np.unique(target.offsets(entries[entries > qcow2.ZERO]))

    def read_ahead(self, image_id: str, numbers: blocks.Blocks) -> int:
        """Ask the kernel for the clusters of some blocks.

        :returns: bytes asked for.
        """
        target = self.slot_of(image_id)
        # The tables come with being read here; QEMU also reads these two.
        for start in (target.start, slot.REFCOUNTS):
            os.posix_fadvise(self._fd, start, slot.SLOT,
                             os.POSIX_FADV_WILLNEED)
        offsets = self.clusters(image_id, numbers)
        for start, end in _spans(offsets, self.block_size):
            os.posix_fadvise(self._fd, start, end - start,
                             os.POSIX_FADV_WILLNEED)
        return len(offsets) * self.block_size

    # Completeness

    def complete(self, image_id: str) -> bool:
        """Give the image its complete name, if nothing of it is missing."""
        with self._mutex, self._operation():
            target = self.slot_of(image_id)
            name = self.complete_name(image_id)
            if name.exists():
                return True
            if target.missing():
                return False
            self._sync()
            target.write_header(None)
            self._sync()
            files.make_directory(name.parent)
            os.link(self.file, name)
            files.sync_directory(name.parent)
            return True

    def _make_incomplete(self, image_id: str) -> None:
        files.remove(self.complete_name(image_id))
        target = self.slot_of(image_id)
        if target.header.backing is None:
            target.write_header(self._backing(image_id))
            self._sync()

    # Leases and pins

    def lease(self, image_id: str, holder: str, file: str = '',
              wait: float | None = None) -> None:
        """Keep an image here, durably. Asked for again, it is the same lease.

        :param holder: an instance's id, or a service.
        :param file: see :class:`Lease`.
        :param wait: seconds for an eviction of the image to end; None: any.
        :raises Busy: it did not.
        """
        path = self._lease(image_id, holder, file)
        with self._guests:
            if not self._guests.wait_for(
                    lambda: image_id not in self._leaving, wait):
                raise exception.Busy(f'image {image_id} is being evicted')
            with contextlib.suppress(FileNotFoundError):
                # The kernel's own time is some milliseconds coarse: two who
                # ask at once would look like one.
                now = time.time_ns()
                os.utime(path, ns=(now, now))
                return
            self._arriving[image_id] += 1
        try:
            files.write_atomically(path, journal.canonical({
                'since': time.time(), 'holder': holder, 'file': file}))
        finally:
            with self._guests:
                self._arriving[image_id] -= 1

    def last_use(self, image_id: str) -> float:
        """When a lease of the image last began or ended (seconds since the
        epoch); 0: never."""
        try:
            return (self.path / 'leases' / image_id).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def touch(self, image_id: str) -> None:
        """Count as used now, for those who evict what was not."""
        path = self.path / 'leases' / journal.validate_image_id(image_id)
        files.make_directory(path)
        os.utime(path)

    def release(self, image_id: str, holder: str, file: str = '') -> None:
        """End a lease; one that is not there is no error."""
        files.remove(self._lease(image_id, holder, file))

    def expire(self, image_id: str, lease: Lease) -> bool:
        """End a lease, unless it was asked for again since it was read.

        :returns: whether it is over.
        """
        path = self.path / 'leases' / image_id / lease.name
        with self._guests:
            if self._arriving[image_id]:
                return False
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime != lease.since:
                    return False
                files.remove(path)
            return True

    def leases(self, image_id: str) -> list[str]:
        """Names of the leases of an image."""
        directory = (self.path / 'leases'
                     / journal.validate_image_id(image_id))
        try:
            return sorted(name for name in os.listdir(directory)
                          if not name.startswith('.'))
        except FileNotFoundError:
            return []

    def leased_images(self) -> list[str]:
        """The images that have, or had, leases."""
        try:
            return sorted(os.listdir(self.path / 'leases'))
        except FileNotFoundError:
            return []

    def leased(self, image_id: str) -> list[Lease]:
        """The leases of an image."""
        found = []
        for name in self.leases(image_id):
            path = self.path / 'leases' / image_id / name
            with contextlib.suppress(FileNotFoundError):
                found.append(_read_lease(path))
        return found

    def pin(self, image_id: str) -> None:
        """Keep an image here until :meth:`unpin`, durably."""
        files.write_atomically(
            self.path / 'pins' / journal.validate_image_id(image_id), b'')

    def unpin(self, image_id: str) -> None:
        """End a pin; one that is not there is no error."""
        files.remove(
            self.path / 'pins' / journal.validate_image_id(image_id))

    def pinned(self, image_id: str) -> bool:
        """Whether the image is pinned."""
        return (self.path / 'pins'
                / journal.validate_image_id(image_id)).exists()

    def _lease(self, image_id: str, holder: str, file: str) -> pathlib.Path:
        name = journal.validate_image_id(holder)
        if file:
            digest = hashlib.sha256(os.fsencode(f'{holder} {file}'))
            name = f'{holder[:31]}-{digest.hexdigest()[:32]}'
        return (self.path / 'leases' / journal.validate_image_id(image_id)
                / name)

    # Eviction

    def evict(self, image_ids: list[str]) -> int:
        """Remove images, and free what no other image uses.

        :returns: bytes freed on the device.
        :raises Busy: one of them is leased or pinned; nothing was removed.
        :raises Corrupt: a slot is damaged, perhaps another image's. What it
            uses is not known; nothing was removed.
        """
        with self._mutex, self._closed_to_guests(image_ids):
            self._check_slots()
            before = self.disk_used()
            with self._operation():
                for image_id in image_ids:
                    self._remove_slot(image_id)
                self._reclaim()
                for image_id in image_ids:
                    files.remove(self.path / 'images' / image_id)
            return before - self.disk_used()

    @contextlib.contextmanager
    def _closed_to_guests(self, image_ids: list[str]) -> Iterator[None]:
        """No lease of these images begins meanwhile.

        :raises Busy: there is one, or a pin.
        """
        with self._guests:
            for image_id in image_ids:
                holders = self.leases(image_id)
                if holders or self._arriving[image_id]:
                    raise exception.Busy(
                        f'image {image_id} is leased by '
                        f'{", ".join(holders) or "a guest that comes"}')
                if self.pinned(image_id):
                    raise exception.Busy(f'image {image_id} is pinned')
            self._leaving.update(image_ids)
        try:
            yield
        finally:
            with self._guests:
                self._leaving.difference_update(image_ids)
                self._guests.notify_all()

    def _remove_slot(self, image_id: str) -> None:
        try:
            target = self.slot_of(image_id)
        except exception.NotFound:
            return
        self._make_incomplete(image_id)
        tables = np.unique(target.tables) // self.block_size
        os.pwrite(self._fd, bytes(qcow2.HEADER_LIMIT), target.start)
        self._sync()
        self._slots.pop(image_id)
        # Before the data: an entry must never name a hole.
        for first, count in blocks.runs(tables):
            files.punch(self._fd, first * self.block_size,
                        count * self.block_size)
        self._sync()

    def _used(self) -> tuple[Offsets, list[tuple[int, int]]]:
        """All data clusters (sorted), and all places in use (sorted)."""
        data, places = [np.empty(0, np.int64)], []
        for target in self._all_slots():
            data.append(target.clusters())
            start, length = target.l1_place
            places.append((start, start + length))
            places += _spans(target.tables, self.block_size)
        clusters = np.unique(np.concatenate(data))
        places += _spans(clusters, self.block_size)
        return clusters, _united(places, self.block_size)

    def _all_slots(self) -> Iterator[slot.Slot]:
        """All slots of the file, also one whose description was lost."""
        for serial in self._serials():
            with contextlib.suppress(exception.NotFound):
                yield slot.Slot(self._fd, serial)

    def _check_slots(self) -> None:
        """:raises Corrupt: one is damaged, or its description is."""
        for _ in self._all_slots():
            pass
        for image_id in self.images():
            with contextlib.suppress(exception.NotFound):
                self.slot_of(image_id)

    def _serials(self) -> Iterator[int]:
        """The serials whose slots have, or had, a header."""
        for start, end in files.data_ranges(self._fd, slot.SLOT,
                                            slot.SLOTS_END):
            yield from range(start // slot.SLOT, -(-end // slot.SLOT))

    def _reclaim(self) -> None:
        """Punch all that no slot uses; the index forgets it first."""
        clusters, places = self._used()
        self._index.keep(clusters)
        for start, end in _gaps(places, slot.DATA, self.size):
            for low, high in files.data_ranges(self._fd, start, end):
                files.punch(self._fd, low, high - low)
        self._sync()

    # Syncing

    def _sync(self) -> None:
        """Make durable what was written.

        :raises OSError: some of it may be lost. The kernel says so once, and
            from then on takes it for written: what is read may never have
            reached the device, and the next sync succeeds.
        """
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._lost = True
            raise

    def _write_again(self) -> None:
        """Have all headers and L2 tables on the device as they are read.

        Of the rest, nothing is named before it was synced.

        :raises OSError: the device does not take them now either.
        :raises NoSpace: it is full, and writes nothing where it lay before.
        """
        for serial in self._serials():
            # Empty ones, too: those of images that were evicted.
            self._write_same(serial * slot.SLOT, qcow2.HEADER_LIMIT)
        for target in self._all_slots():
            for start, end in _spans(target.tables, self.block_size):
                self._write_same(start, end - start)
        self._sync()
        self._lost = False

    def _write_same(self, start: int, length: int) -> None:
        for place in range(start, start + length, _PIECE):
            data = os.pread(self._fd, min(_PIECE, start + length - place),
                            place)
            blocks.write_exactly(self._fd, data, place)

    # Space

    def _allocate(self, length: int) -> int:
        """A free run of at least `length` bytes, of whole clusters.

        :raises NoSpace: the volume has none.
        """
        length = -(-length // self.block_size) * self.block_size
        if self._cursor + length > self._limit:
            self._find_gap(length)
        offset = self._cursor
        # Free space reads as zeros. Did it not, someone's data would be
        # lost. It need not be a hole: who copies or restores a sparse file
        # rounds holes, some to more than a cluster.
        for start, end in files.data_ranges(self._fd, offset,
                                            offset + length):
            if not blocks.are_zeros(self._fd, start, end):
                raise exception.Corrupt(
                    f'{self.file}: bytes {start} to {end} should be free '
                    f'and are not; run volume check')
        self._cursor += length
        self._end = max(self._end, self._cursor)
        return offset

    def _find_gap(self, length: int) -> None:
        _clusters, places = self._used()
        # What this operation got before is not in the tables yet.
        if self._cursor > self._gap:
            self._given.append((self._gap, self._cursor))
        places = _united([*places, *self._given], self.block_size)
        for start, end in _gaps(places, slot.DATA, self.size):
            if end - start >= length:
                self._gap = self._cursor = start
                self._limit = end
                return
        raise exception.NoSpace(f'{self.file}: no free run of {length} bytes;'
                                f' evict images')

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """Mark the index while tables and index may disagree.

        What an operation that failed left behind is freed by the next one,
        or when the volume is opened.
        """
        try:
            if self._index.busy:
                LOG.info('%s: freeing what a failed operation left',
                         self.path)
                self._recover()
            self._given = []
            self._gap = self._cursor
            self._index.busy = True
            yield
            self._index.busy = False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise exception.NoSpace(f'{self.file}: {error}') from error
            raise
        except sqlite3.OperationalError as error:
            raise exception.NoSpace(
                f'{self.path}/index.sqlite: {error}') from error
        except sqlite3.DatabaseError as error:
            self._index.close()
            self._renew_index(error)
            raise exception.Unavailable(
                f'{self.path}/index.sqlite was damaged and is made anew: '
                f'repeat') from error

    # Opening

    def _follow_backing(self) -> None:
        """Give slots the backing of today: the socket may have moved.

        One that is damaged stays as it is: its image cannot be used, the
        others can.
        """
        for image_id in self.images():
            try:
                target = self.slot_of(image_id)
            except exception.NotFound:
                continue
            except exception.Corrupt as error:
                LOG.error('%s: image %s: %s', self.file, image_id, error)
                continue
            if target.header.backing not in (None, self._backing(image_id)):
                with self._operation():
                    target.write_header(self._backing(image_id))
                    self._sync()

    def _open_index(self) -> None:
        path = self.path / 'index.sqlite'
        self._limit = self.size
        try:
            self._index = blockindex.BlockIndex(path)
        except sqlite3.DatabaseError as error:
            self._renew_index(error)
            return
        try:
            self._resume()
        except sqlite3.DatabaseError as error:
            self._index.close()
            self._renew_index(error)

    def _resume(self) -> None:
        """Go on where the index says that the volume was left."""
        end = self._index.end
        if end is None:
            self._rebuild()
            return
        self._end = self._cursor = end
        self._lost = self._index.busy
        if self._lost:
            LOG.info('%s: recovering from an interrupted operation',
                     self.path)
            self._recover()

    def _renew_index(self, error: Exception) -> None:
        LOG.warning('%s/index.sqlite is damaged (%s): rebuilding it',
                    self.path, error)
        self._remove_index()
        self._index = blockindex.BlockIndex(self.path / 'index.sqlite')
        self._rebuild()

    def _remove_index(self) -> None:
        for suffix in ('', '-wal', '-shm'):
            (self.path / f'index.sqlite{suffix}').unlink(missing_ok=True)

    def _recover(self) -> None:
        """Free what an interrupted operation left."""
        self._slots.clear()
        clusters, places = self._used()
        if self._lost:
            self._write_again()
        self._end = max([self._end, *(end for _, end in places)])
        self._end = -(-self._end // self.block_size) * self.block_size
        self._cursor, self._limit = self._end, self.size
        for image_id in self.images():
            self._recover_image(image_id)
        self._reclaim()
        self._index.add([], self._end)
        self._index.busy = False

    def _recover_image(self, image_id: str) -> None:
        try:
            target = self.slot_of(image_id)
        except exception.NotFound:
            # Never had its header, or lost it to an eviction.
            files.remove(self.complete_name(image_id))
            files.remove(self.path / 'images' / image_id)
            return
        if self.is_complete(image_id) and target.missing():
            LOG.error('image %s was called complete and is not', image_id)
            self._make_incomplete(image_id)
        elif target.header.backing is None and not self.is_complete(image_id):
            self._make_incomplete(image_id)

    def _rebuild(self) -> None:
        """Make the index anew from tables and manifests."""
        self._index.clear()
        self._recover()
        self._index.busy = True
        for image in self.images().values():
            target = self.slot_of(image.image_id)
            for first, entries in target.chunks():
                present = np.flatnonzero(entries > qcow2.ZERO)
                offsets = target.offsets(entries[present])
                self._index.add(list(zip(
                    self._resolve(image, first + present), offsets.tolist(),
                    strict=True)), self._end)
        self._index.busy = False

    # Checking

    def check(self, image_id: str, digests: Digests,
              data_blocks: Iterable[blocks.Blocks],
              pool: concurrent.futures.Executor,
              progress: Progress = lambda count: None,
              ) -> tuple[int, list[str]]:
        """Prove what is here of an image against its manifest.

        :param data_blocks: all blocks that are not zeros, ascending.
        :param progress: told the plain bytes that were looked at.
        :returns: blocks proven, and what is wrong, in words.
        """
        target = self.slot_of(image_id)
        # Looked at first: others may fill and complete it meanwhile.
        complete = self.complete_name(image_id)
        named = complete.exists()
        problems: list[str] = []
        proven = seen = missing = 0
        for numbers in data_blocks:
            entries = target.entries(numbers)
            for number in numbers[entries == qcow2.ZERO].tolist():
                problems.append(f'block {number} should have data')
            seen += len(numbers)
            missing += int((entries == 0).sum())
            proven += int((entries > qcow2.ZERO).sum())
            problems += [f'block {number} has other content' for number
                         in self.damaged(image_id, numbers, digests, pool)]
            progress(len(numbers) * self.block_size)
        if sum(int((entries != qcow2.ZERO).sum())
               for _, entries in target.chunks()) != seen:
            problems.append('the tables have data where there are zeros')
        if named:
            if missing:
                problems.append(f'is called complete; {missing} blocks lack')
            if not complete.samefile(self.file):
                problems.append('its complete name is another file')
        return proven, problems[:_PROBLEMS]

    def damaged(self, image_id: str, numbers: blocks.Blocks,
                digests: Digests,
                pool: concurrent.futures.Executor) -> list[int]:
        """Those of some blocks whose bytes here are not the image's."""
        target = self.slot_of(image_id)
        entries = target.entries(numbers)
        present = entries > qcow2.ZERO
        found = pool.map(self._digest,
                         target.offsets(entries[present]).tolist())
        return [number for number, want, got in zip(
            numbers[present].tolist(), digests(numbers[present]), found,
            strict=True) if want != got]

    def rewrite(self, image: Image, batches: list[Batch]) -> int:
        """Write blocks of an image once more, where they lie.

        Guests may run: they read nothing but what the image has, sooner or
        later. A block is left alone unless tables and index agree on its
        place: where they do not, that may be the place of another block.

        :param image: as it was found when `batches` were made.
        :returns: blocks written.
        :raises NotFound: its slot is gone.
        """
        with self._mutex, self._operation():
            target = self._slot_of_same(image)
            written = 0
            for batch in batches:
                entries = target.entries(batch.numbers)
                offsets = target.offsets(entries)
                places = self._index.find(batch.digests)
                known = np.array([places.get(digest, -1)
                                  for digest in batch.digests], np.int64)
                ours = np.flatnonzero(
                    (entries > qcow2.ZERO) & (offsets == known))
                if len(ours):
                    self._write(batch, batch.positions[ours], offsets[ours])
                written += len(ours)
            self._sync()
            return written

    def _digest(self, offset: int) -> bytes:
        return hashlib.sha256(
            blocks.read_exactly(self._fd, self.block_size, offset)).digest()


def _lock(path: pathlib.Path) -> int:
    files.make_directory(path)
    fd = os.open(path / 'lock', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise exception.Busy(
            f'{path} is being written by another process') from None
    return fd


def _open(file: pathlib.Path, writable: bool) -> int:
    try:
        return os.open(file, (os.O_RDWR if writable else os.O_RDONLY)
                       | os.O_CLOEXEC)
    except FileNotFoundError:
        raise exception.NotFound(f'{file} is not there') from None


def _make(file: pathlib.Path, block_size: int, size: int) -> None:
    """Make the file with the poison and the table of zeros."""
    temporary = file.with_name('.volume.tmp')
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
    try:
        os.ftruncate(fd, size // slot.SLOT * slot.SLOT)
        table = np.full(block_size // 8, qcow2.ZERO, '>u8').tobytes()
        blocks.write_exactly(fd, table, slot.ZERO_TABLE)
        # Valid, so that what probes it goes on to the backing file.
        poison = qcow2.Header(
            1 << 20, block_size.bit_length() - 1, slot.REFCOUNTS,
            qcow2.l1_entries(1 << 20, block_size), slot.REFCOUNTS, POISON)
        blocks.write_exactly(fd, poison.pack(), 0)
        os.fsync(fd)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.EFBIG:
            raise exception.Invalid(
                f'{file.parent}: its file system has no sparse files of '
                f'{size >> 40} TiB; lower [host] volume_size') from error
        raise
    finally:
        os.close(fd)
    temporary.rename(file)
    files.sync_directory(file.parent)


def _end_counting(fd: int) -> None:
    """Make the refcount table, also in volumes that were made without."""
    if os.pread(fd, 8, slot.REFCOUNTS) != slot.UNCOUNTABLE:
        blocks.write_exactly(fd, slot.UNCOUNTABLE, slot.REFCOUNTS)
        os.fdatasync(fd)


def _read_image(path: pathlib.Path) -> Image:
    try:
        raw: dict[str, Any] = json.loads(path.read_bytes())
        found = Image(str(raw['image_id']), int(raw['serial']),
                      str(raw['manifest']), int(raw['virtual_size']))
        if found.image_id != path.name or not (
                0 < found.serial < journal.SERIAL_LIMIT):
            raise ValueError(f'{found}')
        return found
    except FileNotFoundError:
        raise exception.NotFound(f'{path} is not there') from None
    except (ValueError, KeyError, TypeError, OverflowError,
            RecursionError) as error:
        raise exception.Corrupt(f'{path}: {error!r}') from error


def _read_lease(path: pathlib.Path) -> Lease:
    """One that makes no sense is kept until it is released.

    :raises FileNotFoundError: it is over.
    """
    since = path.stat().st_mtime
    raw: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        raw = json.loads(path.read_bytes())
    if not isinstance(raw, dict):
        raw = {}
    holder, file = raw.get('holder', path.name), raw.get('file', '')
    return Lease(path.name, str(holder),
                 file if isinstance(file, str) else '', since)


def _tables(pieces: Iterable[blocks.Blocks], per_table: int,
            ) -> Iterator[tuple[blocks.Blocks, npt.NDArray[Any]]]:
    """The L2 tables of all pieces; a table is never split over two."""
    rest = np.empty(0, np.int64)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        if len(rest) > _TABLES_AT_ONCE * per_table:
            last = rest[-1] // per_table * per_table
            cut = int(np.searchsorted(rest, last))
            if cut:
                yield slot.table_array(rest[:cut], per_table)
                rest = rest[cut:]
    if len(rest):
        yield slot.table_array(rest, per_table)


def _spans(offsets: Offsets, length: int) -> list[tuple[int, int]]:
    """Start and end of the runs that clusters (sorted or not) make."""
    return [(first * length, (first + count) * length)
            for first, count in blocks.runs(np.unique(offsets) // length)]


def _united(places: list[tuple[int, int]],
            cluster: int) -> list[tuple[int, int]]:
    """Sorted, whole clusters, and what touches made one."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(places):
        end = -(-end // cluster) * cluster
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _gaps(places: list[tuple[int, int]], start: int,
          end: int) -> Iterator[tuple[int, int]]:
    """What lies between sorted places."""
    for low, high in places:
        if low > start:
            yield start, low
        start = max(start, high)
    if start < end:
        yield start, end
