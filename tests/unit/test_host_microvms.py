# SPDX-License-Identifier: Apache-2.0
"""The µVMs of a host: which come, are made ready, and go."""

import contextlib
import dataclasses
import os
import shutil
import time
import uuid

import microvms as made
import pytest
from disks import BLOCK, disk, put
from test_microvm_store import SIZE, Store, page, same
from test_pool import xml

from fastboot_common import exception
from fastboot_common.microvm import shelf
from fastboot_common.store.local import LocalStore
from fastboot_nova import mirror
from fastboot_nova.agent import metrics, microvms, window
from fastboot_nova.microvm import artifacts

HERE = made.a_key().platform
HOLDER = str(uuid.UUID('aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee'))


class Source(LocalStore):
    """Notes what is asked for, and can be out of reach."""

    def __init__(self, path):
        super().__init__(path)
        self.gone = False
        self.asked = []

    def _note(self, name):
        if self.gone:
            raise exception.Unavailable('out of reach')
        self.asked.append(name)

    def get(self, name, *args, **options):
        self._note(name)
        return super().get(name, *args, **options)

    def read(self, name, *args, **options):
        self._note(name)
        return super().read(name, *args, **options)

    def fetch(self, name, *args, **options):
        self._note(name)
        return super().fetch(name, *args, **options)


class Room:
    """A disk as large as a test wants it."""

    left = 1 << 40

    def is_roomy(self, count):
        return count <= self.left


class Place:
    """A host with a repository of images, and one of µVMs."""

    def __init__(self, path):
        self.path = path
        self.store = Store(path)
        self.room = Room()
        self.platforms = [HERE]
        self.source = Source(path / 'repo' / 'microvms')
        self.images = mirror.Mirror(
            path / 'images', LocalStore(path / 'repo'))
        self.changes = 0
        self.clock_options = {}
        self.one = self.begin()

    def begin(self, **options):
        """A new agent's, on the same directory."""
        self.told = metrics.Metrics()
        return microvms.Microvms(
            self.path / 'microvms', self.images, self.room, self.told, **{
                'enabled': True, 'opened': self._open,
                'platforms': self._ask, 'times': window.Window(''),
                'limit': None, 'interval': 60, 'jitter': 0, 'lanes': 2,
                'disk': 1 << 40, 'memory': 0,
                'changed': self._changed, **options})

    def _open(self, path):
        if not (self.path / 'repo' / 'microvms').exists():
            raise exception.NotFound('no µVMs')
        return mirror.Mirror(path, self.source)

    def _ask(self):
        if self.platforms is None:
            raise exception.Unavailable('no libvirt')
        return self.platforms

    def _changed(self):
        self.changes += 1

    def add(self, image_id, **options):
        """An image here, and its µVM in the repository."""
        self.store.add(image_id, **options)
        entry = self.store.put(image_id).published.image
        self.images.refresh()
        self.images.pull(self.images.state.images[image_id])
        return entry

    def look(self):
        with contextlib.suppress(exception.Unavailable):
            self.one.follow()
        self.one.keep()

    def row(self, image_id='one'):
        return next((row for row in self.one.rows()
                     if row['image'] == image_id), None)

    def state(self, image_id='one'):
        found = self.row(image_id)
        return found and found['state']

    def fail(self, times=1, phase='load'):
        for _ in range(times):
            loan = self.one.take('one', HOLDER)
            self.one.give_back(loan['lane'], 'failed', phase, 'words', {})
            self.one.keep()

    def artifacts(self):
        return sorted(
            (self.path / 'microvms' / 'artifacts').iterdir())

    def lanes(self):
        return sorted((self.path / 'microvms' / 'lanes').iterdir())

    def value(self, name, **labels):
        return self.told.registry.get_sample_value(
            f'fastboot_{name}', labels) or 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(microvms, '_AFTERMATH', 0)
    return Place(tmp_path)


def test_comes_and_serves(place):
    entry = place.add('one')
    assert place.one.rows() == []
    place.look()
    row = place.row()
    assert row == {
        'image': 'one', 'class': shelf.Name.of(entry).group,
        'state': 'ready', 'bytes': row['bytes'], 'lanes': 2, 'resumed': 0,
        'fallbacks': 0, 'reason': None}
    assert 0 < row['bytes'] <= place.one.held()
    same(place.path / 'one', place.artifacts()[0])
    loan = place.one.take('one', HOLDER)
    assert set(loan) == {'lane', 'path', 'directory', 'class'}
    assert loan['directory'] == str(place.artifacts()[0])
    place.one.dress(loan['lane'], xml(HOLDER))
    place.one.give_back(loan['lane'], 'resumed', 'end', '',
                        {'load': .5, 'IDENTITY': 2, 'what/ever': 1})
    assert place.row()['resumed'] == 1
    assert place.value('microvm_resumes_total') == 1
    assert place.value('microvm_seconds_count', phase='load') == 1
    assert place.value('microvm_seconds_sum', phase='IDENTITY') == 2
    assert place.value('microvm_seconds_count', phase='other') == 1
    assert place.value('microvm_lanes') == 2
    assert place.value('microvm_bytes') == place.one.held()


def test_what_is_dull_changes_nothing(place):
    place.add('one')
    place.look()
    place.changes = 0
    place.one.keep()
    assert not place.changes
    asked = len(place.source.asked)
    place.one.keep()
    assert len(place.source.asked) == asked


def test_no_repository(place):
    shutil.rmtree(place.path / 'repo' / 'microvms')
    place.look()
    assert place.one.rows() == [] and not place.one.error
    with pytest.raises(exception.NotFound, match='no µVM for this host'):
        place.one.take('one', HOLDER)
    assert place.value('microvm_misses_total', reason='absent') == 1


def test_foreign_ones_are_only_named(place):
    entry = place.add('one')
    place.platforms = [dataclasses.replace(HERE, qemu='9')]
    place.look()
    place.source.asked.clear()
    place.look()
    assert not place.one.rows()
    assert not [name for name in place.source.asked
                if name.startswith(('packs', 'manifests'))], 'remembered'
    assert not list((place.path / 'microvms' / 'mirror').glob('pa*/??/*'))
    # This host becomes one of those, and another again.
    place.platforms = [HERE]
    place.look()
    assert place.state() == 'ready'
    place.platforms = [dataclasses.replace(HERE, qemu='9')]
    place.look()
    assert not place.one.rows()
    assert not place.artifacts() and not place.lanes()
    assert not list((place.path / 'microvms' / 'mirror').glob('pa*/??/*'))
    place.platforms = [HERE]
    place.look()
    assert place.state() == 'ready'
    assert entry.image_id in os.listdir(place.path / 'microvms' / 'used')


def test_no_libvirt(place):
    place.add('one')
    place.platforms = None
    place.look()
    assert 'no libvirt' in place.one.reason
    with pytest.raises(exception.NotFound, match='no libvirt'):
        place.one.take('one', HOLDER)
    place.platforms = [HERE]
    place.one.keep()
    assert not place.one.reason
    assert place.one.platforms == [HERE.text]
    place.look()
    assert place.state() == 'ready'
    # It stops answering: what is here stays.
    place.platforms = None
    place.look()
    assert place.one.take('one', HOLDER)
    place.one = place.begin()
    place.look()
    assert place.artifacts(), 'not known is not another'


def test_only_while_the_image_is_here(place):
    place.store.add('one')
    place.store.put('one')
    place.look()
    assert place.row()['reason'] == 'its image is not registered'
    place.images.refresh()
    place.look()
    assert place.row()['reason'] == 'its image is not here yet'
    assert place.state() == 'absent'
    place.images.pull(place.images.state.images['one'])
    place.one.keep()
    assert place.state() == 'ready' and place.row()['reason'] is None
    place.store.images.remove('one')
    place.images.refresh()
    place.one.keep()
    assert place.row()['reason'] == 'its image is not registered'
    assert not place.artifacts() and not place.lanes()


def test_another_content_of_the_image(place):
    """Its disks are others; what the µVM wrote would be rubbish on them."""
    place.add('one')
    place.look()
    assert place.state() == 'ready'
    place.store.images.remove('one')
    put(place.store.images, place.path / 'work', 'one', disk(SIZE, 9),
        range(8))
    place.images.refresh()
    with pytest.raises(exception.NotFound, match='not ready'):
        place.one.take('one', HOLDER)
    place.images.pull(place.images.state.images['one'])
    place.look()
    assert place.state() == 'absent'
    assert place.row()['reason'] == 'its image has another content now'
    with pytest.raises(exception.NotFound, match='another content'):
        place.one.take('one', HOLDER)
    # It is as it was.
    place.store.images.remove('one')
    put(place.store.images, place.path / 'work', 'one', place.store.image,
        range(4))
    place.images.refresh()
    place.images.pull(place.images.state.images['one'])
    place.look()
    assert place.state() == 'ready'
    assert place.one.take('one', HOLDER)


def test_a_new_boot_set_of_the_image(place):
    """Its µVM is lent on, before anybody has looked again."""
    place.add('one')
    place.look()
    place.store.images.remove('one')
    put(place.store.images, place.path / 'work', 'one', place.store.image,
        range(6))
    place.images.refresh()
    with pytest.raises(exception.NotFound, match='not ready'):
        place.one.take('one', HOLDER)
    place.images.pull(place.images.state.images['one'])
    assert place.one.take('one', HOLDER)


def test_removed_while_it_is_in_use(place):
    entry = place.add('one')
    place.look()
    loan = place.one.take('one', HOLDER)
    place.store.microvms.remove(entry.image_id)
    place.look()
    place.one.dress(loan['lane'], xml(HOLDER))
    assert place.artifacts()
    place.one.give_back(loan['lane'], 'resumed', '', '', {})
    place.one.keep()
    assert not place.artifacts() and not place.lanes()
    assert not os.listdir(place.path / 'microvms' / 'used')


def test_who_was_not_resumed_boots_in_peace(place, monkeypatch):
    """Neither proof nor copies, which take a processor, until then."""
    place.add('one')
    place.look()
    asked = []
    monkeypatch.setattr(microvms, '_AFTERMATH', 60)
    monkeypatch.setattr(place.one.keeper, 'pause', lambda seconds:
                        asked.append(len(place.lanes())) or len(asked) < 4)
    monkeypatch.setattr(place.one._artifacts, 'prove', lambda name:
                        asked.append('proof'))
    place.fail()
    assert asked == [1, 1, 1, 1, 'proof', 1, 2]
    assert len(place.lanes()) == 2
    loan = place.one.take('one', HOLDER)
    monkeypatch.setattr(place.one, '_calm', 0)
    place.one.give_back(loan['lane'], 'refused', 'begin', 'pinned', {})
    place.one.keep()
    assert len(asked) == 7, 'nothing was tried'


def test_another_version(place):
    entry = place.add('one')
    place.look()
    place.fail(3)
    assert place.state() == 'error'
    place.store.microvms.remove(entry.image_id)
    made.make(place.path / 'one', b'new' * 30_000, size=60 * BLOCK)
    place.store.put('one')
    place.look()
    assert place.state() == 'ready' and place.row()['fallbacks'] == 3
    assert [path.name for path in place.artifacts()] != [entry.manifest]
    same(place.path / 'one', place.artifacts()[0])


def test_put_aside(place):
    place.add('one')
    place.look()
    place.fail(2)
    loan = place.one.take('one', HOLDER)
    place.one.give_back(loan['lane'], 'resumed', '', '', {})
    place.fail(2)
    loan = place.one.take('one', HOLDER)
    place.one.give_back(loan['lane'], 'refused', 'begin', 'pinned', {})
    assert place.state() == 'ready', 'not three in a row'
    place.fail()
    assert place.state() == 'error'
    assert 'words' in place.row()['reason']
    place.look()
    assert place.state() == 'error'
    with pytest.raises(exception.NotFound, match='3 resumes in a row'):
        place.one.take('one', HOLDER)
    assert place.row()['fallbacks'] == 6
    assert place.value('microvm_fallbacks_total', phase='load') == 5
    place.one = place.begin()
    place.look()
    assert place.state() == 'ready'


def test_put_aside_for_a_while(place, monkeypatch):
    monkeypatch.setattr(microvms, '_AGAIN', .2)
    place.add('one')
    place.look()
    place.fail(3, phase='plug')
    assert place.state() == 'ready', 'the host may be to blame'
    place.fail(3)
    for seconds in (.2, .4):
        assert place.state() == 'error'
        began = time.monotonic()
        while place.state() == 'error':
            assert time.monotonic() - began < 10
            place.look()
            time.sleep(.02)
        assert time.monotonic() - began > seconds / 2
        # One more failure is enough.
        place.fail()
    assert place.state() == 'error'


def damage(path):
    with path.open('r+b') as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize('name', ['memory', 'disk.qcow2'])
def test_a_damaged_artifact_is_made_anew(place, name):
    place.add('one')
    place.look()
    damage(place.artifacts()[0] / name)
    place.fail()
    place.one.keep()
    assert place.state() == 'ready'
    same(place.path / 'one', place.artifacts()[0])


def test_damaged_again_and_again(place):
    place.add('one')
    for _ in range(3):
        place.look()
        damage(place.artifacts()[0] / 'memory')
        place.fail()
    place.look()
    assert place.state() == 'error'
    assert 'again and again' in place.row()['reason']


def test_a_damaged_mirror(place):
    """What rotted there is fetched anew."""
    place.add('one')
    place.look()
    for path in (place.path / 'microvms' / 'mirror').glob('pa*/??/*'):
        damage(path)
    shutil.rmtree(place.artifacts()[0])
    place.one = place.begin()
    place.look()
    assert place.state() == 'ready'


def test_restarted_without_the_repository(place):
    place.add('one')
    place.look()
    loan = place.one.take('one', HOLDER)
    place.source.gone = True
    place.one = place.begin()
    assert not place.lanes(), 'nobody knows who has them'
    place.one.keep()
    assert place.artifacts(), 'nothing goes before it was looked at'
    with pytest.raises(exception.Unavailable):
        place.one.follow()
    assert 'out of reach' in place.one.error
    place.one.keep()
    assert place.state() == 'ready' and place.row()['lanes'] == 2
    with pytest.raises(exception.Invalid):
        place.one.give_back(loan['lane'], 'resumed', '', '', {})


def test_killed_at_every_step(place, monkeypatch):
    """Each file system call in turn is the last one."""
    place.add('one')
    place.one.follow()
    calls = 0
    names = ('pwrite', 'fsync', 'rename', 'unlink', 'ftruncate', 'mkdir')
    true = {name: getattr(os, name) for name in names}

    class Killed(BaseException):
        pass

    def run(last):
        nonlocal calls
        calls = 0

        def wrapped(name):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls >= last:
                    # Nor does anything that would clean up work.
                    raise Killed
                return true[name](*args, **options)
            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, wrapped(name))
            patch.setattr(shutil, 'rmtree', lambda *args, **options: None)
            with contextlib.suppress(Killed):
                place.one.keep()
        return calls >= last

    step = 1
    while run(step):
        place.one = place.begin()
        for path in place.artifacts():
            same(place.path / 'one', path)
        assert not place.lanes()
        place.one.follow()
        if step % 5 == 0:
            place.one.keep()
            assert place.state() == 'ready'
            place.one._remove(place.artifacts()[0].name, force=True)
            place.one = place.begin()
            place.one.follow()
        step += 1
    assert step > 10
    place.one.keep()
    assert place.state() == 'ready'


class TestSpace:

    def used(self, place, *names):
        """As if they had been used in this order."""
        for at, name in enumerate(names):
            path = place.path / 'microvms' / 'used' / self.ids[name]
            os.utime(path, (at + 1, at + 1))

    @pytest.fixture
    def three(self, place):
        self.ids = {}
        for name in ('one', 'two', 'three'):
            self.ids[name] = place.add(name).image_id
        place.look()
        self.used(place, 'one', 'two', 'three')
        assert {row['state'] for row in place.one.rows()} == {'ready'}
        self.size = max(row['bytes'] for row in place.one.rows()) + max(
            entry.virtual_size for entry in
            place.store.microvms.state().images.values())
        return place

    def states(self, place):
        return [place.state(name) for name in ('one', 'two', 'three')]

    def test_the_one_used_longest_ago_goes(self, three):
        three.one._disk = 2 * self.size
        three.look()
        assert self.states(three) == ['absent', 'ready', 'ready']
        assert '[microvm] disk' in three.row('one')['reason']
        assert len(three.artifacts()) == 2
        # Who wants it finds it next time, and another goes.
        with pytest.raises(exception.NotFound, match='disk'):
            three.one.take('one', HOLDER)
        three.look()
        assert self.states(three) == ['ready', 'absent', 'ready']

    def test_one_in_use_stays(self, three):
        loan = three.one.take('one', HOLDER)
        self.used(three, 'one', 'two', 'three')
        three.one._disk = 0
        three.look()
        assert self.states(three) == ['ready', 'absent', 'absent']
        three.one.give_back(loan['lane'], 'resumed', '', '', {})
        three.look()
        assert self.states(three) == ['absent'] * 3
        assert not list((three.path / 'microvms').glob('mirror/pa*/??/*'))

    def test_nothing_is_made_to_go_again(self, three):
        three.one._disk = 2 * self.size
        three.look()
        before = {path: path.stat().st_ino for path in three.artifacts()}
        for _ in range(3):
            three.look()
            assert {path: path.stat().st_ino
                    for path in three.artifacts()} == before

    def test_room_for_others(self, three):
        held = three.one.held()
        loan = three.one.take('one', HOLDER)
        self.used(three, 'one', 'two', 'three')
        three.room.left = 0
        freed = three.one.make_room(1)
        assert self.states(three) == ['ready', 'absent', 'ready']
        assert 0 < freed <= held - three.one.held() + 4096
        assert three.one.make_room(1 << 40)
        assert self.states(three) == ['ready', 'absent', 'absent']
        assert not three.one.make_room(1 << 40)
        three.look()
        assert self.states(three) == ['ready', 'absent', 'absent']
        assert three.row('two')['reason'] == 'it went to make room'
        three.one.give_back(loan['lane'], 'resumed', '', '', {})
        three.room.left = 1 << 40
        three.look()
        assert self.states(three) == ['ready'] * 3

    def test_no_room_to_come(self, place):
        place.add('one')
        place.room.left = 0
        place.look()
        assert place.state() == 'absent'
        assert 'room' in place.row()['reason']
        assert not list((place.path / 'microvms').glob('mirror/ready/*'))
        place.room.left = 1 << 40
        place.look()
        assert place.state() == 'ready'


def test_the_window(place):
    place.add('one')

    class Closed:
        def is_open(self):
            return False

    place.one = place.begin(times=Closed())
    place.look()
    assert place.state() == 'absent'
    with pytest.raises(exception.NotFound):
        place.one.take('one', HOLDER)
    place.look()
    assert place.state() == 'ready', 'somebody asked for it'
    place.add('two')
    place.look()
    assert place.state('two') == 'absent'
    place.one.everything()
    place.look()
    assert place.state('two') == 'ready'


def test_switched_off(place):
    place.add('one')
    place.look()
    place.one = place.begin(enabled=False)
    assert not place.one.workers
    assert not place.artifacts() and not place.one.held()
    with pytest.raises(exception.NotFound, match='switched off'):
        place.one.take('one', HOLDER)


def test_kvm_before_qemu(place):
    place.add('one')
    other = made.make(place.path / 'other', size=60 * BLOCK,
                      group=made.a_key(virt_type='kvm'))
    place.store.put('one', place.path / 'other')
    kvm = other.key.platform
    place.platforms = [kvm, HERE]
    place.look()
    assert place.one.take('one', HOLDER)['class'] == other.key.digest
    place.platforms = [HERE]
    place.look()
    assert place.one.take('one', HOLDER)['class'] == (
        made.a_key().digest)


def test_what_only_looks(place):
    assert not artifacts.counted(place.path / 'microvms')
    place.add('one')
    place.look()
    assert artifacts.counted(place.path / 'microvms') == {'one': 1}
    (place.artifacts()[0] / 'microvm.json').unlink()
    assert not artifacts.counted(place.path / 'microvms')


def test_pages_come_from_the_image(place):
    """What the image has is not fetched again."""
    place.add('one', memory=[page(3)] * 9)
    place.look()
    stored = sum(path.stat().st_size for path in
                 (place.path / 'repo' / 'microvms').glob('packs/??/*'))
    here = sum(path.stat().st_blocks * 512 for path in
               (place.path / 'microvms' / 'mirror').glob('pa*/??/*'))
    assert here <= stored + 8192


def test_threads(place):
    """As the agent runs it."""
    import time
    place.add('one')
    for one in place.one.workers:
        one.start()
    deadline = time.monotonic() + 20
    while place.state() != 'ready' and time.monotonic() < deadline:
        time.sleep(.02)
    loan = place.one.take('one', HOLDER)
    place.one.give_back(loan['lane'], 'failed', 'load', '', {})
    while place.row()['lanes'] < 2 and time.monotonic() < deadline:
        time.sleep(.02)
    for one in place.one.workers:
        one.stop()
    assert all(one.join(deadline) for one in place.one.workers)
    assert place.row()['lanes'] == 2
