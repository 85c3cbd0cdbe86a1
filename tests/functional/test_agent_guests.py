# SPDX-License-Identifier: Apache-2.0
"""Leases: how they begin, how they end, and how they must not."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import subprocess
import threading
import time

import pytest
from images import World, compare, disk, fast_directory

from fastboot_common import chain, exception, volume
from fastboot_nova.agent import guests, loopdevice


@pytest.fixture
def world():
    with fast_directory() as path:
        made = World(path)
        made.publish('image', disk(300 * 4096, 1), range(40))
        yield made


@pytest.fixture
def host(world):
    with world.host() as opened:
        opened.sync()
        yield opened


@pytest.fixture
def clock(monkeypatch):
    """Seconds that are added to the clock that never jumps."""
    real = time.monotonic

    class Clock:
        ahead = 0.0

        def monotonic(self):
            return real() + self.ahead

        def time(self):
            return time.time()

    clock = Clock()
    monkeypatch.setattr(guests, 'time', clock)
    return clock


@pytest.fixture
def base(world):
    path = world.path / '_base'
    path.mkdir()
    return path


def make(host, **options):
    return guests.Guests(host, **{'wait': 20, 'grace': 600, **options})


def leases(host):
    return host.find('image')[0].leased('image')


def test_a_lease_ends_when_its_file_is_gone(host, base, clock):
    stub = base / 'stub'
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    [lease] = leases(host)
    assert (lease.holder, lease.file) == ('nova', str(stub))
    assert one.reconcile() == 1
    stub.write_text('')
    assert one.reconcile() == 1
    stub.unlink()
    clock.ahead = 61
    assert one.reconcile() == 1, 'one look is not enough'
    assert one.reconcile() == 0
    assert not leases(host)


@pytest.mark.parametrize('where', [
    'rescued/disk.rescue', 'moving/disk', 'one_resize/disk'])
def test_a_disk_that_lies_on_a_file_that_is_gone(host, base, clock, where):
    """Nova removes bases of which it knows no server."""
    stub, disk = base / 'stub', base.parent / where
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    chain.make_stub(stub, host.link('image'))
    disk.parent.mkdir()
    chain.make_disk(disk, stub, 1 << 30)
    (disk.parent / 'disk.info').write_text('{}')
    one.reconcile()
    stub.unlink()
    for ahead in (61, 700, 1400):
        clock.ahead = ahead
        assert [one.reconcile() for _ in range(3)] == [1] * 3
    with pytest.raises(exception.Busy):
        host.evict(['image'])
    disk.unlink()
    clock.ahead = 2100
    assert [one.reconcile() for _ in range(2)][-1] == 0


def test_a_release_of_what_a_disk_lies_on(host, base):
    """Who asked for the file did not know of the disk; it is as much
    theirs."""
    stub, disk = base / 'stub', base.parent / 'rescued' / 'disk.rescue'
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    chain.make_stub(stub, host.link('image'))
    disk.parent.mkdir()
    chain.make_disk(disk, stub, 1 << 30)
    one.reconcile()
    stub.unlink()
    one.acquire('image', 'nova', str(stub))
    one.release('image', 'nova', str(stub))
    assert one.reconcile() == 1
    disk.unlink()
    one.acquire('image', 'nova', str(stub))
    one.release('image', 'nova', str(stub))
    assert one.reconcile() == 0


def test_an_image_that_was_removed(world, host, base):
    """Disks that need it get it, from here or from the repository."""
    one = make(host)
    stub = str(base / 'stub')
    world.repository.remove('image')
    host.sync()
    with pytest.raises(exception.NotFound):
        one.acquire('image', 'nova', stub)
    first = one.acquire('image', 'nova', stub, removed=True)
    assert first.thawed
    host.drop_gone()
    again = one.acquire('image', 'nova', stub, removed=True)
    assert (again.link, again.thawed) == (first.link, 0)
    assert one.reconcile() == 1


def test_an_image_that_nobody_remembers(host, base):
    with pytest.raises(exception.NotFound, match='not kept any more'):
        make(host).acquire('another', 'nova', str(base / 'stub'),
                           removed=True)


def test_a_file_that_never_appears(host, base, clock):
    one = make(host, grace=600)
    one.acquire('image', 'nova', str(base / 'stub'))
    clock.ahead = 599
    assert one.reconcile() == one.reconcile() == 1
    clock.ahead = 601
    assert one.reconcile() == 0


def test_a_new_acquire_begins_anew(host, base, clock):
    stub = base / 'stub'
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    stub.write_text('')
    one.reconcile()
    stub.unlink()
    clock.ahead = 300
    one.reconcile()
    one.acquire('image', 'nova', str(stub))
    assert [one.reconcile() for _ in range(3)] == [1] * 3
    # Nor does what was seen of the old file count.
    clock.ahead = 300 + 599
    assert [one.reconcile() for _ in range(3)] == [1] * 3


@pytest.mark.parametrize('restart', [False, True])
def test_a_directory_that_is_away_ends_nothing(host, base, clock, restart):
    """Not mounted is not gone."""
    stub = base / 'stub'
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    stub.write_text('')
    one.reconcile()
    base.rename(base.with_name('away'))
    if restart:
        one = make(host)
    for ahead in (100, 1000, 100000):
        clock.ahead = ahead
        assert one.reconcile() == 1
    base.with_name('away').rename(base)
    assert one.reconcile() == 1


def test_a_file_that_cannot_be_looked_at_ends_nothing(host, base, clock):
    loop = base / 'loop'
    loop.symlink_to(loop)
    one = make(host)
    one.acquire('image', 'nova', str(loop / 'stub'))
    clock.ahead = 10000
    assert one.reconcile() == one.reconcile() == 1


def test_leases_last_over_restarts(world, base, clock):
    stub, other = base / 'stub', base / 'other'
    with world.host() as host:
        host.sync()
        one = make(host)
        one.acquire('image', 'nova', str(stub))
        one.acquire('image', 'nova', str(other))
        stub.write_text('')
    with world.host() as host:
        one = make(host)
        clock.ahead = 100000
        assert one.reconcile() == 2
        clock.ahead += 599
        assert one.reconcile() == 2
        clock.ahead += 2
        assert one.reconcile() == 1
        [lease] = leases(host)
        assert lease.file == str(stub)
        with pytest.raises(exception.Busy):
            host.evict(['image'])


def test_release(host, base):
    stub = base / 'stub'
    one = make(host)
    one.acquire('image', 'nova', str(stub))
    one.release('image', 'nova', str(stub))
    assert not leases(host)
    # Two came for the same stub: one that fails leaves the other's lease.
    one.acquire('image', 'nova', str(stub))
    one.acquire('image', 'nova', str(stub))
    one.release('image', 'nova', str(stub))
    assert len(leases(host)) == 1
    one.release('image', 'nova', str(stub))
    assert not leases(host)
    one.acquire('image', 'nova', str(stub))
    stub.write_text('')
    one.release('image', 'nova', str(stub))
    assert len(leases(host)) == 1, 'the stub is there'
    # Who acquired before a restart is not known.
    stub.unlink()
    make(host).release('image', 'nova', str(stub))
    assert len(leases(host)) == 1


def test_a_release_while_another_acquires(host, base, monkeypatch):
    """It comes when the file was looked at, and keeps the lease."""
    stub = str(base / 'stub')
    one = make(host)
    one.acquire('image', 'nova', stub)
    look = guests._is_missing

    def slow(file):
        missing = look(file)
        monkeypatch.setattr(guests, '_is_missing', look)
        one.acquire('image', 'nova', stub)
        return missing

    monkeypatch.setattr(guests, '_is_missing', slow)
    one.release('image', 'nova', stub)
    assert len(leases(host)) == 1
    assert host.make_room(1 << 40) == 0


def test_other_files_and_holders_are_other_leases(host, base):
    one = make(host)
    for holder in ('nova', 'another', 'x' * 64):
        for name in ('a', 'b'):
            one.acquire('image', holder, str(base / name))
    assert len(leases(host)) == 6
    host.acquire('image', 'guest')
    assert len(leases(host)) == 7
    host.release('image', 'guest')
    assert len(leases(host)) == 6


def test_leases_of_earlier_versions(host, base, clock):
    """Those have no file: they last until they are released."""
    host.acquire('image', 'guest')
    one, _ = host.find('image')
    path = one.path / 'leases' / 'image'
    (path / 'old').write_text('{"since":1.5}')
    (path / 'broken').write_text('{"sin')
    (path / 'strange').write_text('[{"file": 7}]')
    clock.ahead = 1e6
    found = make(host)
    assert found.reconcile() == found.reconcile() == 4
    assert {lease.file for lease in one.leased('image')} == {''}


def test_not_here(world, host, base):
    world.publish('absent', disk(90 * 4096, 2), range(9))
    host.mirror.refresh()
    one = make(host)
    with pytest.raises(guests.NotHereError, match='not on this host'):
        one.acquire('absent', 'nova', str(base / 'stub'))
    with pytest.raises(exception.NotFound, match='not registered'):
        one.acquire('unknown', 'nova', str(base / 'stub'))
    with pytest.raises(exception.NotFound, match='not registered'):
        one.acquire('name of image', 'nova', str(base / 'stub'))


def test_what_is_here_needs_no_boot_set(world, host, base):
    """The mark is away while an image that was repacked is pulled anew."""
    one = make(host)
    stub = str(base / 'stub')
    first = one.acquire('image', 'nova', stub)
    (host.mirror.path / 'ready' / 'image').unlink()
    with pytest.raises(guests.NotHereError):
        one.acquire('image', 'nova', stub)
    again = one.acquire('image', 'nova', stub, removed=True)
    assert (again.link, again.thawed) == (first.link, 0)


def test_a_thaw_that_takes_long_goes_on(host, base, monkeypatch):
    gate = threading.Event()
    thaw = host.thaw

    def slow(image):
        assert gate.wait(20)
        return thaw(image)

    monkeypatch.setattr(host, 'thaw', slow)
    one = make(host, wait=0.05)
    for _ in range(2):
        with pytest.raises(exception.Busy, match='still being thawed'):
            one.acquire('image', 'nova', str(base / 'stub'))
    gate.set()
    one = make(host)
    assert one.acquire('image', 'nova', str(base / 'stub')).link
    assert one.acquire('image', 'nova', str(base / 'stub')).thawed == 0


def test_a_thaw_that_fails_is_tried_again(host, base, monkeypatch):
    thaw = host.thaw
    monkeypatch.setattr(host, 'thaw', lambda image: (_ for _ in ()).throw(
        exception.NoSpace('full')))
    one = make(host)
    with pytest.raises(exception.NoSpace):
        one.acquire('image', 'nova', str(base / 'stub'))
    monkeypatch.setattr(host, 'thaw', thaw)
    assert one.acquire('image', 'nova', str(base / 'stub')).thawed > 0


def test_an_eviction_under_way(host, base, monkeypatch):
    """A guest waits for it, but not for long; then it gets its image."""
    one = make(host)
    stub = str(base / 'stub')
    one.acquire('image', 'nova', stub)
    one.release('image', 'nova', stub)
    gate, inside = threading.Event(), threading.Event()
    remove = volume.Volume._remove_slot

    def slow(self, image_id):
        inside.set()
        assert gate.wait(20)
        remove(self, image_id)

    monkeypatch.setattr(volume.Volume, '_remove_slot', slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        evicting = pool.submit(host.evict, ['image'])
        assert inside.wait(20)
        with pytest.raises(exception.Busy, match='evicted'):
            make(host, wait=0.05).acquire('image', 'nova', stub)
        assert not leases(host)
        coming = pool.submit(one.acquire, 'image', 'nova', stub)
        time.sleep(0.1)
        assert not coming.done()
        gate.set()
        assert evicting.result(20) > 0
        assert coming.result(20).thawed > 0
    assert len(leases(host)) == 1


def test_guests_come_and_go_while_others_evict(world, host, base):
    """Whoever holds a lease can read every byte of the boot set."""
    for number in range(3):
        world.publish(f'image-{number}', disk(
            300 * 4096, number, pool=400), range(60))
    host.sync()
    one = make(host)
    stop = threading.Event()

    def evict():
        while not stop.is_set():
            host.make_room(1 << 40)

    def run(seed):
        rng = random.Random(seed)
        for turn in range(25):
            image_id = f'image-{rng.randrange(3)}'
            stub = base / f'{seed}-{turn}'
            done = one.acquire(image_id, 'nova', str(stub))
            found, _ = host.find(image_id)
            entries = found.slot_of(image_id).entries(
                host.mirror.read_manifest(
                    host.image(image_id).manifest).boot)
            assert (entries > 0).all()
            assert done.link.image_id == image_id
            one.release(image_id, 'nova', str(stub))

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        evicting = pool.submit(evict)
        running = [pool.submit(run, seed) for seed in range(4)]
        try:
            for future in running:
                future.result(120)
        finally:
            stop.set()
        evicting.result(60)


def test_no_export_no_guest(host, base):
    one = make(host, reachable=lambda: False)
    with pytest.raises(exception.Unavailable, match='export'):
        one.acquire('image', 'nova', str(base / 'stub'))
    assert host.hydrate('image')
    # A complete image needs none.
    assert one.acquire('image', 'nova', str(base / 'stub')).link.complete


def test_expire_spares_what_was_asked_for_again(host):
    one = host.open_volume('public')
    one.lease('image', 'nova', '/s')
    for _ in range(50):
        [lease] = one.leased('image')
        one.lease('image', 'nova', '/s')
        assert not one.expire('image', lease)
    [lease] = one.leased('image')
    assert one.expire('image', lease)
    assert one.expire('image', lease)
    assert not one.leases('image')


@pytest.fixture
def loops():
    if os.geteuid() or not pathlib.Path('/dev/loop-control').exists():
        pytest.skip('loop devices need root')
    return loopdevice.LoopDevices(os.getegid())


@pytest.fixture
def slow_world(tmp_path):
    """On a real file system: what loop devices need."""
    made = World(tmp_path)
    made.publish('image', disk(300 * 4096, 1), range(40))
    yield made
    for file in tmp_path.glob('host/volumes/*/volume'):
        for device in subprocess.run(
                ['losetup', '-j', file, '-n', '-O', 'NAME'],
                capture_output=True, text=True).stdout.split():
            subprocess.run(['losetup', '-d', device], check=False)


def test_loop_devices(slow_world, loops, clock):
    world = slow_world
    base = world.path / '_base'
    base.mkdir()
    stub = base / 'stub'
    with world.host() as host:
        host.sync()
        one = make(host, loops=loops)
        try:
            done = one.acquire('image', 'nova', str(stub))
        except exception.Unavailable as error:
            pytest.skip(f'no loop devices here: {error}')
        device = done.device
        found = device.stat()
        assert found.st_mode & 0o777 == 0o640
        assert found.st_gid == os.getegid()
        assert one.acquire('image', 'nova', str(stub)).device == device
        # Another process, later: the same device.
        again = loopdevice.LoopDevices(os.getegid())
        assert again.attach(done.link.volume) == device
        # What a guest reads through it is the image.
        host.hydrate('image')
        raw = world.path / 'raw'
        raw.write_bytes(world.data['image'])
        link = host.link('image')
        # As cache mode "none" has it.
        compare(raw, 'json:' + json.dumps({'file': {
            'driver': 'raw', 'offset': link.start,
            'size': link.size - link.start, 'file': {
                'driver': 'host_device', 'filename': str(device),
                'cache': {'direct': True}}}}))
        device.chmod(0o600)
        assert one.acquire('image', 'nova', str(stub)).device == device
        assert device.stat().st_mode & 0o777 == 0o640
        # A device that an operator took away is made anew.
        subprocess.run(['losetup', '-d', device], check=True)
        anew = one.acquire('image', 'nova', str(stub)).device
        assert anew.exists()
        stub.write_text('')
        one.reconcile()
        stub.unlink()
        clock.ahead = 1000
        one.reconcile()
        one.reconcile()
        with contextlib.suppress(FileNotFoundError):
            backing = pathlib.Path('/sys/block', anew.name, 'loop',
                                   'backing_file').read_text().strip()
            assert backing != str(link.volume)
