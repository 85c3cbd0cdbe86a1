# SPDX-License-Identifier: Apache-2.0
"""The repository: reading its state, appending to its journal."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Set
from typing import Any, Final

from fastboot_common import (
    blocks,
    exception,
    journal,
    manifest,
    pack,
    signing,
    store,
)

LOG = logging.getLogger(__name__)

FORMAT: Final = 'fastboot-repository'
VERSION: Final = 1
#: Lost races before a publisher gives up; each means that another got on.
_ATTEMPTS: Final = 100
#: Entries between checkpoints: what a new reader has to fold at most.
_CHECKPOINT_EVERY: Final = 128
_MANIFESTS_CACHED: Final = 4


def init(target: store.WriteStore, block_size: int) -> None:
    """Make an empty repository.

    :param block_size: bytes.
    :raises Exists: there is one.
    :raises Invalid: no repository can have such blocks.
    """
    blocks.validate_block_size(block_size)
    target.create('config.json', journal.canonical({
        'format': FORMAT, 'version': VERSION, 'id': str(uuid.uuid4()),
        'block_size': block_size,
    }))


class Repository:
    """A repository in a store. Use from one thread at a time."""

    def __init__(self, source: store.ReadStore,
                 state: journal.State | None = None, *,
                 trust: signing.Trust | None = None,
                 signer: signing.Signer | None = None) -> None:
        """Open it.

        :param state: what is known already; only later entries are read.
        :param trust: proves the newest entry, and with it all others; None:
            whoever writes to the store is trusted.
        :param signer: signs new entries; None: nobody.
        :raises NotFound: there is no repository.
        :raises Corrupt: its configuration is damaged.
        :raises UnknownVersion: it is of a newer format.
        """
        self.store = source
        _, (self.id, self.block_size) = store.parsed(
            lambda check: source.get('config.json', check=check),
            read_config)
        self._state = state or journal.State()
        self._trust = trust
        self._signer = signer
        self._proven = trust is None
        self._manifests: collections.OrderedDict[
            str, manifest.Manifest] = collections.OrderedDict()

    def state(self) -> journal.State:
        """The newest state, read from the store.

        :raises Corrupt: an entry is missing, damaged, or does not follow; or
            the newest is not signed by who is trusted.
        """
        hint = self._hint()
        known = self._state
        if known.version == 0 and hint:
            known = self._from_checkpoint(hint)
        newest = None
        while True:
            try:
                newest, known = self._follow(known)
            except exception.NotFound:
                break
        if known.version < hint:
            raise exception.Corrupt(
                f'journal entry {known.version + 1} is missing, though '
                f'the repository had version {hint}: journal gap')
        self._prove(known, newest)
        self._state = known
        return known

    def _prove(self, state: journal.State, newest: bytes | None) -> None:
        """Check the signature of the newest entry, unless it is known.

        :param newest: its bytes, if they were just read.
        """
        if self._trust is None or not state.version or (
                self._proven and newest is None):
            return
        if newest is None:
            newest = self._known_entry(state.version)
            if hashlib.sha256(newest).hexdigest() != state.previous:
                raise exception.Corrupt(
                    f'journal entry {state.version} is not the one that is '
                    f'known here: the journal was rewritten; restore it')
        self._trust.check(newest, state.version, self.id)
        self._proven = True

    def _known_entry(self, number: int) -> bytes:
        try:
            return self.store.get(store.entry_name(number),
                                  journal.ENTRY_LIMIT)
        except exception.NotFound as error:
            raise exception.Corrupt(
                f'journal entry {number}, which is known here, is gone: the '
                f'repository is an older one; restore the newer') from error

    def _follow(self, known: journal.State) -> tuple[bytes, journal.State]:
        """The entry after a state, and the state after it.

        :raises NotFound: there is none yet.
        """
        name = store.entry_name(known.version + 1)
        return store.parsed(
            lambda check: self.store.get(name, journal.ENTRY_LIMIT, check),
            functools.partial(journal.apply, known))

    def _hint(self) -> int:
        try:
            return store.parsed(
                lambda check: self.store.get('head.json', 4096, check),
                _read_head)[1]
        except exception.NotFound:
            return 0

    def _from_checkpoint(self, hint: int) -> journal.State:
        """The state at the newest checkpoint up to entry `hint`.

        Where it cannot be found (``gc`` keeps the newest one's only), the
        empty state: folding all gives the same.
        """
        try:
            newest = journal.parse(
                self.store.get(store.entry_name(hint), journal.ENTRY_LIMIT),
                hint)
            number = hint if newest.get('kind') == 'checkpoint' \
                else newest['checkpoint']
            if number == 0:
                return journal.State()
            entry = self.store.get(store.entry_name(number),
                                   journal.ENTRY_LIMIT)
            digest = journal.state_digest(entry, number)
            data = self.store.get(
                store.object_name('states', digest),
                check=functools.partial(_check_state, digest))
        except exception.NotFound:
            return journal.State()
        state = journal.State.from_json(data, f'states/{digest}')
        if state.version != number - 1:
            raise exception.Corrupt(f'checkpoint {number}: its state is of '
                                    f'version {state.version}')
        return journal.apply(state, entry)

    def image(self, image_id: str) -> journal.Image:
        """The registered image with this id, or with this name if one only.

        :raises NotFound: there is none.
        :raises Invalid: several have that name.
        """
        return journal.find(self.state(), image_id)

    def read_manifest(self, digest: str) -> manifest.Manifest:
        """The manifest with this digest, checked; a few stay in memory.

        :raises NotFound: it is not there.
        :raises Corrupt: it is damaged.
        """
        if digest not in self._manifests:
            name = store.object_name('manifests', digest)
            _, found = store.parsed(
                lambda check: self.store.get(name, manifest.LIMIT, check),
                lambda data: manifest.Manifest.unpack(data, digest))
            if found.block_size != self.block_size:
                raise exception.Corrupt(
                    f'manifest {digest}: blocks of {found.block_size} bytes, '
                    f'the repository has {self.block_size}')
            self._manifests[digest] = found
            if len(self._manifests) > _MANIFESTS_CACHED:
                self._manifests.popitem(last=False)
        return self._manifests[digest]

    def keep_manifest(self, data: bytes) -> str:
        """Put a manifest into the store, unless it is there.

        :returns: its digest.
        """
        digest = hashlib.sha256(data).hexdigest()
        target: Any = self.store
        with contextlib.suppress(exception.Exists):
            target.create(store.object_name('manifests', digest), data)
        return digest

    def pack_read(self, digest: str) -> pack.Read:
        """A function that reads parts of a pack from the store."""
        name = store.object_name('packs', digest)
        return lambda offset, length: self.store.read(name, offset, length)

    def pack_refs(self, state: journal.State,
                  wanted: Set[str]) -> dict[str, pack.PackRef]:
        """The references to packs, as images' manifests have them.

        Their publishers made these packs, and the journal proves the
        manifests. What a pack in the store says of itself proves nothing.

        :param wanted: digests; those that no image needs are left out.
        :raises Unavailable: the store is away.
        """
        found: dict[str, pack.PackRef] = {}
        images = [*state.images.values(),
                  *(gone.image for gone in state.removed.values())]
        for image in sorted(images, key=lambda one: -one.serial):
            if len(found) == len(wanted):
                break
            try:
                refs = self.read_manifest(image.manifest).packs
            except exception.UNREADABLE as error:
                LOG.warning('image %s: nothing is deduplicated against it: '
                            '%s', image.image_id, error)
                self.state()  # or is it the whole store?
                continue
            for ref in refs:
                if ref.digest in wanted:
                    found.setdefault(ref.digest, ref)
        return found

    def pack_ref(self, digest: str, size: int) -> pack.PackRef:
        """What a pack that the journal names says of itself: to look at, not
        to be published; see :meth:`pack_refs`.

        :param size: its bytes, as the journal says.
        :raises Corrupt: it is damaged.
        """
        ref, block_size = pack.read_ref(digest, size, self.pack_read(digest))
        if block_size != self.block_size:
            raise exception.Corrupt(f'pack {digest}: wrong block size')
        return ref

    def pack_index(self, ref: pack.PackRef) -> pack.PackIndex:
        """The index of a pack, checked."""
        return pack.PackIndex.load(ref, self.pack_read(ref.digest),
                                   self.block_size)

    def pack_plain(self, index: pack.PackIndex, number: int) -> bytes:
        """The plain bytes of a pack's frame, checked."""
        return index.decode(number, self.pack_read(index.ref.digest)(
            *index.extent(number)))

    def append(self, kind: str,
               build: Callable[[journal.State], dict[str, Any] | None],
               ) -> journal.State:
        """Add an entry, whoever else is adding.

        :param build: gives the entry's members for a state; called again
            when another publisher was first; None: there is nothing to add.
        :returns: the state after it.
        :raises Busy: a hundred races were lost in a row.
        :raises NoSpace: no more images can be registered.
        """
        target: Any = self.store
        for _ in range(_ATTEMPTS):
            state = self.state()
            body = build(state)
            if body is None:
                return state
            if kind == 'register':
                journal.check_serials(state.version)
            data = journal.make(state, kind, body)
            if self._signer:
                data = self._signer.sign(data, self.id)
            after = journal.apply(state, data)
            try:
                target.create(store.entry_name(after.version), data)
            except exception.Exists:
                continue
            self._state = after
            target.replace('head.json', journal.canonical(
                {'version': after.version}))
            if after.version - after.checkpoint >= _CHECKPOINT_EVERY:
                self.checkpoint()
            return after
        raise exception.Busy(
            f'{_ATTEMPTS} other publishers were first; repeat later')

    def checkpoint(self) -> journal.State:
        """Add a checkpoint, so that new readers need not fold it all.

        Also where one is the newest entry already: it may be signed with
        another key, or not at all.
        """
        return self.append('checkpoint', self._store_state)

    def _store_state(self, state: journal.State) -> dict[str, Any]:
        data = state.to_json()
        digest = hashlib.sha256(data).hexdigest()
        target: Any = self.store
        with contextlib.suppress(exception.Exists):
            target.create(store.object_name('states', digest), data)
        return {'state': digest}

    def remove(self, image_id: str) -> journal.State:
        """Deregister an image. Its blocks stay until ``gc``.

        :raises NotFound: it is not registered.
        """
        def build(state: journal.State) -> dict[str, Any]:
            if image_id not in state.images:
                raise exception.NotFound(
                    f'image {image_id} is not registered')
            return {'image_id': image_id}

        return self.append('deregister', build)

    def move(self, image: journal.Image, visibility: str,
             owner: str) -> journal.Image:
        """Register an image anew, for others to see. Its packs are those
        that it has.

        :param image: as it is registered.
        :raises NotFound: its packs were removed meanwhile.
        """
        with contextlib.suppress(exception.NotFound):
            self.remove(image.image_id)
        members = dataclasses.asdict(dataclasses.replace(
            image, visibility=visibility, owner=owner))
        del members['serial']

        def build(state: journal.State) -> dict[str, Any] | None:
            if image.image_id in state.images:
                return None
            lacking = {ref.digest for ref in self.read_manifest(
                image.manifest).packs} - state.packs.keys()
            if lacking:
                raise exception.NotFound(
                    f'image {image.image_id}: its packs were removed')
            return {'image': members, 'packs': []}

        return self.append('register', build).images[image.image_id]


def _read_head(data: bytes) -> int:
    """The version in ``head.json``.

    :raises Corrupt: it is damaged.
    """
    try:
        number = json.loads(data)['version']
        if type(number) is not int or not 0 < number < 10 ** 16:
            raise ValueError(f'version {number!r}')
        return number
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise exception.Corrupt(f'head.json: {error!r}') from error


def _check_state(digest: str, data: bytes) -> None:
    """:raises Corrupt: a state has another digest."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise exception.Corrupt(f'states/{digest}: digest does not match')


def read_config(data: bytes) -> tuple[str, int]:
    """Id and block size (bytes) from ``config.json``.

    :raises Corrupt: it is damaged.
    :raises UnknownVersion: it is of a newer format.
    """
    try:
        config = json.loads(data)
        if config['format'] != FORMAT:
            raise ValueError(f'format {config["format"]!r}')
        if config['version'] != VERSION:
            raise exception.UnknownVersion(
                f'repository of version {config["version"]!r}')
        return (str(uuid.UUID(config['id'])),
                blocks.validate_block_size(config['block_size']))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError,
            exception.Invalid) as error:
        raise exception.Corrupt(f'config.json: {error}') from error
