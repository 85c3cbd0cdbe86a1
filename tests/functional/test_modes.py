# SPDX-License-Identifier: Apache-2.0
"""Who may read what we make: everything is made once, and looked at."""

import contextlib
import grp
import os
import stat
import subprocess

import bootsector
import pytest
from agents import Agent, needs_nbdkit
from images import GIB, fast_directory
from test_agent_microvm import (
    await_ready,
    publish_microvm,
    start,
    take,
    world,  # noqa: F401  a fixture
)
from test_capture import LOGIN, READS, SIZE, options
from test_cli import Fastbootctl

from fastboot_common import files, publish, repository
from fastboot_common.store.local import LocalStore
from fastboot_glance import build, staging
from fastboot_nova.host import Host
from fastboot_nova.node import Node

pytestmark = needs_nbdkit

IMAGE = '0a0a0a0a-1111-2222-3333-444444444444'
PRIVATE = '0b0b0b0b-1111-2222-3333-444444444444'
KINDS = {stat.S_IFDIR: 0o750, stat.S_IFREG: 0o640, stat.S_IFSOCK: 0o660}


@pytest.fixture(params=[0, 0o022], ids=['0', '022'])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def room():
    with fast_directory() as path:
        yield path


def look(path, passable=()):
    """Names of all that is below a directory; none is for everybody.

    :param passable: directories that others may pass, and not list.
    """
    seen = set()
    for name in path.rglob('*'):
        with contextlib.suppress(FileNotFoundError):
            found = name.lstat()
            most = KINDS[stat.S_IFMT(found.st_mode)] | (name in passable)
            mode = stat.S_IMODE(found.st_mode) & ~stat.S_ISGID
            assert mode & ~most == 0, f'{name}: {mode:o}'
            if stat.S_ISSOCK(found.st_mode):
                assert mode == 0o660, f'{name}: {mode:o}'
            seen.add(name.name)
    return seen


def made(path):
    """An uploaded image, which is none of ours."""
    raw = bootsector.disk(path / 'raw', SIZE,
                          bootsector.sector(LOGIN, **READS))
    with raw.open('r+b') as disk:
        disk.seek(1 << 20)
        disk.write(os.urandom(4 << 20))
    subprocess.run(['qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw,
                    path / 'image'], check=True)
    return path / 'image'


def test_what_builders_and_hosts_make(tmp_path, room, umask):
    image = made(tmp_path)
    files.make_directory(room / 'repository')
    source = LocalStore(room / 'repository')
    repository.init(source, 4096)
    seen = set()

    def glance(*_):
        seen.update(look(room))

    one = repository.Repository(source)
    publisher = publish.Publisher(one, room / 'cache' / 'a', threads=2)
    told = build.Progress(glance, glance, glance)
    for image_id, visibility in ((IMAGE, 'public'), (PRIVATE, 'private')):
        with staging.open_stage(room / 'work' / 'b', image_id) as stage:
            build.build(
                build.Request(image, image_id, 'name', visibility, 'p'),
                publisher, 4096, stage.work,
                options(boots=2, config_drive=True), told, keeper=stage)
            glance()
    assert seen >= {'root.qcow2', 'config.iso', 'serial.log', 'qemu.log',
                    'reads.log', 'disk.raw', 'nbd.sock', 'capture',
                    'head.json', '0000000000000001.json'}, seen
    host = Host(room / 'host', source, socket=room / 'run' / 'nbd.sock',
                threads=2, volume_size=65 * GIB)
    with host, Node(host, room / 'run', socket=room / 'run' / 'nbd.sock',
                    wait=5, shield_wait=2, log=room / 'run' / 'log'):
        host.sync()
        for image_id in (IMAGE, PRIVATE):
            host.acquire(image_id, 'guest')
            glance()
            host.hydrate(image_id)
        glance()
    assert seen >= {'agent.sock', 'export.sock', 'nbd.sock', 'log', 'volume',
                    'lock', IMAGE, 'guest', 'state.json', 'config.json',
                    'project-p', 'complete', 'index.sqlite'}, seen


def test_what_the_programs_make(tmp_path, room, umask):
    """The same by the command line and an agent, as they are run."""
    ctl = Fastbootctl(tmp_path)
    ctl.options = ('--state-dir', str(room / 's'), *ctl.options[2:])
    ctl('repo', 'init')
    assert (room / 's').stat().st_mode & 0o777 == 0o751
    ctl('image', 'add', made(tmp_path), '--id', IMAGE)
    group = grp.getgrgid(os.getegid()).gr_name
    agent = Agent(room / 's', room / 's' / 'repository',
                  export={'group': group}, agent={'group': group})
    agent.log = tmp_path / 'agent.log'
    agent.config.chmod(0o640)  # the test made it
    try:
        agent.start()
        agent.await_state(IMAGE, 'ready')
        assert agent.acquire(IMAGE, tmp_path / 'stub')[0] == 200
        assert agent.call('prepare', image=IMAGE)[0] == 202
        agent.await_state(IMAGE, 'complete')
        run = room / 's' / 'run'
        seen = look(room, {room / 's', run})
        for name in ('agent.sock', 'nbd.sock', 'export.sock'):
            assert (run / name).group() == group
    finally:
        agent.clean()
    ctl('vm', 'run', IMAGE, '--until-prompt', '--keep', '--quiet-console')
    seen |= look(room, {room / 's', run})
    assert seen >= {'disk.qcow2', 'stub.qcow2', 'misses.log', 'nbd.pid',
                    'volume', 'complete'}, seen


def test_what_microvms_are_made_of(world, umask):  # noqa: F811
    """QEMU's group may read them, and no other."""
    group = 'daemon' if os.geteuid() == 0 else grp.getgrgid(
        os.getegid()).gr_name
    publish_microvm(world)
    agent = Agent(world.path / 's', world.path / 'repo',
                  agent={'libvirt_uri': world.path / 'down'},
                  export={'group': group})
    try:
        start(agent, world)
        await_ready(agent)
        lane = take(agent, '0b0b0b0b-1111-4222-8333-444444444444')
        seen = look(agent.state / 'host' / 'microvms')
        for path in (lane.path, *lane.directory.iterdir()):
            assert (path.group(), path.stat().st_mode & 0o777) == (
                group, 0o640)
        for path in (lane.path.parent, lane.directory):
            assert (path.group(), path.stat().st_mode & 0o777) == (
                group, 0o750)
    finally:
        agent.clean()
    assert seen >= {'memory', 'disk.qcow2', 'microvm.json', 'lanes',
                    'artifacts', 'used', 'mirror', 'state.json'}, seen
