# SPDX-License-Identifier: Apache-2.0
"""Repositories: histories, races, checks and collecting garbage."""

import contextlib
import datetime
import json
import os
import shutil
import threading
import time

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
    journal,
    publish,
    repository,
    store,
    upkeep,
)
from fastboot_common.store.local import LocalStore


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / 'repo')


def add(repo, image_id):
    """An entry without content."""
    return repo.append('register', lambda state: {
        'image': {'image_id': image_id, 'name': image_id,
                  'manifest': 'ab' * 32, 'manifest_size': 5,
                  'virtual_size': 0, 'visibility': 'public', 'owner': '',
                  'os_hash': {}}, 'packs': []})


def fresh(repo):
    return repository.Repository(repo.store)


def entry(repo, number):
    return repo.store._root / store.entry_name(number)


def test_init_and_open(tmp_path):
    (tmp_path / 'r').mkdir()
    target = LocalStore(tmp_path / 'r')
    with pytest.raises(exception.NotFound):
        repository.Repository(target)
    with pytest.raises(exception.Invalid):
        repository.init(target, 5000)
    repository.init(target, 8192)
    with pytest.raises(exception.Exists):
        repository.init(target, 8192)
    found = repository.Repository(target)
    assert found.block_size == 8192
    assert found.id == repository.Repository(target).id
    assert found.state() == journal.State()


@pytest.mark.parametrize('change, error', [
    ({'version': 2}, exception.UnknownVersion),
    ({'format': 'x'}, exception.Corrupt), ({'id': 'x'}, exception.Corrupt),
    ({'block_size': 5}, exception.Corrupt),
    ({'block_size': None}, exception.Corrupt)])
def test_configurations_that_have_no_sense(repo, change, error):
    path = repo.store._root / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(error):
        fresh(repo)


def test_a_configuration_without_end(repo):
    (repo.store._root / 'config.json').write_bytes(b'[' * 9000)
    with pytest.raises(exception.Corrupt):
        fresh(repo)


def test_checkpoints(repo):
    for number in range(140):
        add(repo, f'image-{number}')
    state = repo.state()
    assert state.version == 141
    assert state.checkpoint == 129
    # A new reader, and one that folds everything.
    assert fresh(repo).state() == state
    folded = journal.State()
    for number in range(1, 142):
        folded = journal.apply(folded, entry(repo, number).read_bytes())
    assert folded == state
    # It really begins at the checkpoint.
    entry(repo, 5).unlink()
    assert fresh(repo).state() == state
    assert [one.name for one in upkeep.check(repo)
            if one.name.startswith('journal')] == [store.entry_name(5)]


def test_a_checkpoint_that_was_collected(repo):
    """Folding everything gives the same."""
    for number in range(130):
        add(repo, f'image-{number}')
    state = repo.state()
    shutil.rmtree(repo.store._root / 'states')
    assert fresh(repo).state() == state


def test_a_damaged_checkpoint(repo):
    add(repo, 'a')
    repo.checkpoint()
    [path] = (repo.store._root / 'states').glob('*/*')
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(exception.Corrupt, match='states/'):
        fresh(repo).state()
    assert any(one.name.startswith('states/') for one in upkeep.check(repo))


@pytest.mark.parametrize('state', ['../../x', 'None', 5, None])
def test_a_checkpoint_that_names_no_state(repo, state):
    add(repo, 'a')
    repo.checkpoint()
    path = entry(repo, 2)
    path.write_text(json.dumps(
        {**json.loads(path.read_bytes()), 'state': state}))
    add_to = {'version': 3}
    path3 = entry(repo, 3)
    path3.write_bytes(journal.canonical({
        **json.loads(path.read_bytes()), 'number': 3, 'checkpoint': 2}))
    repo.store.replace('head.json', journal.canonical(add_to))
    with pytest.raises(exception.Corrupt):
        fresh(repo).state()


@pytest.mark.parametrize('lost', [1, 2, 3])
def test_journal_gap(repo, lost):
    for number in range(4):
        add(repo, f'image-{number}')
    entry(repo, lost).unlink()
    with pytest.raises(exception.Corrupt, match='gap'):
        fresh(repo).state()
    problems = [one for one in upkeep.check(repo)
                if one.problem.endswith('journal gap')]
    assert [one.name for one in problems] == [store.entry_name(lost)]


def test_rewritten_journal(repo):
    add(repo, 'a')
    known = fresh(repo)
    known.state()
    other = repo.state()
    entry(repo, 1).unlink()
    repo._state = journal.State()
    (repo.store._root / 'head.json').unlink()
    add(repo, 'b')
    add(repo, 'c')
    with pytest.raises(exception.Corrupt, match='rewritten'):
        known.state()
    assert known._state == other


@pytest.mark.parametrize('head', [
    None, b'{"version":1}', b'{"version":2}', b'{"version":3}'])
def test_the_hint_may_be_behind(repo, head):
    for number in range(3):
        add(repo, f'image-{number}')
    path = repo.store._root / 'head.json'
    path.unlink() if head is None else path.write_bytes(head)
    assert fresh(repo).state().version == 3


@pytest.mark.parametrize('head', [
    b'{"version":4}', b'{"version":9999999999999999}',
    b'{"version":99999999999999999}', b'{"version":-1}', b'[]', b'{}', b'',
    b'{"version":true}', b'[' * 4000, b'x' * 5000])
def test_a_hint_that_is_wrong(repo, head):
    for number in range(3):
        add(repo, f'image-{number}')
    (repo.store._root / 'head.json').write_bytes(head)
    with pytest.raises(exception.Corrupt):
        fresh(repo).state()


def test_racing_appends(repo):
    """Every number once, nothing lost."""
    def run(name):
        one = fresh(repo)
        for number in range(12):
            add(one, f'{name}-{number}')

    threads = [threading.Thread(target=run, args=(name,)) for name in 'abcd']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    state = fresh(repo).state()
    assert state.version == 48
    assert len(state.images) == 48
    assert not list(upkeep._check_journal(repo))


def race(tmp_path, jobs):
    """Publish in processes that start together; exit statuses."""
    children = []
    gate_read, gate_write = os.pipe()
    for work, image_id, data in jobs:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(gate_write)
                os.read(gate_read, 1)
                put(open_repository(tmp_path / 'repo'), tmp_path / work,
                    image_id, data)
                status = 0
            os._exit(status)
        children.append(child)
    os.close(gate_read)
    os.close(gate_write)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for child in children]


@pytest.mark.parametrize('shared_cache', [True, False])
def test_racing_publishers(tmp_path, repo, shared_cache):
    images = {f'image-{number}': disk(200 * BLOCK, number, pool=300)
              for number in range(4)}
    assert race(tmp_path, [
        ('work' if shared_cache else f'work-{image_id}', image_id, data)
        for image_id, data in images.items()]) == [0] * 4
    state = repo.state()
    assert set(state.images) == set(images)
    for image_id, data in images.items():
        assert read_back(repo, state.images[image_id]) == data
    assert not list(upkeep.check(repo, deep=True))
    # Afterwards all is known.
    again = put(repo, tmp_path / 'work', 'again', images['image-2'])
    assert again.new_bytes == 0


def test_racing_publishers_of_the_same_image(tmp_path, repo):
    data = disk(50 * BLOCK, 1)
    assert race(tmp_path, [('work', 'image', data)] * 3) == [0] * 3
    state = repo.state()
    assert list(state.images) == ['image']
    assert read_back(repo, state.images['image']) == data


def test_others_published_meanwhile(tmp_path, repo, monkeypatch):
    """The loser dedups against the winner."""
    data = disk(100 * BLOCK, 1)
    other = fresh(repo)
    original = publish._Work._prove
    calls = []

    def meanwhile(self, *made):
        calls.append(1)
        if len(calls) == 1:
            put(other, tmp_path / 'other', 'winner', data)
        original(self, *made)

    monkeypatch.setattr(publish._Work, '_prove', meanwhile)
    done = put(repo, tmp_path / 'work', 'loser', data[:90 * BLOCK] + disk(
        10 * BLOCK, 2))
    # winner's own _prove is counted, too: loser, winner, loser again.
    assert len(calls) == 3
    assert done.new_bytes <= 10 * BLOCK
    assert read_back(repo, done.image) == data[:90 * BLOCK] + disk(
        10 * BLOCK, 2)
    assert not list((repo.store._root / 'tmp').iterdir())


def test_packs_dropped_meanwhile(tmp_path, repo, monkeypatch):
    data = disk(100 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'old', data)
    other = fresh(repo)
    original = publish._Work._prove
    calls = []

    def meanwhile(self, *made):
        calls.append(1)
        original(self, *made)
        if len(calls) == 1:
            other.remove('old')
            upkeep.collect(other, retention=0, grace=0)

    monkeypatch.setattr(publish._Work, '_prove', meanwhile)
    done = put(repo, tmp_path / 'work', 'new', data)
    assert len(calls) == 2
    assert read_back(repo, done.image) == data
    assert not list(upkeep.check(repo, deep=True))


@pytest.mark.parametrize('entries', [1, 3])
def test_retention_by_a_clock_that_is_behind(tmp_path, repo, monkeypatch,
                                             entries):
    """A machine that has no time from the network yet: what it removes is
    no older than what was there before."""
    names = [f'image-{number}' for number in range(entries)]
    for seed, name in enumerate(names):
        put(repo, tmp_path / 'work', name, disk(20 * BLOCK, seed))
    real = datetime.datetime

    class Behind(real):
        @classmethod
        def now(cls, tz=None):
            return real(2020, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patched:
        patched.setattr(journal.datetime, 'datetime', Behind)
        for name in names:
            repo.remove(name)
    assert {gone.time[:4] for gone in repo.state().removed.values()} == {
        '2020'}
    assert not upkeep.collect(repo, retention=3600, grace=0).images
    assert upkeep.collect(repo, retention=0, grace=0).images == entries


def test_collecting_while_the_same_pack_is_made_again(
        tmp_path, repo, monkeypatch):
    """A pack is published again between ``drop`` and the deletions."""
    data = disk(60 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'old', data)
    repo.remove('old')
    other = fresh(repo)
    original = LocalStore.list
    done = []

    def late(self, kind):
        found = list(original(self, kind))
        if kind == 'packs' and not done:
            done.append(put(other, tmp_path / 'other', 'new', data))
        return iter(found)

    monkeypatch.setattr(LocalStore, 'list', late)
    upkeep.collect(repo, retention=0, grace=0)
    assert read_back(repo, repo.state().images['new']) == data
    assert not list(upkeep.check(repo, deep=True))


def test_collected_before_the_entry_said_otherwise(
        tmp_path, repo, monkeypatch):
    """The same, the deletion being just before the new entry."""
    data = disk(60 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'old', data)
    repo.remove('old')
    upkeep.collect(repo, retention=0, grace=3600)
    assert not repo.state().packs
    original = repo.append

    def append(kind, build):
        def late(state):
            body = build(state)
            upkeep.collect(fresh(repo), retention=0, grace=0)
            return body
        return original(kind, late)

    monkeypatch.setattr(repo, 'append', append)
    done = put(repo, tmp_path / 'work', 'new', data)
    assert read_back(repo, done.image) == data
    assert not list(upkeep.check(repo, deep=True))


def names(repo, kind):
    return {name for name, _, _ in repo.store.list(kind)}


def test_collecting(tmp_path, repo):
    one, two = disk(60 * BLOCK, 1), disk(60 * BLOCK, 2)
    put(repo, tmp_path / 'work', 'one', one)
    kept = names(repo, 'packs') | names(repo, 'manifests')
    put(repo, tmp_path / 'work', 'two', one[:30 * BLOCK] + two)
    everything = names(repo, 'packs') | names(repo, 'manifests')
    # Nothing to do.
    version = repo.state().version
    assert upkeep.collect(repo, 0, 0).files == 0
    assert repo.state().version == version
    # Retention: an image that was removed stays for a time.
    repo.remove('two')
    assert list(repo.state().removed) == ['2']
    assert upkeep.collect(repo, 3600, 0).files == 0
    assert names(repo, 'packs') | names(repo, 'manifests') == everything
    # Looking only.
    would = upkeep.collect(repo, 0, 0, dry_run=True)
    assert (would.images, would.packs) == (1, 1)
    assert would.bytes > 0
    assert names(repo, 'packs') | names(repo, 'manifests') == everything
    assert repo.state().removed
    # Grace: files that are young stay.
    done = upkeep.collect(repo, 0, 3600)
    assert (done.images, done.packs, done.files) == (1, 1, 0)
    assert not repo.state().removed
    assert names(repo, 'packs') | names(repo, 'manifests') == everything
    # What a publisher that died long ago had begun goes, too.
    for name, age in (('old', 90000), ('young', 100)):
        path = repo.store.scratch() / name
        path.write_bytes(b'x')
        os.utime(path, (time.time() - age,) * 2)
    assert upkeep.collect(repo, 0, 0).files == 3
    assert [path.name for path in repo.store.scratch().iterdir()
            ] == ['young']
    assert names(repo, 'packs') | names(repo, 'manifests') == kept
    assert read_back(repo, repo.image('one')) == one
    assert not list(upkeep.check(repo, deep=True))


class Clock(datetime.datetime):
    """A clock that somebody sets."""

    days = 0.0

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(cls.days)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(Clock, 'days', 0.0)
    monkeypatch.setattr(journal.datetime, 'datetime', Clock)
    return Clock


def test_a_clock_that_was_years_ahead(tmp_path, repo, clock):
    for number, name in enumerate('abc'):
        put(repo, tmp_path / 'work', name, disk(9 * BLOCK, number))
    clock.days = 4000
    repo.remove('a')
    clock.days = 0
    # Nobody can tell how long ago that was, until something else happens.
    assert upkeep.collect(repo, 10, 0).images == 0
    clock.days = 3000
    assert upkeep.collect(repo, 10, 0).images == 0
    clock.days = 0
    repo.remove('b')
    clock.days = 2
    repo.checkpoint()
    week = 7 * 86400
    assert upkeep.collect(repo, week, 0).images == 0
    clock.days = 8
    done = upkeep.collect(repo, week, 0)
    assert (done.images, done.packs) == (2, 2)
    assert list(repo.state().images) == ['c']
    assert not list(upkeep.check(repo, deep=True))


def test_no_pack_is_collected_without_every_manifest(tmp_path, repo, caplog):
    put(repo, tmp_path / 'work', 'one', disk(9 * BLOCK, 1))
    put(repo, tmp_path / 'work', 'two', disk(9 * BLOCK, 2))
    repo.remove('two')
    path = repo.store._root / store.object_name(
        'manifests', repo.image('one').manifest)
    path.write_bytes(path.read_bytes()[:-1])
    before = names(repo, 'packs')
    done = upkeep.collect(fresh(repo), 0, 0)
    assert (done.images, done.packs) == (1, 0)
    assert names(repo, 'packs') == before
    assert 'image one: ' in caplog.text


def test_collecting_keeps_the_newest_checkpoint(tmp_path, repo):
    put(repo, tmp_path / 'work', 'one', disk(9 * BLOCK, 1))
    repo.checkpoint()
    put(repo, tmp_path / 'work', 'two', disk(9 * BLOCK, 2))
    repo.checkpoint()
    assert len(names(repo, 'states')) == 2
    assert upkeep.collect(repo, 0, 0).files == 1
    assert len(names(repo, 'states')) == 1
    assert not list(upkeep.check(repo, deep=True))
    entry(repo, 1).unlink()
    assert fresh(repo).state() == repo.state()


def test_numbers_that_are_used_up(tmp_path, repo, monkeypatch):
    monkeypatch.setattr(journal, 'SERIAL_LIMIT', 4)
    for number in range(3):
        put(repo, tmp_path / 'work', f'image-{number}', disk(BLOCK, number))
    with pytest.raises(exception.NoSpace, match='up to entry 3'):
        put(repo, tmp_path / 'work', 'more', disk(BLOCK, 9))
    assert repo.state().version == 3
    # All else goes on.
    with pytest.raises(exception.NoSpace, match='has 4 entries'):
        repo.move(repo.image('image-0'), 'private', 'p')
    repo.remove('image-1')
    assert upkeep.collect(repo, 0, 0).images == 2
    state = repo.checkpoint()
    assert (state.version, list(state.images)) == (7, ['image-2'])
    assert fresh(repo).state() == state
    assert not list(upkeep.check(repo, deep=True))
    assert [journal.serials_left(version) for version in (0, 2, 3, 9)] == [
        3, 1, 0, 0]


def test_removing(tmp_path, repo):
    data = disk(9 * BLOCK, 1)
    first = put(repo, tmp_path / 'work', 'one', data).image
    with pytest.raises(exception.NotFound):
        repo.remove('two')
    assert repo.remove('one').removed['1'].image == first
    with pytest.raises(exception.NotFound):
        repo.remove('one')
    again = put(repo, tmp_path / 'work', 'one', disk(9 * BLOCK, 2)).image
    assert again.serial == 3
    assert repo.state().by_serial(1) == first


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if at is None else at
    data[at] ^= 16
    path.chmod(0o600)
    path.write_bytes(data)


def damage_pack(root, packs, manifests):
    flip(packs[0])
    return packs[0]


def lose_pack(root, packs, manifests):
    packs[0].unlink()
    return packs[0]


def swap_packs(root, packs, manifests):
    keep = packs[0].read_bytes()
    packs[0].write_bytes(packs[1].read_bytes())
    packs[1].write_bytes(keep)
    return packs[0]


def cut_pack(root, packs, manifests):
    os.truncate(packs[0], packs[0].stat().st_size - 1)
    return packs[0]


def cut_manifest(root, packs, manifests):
    os.truncate(manifests[0], 100)
    return


def lose_manifest(root, packs, manifests):
    manifests[0].unlink()
    return


def swap_manifests(root, packs, manifests):
    keep = manifests[0].read_bytes()
    manifests[0].write_bytes(manifests[1].read_bytes())
    manifests[1].write_bytes(keep)
    return


@pytest.mark.parametrize('harm', [
    damage_pack, lose_pack, swap_packs, cut_pack, cut_manifest,
    lose_manifest, swap_manifests], ids=lambda harm: harm.__name__)
def test_check_finds(tmp_path, repo, harm):
    for number in range(2):
        put(repo, tmp_path / 'work', f'image-{number}',
            disk(50 * BLOCK, number), boot=range(20))
    assert not list(upkeep.check(repo, deep=True))
    root = repo.store._root
    name = harm(root, sorted((root / 'packs').glob('*/*')),
                sorted((root / 'manifests').glob('*/*')))
    problems = list(upkeep.check(fresh(repo), deep=True))
    assert problems
    if name:
        assert any(name.name in one.name for one in problems)
    else:
        assert any(one.name.startswith('image ') for one in problems)


def test_every_flipped_byte_of_a_pack_is_found(tmp_path, repo):
    put(repo, tmp_path / 'work', 'image', disk(4 * BLOCK, 1, zeros=0))
    [path] = (repo.store._root / 'packs').glob('*/*')
    data = path.read_bytes()
    path.chmod(0o600)
    for at in [*range(16), *range(20, len(data), 997),
               *range(len(data) - 250, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert list(upkeep.check(repo, deep=True)), at


def test_statistics(tmp_path, repo):
    assert upkeep.statistics(repo)['dedup_ratio'] == 1.0
    data = disk(40 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'one', data, boot=range(10))
    put(repo, tmp_path / 'work', 'two', data + disk(10 * BLOCK, 2, zeros=0),
        boot=range(5, 15))
    found = upkeep.statistics(repo)
    assert found['virtual_bytes'] == found['data_bytes'] == 90 * BLOCK
    assert found['unique_bytes'] == 50 * BLOCK
    assert found['boot_set_bytes'] == 20 * BLOCK
    assert found['unique_boot_set_bytes'] == 15 * BLOCK
    assert found['dedup_ratio'] == 1.8
    assert found['images'] == 2
    assert found['pack_bytes'] == sum(
        size for _, size, _ in repo.store.list('packs'))


def test_leftovers_are_collected_when_old(repo, tmp_path):
    path = repo.store.scratch() / 'x'
    path.write_bytes(b'leftover')
    import hashlib
    digest = hashlib.sha256(b'leftover').hexdigest()
    repo.store.put(store.object_name('packs', digest), path)
    assert upkeep.collect(repo, 0, 3600).files == 0
    old = time.time() - 7200
    os.utime(repo.store._root / store.object_name('packs', digest),
             (old, old))
    assert upkeep.collect(repo, 0, 3600).files == 1
    assert not names(repo, 'packs')
