# SPDX-License-Identifier: Apache-2.0
"""A device that does not take what is written, at each sync.

The kernel says so once. Then it takes the pages for written, shows them while
it has them, and drops them when it needs the memory. Each sync of each
operation fails in turn; the operation is repeated, the pages are dropped.
"""

import contextlib
import errno
import os
import random

import pytest
from images import World, disk, fast_directory, verify

from fastboot_common import exception, files
from fastboot_nova import host as host_module

PAGE = 4096


class Device:
    """What a volume's device has of the pages that are shown.

    :param failing: the syncs that fail, counted from 1.
    """

    def __init__(self, failing, error=errno.EIO, seed=1):
        self.failing = failing
        self.error = error
        self.rng = random.Random(seed)
        self.count = 0
        #: By file and page, what the device has (None: a hole).
        self.dirty, self.lost = {}, {}
        self.real = {name: getattr(owner, name) for owner, name in (
            (os, 'pwrite'), (os, 'fdatasync'), (files, 'punch'))}

    def install(self, monkeypatch):
        monkeypatch.setattr(host_module, '_AGAIN', 0)
        monkeypatch.setattr(os, 'pwrite', self.pwrite)
        monkeypatch.setattr(os, 'fdatasync', self.fdatasync)
        monkeypatch.setattr(files, 'punch', self.punch)
        monkeypatch.setattr(
            files, 'store_words',
            lambda fd, offset, words: self.pwrite(fd, words, offset))

    def pwrite(self, fd, data, offset):
        file = name_of(fd)
        if file.endswith('/volume'):
            for page in pages(offset, len(bytes(data))):
                if (file, page) not in self.dirty:
                    self.dirty[file, page] = self.lost.pop(
                        (file, page)) if (file, page) in self.lost else shown(
                            fd, page)
        return self.real['pwrite'](fd, data, offset)

    def punch(self, fd, offset, length):
        for page in pages(offset, length):
            self.dirty.pop((name_of(fd), page), None)
            self.lost.pop((name_of(fd), page), None)
        self.real['punch'](fd, offset, length)

    def fdatasync(self, fd):
        self.real['fdatasync'](fd)
        if not name_of(fd).endswith('/volume'):
            return
        self.count += 1
        failed = self.count in self.failing
        if failed:
            share = self.rng.choice((1, .5))
            self.lost |= {place: old for place, old in self.dirty.items()
                          if self.rng.random() <= share}
        self.dirty.clear()
        if failed:
            raise OSError(self.error, 'the device did not take it')

    def forget(self):
        """Drop the pages that are clean."""
        for (file, page), old in self.lost.items():
            with open(file, 'r+b') as opened:
                if old is None:
                    self.real['punch'](opened.fileno(), page * PAGE, PAGE)
                else:
                    self.real['pwrite'](opened.fileno(), old, page * PAGE)
        self.lost.clear()


def name_of(fd):
    return os.readlink(f'/proc/self/fd/{fd}')


def pages(offset, length):
    return range(offset // PAGE, -(-(offset + length) // PAGE))


def shown(fd, page):
    hole = not list(files.data_ranges(fd, page * PAGE, (page + 1) * PAGE))
    return None if hole else os.pread(fd, PAGE, page * PAGE)


@pytest.fixture(scope='module')
def worlds():
    """Worlds in each state, made once: `worlds(name)` gives a copy."""
    with fast_directory() as path:
        made = World(path / 'synced')
        data = disk(40 * PAGE, 1, zeros=.2)
        made.publish('one', data, [5, 30, 4, 3])
        made.publish('two', data[:20 * PAGE] + disk(10 * PAGE, 2), [1, 2])
        with made.host() as host:
            host.sync()
        states = {'synced': made}
        (path / 'thawed').mkdir()
        states['thawed'] = made = made.copy(path / 'thawed')
        with made.host() as host:
            for image_id in ('one', 'two'):
                host.thaw(host.image(image_id))
        (path / 'complete').mkdir()
        states['complete'] = made = made.copy(path / 'complete')
        with made.host() as host:
            for image_id in ('one', 'two'):
                host.hydrate(image_id)
        copies = iter(range(10 ** 6))

        def copy(name):
            target = path / f'copy-{next(copies)}'
            target.mkdir()
            return states[name].copy(target)

        yield copy


def thaw(_world, host):
    host.thaw(host.image('one'))


def ensure(_world, host):
    host.ensure('one', 0, 30 * PAGE)


def bring(world, host):
    thaw(world, host)
    assert host.hydrate('one')


def evict(_world, host):
    """Perhaps it went the last time, when that was not known yet."""
    if 'one' in host.open_volume('public').images():
        host.evict(['one'])


def exchange(world, host):
    evict(world, host)
    host.hydrate('two')


def move(world, host):
    """The export has another socket from now on."""
    world.socket = host._socket = host.path / 'other'
    for one in list(host._volumes.values()):
        one.close()
    host._volumes.clear()
    host.ensure('two', 0, 30 * PAGE)


OPERATIONS = {
    'thaw': ('synced', thaw),
    'from nothing': ('synced', bring),
    'ensure': ('thawed', ensure),
    'hydrate': ('thawed', bring),
    'evict': ('complete', evict),
    'exchange': ('thawed', exchange),
    'move': ('thawed', move),
}


def until_it_works(operation, world, host):
    for _ in range(9):
        try:
            return operation(world, host)
        except (OSError, exception.FastbootError):
            pass
    raise AssertionError('never works again')


def check(world):
    """All that is there is right; what is called complete has all."""
    with world.host(writable=False) as host:
        for one in host.volumes():
            images = one.images()
            assert {found.serial for found in one._all_slots()} == {
                image.serial for image in images.values()}
            for image_id, image in images.items():
                verify(one.path, image, world.data[image_id])
                backing = one.slot_of(image_id).header.backing
                assert backing == (None if one.is_complete(image_id)
                                   else one._backing(image_id))
                assert host.check(image_id)[1] == []


@pytest.mark.parametrize('error', [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize('times', [1, 2])
def test_syncs_that_fail(worlds, monkeypatch, name, error, times):
    state, operation = OPERATIONS[name]
    for number in range(1, 99):
        world = worlds(state)
        device = Device(range(number, number + times), error, number)
        with monkeypatch.context() as patch, world.host() as host:
            list(host.volumes())
            device.install(patch)
            until_it_works(operation, world, host)
            device.forget()
            check(world)
        with world.host() as host:
            for image_id in ('one', 'two'):
                host.thaw(host.image(image_id))
                assert host.hydrate(image_id)
            check(world)
        if device.count < number:
            break
    assert 2 < number < 99


@pytest.mark.parametrize('name', OPERATIONS)
def test_a_process_that_ends_after_a_sync_that_failed(
        worlds, monkeypatch, name):
    """The next one does not know of it, and looks at the same pages."""
    state, operation = OPERATIONS[name]
    for number in range(1, 99):
        world = worlds(state)
        device = Device({number}, seed=number)
        with monkeypatch.context() as patch:
            with world.host() as host:
                list(host.volumes())
                device.install(patch)
                with contextlib.suppress(OSError, exception.FastbootError):
                    operation(world, host)
            with world.host() as host:
                until_it_works(bring, world, host)
                device.forget()
                check(world)
        if device.count < number:
            break
    assert 2 < number < 99
