# SPDX-License-Identifier: Apache-2.0
"""A server that may change every object and has no signing key.

It is a real one, and so are the objects: what each attack changes is what
whoever has broken into the server could write. A host that follows it, with
a guest, and a new one are asked for everything then.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from agents import needs_nbdkit
from disks import read_back, replace_pack
from images import World, disk, fast_directory, put, verify
from test_signing import private, rewrite, trust

from fastboot_common import exception, journal, repository, signing, store
from fastboot_common.store import http
from fastboot_common.store.local import LocalStore
from fastboot_nova.host import Host
from fastboot_nova.node import Node

pytestmark = needs_nbdkit

BLOCK = 4096
SIZE = 300 * BLOCK
IDS = ('old', 'new')
DAMAGED = ('run "fastbootctl repo check" there|pack .* is damaged|'
           'restore the object or use another source')


class Case(World):
    """A signed repository behind a server: ``old`` is on the host, ``new``
    came later; then a checkpoint."""

    def __init__(self, path):
        super().__init__(path)
        self.repo = path / 'repo'
        self.ours = private(path / 'ours')
        self.theirs = private(path / 'theirs')
        self.data = {image_id: disk(SIZE, seed, zeros=0)
                     for seed, image_id in enumerate(IDS)}

    def writer(self, key=None):
        return repository.Repository(
            LocalStore(self.repo), signer=key and signing.Signer(key))

    def builder(self):
        """As the service opens it: it believes what it signed itself."""
        signer = signing.Signer(self.ours)
        return repository.Repository(
            LocalStore(self.repo), trust=signing.Trust([], signer),
            signer=signer)

    def add(self, image_id, data=None, key=None):
        put(self.writer(key), self.path / 'work', image_id,
            data or self.data[image_id], range(20))

    def open(self, name, url):
        return Host(self.path / name, http.HttpStore(url, retries=0),
                    socket=self.socket, threads=2,
                    volume_size=self.volume_size, trust=trust(self.ours))

    def entry(self, number):
        return self.repo / store.entry_name(number)

    def entries(self, *numbers):
        for number in numbers:
            self.entry(number).unlink()

    def head(self, number):
        (self.repo / 'head.json').write_bytes(
            journal.canonical({'version': number}))

    def objects(self, kind, image_id=None):
        """Paths of objects of a kind, of one image if it is given."""
        wanted = None
        if image_id:
            image = self.writer().image(image_id)
            wanted = {image.manifest} if kind == 'manifests' else {
                ref.digest for ref in self.writer().read_manifest(
                    image.manifest).packs}
        return [path for path in sorted((self.repo / kind).glob('*/*'))
                if wanted is None or path.name in wanted]


def spoil(path, step=997):
    data = bytearray(path.read_bytes())
    for at in range(8, len(data), step):
        data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def case():
    with fast_directory() as path:
        yield Case(path)


def attempt(host):
    """Ask a host for all that it can do; what it says that it could not."""
    said = []
    with contextlib.suppress(exception.NotFound):
        said += host.sync().failed.values()
    for image_id in IDS:
        for call in (lambda: host.acquire(image_id, 'guest'),
                     lambda: host.ensure(image_id, 200 * BLOCK, 50 * BLOCK),
                     lambda: host.hydrate(image_id)):
            try:
                call()
            except exception.FastbootError as error:
                said.append(str(error))
    return said


def right(host, case):
    """No byte is wrong; images and how many of their blocks lack."""
    found = {}
    for one in host.volumes():
        for image_id, image in one.images().items():
            found[image_id] = verify(one.path, image, case.data[image_id])
            assert host.check(image_id)[1] == []
    return found


# Attacks. Each returns what the host that follows must say, and a new one;
# None: there is nothing to say, and nothing wrong to be had.

def changed_entry(case):
    rewrite(case.writer(), 2, lambda entry: entry['image'].update(
        manifest='ab' * 32))
    return 'signature is wrong', 'rewritten; restore'


def other_content(case):
    """A whole image of its own, under the name of one of ours."""
    case.entries(2, 3)
    case.head(1)
    case.add('new', disk(SIZE, 9, zeros=0))
    return 'is not signed.*trusted_keys', 'is not signed.*trusted_keys'


def other_key(case):
    case.entries(2, 3)
    case.head(1)
    case.add('new', disk(SIZE, 9, zeros=0), case.theirs)
    return ('not one of \\[repository\\] trusted_keys',) * 2


def borrowed_signature(case):
    """The same, with the signature of the entry that it replaces."""
    signature = json.loads(case.entry(2).read_bytes())['signature']
    other_content(case)
    rewrite(case.writer(), 2, lambda entry: entry.update(
        signature=signature))
    return ('signature is wrong; the repository must not be trusted',) * 2


def another_life(case):
    """Everything anew, from the first entry on."""
    case.entries(1, 2, 3)
    (case.repo / 'head.json').unlink()
    for image_id in IDS:
        case.add(image_id, disk(SIZE, 8, zeros=0))
    return 'rewritten; restore', 'is not signed.*trusted_keys'


def removed_image(case):
    case.writer().remove('old')
    return ('is not signed.*trusted_keys',) * 2


def replay(case):
    """An entry that was right once, as a new one."""
    case.entry(4).write_bytes(case.entry(2).read_bytes())
    case.head(4)
    return ('entry 4: says that it is number 2',) * 2


def replay_numbered(case):
    entry = json.loads(case.entry(3).read_bytes())
    entry.update(number=4, checkpoint=3, previous=case.writer(
        ).state().previous)
    case.entry(4).write_bytes(journal.canonical(entry))
    case.head(4)
    return 'signature is wrong', 'checkpoint 4: its state is of version 2'


def truncated(case):
    case.entries(2, 3)
    return ('journal gap',) * 2


def hole(case):
    case.entries(2)
    # The checkpoint tells a new host the same, and is signed.
    return 'journal gap', None


def rollback(case):
    """An old repository, whole: nothing new comes."""
    case.entries(2, 3)
    case.head(1)
    return ('no image',) * 2


def emptied(case):
    case.entries(1, 2, 3)
    (case.repo / 'head.json').unlink()
    return 'is gone.*restore the newer', 'no image'


def far_head(case):
    case.head(9)
    return ('journal gap',) * 2


def garbage_head(case):
    (case.repo / 'head.json').write_bytes(b'{"version": "3"}')
    return ('head.json',) * 2


def changed_state(case):
    for path in case.objects('states'):
        spoil(path)
    return None, 'states/.*digest does not match'


def other_state(case):
    """A checkpoint of a state with other manifests."""
    state = case.writer().state()
    other = state.copy()
    other.version = 2
    other.previous = json.loads(case.entry(3).read_bytes())['previous']
    other.checkpoint = 0
    other.images['new'] = other.images['old']
    data = other.to_json()
    digest = hashlib.sha256(data).hexdigest()
    LocalStore(case.repo).create(store.object_name('states', digest), data)
    rewrite(case.writer(), 3, lambda entry: entry.update(state=digest))
    return 'signature is wrong', 'signature is wrong|states/'


def changed_manifest(case):
    for path in case.objects('manifests', 'new'):
        spoil(path)
    return ('manifest .*digest does not match',) * 2


def swapped_manifests(case):
    [old], [new] = (case.objects('manifests', one) for one in IDS)
    shutil.copyfile(old, new)
    return ('manifest .*digest does not match',) * 2


def changed_packs(case):
    for path in case.objects('packs'):
        spoil(path)
    return DAMAGED, DAMAGED


def changed_frames(case):
    """The index of a pack stays right, its frames are others."""
    for path in case.objects('packs'):
        data = bytearray(path.read_bytes())
        data[64:len(data) // 2] = os.urandom(len(data) // 2 - 64)
        path.write_bytes(data)
    return DAMAGED, DAMAGED


def replaced_packs(case):
    """Each pack is right in itself, and not the one that it was."""
    writer = case.writer()
    for image in writer.state().images.values():
        for ref in writer.read_manifest(image.manifest).packs:
            replace_pack(writer, ref, case.path)
    return DAMAGED, DAMAGED


def swapped_packs(case):
    olds, news = (case.objects('packs', one) for one in IDS)
    for old, new in zip(olds, news, strict=False):
        kept = new.read_bytes()
        new.write_bytes(old.read_bytes())
        old.write_bytes(kept)
    return DAMAGED, DAMAGED


def truncated_packs(case):
    for path in case.objects('packs'):
        os.truncate(path, path.stat().st_size // 3)
    return 'packs/.* ends at', 'packs/.* ends at'


def other_repository(case):
    path = case.repo / 'config.json'
    path.write_bytes(journal.canonical({
        **json.loads(path.read_bytes()),
        'id': '00000000-0000-0000-0000-000000000001'}))
    return 'use another state directory', 'signature is wrong'


def other_blocks(case):
    path = case.repo / 'config.json'
    path.write_bytes(journal.canonical({
        **json.loads(path.read_bytes()), 'block_size': 8192}))
    return None, 'blocks of 4096 bytes, the repository has 8192'


def garbage_config(case):
    (case.repo / 'config.json').write_bytes(b'{}')
    return ('config.json',) * 2


ATTACKS = [
    changed_entry, other_content, other_key, borrowed_signature,
    another_life, removed_image, replay, replay_numbered, truncated, hole,
    rollback, emptied, far_head, garbage_head, changed_state, other_state,
    changed_manifest, swapped_manifests, changed_packs, changed_frames,
    replaced_packs, swapped_packs, truncated_packs, other_repository,
    other_blocks, garbage_config]


@pytest.fixture
def attacked(case, nginx):
    """Beside it, a host with a guest, and the server's address."""
    server = nginx(case.repo)
    case.add('old', key=case.ours)
    with case.open('host', server.url) as host:
        host.sync()
        host.acquire('old', 'guest')
    case.add('new', key=case.ours)
    case.writer(case.ours).checkpoint()
    return server.url


def told(said, expected):
    if expected is None:
        return True
    return any(re.search(expected, words, re.DOTALL) for words in said)


@pytest.mark.parametrize('attack', ATTACKS,
                         ids=lambda attack: attack.__name__)
def test_nothing_is_accepted(case, attacked, attack):
    whole = case.path / 'backup'
    shutil.copytree(case.repo, whole)
    for_one, for_new = attack(case)
    with case.open('host', attacked) as host:
        try:
            said = attempt(host)
        except exception.FastbootError as error:
            said = [str(error)]
        found = right(host, case)
        assert found['old'] is not None  # the guest's
        assert told(said, for_one), said
    try:
        with case.open('fresh', attacked) as fresh:
            try:
                said = attempt(fresh)
            except exception.FastbootError as error:
                said = [str(error)]
            right(fresh, case)
    except exception.FastbootError as error:
        said = [str(error)]
    assert told(said, for_new), said
    # Repaired, all of it comes.
    shutil.rmtree(case.repo)
    whole.rename(case.repo)
    with case.open('host', attacked) as host:
        assert attempt(host) == []
        assert right(host, case) == {'old': 0, 'new': 0}


@pytest.mark.parametrize('attack', ATTACKS,
                         ids=lambda attack: attack.__name__)
def test_nor_when_a_builder_publishes_then(case, attacked, attack):
    """It would sign what the server wrote before."""
    attack(case)
    case.data['later'] = disk(SIZE, 7, zeros=0)
    with contextlib.suppress(exception.FastbootError):
        put(case.builder(), case.path / 'work', 'later', case.data['later'],
            range(20))
    for name in ('host', 'fresh'):
        with contextlib.suppress(exception.FastbootError), case.open(
                name, attacked) as host:
            with contextlib.suppress(exception.FastbootError):
                attempt(host)
            found = right(host, case)
            assert name == 'fresh' or found['old'] is not None


def test_a_builder_vouches_for_nothing(case, attacked):
    """It has seen no pack before, and is to share their blocks."""
    replaced_packs(case)
    builder = case.builder()
    done = put(builder, case.path / 'elsewhere', 'derived',
               case.data['old'], range(20))
    assert read_back(builder, done.image) == case.data['old']


@pytest.mark.parametrize('attack', [
    changed_packs, swapped_packs, another_life, removed_image])
def test_a_guest_reads_right_bytes_or_none(case, attacked, attack):
    """Through the socket that QEMU has, misses and all."""
    attack(case)
    raw = case.path / 'raw'
    raw.write_bytes(case.data['old'])
    served = case.path / 'served'
    with case.open('host', attacked) as host, Node(
            host, case.path / 'run', socket=case.socket, wait=5,
            shield_wait=1):
        with contextlib.suppress(exception.FastbootError):
            host.sync()
        for block in (0, 150, 299):  # of the boot set, and misses
            served.unlink(missing_ok=True)
            done = subprocess.run(
                ['qemu-img', 'dd', '-f', 'raw', '-O', 'raw', 'bs=4096',
                 f'skip={block}', f'count={block + 1}',
                 f'if=nbd+unix:///old?socket={case.socket}',
                 f'of={served}'], capture_output=True, timeout=60)
            if done.returncode == 0:
                at = block * BLOCK
                assert pathlib.Path(served).read_bytes()[:BLOCK] == case.data[
                    'old'][at:at + BLOCK]
            assert done.returncode == 0 or block
        right(host, case)
