# SPDX-License-Identifier: Apache-2.0
"""The agent's work in the background: pulls, hydration, room, memory."""

import contextlib
import os
import pathlib
import threading
import time

import pytest
from agents import wait_for
from images import CountingStore, World, disk, fast_directory, verify

from fastboot_common import exception, journal
from fastboot_common.store import throttle
from fastboot_nova import host
from fastboot_nova.agent import (
    bus,
    hydrate,
    memory,
    metrics,
    report,
    space,
    sync,
    window,
)


@pytest.fixture
def world():
    with fast_directory() as path:
        made = World(path)
        for number in range(3):
            made.publish(f'image-{number}', disk(
                400 * 4096, number, zeros=0), range(80))
        yield made


class Parts:
    """Sync and hydration of a host, as the agent has them."""

    def __init__(self, world, source=None, *, times='', rate=0, eager=False,
                 policy='leased', min_free=0, jitter=0, delay=0):
        self.source = source or CountingStore(world.path / 'repo')
        self.host = world.host(self.source)
        self.evicted = []
        self.changes = 0
        self.told = metrics.Metrics()
        self.room = space.Space(self.host, min_free, self._evicted)
        self.sync = sync.Sync(
            self.host, self.room, self.told, times=window.Window(times),
            interval=3600, jitter=jitter, rate=rate, eager=eager,
            evicted=self._evicted, changed=self._changed)
        self.hydrator = hydrate.Hydrator(
            self.host, self.room, self.told, policy=policy,
            rate=lambda: 0, delay=delay, busy=lambda: False,
            changed=self._changed)
        self.sent = []
        self.reporter = report.Reporter(
            'host-1', self.host, self.sync, self.hydrator, self.room,
            self.told, send=self.sent.append, interval=3600)
        self._workers = [self.sync.worker, self.hydrator.worker]

    def _evicted(self, image_id, freed):
        self.evicted.append(image_id)

    def _changed(self):
        self.changes += 1

    def states(self):
        return {row['id']: row['state'] for row in self.reporter.images()}

    def row(self, image_id):
        return next((row for row in self.reporter.images()
                     if row['id'] == image_id),
                    {'state': '', 'progress': 0, 'error': ''})

    def await_states(self, **states):
        wait_for(lambda: all(
            self.states().get(key.replace('_', '-')) == value
            for key, value in states.items()))


@pytest.fixture
def parts(world):
    with contextlib.ExitStack() as stack:
        def make(*args, **options):
            made = Parts(world, *args, **options)

            def close():
                for one in made._workers:
                    one.stop()
                made.sync.close()
                for one in made._workers:
                    assert one.join(time.monotonic() + 60)
                made.host.close()

            stack.callback(close)
            return made

        yield make


def closed():
    hour = time.localtime().tm_hour
    return f'{(hour + 6) % 24:02}:00-{(hour + 7) % 24:02}:00'


ALL = {f'image_{number}': 'ready' for number in range(3)}


def test_follows_announcements(world, parts):
    one = parts()
    one.sync.worker.start()
    one.await_states(**ALL)
    assert one.sync.version == one.sync.heard == 3
    world.publish('image-3', disk(90 * 4096, 9), range(9))
    one.sync.announce(2)  # which is old
    one.sync.announce(4)
    one.await_states(image_3='ready')
    assert one.sync.heard == 4


def test_jitter_waits_and_an_order_does_not(world, parts):
    one = parts(jitter=3600)
    one.sync.worker.start()
    one.sync.announce(3)
    time.sleep(0.2)
    assert one.states() == {}
    one.sync.worker.stop()
    assert one.sync.worker.join(time.monotonic() + 20), 'stops at once'
    other = parts(jitter=3600)
    other.sync.everything()
    other.sync.worker.start()
    other.await_states(**ALL)


def test_window(world, parts):
    one = parts(times=closed())
    one.sync.worker.start()
    wait_for(lambda: one.states().get('image-2') == 'absent')
    one.sync.ask('image-1')
    one.await_states(image_1='ready')
    assert one.states()['image-0'] == 'absent'
    one.sync.everything()
    one.await_states(**ALL)


def test_asked_for_what_nobody_knows_yet(world, parts):
    one = parts(times=closed())
    done = threading.Event()
    one.sync.ask('image-0', lambda image: done.set())
    assert done.wait(20)
    one.sync.ask('unknown', lambda image: pytest.fail('it is not there'))
    one.sync.ask('image-1')
    one.await_states(image_0='ready', image_1='ready')


def test_eager(world, parts):
    one = parts(eager=True)
    one.sync.worker.start()
    one.await_states(image_0='thawed', image_1='thawed', image_2='thawed')


def test_a_repository_that_goes_away(world, parts):
    source = CountingStore(world.path / 'repo')
    one = parts(source)
    source.broken = None
    one.sync.worker.start()
    wait_for(lambda: 'out of reach' in one.sync.error)
    source.broken = ()
    one.await_states(**ALL)
    assert one.sync.error == ''


def test_one_damaged_image(world, parts):
    """It is reported with the reason, and does not keep others away."""
    source = CountingStore(world.path / 'repo')
    manifest = world.repository.image('image-1').manifest
    path = world.path / 'repo' / 'manifests' / manifest[:2] / manifest
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:-9] + bytes(9))
    one = parts(source)
    one.sync.worker.start()
    one.await_states(image_0='ready', image_1='error', image_2='ready')
    assert manifest in one.row('image-1')['error']
    path.write_bytes(whole)
    one.sync.worker.wake()
    one.await_states(**ALL)
    assert one.row('image-1')['error'] == ''


@pytest.mark.parametrize('kind', [exception.Unavailable, exception.Invalid])
def test_one_object_that_cannot_be_read(world, parts, kind):
    """A bad sector of the server, a file with wrong modes: others come."""
    one = parts()
    one.source.error = kind
    one.source.broken = world.packs('image-0')
    one.sync.everything()
    with pytest.raises(kind, match='out of reach'):
        one.sync._step()
    assert one.states() == {'image-0': 'error', 'image-1': 'ready',
                            'image-2': 'ready'}
    assert 'out of reach' in one.sync.error
    one.source.broken = ()
    one.sync._step()
    assert one.states()['image-0'] == 'ready' and not one.sync.error


def test_a_pack_that_others_never_have(parts, monkeypatch):
    monkeypatch.setattr(sync, '_BUSY', 2)
    one = parts()

    def pull(image, tell):
        raise exception.Busy('fetched already')

    monkeypatch.setattr(one.host.mirror, 'pull', pull)
    one.sync.worker.pause = lambda seconds: True
    one.sync.everything()
    one.sync._step()
    assert 'still fetching' in one.row('image-0')['error']


@pytest.mark.parametrize('version', [10 ** 400, 1 << 31, True, '1'],
                         ids=['huge', 'large', 'bool', 'text'])
def test_versions_that_make_no_sense(parts, version):
    one = parts()
    bus.Endpoint(one.sync).announce({}, version)
    assert one.sync.heard == 0
    bus.Endpoint(one.sync).announce({}, 2)
    assert one.sync.heard == 2


def test_errors_that_nobody_expects_are_told(parts, monkeypatch):
    one = parts()
    monkeypatch.setattr(one.host.mirror, 'refresh', lambda: {}['none'])
    one.sync.everything()
    with pytest.raises(KeyError):
        one.sync._step()
    assert one.sync.error == "'none'"


def test_a_repository_that_goes_away_in_the_middle(world, parts,
                                                   monkeypatch):
    """Not each image finds that out."""
    one = parts()
    tried = []

    def pull(image, tell):
        tried.append(image.image_id)
        one.source.broken = None
        raise exception.Unavailable('away')

    monkeypatch.setattr(one.host.mirror, 'pull', pull)
    one.sync.everything()
    with pytest.raises(exception.Unavailable, match='out of reach'):
        one.sync._step()
    assert tried == ['image-0']


def test_progress_and_stop_in_the_middle(world, parts):
    data = disk(9000 * 4096, 9, zeros=0)
    world.publish('large', data, range(9000))
    one = parts(rate=8 << 20)
    one.sync.worker.start()
    wait_for(lambda: 0 < one.row('large')['progress'] < 1)
    assert one.row('large')['state'] == 'transferring'
    one.sync.worker.stop()
    assert one.sync.worker.join(time.monotonic() + 20)
    assert one.row('large')['state'] == 'absent'
    assert not one.sync.transfers and not one.sync.errors


def test_two_who_pull_one_image(world, parts):
    one = parts()
    one.host.mirror.refresh()
    for _ in range(5):
        one.sync.ask('image-0')
    one.sync.everything()
    one.sync.worker.start()
    one.await_states(**ALL)


def test_deregistered(world, parts):
    one = parts()
    one.sync.worker.start()
    one.await_states(**ALL)
    one.host.acquire('image-0', 'guest')
    one.host.acquire('image-1', 'guest')
    one.host.release('image-1', 'guest')
    for number in range(2):
        world.repository.remove(f'image-{number}')
    one.sync.announce(5)
    wait_for(lambda: one.evicted == ['image-1'])
    one.await_states(image_0='stale')
    assert 'image-1' not in one.states()
    one.host.release('image-0', 'guest')
    one.sync.worker.wake()
    wait_for(lambda: one.evicted == ['image-1', 'image-0'])


def test_a_deregistered_image_beside_one_that_cannot_be_read(
        world, parts, monkeypatch):
    """The repacked image is followed when its manifest can be read."""
    one = parts()
    one.sync.everything()
    one.sync._step()
    for image_id in ('image-0', 'image-1'):
        one.host.acquire(image_id, 'guest')
        one.host.release(image_id, 'guest')
    world.repository.remove('image-1')
    real, failing = one.host._follow, [exception.Unavailable('cut off')]

    def follow(*args):
        if args[1].image_id == 'image-0' and failing:
            raise failing.pop()
        real(*args)

    monkeypatch.setattr(one.host, '_follow', follow)
    world.publish('image-3', disk(90 * 4096, 9), range(9))
    one.sync.everything()
    one.sync._step()
    assert one.evicted == ['image-1']
    assert one.states()['image-3'] == 'ready'
    assert one.sync._dropped < one.sync.version, 'tried again'
    one.sync.everything()
    one.sync._step()
    assert one.sync._dropped == one.sync.version


def test_an_id_that_is_used_again(world, parts):
    one = parts()
    one.sync.worker.start()
    one.await_states(**ALL)
    one.host.acquire('image-0', 'guest')
    world.repository.remove('image-0')
    world.publish('image-0', disk(90 * 4096, 8), range(9))
    one.sync.announce(5)
    one.await_states(image_0='stale')
    assert 'serial 1' in one.row('image-0')['error']


def complete(world, one, image_id):
    found, here = one.host.find(image_id)
    image = journal.Image(image_id, '', here.serial, here.manifest, 0,
                          here.virtual_size)
    return verify(found.path, image, world.data[image_id]) == 0


def test_hydration_waits_for_the_boot_to_end(world, parts):
    """A guest has just come: its image is due later, and then really."""
    one = parts(delay=1000)
    one.host.sync()
    one.host.acquire('image-0', 'guest')
    assert list(one.hydrator._candidates()) == []
    one.hydrator._not_before['image-0'] = 0
    assert list(one.hydrator._candidates()) == ['image-0']


def test_hydrates_what_is_leased(world, parts):
    one = parts()
    one.host.sync()
    one.host.acquire('image-0', 'guest')
    one.host.thaw(one.host.image('image-1'))
    one.hydrator.worker.start()
    one.await_states(image_0='complete')
    time.sleep(0.2)
    assert one.states()['image-1'] == 'thawed'
    one.hydrator.ask(one.host.image('image-2'))
    one.await_states(image_2='complete')
    assert complete(world, one, 'image-0')
    assert complete(world, one, 'image-2')


@pytest.mark.parametrize('policy', ['never', 'all'])
def test_hydration_policies(world, parts, policy):
    one = parts(policy=policy)
    one.host.sync()
    one.host.acquire('image-0', 'guest')
    one.hydrator.worker.start()
    if policy == 'all':
        one.await_states(image_0='complete', image_1='complete',
                         image_2='complete')
    else:
        time.sleep(0.3)
        assert one.states() == {'image-0': 'thawed', 'image-1': 'ready',
                                'image-2': 'ready'}


def test_hydration_yields_to_what_is_asked_for(world, parts, monkeypatch):
    for name in ('large', 'small'):
        blocks = 9000 if name == 'large' else 90
        world.publish(name, disk(blocks * 4096, 5, zeros=0), range(9))
    one = parts()
    one.host.sync()
    one.host.acquire('large', 'guest')
    order = []
    real = one.host.hydrate

    def hydrate_(image_id, **options):
        order.append(image_id)
        if order == ['large']:
            one.hydrator.ask(one.host.image('small'))
        return real(image_id, **options)

    monkeypatch.setattr(one.host, 'hydrate', hydrate_)
    one.hydrator.worker.start()
    one.await_states(large='complete', small='complete')
    assert order == ['large', 'small', 'large']


def test_a_slot_that_cannot_be_completed(world, parts):
    """It does not keep others waiting."""
    world.publish('holes', disk(100 * 4096, 6, zeros=.5), range(4))
    one = parts()
    one.host.sync()
    for image_id in ('holes', 'image-0'):
        one.host.acquire(image_id, 'guest')
    found, _ = one.host.find('holes')
    target = found.slot_of('holes')
    _first, entries = next(target.chunks())
    zero = int((entries == 1).argmax())
    os.pwrite(found._fd, bytes(8), int(target._tables[0]) + zero * 8)
    tries, real = [], one.hydrator._try

    def try_(image_id):
        tries.append(image_id)
        if len(tries) > 9:
            one.hydrator.worker.stop()
        real(image_id)

    one.hydrator._try = try_
    one.hydrator._step()
    assert sorted(tries) == ['holes', 'image-0']
    assert one.states()['image-0'] == 'complete'
    assert 'lacks blocks' in one.row('holes')['error']


def test_the_rate_of_hydration(world, parts, monkeypatch):
    """Asked for before each image: the network may be another by then."""
    one = parts()
    rates, taken = [0, 5 << 20, 5 << 20], []
    one.hydrator._ask_rate = lambda: rates.pop(0)
    monkeypatch.setattr(throttle.Throttle, 'take',
                        lambda self, count: taken.append((self, count)))
    one.host.sync()
    for number in range(3):
        one.host.thaw(one.host.image(f'image-{number}'))
        before = len(taken)
        assert one.hydrator._hydrate(f'image-{number}')
        assert (len(taken) > before) == bool(one.hydrator.rate)
    assert one.hydrator.rate == 5 << 20
    assert len({id(limit) for limit, _ in taken}) == 1
    assert sum(count for _, count in taken) == 2 * 320 * 4096


def test_what_is_left_to_hydrate(world, parts):
    one = parts()
    one.host.sync()
    one.host.acquire('image-0', 'guest')
    left, real = [], one.hydrator._pace

    def pace(count):
        left.append(one.hydrator.left)
        real(count)
        left.append(one.hydrator.left)

    one.hydrator._pace = pace
    assert one.hydrator._hydrate('image-0')
    assert left[0] == 320 * 4096 and left[-1] == 0
    assert one.hydrator.left == 0


def test_hydration_without_a_repository(world, parts, monkeypatch):
    monkeypatch.setattr(hydrate, '_AGAIN', 0.05)
    source = CountingStore(world.path / 'repo')
    one = parts(source)
    # Not all of it is in its boot set's packs.
    world.publish('thin', disk(3000 * 4096, 7, zeros=0), range(9))
    one.host.sync()
    one.host.acquire('thin', 'guest')
    source.broken = None
    one.hydrator.worker.start()
    wait_for(lambda: 'out of reach' in one.row('thin')['error'])
    assert one.row('thin')['state'] == 'thawed'
    source.broken = ()
    one.hydrator.worker.wake()
    wait_for(lambda: one.hydrator.worker.wake()
             or one.states()['thin'] == 'complete')
    assert one.row('thin')['error'] == ''


def test_room(world, parts, monkeypatch):
    one = parts(min_free=1000)
    one.host.sync()
    for number in range(3):
        one.host.acquire(f'image-{number}', 'guest')
        if number:
            one.host.release(f'image-{number}', 'guest')
        time.sleep(0.02)
    monkeypatch.setattr(one.room, 'free', lambda: 2000)
    one.room.keep()
    one.room.demand()
    assert one.evicted == []
    assert not one.room.is_roomy(1000)
    assert one.room.is_roomy(700)
    monkeypatch.setattr(one.room, 'free', lambda: 999)
    one.room.keep()
    assert one.evicted == ['image-1'], 'the one that was not used longest'
    monkeypatch.setattr(one.room, 'free', lambda: -1 << 40)
    with pytest.raises(exception.NoSpace, match='min_free'):
        one.room.demand()
    assert one.evicted == ['image-1', 'image-2'], 'the leased one stays'
    # Nothing comes into a full host, and people see why.
    world.publish('image-3', disk(90 * 4096, 9), range(9))
    one.sync.worker.start()
    one.await_states(image_3='error')
    assert 'min_free' in one.row('image-3')['error']
    # Nor is anything completed.
    one.hydrator.worker.start()
    wait_for(lambda: 'min_free' in one.row('image-0')['error'])
    assert one.row('image-0')['state'] == 'thawed'


def used(one, *names):
    """Acquired one after the other, and let go."""
    for name in names:
        one.host.acquire(name, 'guest')
        one.host.release(name, 'guest')
        time.sleep(0.02)


def test_the_least_recently_used_goes_first(world, parts):
    one = parts()
    one.host.sync()
    used(one, 'image-0', 'image-1', 'image-2', 'image-0')
    for expected in (['image-1'], ['image-1', 'image-2'],
                     ['image-1', 'image-2', 'image-0']):
        one.room.make()
        assert one.evicted == expected


def test_pinned_and_leased_images_stay(world, parts, monkeypatch):
    one = parts(min_free=1000)
    one.host.sync()
    used(one, 'image-0', 'image-1', 'image-2')
    one.host.find('image-0')[0].pin('image-0')
    one.host.acquire('image-1', 'guest')
    monkeypatch.setattr(one.room, 'free', lambda: 0)
    one.room.keep()
    assert one.evicted == ['image-2']
    one.room.keep()
    assert one.evicted == ['image-2'], 'there is nothing more'
    one.host.find('image-0')[0].unpin('image-0')
    one.room.keep()
    assert one.evicted == ['image-2', 'image-0']
    assert one.states()['image-1'] == 'thawed'


def test_quota(world, parts):
    one = parts()
    one.host.sync()
    used(one, 'image-0', 'image-1')
    one.host.acquire('image-2', 'guest')
    held = sum(one.host.held())
    one.room._quota = held
    one.room.keep()
    one.room.demand()
    assert one.evicted == []
    assert not one.room.is_roomy(1) and one.room.is_roomy(0)
    one.room._quota = held - 1
    assert not one.room.is_roomy(0)
    one.room.demand()
    assert one.evicted == ['image-0'], 'the one that was not used longest'
    one.room._quota = 1
    with pytest.raises(exception.NoSpace, match='quota'):
        one.room.demand()
    assert one.evicted == ['image-0', 'image-1'], 'the leased one stays'
    # Nothing comes into it that nobody waits for; what a guest reads does.
    one.hydrator.worker.start()
    wait_for(lambda: 'quota' in one.row('image-2')['error'])
    one.host.ensure('image-2', 300 * 4096, 4096)
    assert sum(one.host.held()) > 1


def test_the_report(world, parts):
    one = parts()
    one.sync.worker.start()
    one.await_states(**ALL)
    one.host.acquire('image-0', 'guest')
    one.reporter.worker.start()
    wait_for(lambda: one.sent)
    one.reporter.worker.stop()
    assert one.reporter.worker.join(time.monotonic() + 20)
    [sent] = one.sent[:1]
    assert sent['host'] == 'host-1' and sent['version'] == 3
    assert one.told.registry.get_sample_value(
        'fastboot_serials_left') == journal.SERIAL_LIMIT - 4
    assert sent['volume_bytes'] > 0 < sent['mirror_bytes']
    assert sent['free_bytes'] > 0
    rows = {row['id']: row for row in sent['images']}
    assert rows['image-0']['state'] == 'thawed'
    assert 0 < rows['image-0']['progress'] < 1
    assert rows['image-1'] == {
        'id': 'image-1', 'state': 'ready', 'progress': 0.0, 'error': '',
        'serial': 2, 'leases': 0}
    assert rows['image-0']['leases'] == 1


def test_what_the_centre_keeps(world, parts, monkeypatch):
    one = parts()
    one.sync.worker.start()
    one.await_states(**ALL)
    one.host.acquire('image-0', 'guest')
    world.repository.remove('image-0')
    one.sync.announce(4)
    one.await_states(image_0='stale')
    assert 0 < one.row('image-0')['progress'] < 1
    # Nearly all is not all.
    monkeypatch.setattr(host, '_presence',
                        lambda *_: ('thawed', 1 - 1e-6))
    assert one.row('image-0')['progress'] == .9999
    monkeypatch.undo()
    assert one.host.hydrate('image-0')
    assert one.row('image-0')['progress'] == 1


def locked_pages():
    """Bytes that this process has locked."""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmLck:'):
            return int(line.split()[1]) << 10
    return 0


def test_memory(world, parts):
    one = parts()
    one.host.sync()
    size = 80 * 4096
    before = locked_pages()
    held = memory.Memory(one.host, 2 * size, ['image-1', 'unknown'],
                         lambda count: True)
    try:
        try:
            held.follow()
        except exception.NoSpace as error:
            pytest.skip(str(error))
        assert held.bytes == size
        assert locked_pages() - before == size
        volume = one.host.open_volume('public')
        one.host.thaw(one.host.image('image-0'))
        volume.pin('image-0')
        held.follow()
        assert held.bytes == 2 * size == locked_pages() - before
        # A third one is over the budget.
        one.host.thaw(one.host.image('image-2'))
        volume.pin('image-2')
        held.follow()
        assert held.bytes == 2 * size
        volume.unpin('image-0')
        held.follow()
        assert held.bytes == 2 * size
        one.host.evict(['image-0'])
        volume.unpin('image-2')
        held.follow()
        assert held.bytes == size == locked_pages() - before
    finally:
        held.close()
    assert held.bytes == 0 == locked_pages() - before


@pytest.mark.parametrize('registered', [True, False])
def test_what_a_damaged_volume_has_is_reported(world, parts, registered):
    """Nobody is to collect it, before the volume is mended."""
    with world.host() as host:
        host.sync()
        host.acquire('image-0', 'guest')
        one, _ = host.find('image-0')
    if not registered:
        world.repository.remove('image-0')
    description = one.path / 'images' / 'image-0'
    good = description.read_bytes()
    description.write_text('')
    found = parts()
    found.host.sync()
    row = found.row('image-0')
    assert (row['state'], row['serial'], row['leases'], row['progress']) == (
        'error', None, 1, 0)
    assert f'volume {one.path.name} cannot be opened' in row['error']
    assert found.row('image-1')['state'] != 'error'
    # Where not even that can be told, nothing is.
    (one.path / 'images').rename(one.path / 'away')
    (one.path / 'images').write_text('')
    with pytest.raises(OSError):
        parts().row('image-0')
    (one.path / 'images').unlink()
    (one.path / 'away').rename(one.path / 'images')
    description.write_bytes(good)
    row = parts().row('image-0')
    assert (row['serial'], row['leases']) == (1, 1)


@pytest.mark.parametrize('place', ['slot', 'description'])
def test_memory_of_a_damaged_volume(world, place):
    """There is none; that of others is locked."""
    with world.host() as host:
        host.sync()
        host.thaw(host.image('image-0'))
        one, _ = host.find('image-0')
        if place == 'slot':
            os.pwrite(one._fd, b'\x02', one.slot_of('image-0').l1_place[0] + 6)
        else:
            (one.path / 'images' / 'image-0').write_text('')
    with world.host() as host:
        held = memory.Memory(host, 1 << 30, ['image-0'], lambda count: True)
        held.follow()
        assert held.bytes == 0


def test_memory_that_may_not_be_locked(world, parts):
    """As a process whose limit is lower than the budget."""
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            import resource
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
            if not os.geteuid():
                os.setegid(65534)
            with world.host() as host:
                host.sync()
                host.acquire('image-0', 'guest')
                if not os.geteuid():
                    for path in [world.path, *world.path.rglob('*')]:
                        os.chown(path, 65534, 65534)
                    os.setuid(65534)
                held = memory.Memory(host, 1 << 30, ['image-0'],
                                     lambda count: True)
                try:
                    held.follow()
                except exception.NoSpace as error:
                    status = 0 if 'LimitMEMLOCK' in str(error) else 2
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
