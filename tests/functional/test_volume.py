# SPDX-License-Identifier: Apache-2.0
"""Volumes: QEMU, and the letter of the format, read what was published."""

import concurrent.futures
import contextlib
import itertools
import os
import random
import shutil
import sqlite3

import numpy as np
import pytest
from images import (
    World,
    batch,
    compare,
    data_blocks,
    disk,
    fast_directory,
    qemu,
    verify,
)

from fastboot_common import blocks, chain, exception, slot, volume


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def raw_of(world, image_id):
    return world.path / 'originals' / image_id


def check(host, world, image_id):
    """Both of us, and QEMU through stub and disk."""
    image = host.image(image_id)
    one = host.open_volume(image.domain)
    missing = verify(one.path, image, world.data[image_id])
    _proven, problems = host.check(image_id)
    assert problems == []
    link = host.link(image_id)
    stub, top = world.path / 'stub', world.path / 'disk'
    chain.make_stub(stub, link)
    chain.make_disk(top, stub, image.virtual_size)
    compare(raw_of(world, image_id), top)
    return missing


@pytest.mark.parametrize('size', blocks.BLOCK_SIZES)
def test_states(tmp_path, size):
    """Just a slot, thawed, half there, complete, others evicted."""
    world = World(tmp_path, size)
    # Several L2 tables where that is cheap.
    count = 1200 if size == 4096 else 100
    data = disk(count * size + 512, 1, zeros=.3, block=size)
    other = data[:50 * size] + disk(50 * size, 2, block=size)
    boot = random.Random(3).sample(range(count + 1), 40)
    world.publish('one', data, boot)
    world.publish('slotless', disk(9 * size, 3, block=size))
    world.publish('two', other)
    world.publish('three', data[:512], [0])
    with world.host() as host, world.export():
        host.sync()
        host.acquire('two', 'guest')
        assert check(host, world, 'two') == len(data_blocks(other, size))
        host.acquire('one', 'guest')
        here = len(set(boot) & set(data_blocks(data, size)))
        total = len(data_blocks(data, size))
        assert check(host, world, 'one') == total - here
        host.ensure('one', 50 * size, 7 * size)
        assert 0 <= check(host, world, 'one') < total - here
        assert host.hydrate('two')
        assert check(host, world, 'two') == 0
        host.hydrate('one')
        assert check(host, world, 'one') == 0
        host.acquire('three', 'guest')
        assert check(host, world, 'three') == 0
        host.release('one', 'guest')
        host.evict(['one'])
        assert check(host, world, 'two') == 0
        host.acquire('one', 'guest')
        assert check(host, world, 'one') == total - here
    # A new process, and without anything beneath.
    with world.host() as host:
        host.hydrate('one')
        assert check(host, world, 'one') == 0
        assert check(host, world, 'two') == 0


@pytest.mark.parametrize('length', [
    512, 4096 - 512, 4096, 4096 + 512, (2 << 20) - 512, (4 << 20) + 512])
def test_sizes(world, length):
    data = disk(length, length)
    world.publish('image', data, [0])
    with world.host() as host, world.export():
        host.sync()
        host.acquire('image', 'guest')
        check(host, world, 'image')
        assert host.hydrate('image')
        assert check(host, world, 'image') == 0


def test_an_empty_disk(world):
    world.publish('image', b'')
    with world.host() as host, world.export():
        host.sync()
        host.acquire('image', 'guest')
        assert host.hydrate('image')
        assert host.check('image') == (0, [])
        compare(raw_of(world, 'image'), host.link('image'))


def test_a_disk_of_zeros(world):
    world.publish('image', bytes(5 << 20), [1, 2])
    with world.host() as host, world.export():
        host.sync()
        host.acquire('image', 'guest')
        assert check(host, world, 'image') == 0
        assert host.hydrate('image')
        assert check(host, world, 'image') == 0


@pytest.mark.parametrize('size', [4096, 65536])
def test_a_terabyte_that_is_sparse(tmp_path, size):
    from disks import make_draft

    from fastboot_common import publish
    world = World(tmp_path, size)
    raw = tmp_path / 'raw'
    rng = random.Random(1)
    with raw.open('wb') as file:
        file.truncate(1 << 40)
        for place in (0, 5 << 20, 1 << 39, (1 << 40) - 512):
            file.seek(place)
            file.write(rng.randbytes(512))
    publish.Publisher(world.repository, tmp_path / 'cache').publish(
        raw, make_draft('image', 1 << 40, size, [0, (1 << 40) // size - 1]))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        assert host.hydrate('image')
        assert host.check('image') == (4, [])
        one, image = host.find('image')
        found = one.slot_of('image')
        assert len(found.clusters()) == 4
        # Comparing all of it in QEMU would read a terabyte of zeros.
        for place in (0, 5 << 20, 1 << 39, (1 << 40) - 4096, 3 << 30):
            parts = []
            for name, kind in ((str(raw), 'raw'),
                               (host.link('image').backing, 'qcow2')):
                target = tmp_path / 'part'
                status, words = qemu(
                    'qemu-img', 'dd', '-U', '-f', kind, '-O', 'raw',
                    'bs=4096', f'skip={place // 4096}',
                    f'count={place // 4096 + 1}', f'if={name}',
                    f'of={target}')
                assert status == 0, words
                parts.append(target.read_bytes()[:4096])
            assert parts[0] == parts[1]


def test_poison(world):
    world.publish('image', disk(9 * 4096, 1))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        file = host.link('image').volume
    status, words = qemu('qemu-img', 'info', '--backing-chain', file)
    assert status and volume.POISON in words
    status, words = qemu('qemu-img', 'convert', '-O', 'raw', file,
                         world.path / 'out')
    assert status and volume.POISON in words


def test_nobody_counts_the_clusters_of_a_volume(world):
    """Volumes of before, too; and QEMU says the same of their images."""
    data = disk(40 * world.block_size, 1, zeros=.3, block=world.block_size)
    world.publish('one', data, [1])
    with world.host() as host, world.export():
        host.sync()
        host.acquire('one', 'guest')
        one = host.open_volume(host.image('one').domain)
        stub = world.path / 'stub'
        chain.make_stub(stub, host.link('one'))

        def word():
            return os.pread(one._fd, 16, slot.REFCOUNTS)

        def allocated():
            return qemu('qemu-img', 'map', '-U', '--output=json', stub)

        assert word() == slot.UNCOUNTABLE + bytes(8)
        mapped = allocated()
        assert mapped[0] == 0
        with one.file.open('r+b') as file:
            file.seek(slot.REFCOUNTS)
            file.write(bytes(8))
        assert allocated() == mapped
    with world.host() as host:
        one = host.open_volume(host.image('one').domain)
        assert word() == slot.UNCOUNTABLE + bytes(8)


def test_the_complete_name(world):
    world.publish('image', disk(90 * 4096, 1), range(20))
    with world.host() as host, world.export():
        host.sync()
        lazy = host.acquire('image', 'guest')
        assert lazy.complete is None
        assert host.hydrate('image')
        link = host.link('image')
        stub = world.path / 'lazy'
        chain.make_stub(stub, lazy)
        assert check(host, world, 'image') == 0
        # Written before it was complete: still right.
        compare(raw_of(world, 'image'), stub)
    with world.host() as host:
        # Nobody answers misses now.
        assert check(host, world, 'image') == 0
        host.release('image', 'guest')
        host.evict(['image'])
        status, _words = qemu('qemu-img', 'info', '-U', link.backing)
        assert status
        status, _words = qemu('qemu-img', 'convert', '-U', '-O', 'raw',
                              world.path / 'disk', world.path / 'out')
        assert status
        # The lazy one fails loudly, too.
        status, _words = qemu('qemu-img', 'convert', '-U', '-O', 'raw',
                              stub, world.path / 'out')
        assert status


def test_equal_blocks_lie_once(world):
    data = disk(100 * 4096, 1, zeros=0)
    world.publish('one', data)
    world.publish('two', data[4096 * 50:] + disk(4096 * 10, 2, zeros=0))
    with world.host() as host:
        host.sync()
        for image_id in ('one', 'two'):
            host.acquire(image_id, 'guest')
            host.hydrate(image_id)
        one, _ = host.find('one')
        first = one.slot_of('one').clusters().tolist()
        second = one.slot_of('two').clusters().tolist()
        assert len(set(first)) == 100
        assert len(set(second) - set(first)) == 10
        assert second[:50] == first[50:]


def test_the_boot_set_is_one_run(world):
    data = disk(400 * 4096, 1)
    boot = random.Random(2).sample(range(400), 200)
    image = world.publish('image', data, boot)
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
        found = host.mirror.read_manifest(image.manifest).boot
        one, _ = host.find('image')
        target = one.slot_of('image')
        offsets = target.offsets(target.entries(found))
        assert set(np.diff(offsets).tolist()) == {4096}


def test_free_space_that_is_no_hole(world):
    """Zeros are free, as who copies a sparse file rounds holes; others' bytes
    are refused once, and the next operation knows whose they are."""
    for name, number in (('one', 1), ('two', 2), ('three', 3)):
        world.publish(name, disk(20 * 4096, number), range(20))
    with world.host() as host, world.export():
        host.sync()
        host.acquire('one', 'guest')
        one, _ = host.find('one')
        os.pwrite(one._fd, bytes(3 * 4096), one._end)
        host.acquire('two', 'guest')
        assert check(host, world, 'two') == 0
        os.pwrite(one._fd, b'x', one._end + 5000)
        with pytest.raises(exception.Corrupt, match='should be free'):
            host.acquire('three', 'guest')
        host.acquire('three', 'guest')
        for name in ('one', 'two', 'three'):
            assert check(host, world, name) == 0


def test_visibility(world):
    data = disk(50 * 4096, 1)
    world.publish('public', data)
    world.publish('mine', data, visibility='private', owner='p1')
    world.publish('yours', data, visibility='private', owner='p2')
    world.publish('shared', data, visibility='shared', owner='p1')
    with world.host() as host, world.export():
        host.sync()
        files = set()
        for image_id in ('public', 'mine', 'yours', 'shared'):
            files.add(host.acquire(image_id, 'guest').volume)
            host.hydrate(image_id)
            assert check(host, world, image_id) == 0
        assert {file.parent.name for file in files} == {
            'public', 'project-p1', 'project-p2', 'image-shared'}
        assert len({os.stat(file).st_ino for file in files}) == 4


def index_files(path):
    return [path / f'index.sqlite{end}' for end in ('', '-wal', '-shm')]


def lost(path):
    for file in index_files(path):
        file.unlink(missing_ok=True)


def garbage(path):
    (path / 'index.sqlite').write_bytes(os.urandom(20000))


def cut(path):
    os.truncate(path / 'index.sqlite', 5000)


def pages(path):
    """Damage that is not seen before a row is looked for."""
    file = path / 'index.sqlite'
    data = bytearray(file.read_bytes())
    data[2 * 4096:] = b'\xa5' * (len(data) - 2 * 4096)
    file.write_bytes(data)


def words(path):
    """Damage in an index that is to be recovered."""
    with contextlib.closing(sqlite3.connect(path / 'index.sqlite')) as db:
        with db:
            db.execute("UPDATE blocks SET offset = 'x'")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('busy', 1)")


@pytest.mark.parametrize('harm', [lost, garbage, cut, pages, words],
                         ids=lambda harm: harm.__name__)
def test_the_index_is_rebuilt(world, harm):
    data = disk(600 * 4096, 1)
    world.publish('one', data, range(100))
    world.publish('two', data + disk(4096 * 9, 2, zeros=0))
    with world.host() as host:
        host.sync()
        host.acquire('one', 'guest')
        host.hydrate('one')
    harm(world.path / 'host' / 'volumes' / 'public')
    with world.host() as host, world.export():
        for _ in range(3):
            with contextlib.suppress(exception.Unavailable):
                host.acquire('two', 'guest')
                host.hydrate('two')
        assert check(host, world, 'one') == 0
        assert check(host, world, 'two') == 0
        one, _ = host.find('one')
        # Dedup goes on where it was.
        assert len(set(one.slot_of('two').clusters().tolist())
                   - set(one.slot_of('one').clusters().tolist())) == 9


def test_a_volume_file_that_was_deleted(world):
    """The index must not name clusters of the old file."""
    world.publish('one', disk(90 * 4096, 1), range(20))
    with world.host() as host:
        host.sync()
        host.acquire('one', 'guest')
        host.hydrate('one')
    (world.path / 'host' / 'volumes' / 'public' / 'volume').unlink()
    with world.host() as host, world.export():
        host.sync()
        host.acquire('one', 'guest')
        check(host, world, 'one')
        host.hydrate('one')
        assert check(host, world, 'one') == 0


def test_a_description_that_was_deleted(world):
    """Its clusters are nobody else's."""
    world.publish('one', disk(90 * 4096, 1), range(20))
    world.publish('two', disk(90 * 4096, 2), range(20))
    with world.host() as host:
        host.sync()
        host.acquire('one', 'guest')
        host.hydrate('one')
        image = host.image('one')
    directory = world.path / 'host' / 'volumes' / 'public'
    (directory / 'images' / 'one').unlink()
    lost(directory)
    with world.host() as host:
        host.acquire('two', 'guest')
        host.hydrate('two')
        host.release('two', 'guest')
        host.evict(['two'])
    assert verify(directory, image, world.data['one']) == 0


def test_one_writer(world):
    world.publish('one', disk(4096, 1))
    with world.host() as host:
        host.sync()
        host.acquire('one', 'guest')
        with world.host() as other, pytest.raises(exception.Busy):
            other.acquire('one', 'guest')
        with world.host(writable=False) as reader:
            assert [row.state for row in reader.status()] == ['thawed']


def test_leases_and_pins(world):
    for number in range(3):
        world.publish(f'image-{number}', disk(90 * 4096, number), range(20))
    with world.host() as host, world.export():
        host.sync()
        for number in range(3):
            host.acquire(f'image-{number}', 'a')
            host.hydrate(f'image-{number}')
        host.acquire('image-0', 'b')
        host.release('image-0', 'a')
        with pytest.raises(exception.Busy, match='leased by b'):
            host.evict(['image-0'])
        one, _ = host.find('image-0')
        one.pin('image-1')
        host.release('image-1', 'a')
        assert host.make_room(1 << 40) == 0
        host.release('image-2', 'a')
        with pytest.raises(exception.Busy, match='pinned'):
            host.evict(['image-2', 'image-1'])
        assert check(host, world, 'image-1') == 0
        assert check(host, world, 'image-2') == 0
        assert host.make_room(1) > 0
        with pytest.raises(exception.NotFound):
            host.find('image-2')
        one.unpin('image-1')
        host.evict(['image-1'])
        host.release('image-0', 'never')
        assert check(host, world, 'image-0') == 0
    # Across a restart, too.
    with world.host() as host:
        with pytest.raises(exception.Busy):
            host.evict(['image-0'])
        host.release('image-0', 'b')
        assert host.evict(['image-0']) > 0
        one = host.open_volume('public')
        assert one.disk_used() < 90 * 4096


@pytest.mark.parametrize('name', ['../x', '', '.', 'a/b', 'x' * 65])
def test_names_of_holders(world, name):
    world.publish('one', disk(4096, 1))
    with world.host() as host:
        host.sync()
        with pytest.raises(exception.Invalid):
            host.acquire('one', name)


class Model:
    """A small volume, and what must be in it."""

    def __init__(self, path, clusters, cluster=4096, seed=1):
        self.path = path / 'v'
        self.cluster = cluster
        self.size = slot.DATA + clusters * cluster
        self.rng = random.Random(seed)
        self.data = {}
        self.images = {}
        self.serials = itertools.count(1)
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.open()

    def open(self):
        self.volume = volume.Volume(
            self.path, self.cluster, backing=lambda name: f'nbd:{name}',
            resolve=self.resolve, size=self.size)

    def resolve(self, image, numbers):
        return batch(self.data[image.image_id], numbers.tolist(),
                     self.cluster).digests

    def close(self):
        self.pool.shutdown()
        self.volume.close()

    def make(self, count, pool=0):
        name = f'image-{next(self.serials)}'
        image = volume.Image(name, int(name[6:]), 'ab' * 32,
                             count * self.cluster)
        data = disk(count * self.cluster, self.rng.random(), pool=pool,
                    zeros=.1, block=self.cluster)
        self.data[name] = data
        here = np.array(data_blocks(data, self.cluster), np.int64)
        self.volume.make_slot(image, [here] if len(here) else [])
        self.images[name] = image
        return name

    def fill(self, name):
        here = data_blocks(self.data[name], self.cluster)
        self.rng.shuffle(here)
        some = sorted(here[:self.rng.randrange(len(here) + 1)])
        half = len(some) // 2
        self.volume.fill(self.images[name], [
            batch(self.data[name], part, self.cluster)
            for part in (some[:half], some[half:]) if part], self.pool)

    def evict(self, name):
        self.volume.evict([name])
        del self.images[name]

    def verify(self):
        """All bytes right, no place used twice for different things."""
        places = {slot.ZERO_TABLE: 'zeros', slot.REFCOUNTS: 'refcounts'}
        for name, image in self.images.items():
            assert verify(self.path, image, self.data[name]) is not None
            found = slot.Slot(self.volume._fd, image.serial)
            start, length = found.l1_place
            mine = [(start + at, name)
                    for at in range(0, length, self.cluster)]
            mine += [(at, name) for at in found.tables.tolist()]
            for at, owner in mine:
                assert places.setdefault(at, owner) is owner
            for at in set(found.clusters().tolist()):
                content = os.pread(self.volume._fd, self.cluster, at)
                assert places.setdefault(at, content) == content
                assert at + self.cluster <= self.size


@pytest.mark.parametrize('cluster, seed', [
    (4096, 1), (4096, 2), (4096, 3), (65536, 6), (16384, 5)])
def test_a_volume_that_is_always_full(cluster, seed):
    """Gaps are used again, and nothing is ever written over."""
    with fast_directory() as path:
        model = Model(path, 90, cluster, seed)
        rng, full, reused = model.rng, 0, 0
        for step in range(120):
            names = list(model.images)
            action = rng.random()
            try:
                if action < .35 or not names:
                    model.make(rng.choice((1, 5, 30, 600)), rng.choice((
                        0, 9)))
                elif action < .75:
                    before = model.volume._cursor
                    model.fill(rng.choice(names))
                    reused += model.volume._cursor < before
                elif action < .95:
                    model.evict(rng.choice(names))
                else:
                    model.volume.close()
                    model.open()
            except exception.NoSpace:
                full += 1
                if names and rng.random() < .5:
                    model.evict(rng.choice(names))
            if step % 8 == 0:
                model.verify()
        model.verify()
        assert full and reused
        for name in list(model.images):
            model.evict(name)
        # All of it can be had again.
        assert model.volume.disk_used() <= 1 << 20
        model.close()


def test_a_slot_in_several_gaps():
    """Tables and L1 come from different gaps; neither takes the other's."""
    with fast_directory() as path:
        model = Model(path, 16)
        keep = [model.make(1) for _ in range(5)]
        for name in keep[::2]:
            model.evict(name)
        for _ in range(6):
            with contextlib.suppress(exception.NoSpace):
                model.make(700)
            model.verify()
        assert len(model.images) > 3
        model.close()


def test_no_room_leaves_everything_as_it_was():
    with fast_directory() as path:
        model = Model(path, 40)
        first = model.make(20)
        here = data_blocks(model.data[first])
        model.volume.fill(
            model.images[first],
            [batch(model.data[first], here, 4096)], model.pool)
        second = model.make(30)
        here = data_blocks(model.data[second])
        for _ in range(2):
            with pytest.raises(exception.NoSpace):
                model.volume.fill(
                    model.images[second],
                    [batch(model.data[second], here, 4096)],
                    model.pool)
        model.verify()
        assert not model.volume.complete(second)
        model.verify()
        assert model.volume.complete(first)
        model.evict(first)
        for part in (here[:12], here[12:]):
            model.volume.fill(
                model.images[second],
                [batch(model.data[second], part, 4096)], model.pool)
        assert model.volume.complete(second)
        model.verify()
        model.close()


def test_a_frame_that_cannot_be_had():
    """Nothing of the call counts, and its room is given back."""
    with fast_directory() as path:
        model = Model(path, 60)
        name = model.make(20)
        here = data_blocks(model.data[name])
        good = batch(model.data[name], here[:9], 4096)
        bad = batch(model.data[name], here[9:], 4096)

        def fail():
            raise exception.Corrupt('damaged')

        def crash():
            raise ValueError('a bug')

        before = model.volume.disk_used()
        for error, load in ((exception.Corrupt, fail), (ValueError, crash),
                            (exception.Corrupt, fail)):
            with pytest.raises(error):
                model.volume.fill(model.images[name], [good, volume.Batch(
                    bad.numbers, bad.digests, bad.positions, load)],
                    model.pool)
            model.verify()
            assert model.volume.slot_of(name).present() == 0
        assert model.volume.disk_used() <= before + 65536
        model.volume.fill(model.images[name], [good, bad], model.pool)
        assert model.volume.complete(name)
        model.verify()
        model.close()


@contextlib.contextmanager
def complete_image():
    """World, host and volume with an image that is here as a whole."""
    with fast_directory() as path:
        world = World(path)
        world.publish('image', disk(60 * 4096, 1), range(30))
        with world.host() as host:
            host.sync()
            host.acquire('image', 'guest')
            host.hydrate('image')
            yield world, host, host.find('image')[0]


def flip(one, place):
    byte = os.pread(one._fd, 1, place)
    os.pwrite(one._fd, bytes([byte[0] ^ 1]), place)


def test_check_sees_damage():
    with complete_image() as (world, host, one):
        target = one.slot_of('image')
        place = int(target.clusters()[3])
        flip(one, place + 100)
        assert 'other content' in host.check('image')[1][0]
        flip(one, place + 100)
        assert host.check('image')[1] == []
        table = int(target.tables[0])
        number = data_blocks(world.data['image'])[0]
        entry = os.pread(one._fd, 8, table + number * 8)
        for wrong in (bytes(8), bytes(7) + b'\1'):
            os.pwrite(one._fd, wrong, table + number * 8)
            assert host.check('image')[1]
        os.pwrite(one._fd, entry, table + number * 8)
        assert host.check('image')[1] == []


def test_repair_writes_damaged_blocks_anew():
    with complete_image() as (world, host, one):
        assert host.repair('image') == 0
        for place in one.slot_of('image').clusters()[3:12:4].tolist():
            flip(one, place + 100)
        assert len(host.check('image')[1]) == 3
        # What the mirror has is damaged, too: the repository helps.
        for pack in (world.path / 'host' / 'mirror' / 'packs').rglob('*'):
            if pack.is_file():
                pack.write_bytes(bytes(pack.stat().st_size))
        assert host.repair('image') == 3
        assert verify(one.path, host.image('image'),
                      world.data['image']) == 0
        assert host.check('image')[1] == []


def test_repair_writes_nothing_into_the_place_of_another_block():
    """A damaged table names it; that one's bytes are right."""
    with complete_image() as (world, host, one):
        table = int(one.slot_of('image').tables[0])
        first, second = data_blocks(world.data['image'])[:2]
        entry = os.pread(one._fd, 8, table + first * 8)
        os.pwrite(one._fd, os.pread(one._fd, 8, table + second * 8),
                  table + first * 8)
        assert host.repair('image') == 0
        assert len(host.check('image')[1]) == 1
        os.pwrite(one._fd, entry, table + first * 8)
        assert verify(one.path, host.image('image'),
                      world.data['image']) == 0


@pytest.mark.parametrize('text', [
    '', '{}', '[]', 'x', '{"image_id":"image","serial":0,"manifest":"","'
    'virtual_size":0}', '{"image_id":"other","serial":1,"manifest":"",'
    '"virtual_size":0}', '{"image_id":"image","serial":1e999,"manifest":"",'
    '"virtual_size":0}', '[' * 9999])
def test_a_damaged_description(world, text):
    """Nothing is given out while it is unknown what is in use."""
    world.publish('image', disk(9 * 4096, 1))
    with world.host() as host:
        host.sync()
        host.acquire('image', 'guest')
    directory = world.path / 'host' / 'volumes' / 'public'
    (directory / 'images' / 'image').write_text(text)
    with world.host() as host, pytest.raises(exception.Corrupt):
        host.acquire('image', 'other')


def test_what_is_no_volume(tmp_path):
    def open_it(block_size=4096):
        return volume.Volume(tmp_path, block_size, backing=str,
                             resolve=lambda *_: [], size=65 << 30)

    open_it().close()
    with pytest.raises(exception.Invalid):
        open_it(8192)
    os.truncate(tmp_path / 'volume', 0)
    with pytest.raises(exception.Corrupt):
        open_it()
    (tmp_path / 'volume').write_bytes(os.urandom(4096))
    with pytest.raises(exception.Corrupt):
        open_it()
    shutil.rmtree(tmp_path)
    with pytest.raises(exception.NotFound):
        volume.Volume(tmp_path, 4096, backing=str, writable=False,
                      resolve=lambda *_: [])


def test_an_index_of_another_time_is_not_believed_after_a_crash(world):
    """Rows of an operation that never ended are dropped when opened."""
    world.publish('one', disk(60 * 4096, 1, zeros=0), range(30))
    with world.host() as host:
        host.sync()
        host.acquire('one', 'guest')
        one, _ = host.find('one')
        path, end = one.path, one._end
    digests = batch(world.data['one'], range(30, 60), 4096).digests
    db = sqlite3.connect(path / 'index.sqlite')
    with db:
        db.executemany('INSERT INTO blocks VALUES (?, ?)', [
            (digest, end + at * 4096) for at, digest in enumerate(digests)])
        db.execute("UPDATE meta SET value = 1 WHERE key = 'busy'")
    db.close()
    with world.host() as host, world.export():
        host.hydrate('one')
        assert check(host, world, 'one') == 0
