# SPDX-License-Identifier: Apache-2.0
"""Repacking: the same content in less space, whatever happens meanwhile."""

import contextlib
import hashlib
import random

import pytest
from disks import (
    BLOCK,
    disk,
    make_repository,
    open_repository,
    put,
    read_back,
)

from fastboot_common import (
    exception,
    files,
    journal,
    manifest,
    pack,
    repack,
    store,
    upkeep,
)
from fastboot_nova.mirror import Mirror

SIZE = 64 * BLOCK


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / 'repo')


@pytest.fixture
def work(tmp_path):
    return tmp_path / 'work'


def two(repo, work):
    """Two images that share half of the first one's pack; its rest is
    needed by nobody."""
    whole = disk(SIZE, 'a', zeros=0)
    other = whole[:SIZE // 4] + disk(SIZE // 4, 'b', zeros=0)
    put(repo, work, 'a', whole, boot=range(8))
    put(repo, work, 'b', other, boot=range(4, 12))
    repo.remove('a')
    upkeep.collect(repo, 0, 0)
    return other


def stored(repo):
    return sum(size for _, size, _ in repo.store.list('packs'))


def all_well(repo):
    found = list(upkeep.check(repo, True))
    assert not found, found


def test_what_nobody_needs_goes(repo, work):
    other = two(repo, work)
    before, serial = stored(repo), repo.image('b').serial
    boot = repo.read_manifest(repo.image('b').manifest).boot.tolist()
    done = repack.repack(repo, .5)
    assert (done.retired, done.images) == (1, 1)
    assert done.after < done.before
    assert read_back(repo, repo.image('b')) == other
    assert repo.image('b').serial == serial
    found = repo.read_manifest(repo.image('b').manifest)
    assert found.boot.tolist() == boot
    # Hosts that have not heard of it may still ask for the old one.
    upkeep.collect(repo, 3600, 0)
    assert stored(repo) > before
    assert upkeep.collect(repo, 0, 0).packs == 1
    assert stored(repo) < before * .7
    assert not repo.state().retired
    all_well(repo)
    assert read_back(open_repository(repo.store._root),
                     repo.image('b')) == other
    # Nothing is left to do.
    assert repack.repack(repo, .5) == repack.Repacked()


def test_what_is_needed_enough_stays(repo, work):
    two(repo, work)
    version = repo.state().version
    assert repack.repack(repo, .1) == repack.Repacked()
    assert repack.repack(repo, 0) == repack.Repacked()
    done = repack.repack(repo, .5, dry_run=True)
    assert (done.retired, done.after) == (1, 0)
    assert repo.state().version == version


def test_who_was_deregistered_keeps_what_it_has(repo, work):
    """A host may have a guest of it for as long as the retention."""
    whole = disk(SIZE, 'a', zeros=0)
    put(repo, work, 'a', whole)
    put(repo, work, 'b', whole[:SIZE // 4])
    repo.remove('a')
    assert repack.repack(repo, .5) == repack.Repacked()
    upkeep.collect(repo, 0, 0)
    assert repack.repack(repo, .5).retired == 1


def test_who_cannot_be_described_otherwise_keeps_its_packs(
        repo, work, monkeypatch):
    data = {}
    for number, image_id in enumerate('abcd'):
        whole = disk(SIZE, number, zeros=0)
        put(repo, work, f'whole-{image_id}', whole)
        data[image_id] = whole[:SIZE // 4] + bytes(SIZE // 2)
        put(repo, work, image_id, data[image_id])
        repo.remove(f'whole-{image_id}')
    upkeep.collect(repo, 0, 0)
    before = repo.state()
    original = manifest.Manifest.pack

    def pack(self):
        if self.image_id in 'bc':
            raise exception.ImageRejected(f'image {self.image_id}')
        return original(self)

    monkeypatch.setattr(manifest.Manifest, 'pack', pack)
    done = repack.repack(repo, .5)
    assert (done.retired, done.images) == (2, 2)
    assert {image_id for image_id, image in repo.state().images.items()
            if image == before.images[image_id]} == {'b', 'c'}
    upkeep.collect(repo, 0, 0)
    all_well(repo)
    for image_id, content in data.items():
        assert read_back(repo, repo.image(image_id)) == content
    assert repack.repack(repo, .5).retired == 0
    assert not list((repo.store._root / 'tmp').iterdir())


def test_what_is_too_much_for_one_run(repo, work, monkeypatch):
    data = {}
    for number in range(1, 7):
        image_id = f'image-{number}'
        whole = disk(SIZE, number, zeros=0)
        put(repo, work, 'whole', whole)
        data[image_id] = whole[:4 * number * BLOCK]
        put(repo, work, image_id, data[image_id])
        repo.remove('whole')
    upkeep.collect(repo, 0, 0)
    monkeypatch.setattr(repack, '_MOVED', 30)
    assert [repack.repack(repo, .5).retired for _ in range(5)] == [
        3, 1, 1, 1, 0]
    upkeep.collect(repo, 0, 0)
    all_well(repo)
    for image_id, content in data.items():
        assert read_back(repo, repo.image(image_id)) == content


def test_nothing_new_needs_a_retired_pack(repo, work):
    other = two(repo, work)
    repack.repack(repo, .5)
    retired = set(repo.state().retired)
    put(repo, work, 'c', other[:SIZE // 4])
    found = repo.read_manifest(repo.image('c').manifest)
    assert not retired & {ref.digest for ref in found.packs}
    upkeep.collect(repo, 0, 0)
    assert read_back(repo, repo.image('c')) == other[:SIZE // 4]
    all_well(repo)


def test_a_publisher_that_is_faster(repo, work, monkeypatch):
    other = two(repo, work)
    rewrite = repack._Work._rewrite
    raced = []

    def race(self, image):
        if not raced:
            raced.append(True)
            elsewhere = open_repository(repo.store._root)
            found = elsewhere.read_manifest(image.manifest)
            found.boot = found.boot[:1]
            data = found.pack()
            digest = hashlib.sha256(data).hexdigest()
            elsewhere.store.create(f'manifests/{digest[:2]}/{digest}', data)
            elsewhere.append('repack', lambda state: {
                'packs': [], 'manifests': {'b': {
                    'manifest': digest, 'manifest_size': len(data)}}})
        return rewrite(self, image)

    monkeypatch.setattr(repack._Work, '_rewrite', race)
    assert repack.repack(repo, .5).retired == 1
    found = repo.read_manifest(repo.image('b').manifest)
    assert len(found.boot) == 1
    assert read_back(repo, repo.image('b')) == other


def test_images_that_keep_changing(repo, work, monkeypatch):
    two(repo, work)

    def repeat(self, image):
        raise repack._Repeat

    monkeypatch.setattr(repack._Work, '_rewrite', repeat)
    with pytest.raises(exception.Busy):
        repack.repack(repo, .5)
    assert not list(repo.store.scratch().iterdir())


def damage(repo, digest, at):
    path = repo.store._root / store.object_name('packs', digest)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def packs(repo, image_id):
    """Digests, of the pack with the most blocks first."""
    return [ref.digest for ref in sorted(
        repo.read_manifest(repo.image(image_id).manifest).packs,
        key=lambda ref: -ref.blocks)]


@pytest.mark.parametrize('which, at', [
    # A frame of the pack to rewrite, and the index of the other one, without
    # which what is made of the image cannot be proven.
    (0, 40), (1, -100)])
def test_a_damaged_pack_does_not_stop_others(repo, work, which, at, caplog):
    two(repo, work)
    whole = disk(SIZE, 'c', zeros=0)
    put(repo, work, 'c', whole)
    put(repo, work, 'd', whole[:SIZE // 4])
    repo.remove('c')
    upkeep.collect(repo, 0, 0)
    before = {name: packs(repo, name) for name in 'bd'}
    damage(repo, before['b'][which], at)
    again = open_repository(repo.store._root)
    assert repack.repack(again, .5, dry_run=True).retired == 1 + which
    assert repack.repack(again, .5).retired == 1
    assert before['b'][which] in caplog.text
    assert packs(again, 'b') == before['b']
    assert packs(again, 'd') != before['d']
    assert read_back(again, again.image('d')) == whole[:SIZE // 4]
    assert not list(repo.store.scratch().iterdir())


@pytest.mark.parametrize('kept', [False, True])
def test_without_a_manifest_packs_stay(repo, work, kept, caplog):
    """Its image may need any of them."""
    two(repo, work)
    put(repo, work, 'c', disk(SIZE, 'c'))
    repo.remove('c')
    manifest = repo.store._root / store.object_name(
        'manifests', repo.image('b').manifest)
    data = manifest.read_bytes()
    manifest.unlink()
    if kept:
        # A host needs it.
        repo.remove('b')
    again = open_repository(repo.store._root)
    assert repack.repack(again, .5) == repack.Repacked()
    assert 'nothing is repacked' in caplog.text
    before = again.state().packs
    done = upkeep.collect(again, 0, 0, needed=lambda images: {
        image.serial for image in images if image.image_id == 'b'})
    # What its time is over, and what nobody names, goes all the same.
    assert (done.images, done.kept, done.packs, done.files) == (
        1, int(kept), 0, 1)
    assert again.state().packs == before
    assert 'image b: ' in caplog.text
    manifest.write_bytes(data)
    assert upkeep.collect(again, 0, 0, needed=lambda images: {
        image.serial for image in images}).packs == 1
    all_well(again)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize('step', range(12))
def test_killed_at_every_step(repo, work, monkeypatch, step):
    """What is left is the old state or the new one; a repeat ends it."""
    other = two(repo, work)
    left = [step]

    def mortal(target, name):
        real = getattr(target, name)

        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)
        monkeypatch.setattr(target, name, call)

    mortal(pack.PackWriter, '_write')
    mortal(type(repo.store), 'put')
    mortal(type(repo.store), 'create')
    mortal(type(repo.store), 'replace')
    with contextlib.suppress(Killed):
        repack.repack(repo, .5)
    monkeypatch.undo()
    again = open_repository(repo.store._root)
    assert read_back(again, again.image('b')) == other
    all_well(again)
    repack.repack(again, .5)
    upkeep.collect(again, 0, 0)
    assert read_back(again, again.image('b')) == other
    all_well(again)
    assert not again.state().retired


def test_a_host_follows(repo, work, tmp_path):
    """Offline while packs were rewritten: within the window, a diff."""
    other = two(repo, work)
    mirror = Mirror(tmp_path / 'mirror', repo.store)
    image = mirror.refresh().images['b']
    mirror.pull(image)
    repack.repack(repo, .5)
    # Not told yet: it reads on from the old pack.
    assert mirror.read_manifest(image.manifest).root
    upkeep.collect(repo, 3600, 0)
    mirror.pull(image)
    mirror.refresh()
    image = mirror.state.images['b']
    mirror.pull(image)
    upkeep.collect(repo, 0, 0)
    found = mirror.read_manifest(image.manifest)
    assert found.root == repo.read_manifest(repo.image('b').manifest).root
    assert other


def test_a_checkpoint_knows_retired_packs(repo, work):
    two(repo, work)
    repack.repack(repo, .5)
    retired = repo.state().retired
    assert retired
    repo.checkpoint()
    found = open_repository(repo.store._root).state()
    assert found.retired == retired
    assert found == repo.state()


@pytest.mark.parametrize('change', [
    {'retired': ['ab' * 32]}, {'retired': 'x'}, {'retired': 5},
    {'retired': [None]}, {'retired': [['x']]}])
def test_entries_that_make_no_sense(repo, work, change):
    two(repo, work)
    data = journal.make(repo.state(), 'repack', {
        'manifests': {}, 'packs': [], **change})
    with pytest.raises(exception.Corrupt):
        journal.apply(repo.state(), data)


def visit(mirror):
    """What a host does that is here."""
    mirror.refresh()
    images = mirror.state.images.values()
    for image in images:
        mirror.pull(image)
        assert mirror.ready(image)
    mirror.prune({image.manifest for image in images})
    return files.disk_used(mirror.path)


def test_soak(tmp_path, work):
    """200 registrations, and deletions, while hosts come and go: space is
    what the live set needs."""
    repo = make_repository(tmp_path / 'repo')
    hosts = [Mirror(tmp_path / f'host {number}', repo.store)
             for number in range(4)]
    rng = random.Random(7)
    live = {}
    for number in range(200):
        base = disk(SIZE, f'base {number % 5}', zeros=.2)
        data = bytearray(base)
        for _ in range(rng.randrange(12)):
            at = rng.randrange(SIZE // BLOCK) * BLOCK
            data[at:at + BLOCK] = rng.randbytes(BLOCK)
        live[f'i{number}'] = bytes(data)
        put(repo, work, f'i{number}', bytes(data), boot=range(4))
        while len(live) > 10:
            gone = rng.choice(sorted(live))
            del live[gone]
            repo.remove(gone)
        if number % 20 == 19:
            upkeep.collect(repo, 0, 0)
            repack.repack(repo, .9)
            upkeep.collect(repo, 0, 0)
        # One is seldom here.
        for rarity, host in enumerate(hosts, 1):
            if rng.random() < 1 / (8 * rarity ** 2):
                visit(host)
    all_well(repo)
    for name, data in live.items():
        assert read_back(repo, repo.image(name)) == data
    fresh = make_repository(tmp_path / 'fresh')
    for name, data in live.items():
        put(fresh, work, name, data)
    assert stored(repo) <= 1.1 * stored(fresh)
    least = visit(Mirror(tmp_path / 'host', repo.store))
    for host in hosts:
        assert visit(host) <= 1.1 * least
