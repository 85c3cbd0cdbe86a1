# SPDX-License-Identifier: Apache-2.0
"""Upkeep of a repository: check, statistics, garbage collection."""

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np

from fastboot_common import (
    exception,
    extents,
    journal,
    pack,
    publish,
    store,
)
from fastboot_common.repository import Repository

LOG = logging.getLogger(__name__)

#: Seconds that an unfinished file is left alone at least: it may be in use.
_UNFINISHED: Final = 86400
#: Entries of the journal before those of interest that tell whether a clock
#: was behind: more than a machine writes before its clock is set.
_FURTHER: Final = 100

Progress = Callable[[int], None]
#: Serials of those deregistered images that are needed all the same.
Needed = Callable[[Sequence[journal.Image]], Collection[int]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong, and where."""

    name: str
    problem: str


def check(repository: Repository, deep: bool = False,
          progress: Progress | None = None) -> Iterator[Problem]:
    """Prove the repository; goes on after what it finds.

    Journal chain, manifests, pack indexes, and that each image's content
    follows from them. Nothing is changed.

    :param deep: read and decompress every pack, too.
    :param progress: told the bytes of packs read.
    """
    state = journal.State()
    try:
        state = yield from _check_journal(repository)
    except exception.FastbootError as error:
        yield Problem(store.entry_name(state.version + 1), str(error))
    for digest, size in state.packs.items():
        yield from _check_pack(repository, digest, size, deep, progress)
    for image in state.images.values():
        yield from _check_image(repository, image, state)


def _check_journal(repository: Repository,
                   ) -> Any:
    """Fold all entries from the first; generates problems."""
    source: Any = repository.store
    state = journal.State()
    while True:
        number = state.version + 1
        name = store.entry_name(number)
        try:
            data = source.get(name, journal.ENTRY_LIMIT)
        except exception.NotFound:
            break
        try:
            before, state = state, journal.apply(state, data)
        except exception.Corrupt as error:
            yield Problem(name, str(error))
            return state
        if state.checkpoint == number:
            checkpoint = data, before
    if state.checkpoint:
        yield from _check_checkpoint(source, *checkpoint)
    with contextlib.suppress(AttributeError):
        later = [name for name, _, _ in source.list('journal')
                 if name > store.entry_name(state.version)]
        if later:
            yield Problem(store.entry_name(state.version + 1),
                          f'is missing, {min(later)} is there: journal gap')
    return state


def _check_checkpoint(source: store.ReadStore, data: bytes,
                      before: journal.State) -> Iterator[Problem]:
    number = before.version + 1
    digest = journal.state_digest(data, number)
    name = store.object_name('states', digest)
    try:
        found = source.get(name)
        if hashlib.sha256(found).hexdigest() != digest:
            yield Problem(name, 'digest does not match')
        elif found != before.to_json():
            yield Problem(name, f'is not the state before entry {number}')
    except exception.FastbootError as error:
        yield Problem(name, str(error))


def _check_pack(repository: Repository, digest: str, size: int, deep: bool,
                progress: Progress | None) -> Iterator[Problem]:
    name = store.object_name('packs', digest)
    try:
        actual = repository.store.size(name)
        if actual != size:
            yield Problem(name, f'has {actual} bytes instead of {size}')
            return
        index = repository.pack_index(repository.pack_ref(digest, size))
        if deep:
            yield from _check_frames(repository, index, progress)
    except exception.FastbootError as error:
        yield Problem(name, str(error))


def _check_frames(repository: Repository, index: pack.PackIndex,
                  progress: Progress | None) -> Iterator[Problem]:
    read = repository.pack_read(index.ref.digest)
    whole = hashlib.sha256()
    name = store.object_name('packs', index.ref.digest)
    # Header, frames, index and trailer follow each other without gaps.
    start = int(index.frames['offset'][0]) if len(index.frames) \
        else index.ref.index_offset
    whole.update(read(0, start))
    for number in range(len(index.frames)):
        data = read(*index.extent(number))
        whole.update(data)
        if progress:
            progress(len(data))
        try:
            plain = memoryview(index.decode(number, data))
        except exception.Corrupt as error:
            yield Problem(name, str(error))
            continue
        size = index.block_size
        first = int(index.first[number])
        for at in range(len(plain) // size):
            found = hashlib.sha256(plain[at * size:(at + 1) * size]).digest()
            if found != index.digests[first + at].tobytes():
                yield Problem(name, f'block {first + at} is not what the '
                                    f'index says')
    whole.update(read(index.ref.index_offset,
                      index.ref.size - index.ref.index_offset))
    if whole.hexdigest() != index.ref.digest:
        yield Problem(name, 'digest does not match')


def _check_image(repository: Repository, image: journal.Image,
                 state: journal.State) -> Iterator[Problem]:
    name = f'image {image.image_id}'
    try:
        found = repository.read_manifest(image.manifest)
        if (found.image_id, found.virtual_size) != (
                image.image_id, image.virtual_size):
            yield Problem(name, 'its manifest is of another image')
        lacking = {ref.digest for ref in found.packs} - state.packs.keys()
        if lacking:
            yield Problem(name, f'needs packs that the journal does not '
                                f'know: {", ".join(sorted(lacking))}')
        elif publish.content_root(found, repository.pack_index) != found.root:
            yield Problem(name, 'its packs give another content')
    except exception.FastbootError as error:
        yield Problem(name, str(error))


def statistics(repository: Repository) -> dict[str, Any]:
    """What is stored, and how well it is deduplicated (bytes)."""
    state = repository.state()
    size = repository.block_size
    virtual = data = boot = 0
    used: dict[str, int] = {}
    boot_places = []
    for image in state.images.values():
        found = repository.read_manifest(image.manifest)
        virtual += image.virtual_size
        data += extents.total(found.extents) * size
        boot += len(found.boot) * size
        numbers = {ref.digest: used.setdefault(ref.digest, len(used))
                   for ref in found.packs}
        of = np.array(list(numbers.values()) or [0], np.int64)
        _, packs, ordinals = extents.locate(found.extents, found.boot)
        boot_places.append(of[packs] << 32 | ordinals)
    unique = sum(repository.pack_ref(digest, length).blocks
                 for digest, length in state.packs.items()) * size
    stored = sum(state.packs.values())
    unique_boot = len(np.unique(np.concatenate(boot_places))) * size \
        if boot_places else 0
    return {
        'version': state.version, 'block_size': size,
        'images': len(state.images), 'removed_images': len(state.removed),
        'virtual_bytes': virtual, 'data_bytes': data,
        'unique_bytes': unique, 'packs': len(state.packs),
        'pack_bytes': stored, 'boot_set_bytes': boot,
        'unique_boot_set_bytes': unique_boot,
        'dedup_ratio': round(data / unique, 3) if unique else 1.0,
        'compression_ratio': round(unique / stored, 3) if stored else 1.0,
        'combined_ratio': round(data / stored, 3) if stored else 1.0,
    }


@dataclasses.dataclass
class Collected:
    """What garbage collection removed, or would remove.

    :ivar kept: deregistered images whose time is over, and that are needed.
    """

    images: int = 0
    kept: int = 0
    packs: int = 0
    files: int = 0
    bytes: int = 0


def by_nobody(images: Sequence[journal.Image]) -> Collection[int]:
    """None is needed: a :data:`Needed` where nobody can tell."""
    return ()


def collect(repository: Repository, retention: float, grace: float,
            dry_run: bool = False, needed: Needed = by_nobody) -> Collected:
    """Remove what no image needs any more.

    The journal says so first; only then files go. Safe to interrupt: a
    repeat removes the rest. While the manifest of an image that is kept
    cannot be read, nobody knows what it needs, and every pack stays.

    :param retention: seconds that a deregistered image's packs are kept.
    :param grace: seconds that a file is left alone that nothing names.
    :param needed: asked for the images whose time is over. What it raises
        ends the collection before anything is removed.
    """
    result = Collected()

    def build(state: journal.State) -> dict[str, Any] | None:
        ages = _ages(repository, state, retention)
        old = [gone.image for gone in state.removed.values()
               if ages[gone.time] >= retention]
        kept = needed(old) if old else ()
        serials = sorted(image.serial for image in old
                         if image.serial not in kept)
        used = _used(repository, state, serials)
        young = {digest for digest, moment in state.retired.items()
                 if ages[moment] < retention}
        packs = sorted(state.packs.keys() - used - young)
        result.images, result.packs = len(serials), len(packs)
        result.kept = len(old) - len(serials)
        if dry_run or not (serials or packs):
            result.bytes = sum(state.packs[digest] for digest in packs)
            return None
        return {'packs': packs, 'serials': serials}

    state = repository.append('drop', build)
    named = _named(repository, state)
    target: Any = repository.store
    now = time.time()
    for kind in ('packs', 'manifests', 'states'):
        for name, size, changed in list(target.list(kind)):
            # Young: perhaps a publisher's that has not said so yet.
            if name in named or now - changed < grace:
                continue
            # One that was old when a publisher made the same again.
            if repository.state().version != state.version:
                state = repository.state()
                named = _named(repository, state)
                if name in named:
                    continue
            result.files += 1
            result.bytes += size
            if not dry_run:
                target.delete(name)
    # What publishers that died had begun.
    for path in list(target.scratch().iterdir()):
        found = path.stat()
        if now - found.st_mtime >= max(grace, _UNFINISHED):
            result.files += 1
            result.bytes += found.st_size
            if not dry_run:
                path.unlink(missing_ok=True)
    return result


def _ages(repository: Repository, state: journal.State,
          retention: float) -> dict[str, float]:
    """Seconds since each time at which something was removed or retired.

    The clock of who said so may have been wrong, and the journal has an
    order. A time that is yet to come is as long ago at least as the first
    entry after it whose time has come. And none is longer ago than an entry
    before it: that is looked at where something is old enough to go, some
    entries further back.
    """
    ages = {moment: journal.age(moment) for moment in (
        *(gone.time for gone in state.removed.values()),
        *state.retired.values())}
    due = {moment for moment, age in ages.items()
           if age < 0 or age >= retention}
    times = list(_times(repository, state, due))
    since = 0.0
    for moment, age in times:
        if age < 0 and moment in ages:
            ages[moment] = since
        since = age if age >= 0 else since
    youngest = math.inf
    for moment, age in reversed(times):
        if moment in ages:
            ages[moment] = min(ages[moment], youngest)
        youngest = min(youngest, age) if age >= 0 else youngest
    return ages


def _times(repository: Repository, state: journal.State,
           due: set[str]) -> Iterator[tuple[str, float]]:
    """Times and ages (seconds) of the entries, the newest first.

    Down to some before the last of `due`, or to one that cannot be read.
    """
    number, further = state.version, _FURTHER
    while number and (due or further):
        try:
            moment = journal.parse(repository.store.get(
                store.entry_name(number), journal.ENTRY_LIMIT),
                number)['time']
            age = journal.age(moment)
        except (*exception.UNREADABLE, LookupError, ValueError, TypeError):
            return
        further -= not due
        due.discard(moment)
        yield moment, age
        number -= 1


def _kept(state: journal.State,
          without: list[int]) -> Iterator[journal.Image]:
    yield from state.images.values()
    for serial, gone in state.removed.items():
        if int(serial) not in without:
            yield gone.image


def _used(repository: Repository, state: journal.State,
          without: list[int]) -> set[str]:
    used: set[str] = set()
    for image in _kept(state, without):
        try:
            found = repository.read_manifest(image.manifest)
        except exception.UNREADABLE as error:
            LOG.warning('image %s: %s; no pack is collected until its '
                        'manifest is restored, or the image gone',
                        image.image_id, error)
            return set(state.packs)
        used |= {ref.digest for ref in found.packs}
    return used


def _named(repository: Repository, state: journal.State) -> set[str]:
    names = {store.object_name('packs', digest) for digest in state.packs}
    names |= {store.object_name('manifests', image.manifest)
              for image in _kept(state, [])}
    if state.checkpoint:
        names.add(store.object_name('states', journal.state_digest(
            repository.store.get(store.entry_name(state.checkpoint),
                                 journal.ENTRY_LIMIT), state.checkpoint)))
    return names
