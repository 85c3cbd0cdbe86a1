# SPDX-License-Identifier: Apache-2.0
"""A host: following the repository, guests, misses, and what goes wrong."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import sqlite3
import threading
import types

import numpy as np
import pytest
from images import (
    CountingStore,
    World,
    data_blocks,
    disk,
    fast_directory,
    verify,
)

from fastboot_common import (
    chain,
    exception,
    journal,
    manifest,
    upkeep,
)
from fastboot_common import repack as compaction
from fastboot_nova import host as host_module


@pytest.fixture
def world():
    with fast_directory() as path:
        yield World(path)


def right(host, world, image_id):
    """Missing blocks of an image; all others are right."""
    one, here = host.find(image_id)
    image = journal.Image(image_id, '', here.serial, here.manifest, 0,
                          here.virtual_size)
    assert host.check(image_id)[1] == []
    return verify(one.path, image, world.data[image_id])


def state_of(host, image_id):
    [row] = [row for row in host.status() if row.image_id == image_id]
    return row.state


def test_from_absent_to_complete(world):
    data = disk(200 * 4096, 1)
    world.publish('image', data, range(30))
    with world.host() as host:
        assert host.status() == []
        host.mirror.refresh()
        assert state_of(host, 'image') == 'absent'
        with pytest.raises(exception.NotFound):
            host.link('image')
        done = host.sync()
        assert (done.images, done.version) == (1, 1)
        assert done.fetched > 0
        assert host.sync().fetched == 0
        assert state_of(host, 'image') == 'ready'
        host.acquire('image', 'guest')
        assert state_of(host, 'image') == 'thawed'
        cancelled = iter([False, True])
        assert right(host, world, 'image') > 0
        host.hydrate('image', cancelled=lambda: next(cancelled, True))
        right(host, world, 'image')
        told = []
        assert host.hydrate('image', told.append)
        assert sum(told) >= len(data_blocks(data)) * 4096
        assert state_of(host, 'image') == 'complete'
        assert right(host, world, 'image') == 0
        assert host.link('image').complete.exists()


def test_offline(world):
    """Boot sets that are here need nobody."""
    data = disk(600 * 4096, 1)
    world.publish('image', data, range(600))
    source = CountingStore(world.path / 'repo')
    with world.host(source) as host:
        host.sync()
    source.broken = None
    with world.host(source) as host:
        with pytest.raises(exception.Unavailable):
            host.sync()
        host.acquire('image', 'guest')
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


@pytest.mark.parametrize('kind', [exception.Unavailable, exception.Invalid])
def test_sync_with_one_object_that_cannot_be_read(world, kind):
    for number in range(2):
        world.publish(f'image-{number}', disk(600 * 4096, number), range(600))
    source = CountingStore(world.path / 'repo')
    source.error, source.broken = kind, world.packs('image-0')
    with world.host(source) as host:
        assert 'out of reach' in host.sync().failed['image-0']
        assert state_of(host, 'image-0') == 'absent'
        assert state_of(host, 'image-1') == 'ready'
        source.broken = ()
        assert not host.sync().failed
        assert state_of(host, 'image-0') == 'ready'


def test_never_synced_and_offline(world):
    source = CountingStore(world.path / 'repo')
    source.broken = None
    with pytest.raises(exception.Unavailable):
        world.host(source)


def test_offline_with_a_part_only(world):
    data = disk(3000 * 4096, 1, zeros=0)
    world.publish('image', data, range(20))
    source = CountingStore(world.path / 'repo')
    with world.host(source) as host:
        host.sync()
        source.broken = None
        host.acquire('image', 'guest')
        with pytest.raises(exception.Unavailable):
            host.ensure('image', 2000 * 4096, 4096)
        with pytest.raises(exception.Unavailable):
            host.hydrate('image')
        one, here = host.find('image')
        assert verify(one.path, here, data) > 0
        source.broken = ()
        host.ensure('image', 2000 * 4096, 4096)
        one, _ = host.find('image')
        assert one.slot_of('image').entries(np.array([2000]))[0] > 1
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


def test_a_failed_acquire_keeps_a_running_guests_lease(world):
    world.publish('image', disk(900 * 4096, 1), range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        host.mirror._manifests.clear()
        host.thaw = lambda image: (_ for _ in ()).throw(
            exception.Unavailable('away'))
        for holder in ('guest', 'another'):
            with pytest.raises(exception.Unavailable):
                host.acquire('image', holder)
        one, _ = host.find('image')
        assert one.leases('image') == ['guest']
        with pytest.raises(exception.Busy):
            host.evict(['image'])


def damage(path):
    for directory in path.glob('*'):
        damage_in(directory)


def damage_in(path):
    for file in path.glob('*'):
        data = bytearray(file.read_bytes())
        for at in range(100, len(data) - 100, 997):
            data[at] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)


def test_a_damaged_repository_gives_nothing(world):
    world.publish('image', disk(400 * 4096, 1), range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        before = right(host, world, 'image')
        damage(world.path / 'repo' / 'packs')
        damage(world.path / 'host' / 'mirror' / 'packs')
        host.mirror._indexes.clear()
        with pytest.raises(exception.Corrupt, match='pack'):
            host.hydrate('image')
        with pytest.raises(exception.Corrupt, match='pack'):
            host.ensure('image', 300 * 4096, 40 * 4096)
        assert right(host, world, 'image') == before
        assert not host.link('image').complete


def test_damaged_local_packs_heal(world):
    world.publish('image', disk(400 * 4096, 1), range(400))
    with world.host() as host:
        host.sync()
        damage(world.path / 'host' / 'mirror' / 'packs')
    with world.host() as host:
        host.acquire('image', 'guest')
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


def test_a_removed_image_with_a_guest_stays(world):
    data = disk(400 * 4096, 1)
    world.publish('image', data, range(9))
    world.publish('idle', disk(50 * 4096, 2), range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        host.acquire('idle', 'guest')
        host.release('idle', 'guest')
        for image_id in ('image', 'idle'):
            world.repository.remove(image_id)
        host.sync()
        with pytest.raises(exception.NotFound):
            host.find('idle')
        with pytest.raises(exception.NotFound):
            host.acquire('image', 'another')
        assert right(host, world, 'image') > 0
    with world.host() as host:
        host.sync()
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0
        host.release('image', 'guest')
        host.sync()
        assert host.status() == []
        assert not list((world.path / 'host' / 'mirror').glob('*/??/*'))


@pytest.mark.parametrize('options', [
    {}, {'visibility': 'private', 'owner': 'p'}])
def test_an_id_that_is_used_again(world, options):
    """The export knows ids only: never two contents under one."""
    old, new = disk(90 * 4096, 1), disk(90 * 4096, 2)
    first = world.publish('image', old, range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        world.repository.remove('image')
        world.publish('image', new, range(9), **options)
        host.sync()
        with pytest.raises(exception.Invalid, match='serial 1'):
            host.acquire('image', 'another')
        one, here = host.find('image')
        assert here.serial == 1
        assert host.hydrate('image')
        assert verify(one.path, first, old) == 0
        # Its last guest gone, the new one may come.
        host.release('image', 'guest')
        host.sync()
        host.acquire('image', 'another')
        host.hydrate('image')
        assert right(host, world, 'image') == 0
        assert host.find('image')[1].serial == 3


def use_again(world, host, **options):
    """Register another image under the id, with a slot here."""
    world.repository.remove('image')
    world.publish('image', disk(900 * 4096, 2), range(5), **options)
    host.sync()
    host.thaw(host.image('image'))


def test_a_hydration_under_way_when_an_id_is_used_again(world, monkeypatch):
    """What it has on its way is not the new image's."""
    monkeypatch.setattr(host_module, '_FRAMES_AT_ONCE', 2)
    world.publish('image', disk(900 * 4096, 1), range(5))
    with world.host() as host:
        host.sync()
        host.thaw(host.image('image'))
        parts = itertools.count()

        def pace(_count):
            if next(parts) == 2:
                use_again(world, host)

        with pytest.raises(exception.NotFound, match='serial 1'):
            host.hydrate('image', pace=pace)
        assert host.find('image')[1].serial == 3
        assert right(host, world, 'image') > 0
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


@pytest.mark.parametrize('work', [
    lambda host: host.ensure('image', 500 * 4096, 4096),
    lambda host: host.repair('image')])
def test_a_miss_under_way_when_an_id_is_used_again(world, monkeypatch, work):
    world.publish('image', disk(900 * 4096, 1), range(5))
    with world.host() as host:
        host.sync()
        host.thaw(host.image('image'))
        one, _ = host.find('image')
        os.pwrite(one._fd, b'x', int(one.slot_of('image').clusters()[0]))
        plain_many = host.mirror.plain_many

        def slow(*args, **options):
            found = plain_many(*args, **options)
            use_again(world, host)
            return found

        monkeypatch.setattr(host.mirror, 'plain_many', slow)
        with pytest.raises(exception.NotFound, match='serial 1'):
            work(host)
        assert right(host, world, 'image') > 0


@pytest.mark.parametrize('options', [
    {}, {'visibility': 'private', 'owner': 'p'}])
def test_a_thaw_under_way_when_an_id_is_used_again(world, monkeypatch,
                                                   options):
    """It waits for the network; then the id is another image's."""
    world.publish('image', disk(900 * 4096, 1), range(5))
    with world.host() as host:
        host.sync()
        image = host.image('image')
        pull = host.mirror.pull

        def slow(image):
            monkeypatch.setattr(host.mirror, 'pull', pull)
            use_again(world, host, **options)
            return pull(image)

        monkeypatch.setattr(host.mirror, 'pull', slow)
        with pytest.raises(exception.Invalid, match='serial 3'):
            host.thaw(image)
        assert [list(one.images()) for one in host.volumes()
                if one.images()] == [['image']]
        assert right(host, world, 'image') > 0


def test_a_manifest_is_of_one_serial(world):
    world.publish('image', disk(90 * 4096, 1), range(9))
    with world.host() as host:
        host.sync()
        host.thaw(host.image('image'))
        one, here = host.find('image')
        one.describe(dataclasses.replace(here, serial=7))
        assert one.image('image') == here


def repack(world, image_id, change):
    """Give an image another manifest."""
    repository = world.repository
    found = repository.read_manifest(repository.image(image_id).manifest)
    found = dataclasses.replace(found, **change)
    data = found.pack()
    import hashlib
    digest = hashlib.sha256(data).hexdigest()
    from fastboot_common import store
    repository.store.create(store.object_name('manifests', digest), data)
    repository.append('repack', lambda state: {
        'manifests': {image_id: {'manifest': digest,
                                 'manifest_size': len(data)}}, 'packs': []})
    return digest


def test_a_repacked_image(world):
    world.publish('image', disk(90 * 4096, 1), range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        digest = repack(world, 'image', {'name': 'another'})
        host.sync()
        assert host.find('image')[1].manifest == digest
        upkeep.collect(world.repository, 0, 0)
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


def test_a_repack_that_changes_the_content(world):
    """Half of an image's blocks must not come from another one."""
    world.publish('image', disk(90 * 4096, 1), range(9))
    world.publish('other', disk(90 * 4096, 2), range(9))
    other = world.repository.read_manifest(
        world.repository.image('other').manifest)
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        repack(world, 'image', {
            'root': other.root, 'extents': other.extents,
            'packs': other.packs})
        host.sync()
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0


def test_a_manifest_of_another_image(world):
    world.publish('image', disk(90 * 4096, 1), range(9))
    other = world.publish('other', disk(91 * 4096, 2), range(9))
    world.repository.append('repack', lambda state: {
        'manifests': {'image': {'manifest': other.manifest,
                                'manifest_size': other.manifest_size}},
        'packs': []})
    with world.host() as host:
        host.sync()
        with pytest.raises(exception.Corrupt):
            host.acquire('image', 'guest')


def test_manifests_of_other_blocks(world):
    found = manifest.Manifest(
        'image', '', 512, 8192, '00' * 32, [],
        world.publish('x', b'') and __import__('numpy').empty(
            0, __import__('fastboot_common.extents').extents.DTYPE))
    import hashlib
    data = found.pack()
    digest = hashlib.sha256(data).hexdigest()
    from fastboot_common import store
    world.repository.store.create(
        store.object_name('manifests', digest), data)
    with world.host() as host, pytest.raises(exception.Corrupt):
        host.mirror.read_manifest(digest)


@pytest.fixture
def neighbours(world):
    """A public image, and two of a project; ``two`` lacks a byte of its L1."""
    world.publish('public', disk(300 * 4096, 1), range(10))
    for number, name in enumerate(('one', 'two')):
        world.publish(name, disk(300 * 4096, 2 + number), range(10),
                      visibility='private', owner='p')
    with world.host() as host:
        host.sync()
        for name in ('public', 'one', 'two'):
            host.acquire(name, f'guest-{name}')
        one, _ = host.find('two')
        one.pin('two')
        os.pwrite(one._fd, b'\x02',
                  one.slot_of('two').l1_place[0] + 6)
    return one


def kept(one):
    """The files of a volume, and how each is."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_blocks)
            for path in one.path.rglob('*')
            if path.is_file() and 'index' not in path.name}


def test_a_damaged_slot_is_its_guests_alone(world, neighbours):
    """Others of the volume are served; nothing of it goes."""
    with world.host() as host:
        for name in ('public', 'one'):
            host.acquire(name, 'another')
            host.ensure(name, 200 * 4096, 4096)
            assert host.hydrate(name)
            assert right(host, world, name) == 0
        for fails in (lambda: host.acquire('two', 'another'),
                      lambda: host.ensure('two', 200 * 4096, 4096),
                      lambda: host.hydrate('two')):
            with pytest.raises(exception.Corrupt, match='slot 3'):
                fails()
        assert host.check('two') == (0, ['slot 3: L1 entry'])
        assert len(host.status()) == 3
        one, _ = host.find('two')
        assert one.leases('two') == ['guest-two']
        for holder in ('guest-one', 'another'):
            host.release('one', holder)
        host.release('two', 'guest-two')
        before = kept(one)
        with pytest.raises(exception.Corrupt, match='slot 3'):
            host.evict(['one'])
        assert host.make_room(1 << 40) == 0
        for name in ('one', 'two'):
            world.repository.remove(name)
        host.sync()
        assert kept(one) == before
        assert right(host, world, 'one') == 0
        host.ensure('public', 250 * 4096, 4096)
    with world.host() as host:
        assert right(host, world, 'one') == 0


def spoil_description(one):
    (one.path / 'images' / 'two').write_text('{')


def spoil_poison(one):
    with one.file.open('r+b') as file:
        file.write(b'x')


def leave_busy(one):
    """What the slot uses is not known, so nothing can be freed."""
    db = sqlite3.connect(one.path / 'index.sqlite')
    with db:
        db.execute("UPDATE meta SET value = 1 WHERE key = 'busy'")
    db.close()


def no_file(one):
    one.file.rename(one.path / 'away')
    one.file.mkdir()


@pytest.mark.parametrize('harm', [
    spoil_description, spoil_poison, leave_busy, no_file],
    ids=lambda harm: harm.__name__)
def test_a_volume_that_cannot_be_opened(world, neighbours, harm, caplog):
    """Guests of others do not see it; nothing of it goes."""
    harm(neighbours)
    before = kept(neighbours)
    with world.host() as host:
        host.ensure('public', 200 * 4096, 4096)
        host.acquire('public', 'another')
        assert host.hydrate('public')
        assert right(host, world, 'public') == 0
        assert [row.image_id for row in host.status()
                if row.leases] == ['public']
        assert list(host.damaged()) == ['project-p']
        for fails in (lambda: host.acquire('one', 'another'),
                      lambda: host.ensure('one', 0, 4096)):
            with pytest.raises((exception.Corrupt, OSError)):
                fails()
        with pytest.raises(exception.Corrupt, match='project-p'):
            host.find('two')
        with pytest.raises(exception.NotFound):
            host.find('another')
        host.release('one', 'guest-one')
        assert host.make_room(1 << 40) == 0
        # What its guests need may be nowhere else.
        for name in ('one', 'two', 'public'):
            world.repository.remove(name)
        packs = sorted((world.path / 'host' / 'mirror').glob('*/??/*'))
        host.sync()
        assert sorted((world.path / 'host' / 'mirror').glob(
            '*/??/*')) == packs
        assert kept(neighbours) == before
        assert len([record for record in caplog.records
                    if 'stays as it' in record.message]) == 1


def test_a_volume_that_was_mended(world, neighbours, monkeypatch):
    description = neighbours.path / 'images' / 'one'
    good = description.read_text()
    description.write_text('')
    with world.host() as host:
        with pytest.raises(exception.Corrupt):
            host.ensure('one', 0, 4096)
        description.write_text(good)
        with pytest.raises(exception.Corrupt):
            host.ensure('one', 0, 4096)
        monkeypatch.setattr(host_module, 'time', types.SimpleNamespace(
            monotonic=lambda: 1e12))
        host.ensure('one', 200 * 4096, 4096)
        assert host.damaged() == {}


def test_an_id_of_a_damaged_volume_is_not_used_again(world, neighbours):
    """Its guests would read the other image."""
    (neighbours.path / 'images' / 'two').write_text('')
    world.repository.remove('two')
    world.publish('two', disk(300 * 4096, 9), range(9))
    with world.host() as host:
        host.sync()
        with pytest.raises(exception.Corrupt, match='project-p'):
            host.acquire('two', 'another')
        assert not host.open_volume('public').image('two')


def test_sync_of_some(world):
    for number in range(3):
        world.publish(f'image-{number}', disk(50 * 4096, number), range(9))
    with world.host() as host:
        assert host.sync(['image-1']).images == 1
        assert [state_of(host, f'image-{n}') for n in range(3)] == [
            'absent', 'ready', 'absent']
        with pytest.raises(exception.NotFound):
            host.sync(['unknown'])


def test_ensure(world):
    data = disk(900 * 4096, 1) + b'x' * 512
    world.publish('image', data, range(9))
    with world.host() as host:
        host.sync()
        with pytest.raises(exception.NotFound):
            host.ensure('image', 0, 512)
        host.acquire('image', 'guest')
        for offset, length in ((-1, 5), (0, -1), (0, len(data) + 1),
                               (len(data), 1), (1 << 62, 1)):
            with pytest.raises(exception.Invalid):
                host.ensure('image', offset, length)
        with pytest.raises(exception.Invalid):
            host.ensure('../image', 0, 1)
        host.ensure('image', len(data), 0)
        rng = random.Random(1)
        one, _ = host.find('image')
        for _ in range(20):
            offset = rng.randrange(len(data))
            length = min(rng.randrange(1, 9000), len(data) - offset)
            host.ensure('image', offset, length)
            numbers = np.arange(offset // 4096,
                                (offset + length - 1) // 4096 + 1)
            assert (one.slot_of('image').entries(numbers) != 0).all()
        right(host, world, 'image')
        host.ensure('image', len(data) - 1, 1)
        right(host, world, 'image')


def test_differences(world, tmp_path):
    """Of a server's snapshot, raw or cached, from its image."""
    data = disk(900 * 4096, 1, zeros=0)
    changed = bytearray(data) + b'more' * 1920
    changed[4096 * 7:4096 * 9] = os.urandom(8192)
    changed[4096 * 99:4096 * 100] = bytes(4096)
    expected = [(4096 * 7, 8192), (4096 * 99, 4096), (4096 * 900, 8192)]
    world.publish('image', data, range(9))
    world.publish('snapshot', bytes(changed), range(9))
    raw = tmp_path / 'raw'
    raw.write_bytes(changed)
    source = CountingStore(world.path / 'repo')
    with world.host(source) as host:
        host.sync()
        with pytest.raises(exception.NotFound):
            host.differences('image', raw)
        host.acquire('image', 'guest')
        with pytest.raises(exception.NotFound):
            host.differences('image', 'snapshot')
        host.acquire('snapshot', 'guest')
        missing, before = right(host, world, 'image'), source.bytes
        for base in raw, 'snapshot':
            assert host.differences('image', base) == expected
        assert host.differences('snapshot', 'snapshot') == []
        assert source.bytes - before < 900 * 64, 'no blocks came'
        assert right(host, world, 'image') == missing > 800
        for base in tmp_path, tmp_path / 'nothing', 'nothing':
            with pytest.raises(exception.FastbootError):
                host.differences('image', base)


def test_differences_of_what_a_guest_wrote(world, tmp_path):
    """It is bytes, also if it looks like a disk on another image."""
    data = disk(200 * 4096, 1, zeros=0)
    world.publish('image', data, range(9))
    stub, raw = tmp_path / 'stub', tmp_path / 'raw'
    with world.host() as host:
        host.sync()
        chain.make_stub(stub, host.acquire('image', 'guest'))
        raw.write_bytes(stub.read_bytes().ljust(len(data), b'\0'))
        assert sum(length for _, length in host.differences(
            'image', raw)) == len(data)


@pytest.mark.parametrize('boot', [(), range(9)])
def test_what_is_observed_comes_alone(world, boot):
    """Without a boot set; its frame comes over the network once."""
    data = disk(900 * 4096, 1, zeros=0)
    world.publish('image', data, boot)
    source = CountingStore(world.path / 'repo')
    with world.host(source) as host:
        host.sync()
        host.acquire('image', 'guest')
        one, _ = host.find('image')
        before = one.slot_of('image').present()
        host.ensure('image', 500 * 4096 + 7, 4096, observed=True)
        assert (one.slot_of('image').present() - before == 2) == (not boot)
        fetched = source.bytes
        host.ensure('image', 510 * 4096, 4096, observed=True)
        assert source.bytes == fetched
        # With nobody looking, all that is there comes.
        host.ensure('image', 505 * 4096, 1)
        assert source.bytes == fetched
        assert one.slot_of('image').present() > 100
        right(host, world, 'image')


def test_many_threads(world):
    """Guests come and miss, others hydrate and are evicted, all at once."""
    for number in range(3):
        world.publish(f'image-{number}', disk(
            500 * 4096, number, pool=600), range(40))
    with world.host() as host:
        host.sync()
        host.acquire('image-0', 'stays')

        def run(seed):
            rng = random.Random(seed)
            for _ in range(12):
                image_id = f'image-{rng.randrange(3)}'
                holder = f'guest-{seed}'
                host.acquire(image_id, holder)
                for _ in range(6):
                    offset = rng.randrange(500 * 4096 - 9000)
                    host.ensure(image_id, offset, 9000)
                if rng.random() < .3:
                    host.hydrate(image_id)
                right(host, world, image_id)
                host.release(image_id, holder)
                if rng.random() < .4:
                    host.make_room(1)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(run, seed) for seed in range(4)]:
                future.result()
        for row in host.status():
            if row.state in ('thawed', 'complete'):
                right(host, world, row.image_id)


def test_hydration_goes_on_where_it_ended(world):
    data = disk(9000 * 4096, 1, zeros=.1)
    world.publish('image', data, range(9))
    source = CountingStore(world.path / 'repo')
    with world.host(source) as host:
        host.sync()
        host.acquire('image', 'guest')
        calls = []
        assert not host.hydrate('image', cancelled=lambda: (
            calls.append(1) or len(calls) > 1))
        some = right(host, world, 'image')
        assert 0 < some < len(data_blocks(data))
        first = source.bytes
    source.bytes = 0
    with world.host(source) as host:
        assert host.hydrate('image')
        assert right(host, world, 'image') == 0
    size = sum(size for _, size, _ in source.list('packs'))
    # At most one frame (and the indexes) twice.
    assert first + source.bytes < size * 1.2 + (1 << 20)


def test_the_order_of_hydration(world, monkeypatch):
    """The boot set as it was read, and then what is behind the other."""
    data = disk(3000 * 4096, 1, zeros=0)
    boot = [2500, 100, 1700]
    world.publish('image', data, boot)
    with world.host() as host:
        host.mirror.refresh()
        image = host.image('image')
        host.mirror.pull(image)
        monkeypatch.setattr(host.mirror, 'frames', lambda found, numbers:
                            asked.append(numbers.tolist()) or frames(
                                found, numbers))
        asked, frames = [], type(host.mirror).frames.__get__(host.mirror)
        # As it is before a thaw: the slot is there and has no data.
        host.open_volume(image.domain).make_slot(
            host_module.volume.Image('image', image.serial, image.manifest,
                                     image.virtual_size),
            host_module.data_blocks(host.mirror.read_manifest(
                image.manifest)))
        assert host.hydrate('image')
        assert asked[0] == boot
        rest = [number for part in asked[1:] for number in part]
        assert rest == sorted(set(range(3000)) - set(boot))
        assert right(host, world, 'image') == 0


def test_a_miss_does_not_wait_for_hydration(world):
    """However long that has to wait for its turn."""
    world.publish('image', disk(3000 * 4096, 1, zeros=0), range(9))
    with world.host() as host, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        host.sync()
        host.acquire('image', 'guest')
        waits, goes_on = threading.Event(), threading.Event()
        done = pool.submit(host.hydrate, 'image', pace=lambda count: (
            waits.set(), goes_on.wait(60)))
        try:
            assert waits.wait(60)
            one, _ = host.find('image')
            host.ensure('image', 2999 * 4096, 4096)
            assert one.slot_of('image').entries(np.array([2999])).all()
            assert not done.done()
        finally:
            goes_on.set()
        assert done.result(60)
        assert right(host, world, 'image') == 0


def test_one_bad_image_does_not_stop_the_others(world):
    world.publish('bad', disk(400 * 4096, 1), range(400))
    [pack] = (world.path / 'repo' / 'packs').glob('*')
    world.publish('good', disk(400 * 4096, 2), range(400))
    damage_in(pack)
    with world.host() as host:
        done = host.sync()
        assert list(done.failed) == ['bad']
        assert 'pack' in done.failed['bad']
        assert state_of(host, 'bad') == 'absent'
        assert state_of(host, 'good') == 'ready'
        host.acquire('good', 'guest')
        right(host, world, 'good')


def test_repacked_and_deregistered_while_the_host_was_away(world):
    """What the repository keeps for its guests is of use to them."""
    kept = disk(200 * 4096, 1)
    # The packs of one image have the blocks of both.
    world.publish('bulk', disk(400 * 4096, 2) + kept, range(9))
    world.publish('image', kept, range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        before = host.find('image')[1].manifest
    world.repository.remove('bulk')
    upkeep.collect(world.repository, 0, 0)
    assert compaction.repack(world.repository, .9)
    world.repository.remove('image')
    upkeep.collect(world.repository, 0, 0, needed=lambda images: {
        image.serial for image in images})
    with world.host() as host:
        host.sync()
        one, image = host.find('image')
        assert image.manifest != before
        host.ensure('image', 180 * 4096, 4096)
        host.hydrate('image')
        assert host.link('image').complete
        assert not right(host, world, 'image')
        host.release('image', 'guest')
        host.drop_gone()
        assert not one.images()


def test_a_serial_that_a_journal_gives_twice(world):
    """A backup of the repository was restored and written to, and this host
    lost its own journal: nobody's blocks are another's."""
    world.publish('first', disk(50 * 4096, 1), range(9))
    backup = world.path / 'backup'
    shutil.copytree(world.path / 'repo', backup)
    world.publish('image', disk(200 * 4096, 2), range(9))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        host.hydrate('image')
    shutil.rmtree(world.path / 'repo')
    backup.rename(world.path / 'repo')
    world.publish('another', disk(200 * 4096, 3), range(9))
    (world.path / 'host/mirror/state.json').unlink()
    with world.host() as host:
        with contextlib.suppress(exception.FastbootError):
            host.sync()
        with pytest.raises(exception.Invalid, match='not the one that this'):
            host.acquire('another', 'stranger')
        one, image = host.find('image')
        # Nothing was begun that the next one would have to clear up.
        assert not one._index.busy
        # What cannot be read is no trouble of all new images.
        damaged = one.path / 'images/damaged'
        damaged.write_bytes(b'{')
        with pytest.raises(exception.Invalid, match='not the one that this'):
            host.acquire('another', 'stranger')
        damaged.unlink()
        assert host.check('image')[1] == []
        assert not verify(one.path, journal.Image(
            'image', '', image.serial, image.manifest, 0,
            image.virtual_size), world.data['image'])
