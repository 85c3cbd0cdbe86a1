# SPDX-License-Identifier: Apache-2.0
"""A host's copy of the repository: journal state, manifests, boot sets.

Everything that came over the network is checked before it is kept, and
checked again when it is read: a frame that lacks or rotted is fetched anew,
and so is a file that the disk cannot read any more.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from fastboot_common import (
    blocks,
    exception,
    extents,
    files,
    journal,
    manifest,
    pack,
    repository,
    signing,
    store,
)
from fastboot_common.store.files import explained

LOG = logging.getLogger(__name__)

#: A pack is taken whole if this share of its bytes is needed.
_WHOLE: Final = 0.5
#: Bytes that are worth a request: neighbours are fetched together up to it.
_REQUEST: Final = 512 << 10
_INDEXES: Final = 16
_MANIFESTS: Final = 4

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame, and the blocks of one image that are wanted of it."""

    ref: pack.PackRef
    index: pack.PackIndex
    number: int
    numbers: blocks.Blocks
    ordinals: blocks.Blocks

    @property
    def extent(self) -> tuple[int, int]:
        """Offset and length (bytes) in the pack."""
        return self.index.extent(self.number)

    @property
    def digests(self) -> list[bytes]:
        """The wanted blocks' digests."""
        return [self.index.digests[ordinal].tobytes()
                for ordinal in self.ordinals.tolist()]

    @property
    def positions(self) -> blocks.Blocks:
        """Where the wanted blocks lie in the frame (in blocks)."""
        return self.ordinals - int(self.index.first[self.number])


class Mirror:
    """Local copies of what one host needs. Methods are thread-safe."""

    def __init__(self, path: pathlib.Path, source: store.ReadStore,
                 trust: signing.Trust | None = None) -> None:
        """Open the mirror in directory `path`.

        :param trust: see :class:`fastboot_common.repository.Repository`.

        Works without the source when it was synced before.

        :raises Unavailable: it was not, and the source is out of reach.
        :raises Invalid: it belongs to another repository.
        """
        self.path = path
        self.source = source
        self._trust = trust
        #: Held while the state changes, and while what it does not name is
        #: deleted. Not by those who read: the source may be slow.
        self.following = threading.RLock()
        #: Held while files are deleted; who counts on one looks after it had
        #: this. Nothing waits for the source meanwhile.
        self._pruning = threading.Lock()
        self._mutex = threading.RLock()
        self._indexes: collections.OrderedDict[
            str, pack.PackIndex] = collections.OrderedDict()
        self._manifests: collections.OrderedDict[
            str, manifest.Manifest] = collections.OrderedDict()
        self._repository: repository.Repository | None = None
        config = path / 'config.json'
        if not config.exists():
            data = source.get('config.json', check=repository.read_config)
            files.write_atomically(config, data)
        self.id, self.block_size = repository.read_config(
            config.read_bytes())
        self.state = self._saved_state()

    def _saved_state(self) -> journal.State:
        path = self.path / 'state.json'
        try:
            return journal.State.from_json(path.read_bytes(), str(path))
        except FileNotFoundError:
            return journal.State()
        except (exception.Corrupt, OSError) as error:
            LOG.warning('%s: reading the whole journal again', error)
            return journal.State()

    # Following the repository

    def refresh(self) -> journal.State:
        """Read the journal's new entries from the source.

        :raises Unavailable: the source is out of reach.
        :raises Corrupt: the journal does not follow what is known here.
        """
        with self.following:
            if self._repository is None:
                found = repository.Repository(self.source, self.state,
                                              trust=self._trust)
                if found.id != self.id:
                    raise exception.Invalid(
                        f'{self.path} mirrors repository {self.id}, and the '
                        f'source is {found.id}; use another state directory')
                self._repository = found
            state = self._repository.state()
            if state.version != self.state.version:
                files.write_atomically(self.path / 'state.json',
                                       state.to_json())
                self.state = state
            return state

    def read_manifest(self, digest: str) -> manifest.Manifest:
        """A manifest, local or fetched."""
        with self._mutex:
            if digest in self._manifests:
                self._manifests.move_to_end(digest)
                return self._manifests[digest]
        # Not under the lock: a slow source holds up nobody else.
        found = self._load_manifest(digest)
        if found.block_size != self.block_size:
            raise exception.Corrupt(
                f'manifest {digest}: blocks of {found.block_size} bytes, '
                f'the repository has {self.block_size}')
        with self._mutex:
            self._manifests[digest] = found
            if len(self._manifests) > _MANIFESTS:
                self._manifests.popitem(last=False)
        return found

    def _load_manifest(self, digest: str) -> manifest.Manifest:
        with contextlib.suppress(exception.NotFound, exception.Corrupt):
            return self._local_manifest(digest)
        name = store.object_name('manifests', digest)
        data, found = store.parsed(
            lambda check: self.source.get(name, manifest.LIMIT, check),
            lambda data: manifest.Manifest.unpack(data, digest))
        files.write_atomically(self.path / name, data)
        return found

    def _local_manifest(self, digest: str) -> manifest.Manifest:
        """:raises NotFound: it is not here.
        :raises Corrupt: it is damaged here."""
        path = self._path('manifests', digest)
        try:
            with self._readable(path):
                data = path.read_bytes()
        except FileNotFoundError:
            raise exception.NotFound(
                f'manifest {digest} is not here') from None
        return manifest.Manifest.unpack(data, digest)

    def ready(self, image: journal.Image) -> bool:
        """Whether the image's boot set is here, as far as is known."""
        try:
            return (self.path / 'ready' / image.image_id
                    ).read_bytes() == image.manifest.encode()
        except OSError:
            return False

    def pull(self, image: journal.Image,
             progress: Progress | None = None) -> int:
        """Bring the boot set of an image here.

        :param progress: told the compressed bytes as they come.
        :returns: bytes that came over the network.
        """
        if self.ready(image):
            return 0
        found = self.read_manifest(image.manifest)
        with self._pruning:
            # What is here now stays: whoever deletes reads the manifest.
            pass
        total = 0
        for ref, frames in self._by_pack(self.frames(found, found.boot)):
            total += self._pull_pack(ref, frames, progress)
        files.write_atomically(self.path / 'ready' / image.image_id,
                               image.manifest.encode())
        return total

    def boot_bytes(self, image: journal.Image) -> int:
        """Compressed bytes of an image's boot set, as :meth:`pull` counts."""
        found = self.read_manifest(image.manifest)
        return sum(_cost(ref, frames) for ref, frames
                   in self._by_pack(self.frames(found, found.boot)))

    def _by_pack(self, frames: list[Frame],
                 ) -> list[tuple[pack.PackRef, list[Frame]]]:
        groups: dict[str, list[Frame]] = {}
        for frame in frames:
            groups.setdefault(frame.ref.digest, []).append(frame)
        return [(group[0].ref, group) for group in groups.values()]

    def _pull_pack(self, ref: pack.PackRef, frames: list[Frame],
                   progress: Progress | None) -> int:
        whole = self._path('packs', ref.digest)
        if whole.exists():
            return 0
        if _cost(ref, frames) == ref.size:
            files.make_directory(whole.parent)
            self.source.fetch(store.object_name('packs', ref.digest), whole,
                              ref.digest, ref.size, progress)
            files.remove(self._path('partial', ref.digest))
            return ref.size
        total = 0
        for group in _neighbours([frame for frame in frames
                                  if not self._is_local(frame)]):
            count = sum(map(len, self._fetch(group, keep=True)))
            total += count
            if progress:
                progress(count)
        return total

    # Frames

    def frames(self, image: manifest.Manifest,
               numbers: blocks.Blocks) -> list[Frame]:
        """The frames that hold blocks of an image, by first use.

        :param numbers: each once, in any order; zeros are left out.
        """
        numbers, packs, ordinals = extents.locate(image.extents, numbers)
        found: list[tuple[int, Frame]] = []
        for position in np.unique(packs).tolist():
            rows = np.flatnonzero(packs == position)
            index = self.pack_index(image.packs[position])
            which = index.frame_of(ordinals[rows])
            for number in np.unique(which).tolist():
                mine = rows[which == number]
                found.append((int(mine[0]), Frame(
                    index.ref, index, number, numbers[mine],
                    ordinals[mine])))
        return [frame for _, frame in sorted(found, key=lambda one: one[0])]

    def widen(self, image: manifest.Manifest,
              frames: list[Frame]) -> list[Frame]:
        """The same frames, with all that the image has in them."""
        positions = {ref.digest: at for at, ref in enumerate(image.packs)}
        wide = []
        for frame in frames:
            first, end = frame.index.first[frame.number:frame.number + 2]
            numbers = extents.within(
                image.extents, positions[frame.ref.digest], int(first),
                int(end))
            located, _packs, ordinals = extents.locate(image.extents, numbers)
            wide.append(dataclasses.replace(
                frame, numbers=located, ordinals=ordinals))
        return wide

    def pack_index(self, ref: pack.PackRef) -> pack.PackIndex:
        """The index of a pack, local or fetched."""
        with self._mutex:
            if ref.digest in self._indexes:
                self._indexes.move_to_end(ref.digest)
                return self._indexes[ref.digest]
        index = self._load_index(ref)
        with self._mutex:
            self._indexes[ref.digest] = index
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return index

    def _load_index(self, ref: pack.PackRef) -> pack.PackIndex:
        with contextlib.suppress(exception.Corrupt, exception.NotFound):
            return pack.PackIndex.load(
                ref, lambda offset, length: self._read_local(
                    ref, offset, length), self.block_size)
        name = store.object_name('packs', ref.digest)
        data, index = store.parsed(
            lambda check: self.source.read(
                name, ref.index_offset, ref.index_length, check),
            lambda data: pack.PackIndex(ref, data, self.block_size))
        self._write_local(ref, ref.index_offset, data)
        return index

    def plain(self, frame: Frame, keep: bool = False) -> bytes:
        """A frame's plain bytes, local or fetched, checked.

        :param keep: keep what was fetched.
        :raises Corrupt: the source has other bytes, too.
        :raises Unavailable: it is not here, and the source is out of reach.
        """
        found = self._plain_local(frame)
        return self._plain_fetched([frame], keep)[0] if found is None \
            else found

    def pack_plain(self, index: pack.PackIndex, number: int) -> bytes:
        """The plain bytes of a pack's frame; see :meth:`plain`."""
        none = np.empty(0, np.int64)
        return self.plain(Frame(index.ref, index, number, none, none))

    def plain_many(self, frames: list[Frame],
                   pool: concurrent.futures.Executor,
                   keep: bool = False) -> list[bytes]:
        """As :meth:`plain`, with one request for frames that are neighbours.

        :param pool: fetches side by side.
        """
        plain = {at: data for at, data in enumerate(
            pool.map(self._plain_local, frames)) if data is not None}
        lacking = {id(frame): at for at, frame in enumerate(frames)
                   if at not in plain}
        groups = _neighbours([frames[at] for at in lacking.values()])
        for group, found in zip(groups, pool.map(functools.partial(
                self._plain_fetched, keep=keep), groups), strict=True):
            plain |= {lacking[id(frame)]: data for frame, data
                      in zip(group, found, strict=True)}
        return [plain[at] for at in range(len(frames))]

    def _plain_local(self, frame: Frame) -> bytes | None:
        """A frame's plain bytes, if they are here."""
        with contextlib.suppress(exception.Corrupt, exception.NotFound):
            return frame.index.decode(frame.number, self._read_local(
                frame.ref, *frame.extent))
        return None

    def _plain_fetched(self, group: list[Frame],
                       keep: bool = False) -> list[bytes]:
        """The plain bytes of neighbours, fetched."""
        try:
            return [frame.index.decode(frame.number, data) for frame, data
                    in zip(group, self._fetch(group, keep), strict=True)]
        except exception.Corrupt:
            if len(group) == 1:
                raise
        # Each copy of the repository may have damaged another one.
        return [self._plain_fetched([frame], keep)[0] for frame in group]

    def _is_local(self, frame: Frame) -> bool:
        try:
            data = self._read_local(frame.ref, *frame.extent)
        except (exception.Corrupt, exception.NotFound):
            return False
        return frame.index.intact(frame.number, data)

    def _fetch(self, group: list[Frame], keep: bool) -> list[bytes]:
        """The compressed bytes of neighbours, by one request, checked."""
        ref, offset = group[0].ref, group[0].extent[0]
        data = self.source.read(
            store.object_name('packs', ref.digest), offset,
            sum(group[-1].extent) - offset,
            lambda data: _check_frames(group, data))
        if keep:
            self._write_local(ref, offset, data)
        elif self._path('packs', ref.digest).exists():
            # Whoever waits for the bytes has them, mended or not.
            with contextlib.suppress(exception.FastbootError):
                self._write_local(ref, offset, data)
        return _split(group, data)

    def _path(self, kind: str, digest: str) -> pathlib.Path:
        return self.path / kind / digest[:2] / digest

    def _local(self, digest: str) -> pathlib.Path:
        whole = self._path('packs', digest)
        return whole if whole.exists() else self._path('partial', digest)

    def _read_local(self, ref: pack.PackRef, offset: int,
                    length: int) -> bytes:
        path = self._local(ref.digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise exception.NotFound(
                f'pack {ref.digest} is not here') from None
        try:
            with self._readable(path):
                return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _readable(self, path: pathlib.Path) -> Iterator[None]:
        """A file that the disk cannot read is deleted: to write a part of it
        would read it again. A pull brings it anew.

        :raises Corrupt: that happened.
        """
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            LOG.error('%s: %s; it is fetched anew', path, error.strerror)
            # It may be read-only by now.
            with contextlib.suppress(OSError):
                self._delete(path)
                # Who needs it, is not known without reading more.
                for mark in files.listed(self.path / 'ready', '*'):
                    mark.unlink(missing_ok=True)
            raise exception.Corrupt(f'{path}: {error.strerror}') from error

    def _write_local(self, ref: pack.PackRef, offset: int,
                     data: bytes) -> None:
        with explained(f'pack {ref.digest} in {self.path}'):
            fd = self._open_local(ref.digest)
            try:
                if os.fstat(fd).st_size < ref.size:
                    os.ftruncate(fd, ref.size)
                blocks.write_exactly(fd, data, offset)
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def _open_local(self, digest: str) -> int:
        """Open a pack to be written; a whole one is never made."""
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._path('packs', digest),
                           os.O_RDWR | os.O_CLOEXEC)
        path = self._path('partial', digest)
        files.make_directory(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)

    # Pruning

    def prune(self, keep: set[str]) -> int:
        """Delete what no manifest of `keep` (digests) needs.

        :returns: bytes freed.
        :raises Corrupt: a manifest of `keep` is damaged, here and there.
        :raises Unavailable: it is, and the source is out of reach.
        """
        for path in files.listed(self.path / 'ready', '*'):
            image = self.state.images.get(path.name)
            if image is None or image.manifest not in keep:
                files.remove(path)
        # Listed first: what comes from now on is not looked at.
        paths = [path for kind in ('manifests', 'packs', 'partial')
                 for path in files.listed(self.path / kind, '??/*')]
        # Of an image whose manifest is not here, nothing is.
        packs = {digest: self._packs_of(self.read_manifest(digest))
                 for digest in keep if self._has_manifest(digest)}
        with self._pruning:
            # A pull may have brought some, and counts on what it finds.
            packs |= {digest: self._packs_of(self._local_manifest(digest))
                      for digest in keep - packs.keys()
                      if self._has_manifest(digest)}
            wanted = keep.union(*packs.values())
            return sum(self._delete(path) for path in paths
                       if path.name.removesuffix('.part') not in wanted)

    def _has_manifest(self, digest: str) -> bool:
        return self._path('manifests', digest).exists()

    def _packs_of(self, found: manifest.Manifest) -> set[str]:
        return {ref.digest for ref in found.packs}

    def _delete(self, path: pathlib.Path) -> int:
        """Delete a file, and what is known of it: who needs it again is to
        see that it is not here.

        :returns: bytes freed.
        """
        freed = 0
        with contextlib.suppress(FileNotFoundError):
            freed = path.stat().st_blocks * 512
            path.unlink()
        with self._mutex:
            self._manifests.pop(path.name, None)
            self._indexes.pop(path.name, None)
        return freed


def _neighbours(frames: list[Frame]) -> list[list[Frame]]:
    """Frames in groups for one request each.

    Those of a group follow each other in their pack, and end it as soon as
    it is worth a request: more of them go side by side.
    """
    groups: list[list[Frame]] = []
    size = 0
    for frame in sorted(frames, key=lambda one: (
            one.ref.digest, one.number)):
        offset, length = frame.extent
        last = groups[-1][-1] if groups else None
        if (last and size < _REQUEST and last.ref == frame.ref
                and sum(last.extent) == offset):
            groups[-1].append(frame)
            size += length
        else:
            groups.append([frame])
            size = length
    return groups


def _split(group: list[Frame], data: bytes) -> list[bytes]:
    """What belongs to each frame of neighbours."""
    start = group[0].extent[0]
    return [data[offset - start:offset - start + length]
            for offset, length in (frame.extent for frame in group)]


def _check_frames(group: list[Frame], data: bytes) -> None:
    """:raises Corrupt: one of neighbours is damaged."""
    for frame, part in zip(group, _split(group, data), strict=True):
        if not frame.index.intact(frame.number, part):
            raise exception.Corrupt(
                f'pack {frame.ref.digest}: frame {frame.number} is damaged '
                f'in the repository; run "fastbootctl repo check" there')


def _cost(ref: pack.PackRef, frames: list[Frame]) -> int:
    """Bytes to fetch for some frames of a pack."""
    wanted = sum(frame.extent[1] for frame in frames)
    return ref.size if wanted >= _WHOLE * ref.size else wanted
