# SPDX-License-Identifier: Apache-2.0
"""A project's private image, and the QEMUs of other projects.

What QEMU is given: stub, one volume, the socket of misses. What libvirt's
sVirt makes of that: AppArmor's profile of a guest. And what a QEMU that was
taken over can do with them.
"""

import json
import os
import pathlib
import shutil
import subprocess
import uuid
from xml.etree import ElementTree

import pytest
from agents import needs_nbdkit
from images import World, disk, fast_directory, qemu

from fastboot_common import chain, files
from fastboot_nova.node import Node

pytestmark = needs_nbdkit

BLOCK = 4096
MINE, OTHERS, PUBLIC = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
_HELPER = shutil.which('virt-aa-helper', path='/usr/lib/libvirt:/usr/libexec')


@pytest.fixture
def world():
    with fast_directory() as path:
        made = World(path)
        for seed, (image_id, options) in enumerate((
                (MINE, {'visibility': 'private', 'owner': 'p1'}),
                (OTHERS, {'visibility': 'private', 'owner': 'p2'}),
                (PUBLIC, {}))):
            made.publish(image_id, disk(64 * BLOCK, seed, zeros=0),
                         range(8), **options)
        yield made


@pytest.fixture
def host(world):
    with world.host() as one:
        one.sync()
        for image_id in (MINE, OTHERS, PUBLIC):
            one.acquire(image_id, 'guest')
        yield one


@pytest.fixture
def served(world, host):
    with Node(host, world.path / 'run', socket=world.socket, wait=2,
              shield_wait=1):
        yield host


def named(host, world, image_id):
    """Files and sockets that the chain of an image names."""
    stub = world.path / f'stub-{image_id}'
    root = chain.backing_store(stub, host.link(image_id), world.socket)
    return {value for element in root.iter() for key, value
            in element.attrib.items() if key in ('file', 'socket')}


@pytest.mark.parametrize('whole', [False, True])
def test_a_chain_names_one_projects_files(world, host, whole, served):
    if whole:
        for image_id in (MINE, OTHERS, PUBLIC):
            host.hydrate(image_id)
    stub = str(world.path / 'stub-')
    sets = {image_id: {name for name in named(host, world, image_id)
                       if not name.startswith(stub)
                       and name != str(world.socket)}
            for image_id in (MINE, OTHERS, PUBLIC)}
    inodes = [{os.stat(name).st_ino for name in one}
              for one in sets.values()]
    assert all(len(one) == 1 for one in inodes)
    assert len(set.union(*inodes)) == 3
    # Where nothing is missing, there is no socket either.
    assert (str(world.socket) in named(host, world, MINE)) != whole


def data_of(path):
    """All bytes of a volume that are not holes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return b''.join(
            os.pread(fd, end - start, start) for start, end
            in files.data_ranges(fd, 0, os.fstat(fd).st_size))
    finally:
        os.close(fd)


def test_no_block_of_an_image_is_in_another_projects_volume(
        world, host, served):
    for image_id in (MINE, OTHERS, PUBLIC):
        host.hydrate(image_id)
    for owner in (MINE, OTHERS, PUBLIC):
        held = data_of(host.link(owner).volume)
        for image_id, data in world.data.items():
            found = [at for at in range(0, len(data), BLOCK)
                     if data[at:at + BLOCK] in held]
            assert len(found) == (64 if image_id == owner else 0)


def test_equal_blocks_of_two_projects_lie_twice(world, host, served):
    """So that the time of a read does not tell what others have."""
    world.publish('copy', world.data[MINE], visibility='private', owner='p2')
    host.sync()
    host.acquire('copy', 'guest')
    for image_id in (MINE, 'copy'):
        host.hydrate(image_id)
        assert world.data[MINE][:BLOCK] in data_of(host.link(image_id).volume)


class Qemu:
    """A QEMU without a machine, that nobody gave more than descriptors."""

    def __init__(self, given):
        self._process = subprocess.Popen(
            ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups',
             'qemu-system-x86_64', '-machine', 'none', '-nodefaults',
             '-display', 'none', '-qmp', 'stdio',
             '-add-fd', f'fd={given},set=1'], pass_fds=[given], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process.stdout.readline()
        self.do('qmp_capabilities')

    def do(self, what, **arguments):
        self._process.stdin.write(json.dumps(
            {'execute': what, 'arguments': arguments}) + '\n')
        self._process.stdin.flush()
        self.said = ''
        for line in self._process.stdout:
            answer = json.loads(line) if line.startswith('{') else None
            if answer is None:
                self.said += line  # of its monitor's commands
            elif 'event' not in answer:
                return answer
        raise AssertionError(self.said)

    def open(self, name, file, start, size):
        return self.do('blockdev-add', **{
            'driver': 'qcow2', 'node-name': name, 'backing': None,
            'read-only': True, 'file': {
                'driver': 'raw', 'read-only': True, 'offset': start,
                'size': size - start, 'file': {
                    'driver': 'file', 'read-only': True, 'filename': file,
                    'locking': 'off'}}})

    def read(self, name):
        self.do('human-monitor-command', **{
            'command-line': f'qemu-io {name} "read -v 0 16"'})
        return self.said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate(timeout=20)


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root')
def test_a_qemu_reads_what_it_is_given_and_no_more(world, host, served):
    """It is another user, of another group, with a descriptor of its volume.

    Not so a QEMU that libvirt starts without AppArmor or SELinux: that is of
    the group that may read all volumes.
    """
    for image_id in (MINE, OTHERS):
        host.hydrate(image_id)
    world.path.chmod(0o711)
    mine, others = host.link(MINE), host.link(OTHERS)
    with mine.volume.open('rb') as given, Qemu(given.fileno()) as one:
        answer = one.open('mine', '/dev/fdset/1', mine.start, mine.size)
        assert 'return' in answer, answer
        assert world.data[MINE][:16].hex(' ') in one.read('mine')
        for link in (mine, others):
            answer = one.open('other', str(link.volume), link.start,
                              link.size)
            assert 'Permission denied' in answer['error']['desc']
        # The place of the other's slot is empty in this volume.
        answer = one.open('other', '/dev/fdset/1', others.start, others.size)
        assert 'not in qcow2 format' in answer['error']['desc']


def test_ids_of_others_are_not_told(world, served):
    """Whoever gets at the socket must know what to ask for."""
    listed = subprocess.run(
        ['nbdinfo', '--list', '--json', f'nbd+unix://?socket={world.socket}'],
        capture_output=True, text=True, timeout=60)
    for image_id in (MINE, OTHERS, PUBLIC):
        assert image_id not in listed.stdout + listed.stderr
        status, words = qemu('qemu-img', 'info', '-f', 'raw',
                             f'nbd+unix:///{image_id}?socket={world.socket}')
        assert status == 0, words
    for name in ('', 'project-p2', '../' + OTHERS, f'project-p2/{OTHERS}',
                 f'../project-p2/images/{OTHERS}'):
        status, words = qemu('qemu-img', 'info', '-f', 'raw', 'json:'
                             + json.dumps({'driver': 'nbd', 'export': name,
                                           'server': {
                                               'type': 'unix',
                                               'path': str(world.socket)}}))
        assert status, words


@pytest.mark.skipif(_HELPER is None, reason='virt-aa-helper is missing')
@pytest.mark.parametrize('whole', [False, True])
def test_the_profile_of_a_guest(world, host, served, whole):
    """AppArmor lets it read its own volume, write none, see no other's."""
    if whole:
        host.hydrate(MINE)
    root = chain.backing_store(world.path / 'stub', host.link(MINE),
                               world.socket)
    chain.make_stub(world.path / 'stub', host.link(MINE))
    chain.make_disk(world.path / 'disk', world.path / 'stub', 64 * BLOCK)
    name = uuid.uuid4()
    domain = f'''
        <domain type='qemu'><name>guest</name><uuid>{name}</uuid>
        <memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='pc'>hvm</type></os>
        <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='{world.path}/disk'/>
        {ElementTree.tostring(root, encoding='unicode')}
        <target dev='vda' bus='virtio'/></disk></devices></domain>'''
    done = subprocess.run(
        [_HELPER, '-d', '-c', '-u', f'libvirt-{name}'],
        input=domain, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    lines = [line.strip() for line in said.splitlines()
             if 'host/volumes' in line]
    link = host.link(MINE)
    mine = str(link.complete or link.volume)
    assert any(mine in line for line in lines), said
    for line in lines:
        path = pathlib.Path(line.split('"')[1])
        assert 'project-p1' in path.parts, line
        assert line.startswith('deny ') == (line.split()[-1] == 'w,'), line
