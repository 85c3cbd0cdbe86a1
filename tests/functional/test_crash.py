# SPDX-License-Identifier: Apache-2.0
"""Killed at every step, and losing power at every step.

Each operation runs in a child that dies before its n-th step, for every n:
steps are syncs, renames, links, removals, writes, holes and commits of the
index. Then everything is opened again: the old or the new state, every byte
right, and the operation succeeds when it is repeated.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import tempfile
import threading

import pytest
from images import (
    CountingStore,
    World,
    disk,
    fast_directory,
    verify,
)
from oslo_config import cfg

from fastboot_common import blockindex, exception, files, publish, upkeep
from fastboot_common.cli import base
from fastboot_common.conf import opts
from fastboot_common.microvm import shelf

DEAD = 9
PAGE = 4096


class Steps:
    """Counts steps, and ends the process at one of them."""

    def __init__(self, last):
        self.last = last
        self.count = 0
        self.lock = threading.RLock()

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def step(*args, **options):
            with self.lock:
                self.count += 1
                if self.count >= self.last:
                    self.die()
                return original(*args, **options)

        setattr(owner, name, step)

    def die(self):
        os._exit(DEAD)

    def install(self):
        for name in ('fsync', 'fdatasync', 'rename', 'link', 'unlink',
                     'pwrite', 'ftruncate'):
            self.wrap(os, name)
        for name in ('rename', 'unlink'):
            self.wrap(pathlib.Path, name)
        self.wrap(files, 'punch')
        self.wrap(files, 'store_words')
        for name in ('add', 'keep', 'clear'):
            self.wrap(blockindex.BlockIndex, name)
        busy = blockindex.BlockIndex.busy

        def set_busy(index, value):
            with self.lock:
                self.count += 1
                if self.count >= self.last:
                    self.die()
                busy.fset(index, value)

        blockindex.BlockIndex.busy = busy.setter(set_busy)


class Power(Steps):
    """Of what was written to a volume after its last sync, some is lost."""

    def __init__(self, last, seed):
        super().__init__(last)
        self.rng = random.Random(seed)
        self.pages = {}
        self.done = []

    def install(self):
        self._pwrite, self._punch = os.pwrite, files.punch
        self._sync = os.fdatasync
        os.pwrite, files.punch = self.pwrite, self.punch
        files.store_words = lambda fd, offset, words: self.pwrite(
            fd, words, offset)
        os.fdatasync = self.fdatasync
        super().install()

    def _is_volume(self, fd):
        return os.readlink(f'/proc/self/fd/{fd}').endswith('/volume')

    def _keep(self, fd, offset, length):
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            if (fd, page) in self.pages:
                continue
            hole = not list(files.data_ranges(
                fd, page * PAGE, (page + 1) * PAGE))
            self.pages[fd, page] = None if hole else os.pread(
                fd, PAGE, page * PAGE)

    def pwrite(self, fd, data, offset):
        if self._is_volume(fd):
            with self.lock:
                data = bytes(data)
                self._keep(fd, offset, len(data))
                for start in range(0, len(data), PAGE):
                    part = data[start:start + PAGE]
                    self.done.append((self._pwrite, fd, part,
                                      offset + start))
        return self._pwrite(fd, data, offset)

    def punch(self, fd, offset, length):
        if self._is_volume(fd):
            with self.lock:
                self._keep(fd, offset, length)
                self.done.append((self._punch, fd, offset, length))
        self._punch(fd, offset, length)

    def fdatasync(self, fd):
        self._sync(fd)
        if self._is_volume(fd):
            self.pages.clear()
            self.done.clear()

    def die(self):
        for (fd, page), old in self.pages.items():
            if old is None:
                self._punch(fd, page * PAGE, PAGE)
            else:
                self._pwrite(fd, old, page * PAGE)
        for function, *arguments in self._kept():
            function(*arguments)
        os._exit(DEAD)

    def _kept(self):
        """What reached the device: the newest alone, all but the oldest,
        or any."""
        mode = self.rng.randrange(4)
        if mode < 2:
            return self.done[-1:] if mode else self.done[1:]
        share = self.rng.random()
        return [one for one in self.done if self.rng.random() < share]


def run(steps, operation):
    """Whether the operation ended, in a child that `steps` may kill."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            steps.install()
            operation()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DEAD)
    return status == 0


@pytest.fixture(scope='module')
def worlds():
    """Worlds in each state, made once: `worlds(name)` gives a copy."""
    with fast_directory() as path:
        made = World(path / 'empty')
        states = {'empty': made}
        data = disk(40 * 4096, 1, zeros=.2)
        shared = data[:20 * 4096] + disk(10 * 4096, 2)
        current = made.copy(path / 'published')
        current.publish('one', data, [5, 30, 4, 3])
        current.publish('two', shared, [1, 2])
        states['published'] = current
        current = current.copy(path / 'synced')
        with current.host() as host:
            host.sync()
        states['synced'] = current
        current = current.copy(path / 'thawed')
        with current.host() as host:
            host.acquire('two', 'keep')
            host.acquire('one', 'guest')
        states['thawed'] = current
        current = current.copy(path / 'complete')
        with current.host() as host:
            host.hydrate('one')
            host.hydrate('two')
        states['complete'] = current
        current = current.copy(path / 'released')
        with current.host() as host:
            host.release('one', 'guest')
        states['released'] = current
        current = states['published'].copy(path / 'removed')
        current.repository.remove('one')
        states['removed'] = current
        copies = iter(range(10 ** 6))

        def copy(name):
            target = path / f'copy-{next(copies)}'
            target.mkdir()
            return states[name].copy(target)

        yield copy


def check_host(world):
    """Whatever there is of each image is right."""
    state = world.repository.state()
    found = {}
    with world.host() as host:
        for row in host.status():
            if row.state not in ('thawed', 'complete'):
                continue
            image = state.images[row.image_id]
            one = host.open_volume(image.domain)
            found[row.image_id] = verify(one.path, image,
                                         world.data[row.image_id])
            assert found[row.image_id] is not None
            assert host.check(row.image_id)[1] == []
            assert row.state == 'thawed' or found[row.image_id] == 0
    return found


def check_index(world):
    """The index names nothing but clusters that have that content."""
    import hashlib
    import sqlite3
    path = world.path / 'host' / 'volumes' / 'public'
    if not (path / 'index.sqlite').exists():
        return
    with contextlib.closing(sqlite3.connect(path / 'index.sqlite')) as db, \
            open(path / 'volume', 'rb') as file:
        for digest, offset in db.execute('SELECT * FROM blocks'):
            content = os.pread(file.fileno(), 4096, offset)
            assert hashlib.sha256(content).digest() == digest


def with_host(action):
    def operation(world):
        with world.host() as host:
            action(host)
    return operation


def fill_all(host):
    host.acquire('one', 'guest')
    assert host.hydrate('one')


HOST = {
    'sync': ('published', with_host(lambda host: host.sync())),
    'from nothing': ('synced', with_host(fill_all)),
    'ensure': ('thawed', with_host(
        lambda host: host.ensure('one', 0, 8192))),
    'hydrate': ('thawed', with_host(lambda host: host.hydrate('one'))),
    'evict': ('released', with_host(lambda host: host.evict(['one']))),
    'lease': ('thawed', with_host(
        lambda host: host.acquire('one', 'another'))),
    'release': ('thawed', with_host(
        lambda host: host.release('one', 'guest'))),
}


def every_step(worlds, state, operation, judge, make=Steps):
    """Kill at each step until the operation gets through."""
    for number in range(1, 2000):
        world = worlds(state)
        try:
            ended = run(make(number), lambda world=world: operation(world))
            judge(world, ended)
        except BaseException:
            print(f'killed at step {number}')
            raise
        finally:
            shutil.rmtree(world.path)
        if ended:
            return number
    raise AssertionError('never ends')


def judge_host(operation):
    def judge(world, ended):
        check_host(world)
        check_index(world)
        if not ended:
            with contextlib.suppress(exception.NotFound):
                operation(world)
        check_index(world)
        # And everything else still goes.
        with world.host() as host:
            host.sync()
            for image_id in ('one', 'two'):
                host.acquire(image_id, 'last')
                assert host.hydrate(image_id)
        assert check_host(world) == {'one': 0, 'two': 0}
        check_index(world)
    return judge


@pytest.mark.parametrize('name', HOST)
def test_host(worlds, name):
    state, operation = HOST[name]
    assert every_step(worlds, state, operation, judge_host(operation)) > 3


@pytest.mark.parametrize('name, seed', [
    ('from nothing', 1), ('from nothing', 2), ('hydrate', 3), ('evict', 4),
    ('evict', 5), ('evict', 6), ('evict', 7)])
def test_power_loss(worlds, name, seed):
    state, operation = HOST[name]
    seeds = random.Random(seed)
    every_step(worlds, state, operation, judge_host(operation),
               lambda number: Power(number, seeds.random()))


def test_power_loss_is_seen(worlds):
    """Were there no syncs, the tests above would notice."""
    class Careless(Power):
        def fdatasync(self, fd):
            pass

    for number in range(10, 200):
        world = worlds('thawed')
        try:
            run(Careless(number, number), lambda world=world: HOST[
                'hydrate'][1](world))
            check_host(world)
        except (AssertionError, exception.FastbootError):
            return
        finally:
            shutil.rmtree(world.path)
    pytest.fail('nothing was lost')


def test_publish(worlds):
    data = disk(30 * 4096, 5, zeros=.2)

    def operation(world):
        world.publish('three', data, [7, 1])

    def judge(world, ended):
        from disks import read_back
        state = world.repository.state()
        assert ended <= ('three' in state.images)
        for image_id in state.images:
            assert read_back(world.repository, state.images[
                image_id]) == {**world.data, 'three': data}[image_id]
        assert not list(upkeep.check(world.repository, deep=True))
        world.publish('three', data, [7, 1])
        assert read_back(world.repository, world.repository.state(
            ).images['three']) == data
        assert not list(upkeep.check(world.repository, deep=True))
        assert upkeep.collect(world.repository, 0, 3600).files == 0

    every_step(worlds, 'published', operation, judge)


def test_publish_microvm(worlds, tmp_path):
    """Its repository, which the first one makes, is part of it."""
    import microvms
    rng = random.Random(1)
    stream, _ = microvms.qemu_stream([rng.randbytes(PAGE) for _ in range(9)])
    baked = tmp_path / 'baked'
    microvms.make(baked, stream, size=40 * PAGE)
    conf = opts.register(cfg.ConfigOpts())
    conf([], default_config_files=[])

    def operation(world):
        env = environment(world)
        images = env.writable_repository()
        publisher = publish.Publisher(env.writable_microvms(),
                                      world.path / 'work' / 'cache')
        shelf.put(baked, images.image('one'), images, publisher,
                  world.path / 'work')

    def environment(world):
        conf.set_override('location', str(world.path / 'repo'), 'repository')
        return base.Environment(conf)

    def stored(world):
        """Whether it is there, and then as it was."""
        try:
            found = environment(world).open_microvms()
        except exception.NotFound:
            return False
        assert not list(upkeep.check(found, deep=True))
        for entry in found.state().images.values():
            with tempfile.TemporaryDirectory() as name:
                target = pathlib.Path(name)
                shelf.take(entry, found, world.repository.image('one'),
                           world.repository, target)
                for path in baked.iterdir():
                    assert path.read_bytes() == (
                        target / path.name).read_bytes()
        return bool(found.state().images)

    def judge(world, ended):
        assert ended <= stored(world)
        assert not list(upkeep.check(world.repository, deep=True))
        operation(world)
        assert stored(world)
        assert upkeep.collect(environment(world).open_microvms(), 0,
                              3600).files == 0

    assert every_step(worlds, 'published', operation, judge) > 10


def test_bake(worlds, tmp_path, monkeypatch):
    """From what was baked to its announcement, once and no more."""
    import test_bakes

    from fastboot_glance import bakery, staging
    from fastboot_glance.flows import bake
    monkeypatch.setattr(bakery, 'platform', lambda options: test_bakes.HERE)
    made = test_bakes.World(tmp_path / 'world')
    (tmp_path / 'world' / 'image').write_bytes(b'image')

    def operation(path):
        found = test_bakes.World(path, add=False)
        found.look()
        with staging.open_stage(path / 'stage', test_bakes.ID) as stage:
            if not found.there:
                stage.microvm.mkdir(exist_ok=True)
                found.artifact(stage.microvm / found.bakes.root(found.found))
            work = bake.Work(
                image=found.image, found=found.found, stage=stage,
                cancel=threading.Event(), glance=None,
                registry=found.registry, bakes=found.bakes,
                publisher=found.publisher(), platform=test_bakes.HERE,
                options=found.conf.bakery, report=Quiet())
            work.announce(work.bake())
            stage.discard()

    class Quiet:
        def phase(self, name, total):
            pass

    for number in range(1, 500):
        path = tmp_path / f'at-{number}'
        shutil.copytree(made.path, path, symlinks=True)
        ended = run(Steps(number), lambda path=path: operation(path))
        assert len(test_bakes.World(path, add=False).there) in (
            (1,) if ended else (0, 1))
        operation(path)
        found = test_bakes.World(path, add=False)
        assert found.there == [test_bakes.HERE.text]
        assert found.record.state == 'ready'
        assert not list(upkeep.check(found.shelved.repository(), deep=True))
        staging.sweep(path / 'stage', set())
        assert not list((path / 'stage').glob('*/*'))
        shutil.rmtree(path)
        if ended:
            break
    assert 10 < number < 499


@pytest.mark.parametrize('what', ['move', 'remove', 'tidy'])
def test_microvms_that_move_and_go(tmp_path, what):
    import test_bakes
    made = test_bakes.World(tmp_path / 'world')
    made.bake()
    private = {'visibility': 'private', 'owner': 'p'}
    if what == 'move':
        made.registry.settle(dataclasses.replace(made.image, **private),
                             made.found)

    def operation(path):
        found = test_bakes.World(path, add=False)
        if what == 'move':
            found.look(**private)
        elif what == 'remove':
            found.registry.gone(test_bakes.ID)
        else:
            found.look(properties={})

    for number in range(1, 500):
        path = tmp_path / f'at-{number}'
        shutil.copytree(made.path, path, symlinks=True)
        ended = run(Steps(number), lambda path=path: operation(path))
        operation(path)
        found = test_bakes.World(path, add=False)
        repository = found.shelved.repository()
        assert not list(upkeep.check(repository, deep=True))
        # One that was on its way from one place to another is baked anew.
        assert {one.entry.visibility for one in found.shelved.all()} <= (
            {'private'} if what == 'move' else set())
        shutil.rmtree(path)
        if ended:
            break
    assert 3 < number < 499


def test_collect(worlds):
    def operation(world):
        upkeep.collect(world.repository, 0, 0)

    def judge(world, ended):
        from disks import read_back
        operation(world)
        assert not world.repository.state().removed
        assert not list(upkeep.check(world.repository, deep=True))
        assert read_back(world.repository, world.repository.state(
            ).images['two']) == world.data['two']
        named = {ref.digest for ref in world.repository.read_manifest(
            world.repository.image('two').manifest).packs}
        assert {name[-64:] for name, _, _ in world.repository.store.list(
            'packs')} == named

    every_step(worlds, 'removed', operation, judge)


def test_checkpoint_and_remove(worlds):
    def operation(world):
        world.repository.checkpoint()
        world.repository.remove('one')

    def judge(world, ended):
        state = world.repository.state()
        assert 'two' in state.images
        assert not list(upkeep.check(world.repository, deep=True))
        world.repository.checkpoint()
        if 'one' in state.images:
            world.repository.remove('one')
        assert list(world.repository.state().images) == ['two']
        assert not list(upkeep.check(world.repository, deep=True))

    every_step(worlds, 'published', operation, judge)


def test_nothing_is_fetched_twice(worlds):
    """A sync that is repeated reads from the source what it lacks only."""
    world = worlds('published')
    whole = CountingStore(world.path / 'repo')
    with world.host(whole) as host:
        host.sync()
    for number in range(1, 400):
        world = worlds('published')

        def operation(world=world):
            HOST['sync'][1](world)

        ended = run(Steps(number), operation)
        here = sum(
            path.stat().st_size
            for path in (world.path / 'host').glob('mirror/packs/*/*')
            if not path.name.endswith('.part'))
        source = CountingStore(world.path / 'repo')
        with world.host(source) as host:
            host.sync()
        assert source.bytes <= whole.bytes - here
        shutil.rmtree(world.path)
        if ended:
            assert source.bytes == 0
            break
    else:
        raise AssertionError('never ends')
