# SPDX-License-Identifier: Apache-2.0
"""One compute host's images: from the mirror into the volumes, and out.

What the agent serves and ``fastbootctl`` does by hand: sync, acquire, ensure
(a guest's miss), hydrate, evict, check.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from fastboot_common import (
    blocks,
    chain,
    exception,
    extents,
    files,
    journal,
    manifest,
    signing,
    slot,
    store,
    volume,
)
from fastboot_nova import comparison, mirror

LOG = logging.getLogger(__name__)

#: Frames that hydration puts into a volume with one sync.
_FRAMES_AT_ONCE = 32
#: Frames that are fetched at the same time.
_FETCHES = 4
#: Blocks whose digests are looked up at once, to bound memory.
_PIECE = 1 << 16
#: Seconds before a volume is tried again that could not be opened.
_AGAIN: Final = 60.0
#: Told of an image that left a volume, and the bytes that this freed.
Evicted = Callable[[str, int], None]
#: Hydrates of a cancelled thread end after the frames under way.
Cancelled = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Status:
    """An image on this host (sizes in bytes).

    :ivar state: ``absent``, ``ready`` (its boot set can be thawed),
        ``thawed`` (a slot with data) or ``complete``.
    :ivar progress: share of the image's data that is in the volume.
    """

    image_id: str
    name: str
    serial: int
    domain: str
    state: str
    progress: float
    leases: int
    pinned: bool


@dataclasses.dataclass(frozen=True)
class Synced:
    """What a sync did (bytes).

    :ivar failed: images that could not be brought here, and why.
    """

    version: int
    images: int
    fetched: int
    freed: int
    failed: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image in a volume that cannot be opened.

    :ivar words: why.
    :ivar leases: how many guests read it.
    """

    domain: str
    words: str
    leases: int


class Host:
    """The images of one host. Methods may be called from several threads."""

    def __init__(self, path: pathlib.Path, source: store.ReadStore, *,
                 socket: pathlib.Path, threads: int | None = None,
                 volume_size: int = volume.DEFAULT_SIZE,
                 writable: bool = True,
                 trust: signing.Trust | None = None) -> None:
        """Open the host's state in directory `path`.

        :param source: the repository's store.
        :param socket: where guests reach the export (the shield).
        :param threads: for decompressing; None: one a CPU.
        :param volume_size: apparent size of new volumes (bytes).
        :param writable: false: only to look, beside the process that writes.
        :param trust: see :class:`fastboot_common.repository.Repository`.
        :raises Unavailable: the first sync never happened, and the source is
            out of reach.
        """
        self.path = path
        self.mirror = mirror.Mirror(path / 'mirror', source, trust)
        self._socket = socket
        self._volume_size = volume_size
        self._writable = writable
        self._volumes: dict[str, volume.Volume] = {}
        #: By domain: why its volume could not be opened, and when that is
        #: tried again (monotonic seconds).
        self._damaged: dict[str, tuple[str, float]] = {}
        self._mutex = threading.RLock()
        #: By image id: held from the look for others of that id until the
        #: image has a slot.
        self._making: dict[str, threading.Lock] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(
            threads or len(os.sched_getaffinity(0)), 'frames')
        self._fetchers = concurrent.futures.ThreadPoolExecutor(
            _FETCHES, 'fetch')
        # Guests that miss do not queue behind what can wait.
        self._background = concurrent.futures.ThreadPoolExecutor(
            _FETCHES, 'hydrate')
        self._filler = concurrent.futures.ThreadPoolExecutor(1, 'fill')
        #: By image id: the manifest whose boot set is in the volume, and
        #: the slot that has it (eviction ends a slot).
        self._thawed: dict[str, tuple[str, slot.Slot]] = {}

    def close(self) -> None:
        """Close all volumes."""
        self._fetchers.shutdown()
        self._background.shutdown()
        self._filler.shutdown()
        self._pool.shutdown()
        for one in self._volumes.values():
            one.close()

    def __enter__(self) -> 'Host':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Finding things

    def image(self, image_id: str) -> journal.Image:
        """A registered image, by id or by a name that only one has.

        :raises NotFound: there is none.
        """
        return journal.find(self.mirror.state, image_id)

    def open_volume(self, domain: str) -> volume.Volume:
        """The volume of a visibility domain, opened for writing.

        :raises Corrupt: it is damaged.
        """
        with self._mutex:
            if domain not in self._volumes:
                self._volumes[domain] = volume.Volume(
                    self.path / 'volumes' / domain, self.mirror.block_size,
                    backing=lambda image_id: chain.nbd(
                        image_id, self._socket),
                    resolve=self._digests, size=self._volume_size,
                    writable=self._writable)
                self._damaged.pop(domain, None)
            return self._volumes[domain]

    def volumes(self) -> list[volume.Volume]:
        """The volumes of this host, without those that are damaged: their
        guests alone have to do with that."""
        return self._look()[0]

    def damaged(self) -> dict[str, str]:
        """By domain, why a volume cannot be opened."""
        return self._look()[1]

    def unreadable(self) -> dict[str, Unreadable]:
        """The images in volumes that cannot be opened, by id.

        :raises OSError: not even their names can be read.
        """
        found = {}
        for domain, words in self.damaged().items():
            path = self.path / 'volumes' / domain
            for name in _names(path / 'images'):
                found[name] = Unreadable(
                    domain, words, len(_names(path / 'leases' / name)))
        return found

    def _look(self) -> tuple[list[volume.Volume], dict[str, str]]:
        """:meth:`volumes` and :meth:`damaged` of one moment."""
        opened, damaged = [], {}
        for path in self._files():
            domain = path.parent.name
            with self._mutex:
                one = self._try_volume(domain)
                if one:
                    opened.append(one)
                else:
                    damaged[domain] = self._damaged[domain][0]
        return opened, damaged

    def _files(self) -> list[pathlib.Path]:
        return sorted((self.path / 'volumes').glob('*/volume'))

    def _try_volume(self, domain: str) -> volume.Volume | None:
        words, again = self._damaged.get(domain, ('', 0.0))
        if time.monotonic() < again:
            return None
        try:
            return self.open_volume(domain)
        except (exception.Corrupt, OSError, sqlite3.Error) as error:
            if words != str(error):
                LOG.error('volume %s cannot be opened, and stays as it is: '
                          '%s', domain, error)
            self._damaged[domain] = str(error), time.monotonic() + _AGAIN
            return None

    def find(self, image_id: str) -> tuple[volume.Volume, volume.Image]:
        """The volume that has a slot of the image, registered or not.

        :raises NotFound: none has.
        :raises Corrupt: one has that is damaged.
        """
        opened, damaged = self._look()
        for one in opened:
            found = one.image(image_id)
            if found:
                return one, found
        self._check_damaged(image_id, damaged)
        raise exception.NotFound(f'image {image_id} has no slot here; '
                                 f'acquire it first')

    def _check_damaged(self, image_id: str,
                       damaged: dict[str, str]) -> None:
        """:raises Corrupt: a damaged volume has the image, or one that had
        its id before."""
        name = journal.validate_image_id(image_id)
        for domain, words in damaged.items():
            if (self.path / 'volumes' / domain / 'images' / name).exists():
                raise exception.Corrupt(
                    f'image {image_id} is in volume {domain}, which cannot '
                    f'be opened: {words}')

    def _digests(self, image: volume.Image,
                 numbers: blocks.Blocks) -> list[bytes]:
        found = self.mirror.read_manifest(image.manifest)
        _numbers, packs, ordinals = extents.locate(found.extents, numbers)
        indexes = {at: self.mirror.pack_index(found.packs[at])
                   for at in np.unique(packs).tolist()}
        return [indexes[at].digests[ordinal].tobytes() for at, ordinal
                in zip(packs.tolist(), ordinals.tolist(), strict=True)]

    # Following the repository

    def sync(self, images: Iterable[str] | None = None,
             progress: Callable[[str, int], None] | None = None) -> Synced:
        """Bring the boot sets of all images here; drop what is gone.

        Safe to interrupt; a repeat goes on. An image that fails does not
        keep the others from coming.

        :param images: ids; None: all.
        :param progress: told an image's name and bytes as they come.
        :raises Unavailable: the repository is out of reach.
        :raises NoSpace: no room for the mirror.
        """
        state = self.mirror.refresh()
        wanted = list(state.images.values()) if images is None \
            else [journal.find(state, one) for one in images]
        fetched, failed = 0, {}
        for image in sorted(wanted, key=lambda one: one.serial):
            tell = functools.partial(
                progress, image.name or image.image_id) if progress else None
            try:
                fetched += self.mirror.pull(image, tell)
            except exception.NoSpace:
                raise
            except exception.FastbootError as error:
                LOG.error('image %s: %s', image.image_id, error)
                failed[image.image_id] = str(error)
                if isinstance(error, exception.Unavailable):
                    self.mirror.refresh()  # else all are
        # What a manifest that cannot be read needs is not known.
        freed = 0 if failed else self.drop_gone()
        return Synced(state.version, len(wanted), fetched, freed, failed)

    def drop_gone(self, evicted: Evicted = lambda image_id, freed: None,
                  ) -> int:
        """Drop the images that are not registered any more.

        Those with guests stay until a call that finds none. What a damaged
        volume needs is not known: the mirror keeps all while there is one.

        :param evicted: told of what left a volume.
        :returns: bytes freed.
        :raises FastbootError: something of an image could not be read; it
            was kept, and what it may need of the mirror.
        """
        errors: list[exception.FastbootError] = []
        with self.mirror.following:
            state = self.mirror.state
            images = state.images
            keep = {image.manifest for image in images.values()}
            freed = 0
            opened, damaged = self._look()
            for one in opened:
                for image in one.images().values():
                    current = images.get(image.image_id)
                    try:
                        if current is None or current.serial != image.serial:
                            if self._drop(one, image.image_id, evicted):
                                continue
                            # Guests need it: it may have been repacked
                            # before it was deregistered.
                            gone = state.removed.get(str(image.serial))
                            current = gone.image if gone else None
                        if current:
                            self._follow(one, image, current)
                            keep.add(current.manifest)
                    except exception.FastbootError as error:
                        errors.append(error)
                    keep.add(image.manifest)
            if not damaged:
                freed += self.mirror.prune(keep)
        if errors:
            raise errors[0]
        return freed

    def _drop(self, one: volume.Volume, image_id: str,
              evicted: Evicted) -> bool:
        if one.leases(image_id) or not one.is_sound():
            return False
        one.unpin(image_id)
        try:
            freed = one.evict([image_id])
        except exception.Busy:
            return False
        LOG.info('image %s was deregistered and is evicted', image_id)
        evicted(image_id, freed)
        return True

    def _follow(self, one: volume.Volume, image: volume.Image,
                current: journal.Image) -> None:
        """Take over the manifest of a repacked image: same content."""
        if current.manifest != image.manifest:
            old = self.mirror.read_manifest(image.manifest)
            new = self.mirror.read_manifest(current.manifest)
            if (new.root, new.virtual_size) != (old.root, old.virtual_size):
                LOG.error('image %s: manifest %s says other content than '
                          'the slot has; it is not used', image.image_id,
                          current.manifest)
                return
            one.describe(dataclasses.replace(
                image, manifest=current.manifest))

    # A guest comes

    def acquire(self, image_id: str, holder: str) -> chain.Link:
        """Make an image ready for a guest and lease it.

        :param holder: the instance's id.
        :returns: where its slot is.
        :raises NotFound: the image is not registered.
        :raises Unavailable: its boot set is not here, and the repository is
            out of reach.
        :raises NoSpace: there is no room for it.
        """
        image = self.image(image_id)
        one = self.open_volume(image.domain)
        # A lease that was there may be a running guest's: it stays.
        known = holder in one.leases(image.image_id)
        one.lease(image.image_id, holder)
        try:
            self.thaw(image)
        except BaseException:
            if not known:
                one.release(image.image_id, holder)
            raise
        self.read_ahead(image)
        return self.link(image.image_id)

    def release(self, image_id: str, holder: str, file: str = '') -> None:
        """End a guest's lease."""
        for one in self.volumes():
            one.release(image_id, holder, file)

    def link(self, image_id: str) -> chain.Link:
        """Where the slot of an image is, and whether it is complete."""
        one, image = self.find(image_id)
        complete = one.complete_name(image_id)
        return chain.Link(
            image_id=image_id, volume=one.file, size=one.size,
            start=image.serial * slot.SLOT,
            virtual_size=image.virtual_size,
            complete=complete if complete.exists() else None)

    def thaw(self, image: journal.Image) -> int:
        """Put the boot set of an image into its volume, in boot order.

        :returns: bytes written.
        """
        found = self.mirror.read_manifest(image.manifest)
        if (found.image_id, found.virtual_size) != (
                image.image_id, image.virtual_size):
            raise exception.Corrupt(f'manifest {image.manifest} is not of '
                                    f'image {image.image_id}')
        # What lacks comes before the volume is locked.
        self.mirror.pull(image)
        one = self.open_volume(image.domain)
        here = volume.Image(image.image_id, image.serial, image.manifest,
                            image.virtual_size)
        with self._making.setdefault(image.image_id, threading.Lock()):
            self._check_alone(image)
            target = one.make_slot(here, data_blocks(found))
        frames = self.mirror.frames(found, found.boot)
        written = one.fill(here, [
            volume.Batch(frame.numbers, frame.digests, frame.positions,
                         functools.partial(self.mirror.plain, frame, True))
            for frame in frames], self._pool)
        self._thawed[image.image_id] = image.manifest, target
        return written

    def is_thawed(self, image: journal.Image) -> bool:
        """Whether :meth:`thaw` has nothing to do, as far as is known."""
        manifest_digest, target = self._thawed.get(
            image.image_id, (None, None))
        with contextlib.suppress(exception.NotFound, exception.Corrupt):
            return (manifest_digest == image.manifest and target is
                    self.open_volume(image.domain).slot_of(image.image_id))
        return False

    def _check_alone(self, image: journal.Image) -> None:
        """The export knows images by their ids: one content each.

        :raises Invalid: an image that had the id before has a slot here.
        :raises Corrupt: it may have one, in a damaged volume.
        """
        opened, damaged = self._look()
        for one in opened:
            known = one.image(image.image_id)
            if known and known.serial != image.serial:
                raise exception.Invalid(
                    f'image {image.image_id} has the slot of serial '
                    f'{known.serial} in {one.path}, not {image.serial}; it '
                    f'can be used here once no guest has that one')
        self._check_damaged(image.image_id, damaged)

    def _fill(self, one: volume.Volume, image: volume.Image,
              frames: list[mirror.Frame], plain: list[bytes]) -> None:
        """Put frames into a volume.

        :param plain: their bytes. They are all here before the volume is
            locked: a slow repository must not hold up other guests.
        """
        one.fill(image, _batches(frames, plain), self._pool)

    def read_ahead(self, image: journal.Image) -> None:
        """Start reading the boot set while QEMU is being started."""
        def read() -> None:
            # A hint only; the host may be closed meanwhile.
            with contextlib.suppress(OSError, exception.FastbootError):
                self.open_volume(image.domain).read_ahead(
                    image.image_id,
                    self.mirror.read_manifest(image.manifest).boot)

        # Not on the pool: who fills a volume waits for the pool, and this
        # for the volume.
        threading.Thread(target=read, daemon=True).start()

    # A guest misses

    def ensure(self, image_id: str, offset: int, length: int,
               observed: bool = False) -> None:
        """Bring an extent (bytes) of an image into its volume.

        Comes with all that the same frames hold of the image.

        :param observed: somebody records what guests ask for. Of an image
            without boot set, the extent comes alone then.
        :raises NotFound: the image has no slot here.
        :raises Invalid: the extent reaches behind the image.
        :raises Unavailable: the repository is out of reach.
        :raises Corrupt: the repository has damaged bytes.
        """
        one, image = self.find(journal.validate_image_id(image_id))
        if offset < 0 or length < 0 or offset + length > image.virtual_size:
            raise exception.Invalid(
                f'image {image_id}: no bytes {offset}+{length} in '
                f'{image.virtual_size}')
        size = self.mirror.block_size
        first, end = offset // size, -(-(offset + length) // size)
        numbers = np.arange(first, end)
        numbers = numbers[one.slot_of(image_id).entries(numbers) == 0]
        if not len(numbers):
            return
        found = self.mirror.read_manifest(image.manifest)
        frames = self.mirror.frames(found, numbers)
        # What comes unasked is never asked for, and so never seen: a boot
        # set made of that would lack most of a boot, one made of whole
        # frames would have several times what a boot reads. The frames stay
        # in the mirror, so that only the first read of each goes over the
        # network; it will hold them anyway, as part of the boot set. With a
        # boot set misses are few, and their neighbours can be seen on
        # another host: guests get them at once.
        exact = observed and not len(found.boot)
        if not exact:
            frames = self.mirror.widen(found, frames)
        for part in _parts(frames):
            self._fill(one, image, part, self.mirror.plain_many(
                part, self._fetchers, keep=exact))

    # In the background

    def hydrate(self, image_id: str,
                progress: Callable[[int], None] | None = None,
                cancelled: Cancelled = lambda: False,
                pace: Callable[[int], None] = lambda count: None) -> bool:
        """Bring the whole image here: the boot set, then by offset.

        Safe to interrupt; a repeat goes on with what lacks.

        :param progress: told the plain bytes as they come.
        :param pace: told the plain bytes that come next; may wait.
        :returns: whether the image is complete; else it was cancelled.
        :raises NotFound: it has no slot here, or was evicted meanwhile.
        :raises Corrupt: its slot cannot be completed.
        """
        one, image = self.find(image_id)
        found = self.mirror.read_manifest(image.manifest)
        target = one.slot_of(image_id)
        for numbers in itertools.chain([found.boot], data_blocks(found)):
            missing = numbers[target.entries(numbers) == 0]
            if progress:
                progress(self.mirror.block_size
                         * (len(numbers) - len(missing)))
            frames = self.mirror.frames(found, missing)
            filling = _done()
            for part in _parts(frames):
                size = self.mirror.block_size * sum(
                    len(frame.numbers) for frame in part)
                pace(size)
                if cancelled():
                    filling.result()
                    return False
                plain = self.mirror.plain_many(part, self._background)
                # One part is written while the next one comes.
                filling.result()
                filling = self._filler.submit(
                    self._fill, one, image, part, plain)
                if progress:
                    progress(size)
            filling.result()
        if not one.complete(image_id):
            if one.slot_of(image_id) is not target:
                raise exception.NotFound(
                    f'image {image_id} was evicted meanwhile')
            raise exception.Corrupt(
                f'image {image_id}: its slot in {one.path} lacks blocks that '
                f'the image does not have; move its servers away and evict '
                f'it')
        return True

    def data_bytes(self, image: journal.Image) -> int:
        """Bytes of an image that are not zeros, in whole blocks."""
        found = self.mirror.read_manifest(image.manifest)
        return extents.total(found.extents) * self.mirror.block_size

    def evict(self, image_ids: list[str]) -> int:
        """Remove images from their volumes; packs stay.

        :returns: bytes freed.
        :raises Busy: one is leased or pinned; nothing was removed from its
            volume.
        :raises NotFound: one has no slot.
        :raises Corrupt: its volume is damaged; see :meth:`Volume.evict
            <fastboot_common.volume.Volume.evict>`.
        """
        freed = 0
        places = [(self.find(image_id)[0], image_id)
                  for image_id in image_ids]
        for one in {id(place): place for place, _ in places}.values():
            freed += one.evict([image_id for place, image_id in places
                                if place is one])
        return freed

    def make_room(self, wanted: int,
                  evicted: Evicted = lambda image_id, freed: None) -> int:
        """Evict what nobody leases, least recently acquired first.

        :param wanted: bytes.
        :param evicted: told of each image.
        :returns: bytes freed, perhaps less.
        """
        idle = sorted(
            (one.last_use(image_id), image_id)
             for one in self.volumes() for image_id in one.images()
             if not one.leases(image_id) and not one.pinned(image_id))
        freed = 0
        for _, image_id in idle:
            if freed >= wanted:
                break
            # A guest may have come for it, or others evicted it, meanwhile.
            # Of a damaged volume, nothing goes.
            with contextlib.suppress(exception.Busy, exception.NotFound,
                                     exception.Corrupt):
                count = self.evict([image_id])
                evicted(image_id, count)
                freed += count
        return freed

    # Looking at it

    def held(self) -> tuple[int, int]:
        """Bytes of the disk that volumes and mirror take."""
        return (sum(path.stat().st_blocks * 512 for path in self._files()),
                files.disk_used(self.mirror.path))

    def status(self) -> list[Status]:
        """Every registered image, and those that only this host has."""
        here = {image_id: (one, image) for one in self.volumes()
                for image_id, image in one.images().items()}
        known = dict(self.mirror.state.images)
        rows = [self._status(image, here.get(image_id))
                for image_id, image in known.items()]
        for image_id, (one, image) in here.items():
            if image_id not in known:
                rows.append(self._status(journal.Image(
                    image_id, '', image.serial, image.manifest, 0,
                    image.virtual_size), (one, image)))
        return sorted(rows, key=lambda row: row.serial)

    def _status(self, image: journal.Image, here: tuple[
            volume.Volume, volume.Image] | None) -> Status:
        state, progress, leases, pinned = 'absent', 0.0, 0, False
        if self.mirror.ready(image):
            state = 'ready'
        if here:
            one, _ = here
            leases = len(one.leases(image.image_id))
            pinned = one.pinned(image.image_id)
            # It may be evicted meanwhile.
            with contextlib.suppress(exception.NotFound):
                state, progress = _presence(one, image.image_id)
        return Status(image.image_id, image.name, image.serial, image.domain,
                      state, progress, leases, pinned)

    def differences(self, image_id: str, base: pathlib.Path | str,
                    ) -> list[tuple[int, int]]:
        """Extents (bytes) in which something else is not an image.

        No block of either comes from the repository for this.

        :param base: a file of raw bytes, whatever they look like: a guest
            may have written them. Or the id of an image that has a slot.
        :raises NotFound: there is no such file, or no slot.
        :raises Invalid: it is something else.
        :raises Unavailable: digests are not here, and the repository is out
            of reach.
        """
        size = self.mirror.block_size
        image, length = self._window(image_id)
        with contextlib.ExitStack() as stack:
            if isinstance(base, str):
                other, longest = self._window(base)
            else:
                fd = comparison.open_base(base)
                stack.callback(os.close, fd)
                other = comparison.of_file(fd, size)
                longest = os.fstat(fd).st_size
            return [(first * size, count * size)
                    for first, count in comparison.find(
                        image, other, -(-max(length, longest) // size),
                        size)]

    def _window(self, image_id: str) -> tuple[comparison.Window, int]:
        """The digests of an image that has a slot, and its bytes."""
        image = self.find(image_id)[1]
        return comparison.of_image(
            self.mirror.read_manifest(image.manifest),
            self.mirror.pack_index), image.virtual_size

    def check(self, image_id: str,
              progress: Callable[[int], None] = lambda count: None,
              ) -> tuple[int, list[str]]:
        """Prove every byte of an image's slot against its manifest.

        :param progress: told the plain bytes that were looked at.
        :returns: blocks proven, and what is wrong, in words.
        """
        one, image = self.find(image_id)
        found = self.mirror.read_manifest(image.manifest)
        try:
            one.slot_of(image_id)
        except exception.Corrupt as error:
            return 0, [str(error)]
        return one.check(
            image_id, functools.partial(self._digests, image),
            data_blocks(found), self._pool, progress)

    def repair(self, image_id: str,
               progress: Callable[[int], None] = lambda count: None) -> int:
        """Bring blocks once more whose bytes here are not the image's.

        Guests of the image may run. Damaged tables stay as they are.

        :param progress: told the plain bytes that were looked at.
        :returns: blocks that were written.
        :raises Unavailable: the mirror lacks some, and the repository is
            out of reach.
        :raises Corrupt: the repository has damaged bytes.
        """
        one, image = self.find(image_id)
        found = self.mirror.read_manifest(image.manifest)
        digests = functools.partial(self._digests, image)
        written = 0
        for numbers in data_blocks(found):
            damaged = one.damaged(image_id, numbers, digests, self._pool)
            for part in _parts(self.mirror.frames(found, np.array(
                    damaged, np.int64))):
                written += one.rewrite(image, _batches(
                    part, self.mirror.plain_many(part, self._fetchers)))
            progress(len(numbers) * one.block_size)
        if written:
            LOG.warning('image %s: %d damaged blocks in %s were written '
                        'anew', image_id, written, one.file)
        return written


def _presence(one: volume.Volume, image_id: str) -> tuple[str, float]:
    """State and share of an image that has a slot.

    :raises NotFound: it has none.
    """
    try:
        target = one.slot_of(image_id)
    except exception.Corrupt:
        # There is something: `check` says what.
        return 'thawed', 0.0
    if one.is_complete(image_id):
        return 'complete', 1.0
    present, missing = target.present(), target.missing()
    return 'thawed', present / max(present + missing, 1)


def _done() -> concurrent.futures.Future[None]:
    """Work that has been done."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_result(None)
    return future


def _parts(frames: list[mirror.Frame]) -> Iterator[list[mirror.Frame]]:
    for start in range(0, len(frames), _FRAMES_AT_ONCE):
        yield frames[start:start + _FRAMES_AT_ONCE]


def _batches(frames: list[mirror.Frame],
             plain: list[bytes]) -> list[volume.Batch]:
    """What goes into a volume of frames whose plain bytes are here."""
    return [volume.Batch(frame.numbers, frame.digests, frame.positions,
                         functools.partial(plain.__getitem__, at))
            for at, frame in enumerate(frames)]


def data_blocks(image: manifest.Manifest) -> Iterator[blocks.Blocks]:
    """The blocks of an image that are not zeros, ascending, in pieces."""
    for part in extents.pieces(image.extents, _PIECE):
        yield extents.expand(part)[0]


def _names(path: pathlib.Path) -> list[str]:
    """What is in a directory, without what is not done yet."""
    try:
        return [name for name in os.listdir(path) if name[0] != '.']
    except FileNotFoundError:
        return []
