# SPDX-License-Identifier: Apache-2.0
"""Detaching disks of servers that are off; running ones are the cloud's."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
from images import World, fast_directory

from fastboot_common import chain, exception, overlay
from fastboot_nova import detach
from fastboot_nova.cli import host as cli

pytestmark = pytest.mark.skipif(
    not shutil.which('nbdkit'), reason='needs nbdkit')

SIZE = 1 << 20


@pytest.fixture
def place():
    """Two servers on one image, part of which is not on the host."""
    with fast_directory() as path, contextlib.ExitStack() as stack:
        world = World(path, block_size=16384)
        world.publish('image', os.urandom(SIZE), boot=range(8))
        host = stack.enter_context(world.host())
        host.sync()
        stack.enter_context(world.export())
        link = host.acquire('image', 'nova')
        instances = path / 'instances'
        (instances / '_base').mkdir(parents=True)
        stub = instances / '_base' / f'{overlay.base_name("image")}_sm'
        chain.make_stub(stub, link)
        disks = []
        for name in ('one', 'two'):
            (instances / name).mkdir()
            disk = instances / name / 'disk'
            chain.make_disk(disk, stub, 2 * SIZE)
            disks.append(disk)
            (instances / name / 'disk.config').write_bytes(bytes(4096))
            (instances / name / 'console.log').write_text('disk')
        subprocess.run(['qemu-io', '-c', 'write -P 7 4k 8k', disks[1]],
                       check=True, capture_output=True, timeout=60)
        yield types.SimpleNamespace(
            world=world, instances=instances, stub=stub, disks=disks,
            base=stub.with_name(overlay.base_name('image')))


class Nobody:
    """libvirt without guests."""

    def listAllDomains(self):  # noqa: N802
        return []


class Suspended:
    """libvirt with a guest that was saved; the guest."""

    def listAllDomains(self):  # noqa: N802
        return [self]

    def UUIDString(self):  # noqa: N802
        return 'one'

    def isActive(self):  # noqa: N802
        return False

    def hasManagedSaveImage(self):  # noqa: N802
        return True


class Gone(Nobody):
    """libvirt, which just lost the guest of the first server."""

    class Error(Exception):
        pass

    def listAllDomains(self):  # noqa: N802
        return [self]

    def UUIDString(self):  # noqa: N802
        return 'one'

    def isActive(self):  # noqa: N802
        raise self.Error('Domain not found')


def work(place, libvirt=None):
    return detach.Detacher(place.instances, libvirt or Nobody())


def content(path):
    raw = pathlib.Path(f'{path}.raw')
    subprocess.run(['qemu-img', 'convert', '-U', '-f', 'qcow2', '-O', 'raw',
                    path, raw], check=True, timeout=60)
    data = raw.read_bytes()
    raw.unlink()
    return data


def run(place):
    told = []
    for disk in detach.find(place.instances):
        work(place).detach(disk, told.append)
    return told


def test_disks_become_plain(place):
    before = [content(disk) for disk in place.disks]
    found = list(detach.find(place.instances))
    assert [(disk.server, disk.path.name) for disk in found] == [
        ('one', 'disk'), ('two', 'disk')]
    assert sum(run(place)) >= SIZE
    assert list(detach.find(place.instances)) == []
    # Neither volume nor export nor stub are needed any more.
    shutil.rmtree(place.world.path / 'host')
    place.stub.unlink()
    assert [content(disk) for disk in place.disks] == before
    assert before[0][:SIZE] == place.world.data['image']
    for disk in place.disks:
        assert overlay.read_backing(disk) == (str(place.base), 2 * SIZE)
    assert place.base.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in place.base.parent.iterdir()) == [
        place.base.name]


def test_what_a_guest_writes_is_no_disk(place):
    """It has its config drive byte by byte."""
    hostile = place.instances / 'one' / 'disk.config'
    shutil.copy(place.disks[0], hostile)
    assert hostile not in [
        disk.path for disk in detach.find(place.instances)]
    assert hostile not in overlay.lying_on(place.stub)


@pytest.fixture
def mask():
    """As fastbootctl has it."""
    old = os.umask(0o027)
    yield
    os.umask(old)


def locks(place):
    return sorted((path.name, path.stat().st_uid, path.stat().st_gid,
                   path.stat().st_mode & 0o777)
                  for path in (place.instances / 'locks').iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason='gives files to others')
@pytest.mark.parametrize('killed', [False, True])
@pytest.mark.parametrize('known', [False, True])
def test_nova_can_open_the_locks(place, mask, killed, known):
    """It takes them itself for each new disk, and may not be root."""
    os.chown(place.instances, 4242, 4343)
    directory = place.instances / 'locks'
    if known or killed:
        directory.mkdir()
        os.chown(directory, 4242, 4343)
        directory.chmod(0o755)
    name = f'nova-{place.base.name}'
    if known:
        (directory / name).touch(0o600)
    if killed:
        (directory / f'.{name}.detach').touch(0o600)
    run(place)
    if known:
        # Nova's: it stays as it is.
        assert locks(place) == [(name, 0, 0, 0o600)]
        return
    assert locks(place) == [(name, 4242, 4343, 0o644)]
    found = directory.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (
        4242, 4343, 0o755)


def test_a_base_of_novas_is_used(place):
    place.base.write_bytes(place.world.data['image'])
    inode = place.base.stat().st_ino
    run(place)
    assert place.base.stat().st_ino == inode
    assert content(place.disks[0])[:SIZE] == place.world.data['image']


def test_a_base_of_other_content_is_left_alone(place):
    place.base.write_bytes(place.world.data['image'][:-1] + b'!')
    before = content(place.disks[0])
    with pytest.raises(exception.Corrupt, match='left alone'):
        run(place)
    assert content(place.disks[0]) == before
    assert place.base.read_bytes().endswith(b'!')
    assert len(list(detach.find(place.instances))) == 2


def test_a_stub_that_is_gone(place):
    place.stub.unlink()
    with pytest.raises(exception.NotFound, match='start the server once'):
        run(place)


def test_what_nova_made_at_a_stubs_name(place):
    """Its own driver, in our absence; perhaps of another image."""
    link = overlay.follow(place.stub)
    before = content(place.disks[1])
    place.stub.unlink()
    place.stub.write_bytes(os.urandom(SIZE))
    assert len(list(detach.find(place.instances))) == 2
    with pytest.raises(exception.NotFound, match='start the server once'):
        run(place)
    # What the driver does then.
    chain.make_stub(place.stub, link)
    run(place)
    assert list(detach.find(place.instances)) == []
    assert content(place.disks[1]) == before


def test_an_old_resized_base_is_no_stub(place):
    """Nova before Folsom left <sha1>_sm files."""
    place.stub.write_bytes(place.world.data['image'])
    for disk in place.disks:
        subprocess.run(['qemu-img', 'rebase', '-q', '-u', '-f', 'qcow2', '-b',
                        place.stub, '-F', 'raw', disk], check=True,
                       timeout=20)
    assert list(detach.find(place.instances)) == []


def test_one_that_is_suspended(place):
    """What libvirt saved of it names the chain."""
    disk = next(iter(detach.find(place.instances)))
    with pytest.raises(exception.Unavailable, match='resume it first'):
        work(place, Suspended()).detach(disk, lambda count: None)
    assert len(list(detach.find(place.instances))) == 2


def test_one_that_is_in_rescue(place):
    (place.instances / 'one' / 'unrescue.xml').write_text('<domain/>')
    with pytest.raises(exception.Unavailable, match='unrescue it first'):
        run(place)
    assert len(list(detach.find(place.instances))) == 2


def command(place, monkeypatch, libvirt, *words):
    """The rows of ``host detach``, and its status."""
    monkeypatch.setattr(detach, 'connect', lambda uri: libvirt)
    made = cli.Detach(types.SimpleNamespace(stderr=sys.stderr), None)
    args = made.get_parser('x').parse_args(
        ['--instances', str(place.instances), *words])
    _columns, rows = made.take_action(args)
    return rows, made.failed


@pytest.mark.parametrize('libvirt', [Suspended(), Gone()])
def test_one_server_does_not_stop_the_others(place, monkeypatch, libvirt):
    monkeypatch.setattr(detach, '_libvirt_error', lambda: Gone.Error)
    rows, failed = command(place, monkeypatch, libvirt, '--dry-run')
    assert failed
    assert [row[:3] for row in rows] == [('one', 'disk', 'unknown'),
                                         ('two', 'disk', 'off')]
    assert 'server one' in rows[0][3]
    assert rows[1][3] == 'on local blocks'
    rows, failed = command(place, monkeypatch, libvirt)
    assert failed
    assert rows[0][3].startswith('failed: server one')
    assert rows[1][3] == 'plain'
    assert command(place, monkeypatch, Nobody()) == (
        [('one', 'disk', 'off', 'plain')], False)


def test_a_server_that_is_deleted_meanwhile(place, monkeypatch):
    class Deleting(Suspended):
        """libvirt; the first server runs, and goes while it is asked."""

        def isActive(self):  # noqa: N802
            shutil.rmtree(place.instances / 'one', ignore_errors=True)
            return True

    rows, failed = command(place, monkeypatch, Deleting())
    assert failed
    assert rows[0][2] == 'running'
    assert rows[0][3].startswith('failed')
    assert rows[1][3] == 'plain'


def test_no_room(place, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path:
                        types.SimpleNamespace(free=1 << 30))
    with pytest.raises(exception.NoSpace, match='MiB'):
        run(place)
    assert not place.base.exists()


def test_killed_while_the_base_is_made(place):
    """What a killed run left is in nobody's way."""
    left = place.base.with_name(f'.{place.base.name}.detach')
    left.write_bytes(b'half')
    run(place)
    assert not left.exists()
    assert content(place.disks[0])[:SIZE] == place.world.data['image']


def test_without_the_export(place):
    place.world.socket.unlink()
    before = place.disks[0].read_bytes()
    with pytest.raises(exception.CommandFailed):
        run(place)
    assert place.disks[0].read_bytes() == before
    assert not place.base.exists()


@pytest.mark.parametrize('data', [
    b'', b'QFI\xfb', b'QFI\xfb' + os.urandom(200), os.urandom(4096),
    b'QFI\xfb' + b'\xff' * 100])
def test_disks_that_are_none(place, data):
    (place.instances / 'three').mkdir()
    (place.instances / 'three' / 'disk').write_bytes(data)
    assert len(list(detach.find(place.instances))) == 2
