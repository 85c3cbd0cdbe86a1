# SPDX-License-Identifier: Apache-2.0
"""The agent's µVMs, by the process that serves them.

The µVM is made up: nothing here loads it. What libvirt says of the host is
made up as well, as no libvirt need run; the QEMU is the host's own.
"""

import contextlib
import dataclasses
import os
import pathlib
import platform
import shutil
import uuid

import microvms
import pytest
from agents import Agent, call, needs_nbdkit, wait_for
from images import World, disk, fast_directory
from test_cli import Fastbootctl

from fastboot_common import exception, publish, qemu, repository
from fastboot_common.microvm import (
    activation,
    artifact,
    clone,
    savefile,
    shelf,
)
from fastboot_common.store.local import LocalStore
from fastboot_nova import client
from fastboot_nova.microvm import definition, remote

pytestmark = [
    needs_nbdkit,
    pytest.mark.skipif(shutil.which(qemu.SYSTEM) is None,
                       reason='QEMU is not installed'),
]
SIZE = 600 * 4096
LIBVIRT = '''
import time
class libvirtError(Exception): pass
VIR_CONNECT_LIST_DOMAINS_ACTIVE = 1
def registerErrorHandler(call, context): pass
def virEventRegisterDefaultImpl(): pass
def virEventRunDefaultImpl(): time.sleep(1)
class Connection:
    def getCapabilities(self): return "<domain type='qemu'/>"
    def listAllDomains(self, flags): return []
    def isAlive(self): return True
    def setKeepAlive(self, interval, count): pass
    def close(self): pass
def open(uri):
    import os
    if os.path.exists(uri): raise libvirtError('it is down')
    return Connection()
'''
LIBVIRT_QEMU = '''
def qemuMonitorEventRegister(connection, domain, event, call, opaque): pass
'''


def here():
    return microvms.a_key(arch=platform.machine(), qemu=qemu.package())


@pytest.fixture
def world():
    with fast_directory() as path:
        made = World(path)
        data = disk(SIZE, 1, zeros=0)
        made.image = made.publish('one', data, range(80))
        (path / 'repo' / 'microvms').mkdir()
        repository.init(LocalStore(path / 'repo' / 'microvms'), 4096)
        stream, _ = microvms.qemu_stream(
            [os.urandom(4096) for _ in range(30)]
            + [data[at * 4096:(at + 1) * 4096] for at in range(60)])
        microvms.make(path / 'baked', stream, size=SIZE, group=here())
        (path / 'modules').mkdir()
        (path / 'modules' / 'libvirt.py').write_text(LIBVIRT)
        (path / 'modules' / 'libvirt_qemu.py').write_text(LIBVIRT_QEMU)
        yield made


def publish_microvm(world, directory='baked'):
    found = repository.Repository(
        LocalStore(world.path / 'repo' / 'microvms'))
    publisher = publish.Publisher(found, world.path / 'work' / 'cache',
                                  threads=2)
    return shelf.put(world.path / directory, world.image, world.repository,
                     publisher, world.path / 'work').published.image


@pytest.fixture
def agent(world):
    made = Agent(world.path / 's', world.path / 'repo',
                 agent={'libvirt_uri': world.path / 'down'})
    try:
        yield made
    finally:
        made.clean()


def start(agent, world, **environment):
    root = pathlib.Path(__file__).parents[2]
    return agent.start(
        PYTHONPATH=f'{world.path / "modules"}:{root}', **environment)


def rows(agent):
    with contextlib.suppress(OSError):
        return call(agent.socket, 'GET', '/v1/microvms')[1].get(
            'microvms', [])
    return []


def await_ready(agent, lanes=2):
    return wait_for(lambda: [
        row for row in rows(agent)
        if row['state'] == 'ready' and row['lanes'] >= lanes])[0]


def take(agent, holder):
    return remote.take(client.Agent(str(agent.socket), 5), 'one', holder)


def dressed(lane, holder):
    xml = definition.Server('name', holder, pathlib.Path('/disk'),
                            pathlib.Path('/console')).xml()
    lane.dress(clone.instance(xml, lane.description.machine))
    with lane.path.open('rb') as file:
        return savefile.SaveFile.read(file.fileno()).xml


def test_from_the_repository_to_an_instance(world, agent, tmp_path):
    start(agent, world)
    agent.await_state('one', 'ready')
    assert rows(agent) == []
    with pytest.raises(exception.NotFound, match='no µVM for this host'):
        take(agent, 'holder')
    entry = publish_microvm(world)
    row = await_ready(agent)
    assert row == {
        'image': 'one', 'class': here().digest, 'state': 'ready',
        'bytes': row['bytes'], 'lanes': 2, 'resumed': 0, 'fallbacks': 0,
        'reason': None}
    status = agent.status()
    assert status['microvms'] == 'ok'
    assert status['platforms'] == [here().platform.text]
    assert status['microvm_bytes'] >= row['bytes']

    holder = str(uuid.uuid4())
    lane = take(agent, holder)
    assert lane.description == artifact.read(world.path / 'baked')
    assert lane.group == here().digest
    assert holder in dressed(lane, holder)
    assert (lane.directory / 'disk.qcow2').read_bytes() == (
        world.path / 'baked' / 'disk.qcow2').read_bytes()
    with pytest.raises(exception.Unavailable, match='taken for'):
        dressed(lane, str(uuid.uuid4()))
    lane.give_back(remote.RESUMED, seconds={'load': .5})
    assert rows(agent)[0]['resumed'] == 1

    ctl = Fastbootctl(tmp_path / 'ctl')
    ctl.options = ('--config-file', str(agent.config))
    listed = ctl.json('host', 'status')
    assert [(one['ID'], one['µVMs']) for one in listed] == [('one', 1)]

    found = repository.Repository(
        LocalStore(world.path / 'repo' / 'microvms'))
    found.remove(entry.image_id)
    assert agent.call('sync')[0] == 202
    wait_for(lambda: not rows(agent))
    wait_for(lambda: not lane.directory.exists())


def test_killed_while_a_lane_is_lent(world, agent):
    publish_microvm(world)
    start(agent, world)
    await_ready(agent)
    holder = str(uuid.uuid4())
    lane = take(agent, holder)
    dressed(lane, holder)
    agent.kill()
    with lane.path.open('rb') as loading:
        start(agent, world)
        await_ready(agent)
        assert not lane.path.exists()
        # Who loads it goes on.
        assert holder in savefile.SaveFile.read(loading.fileno()).xml
    lane.give_back(remote.RESUMED)
    assert rows(agent)[0]['resumed'] == 0
    lanes = agent.state / 'host' / 'microvms' / 'lanes'
    assert len(list(lanes.iterdir())) == 2
    assert here().digest == take(agent, holder).group


def test_nobody_knows_what_the_host_is(world, agent):
    publish_microvm(world)
    (world.path / 'down').touch()
    start(agent, world)
    agent.await_state('one', 'ready')
    wait_for(lambda: 'it is down' in agent.status().get('microvms', ''))
    with pytest.raises(exception.NotFound, match='it is down'):
        take(agent, 'holder')
    (world.path / 'down').unlink()
    await_ready(agent)


def test_another_qemu(world, agent):
    """The package was upgraded while the agent ran."""
    publish_microvm(world)
    program = world.path / 'modules' / qemu.SYSTEM
    program.symlink_to(shutil.which(qemu.SYSTEM))
    start(agent, world,
          PATH=f'{world.path / "modules"}:{os.environ["PATH"]}')
    await_ready(agent)
    newer = world.path / 'modules' / 'newer'
    newer.write_text(
        '#!/bin/sh\necho "QEMU emulator version 99.0.1 (new)"\n')
    newer.chmod(0o755)
    newer.rename(program)
    wait_for(lambda: not rows(agent))
    assert '99.0.1 (new)' in agent.status()['platforms'][0]
    wait_for(lambda: not list(
        (agent.state / 'host' / 'microvms' / 'artifacts').iterdir()))
    program.unlink()
    await_ready(agent)


def test_a_repository_behind_http(world, nginx, tmp_path):
    """First without µVMs, then with, then the server is away."""
    shutil.move(world.path / 'repo' / 'microvms', world.path / 'aside')
    server = nginx(world.path / 'repo')
    agent = Agent(world.path / 's', server.url,
                  agent={'libvirt_uri': world.path / 'down'})
    try:
        start(agent, world)
        agent.await_state('one', 'ready')
        assert agent.status()['microvms'] == 'ok'
        shutil.move(world.path / 'aside', world.path / 'repo' / 'microvms')
        publish_microvm(world)
        await_ready(agent)
        agent.kill()
        server.stop()
        start(agent, world)
        await_ready(agent)
        wait_for(lambda: agent.status()['microvms'] != 'ok')
    finally:
        agent.clean()


def test_switched_off(world):
    publish_microvm(world)
    agent = Agent(world.path / 's', world.path / 'repo',
                  agent={'libvirt_uri': world.path / 'down'},
                  microvm={'enabled': False})
    try:
        start(agent, world)
        agent.await_state('one', 'ready')
        assert 'switched off' in agent.status()['microvms']
        with pytest.raises(exception.NotFound, match='switched off'):
            take(agent, 'holder')
    finally:
        agent.clean()


def test_platforms_are_comparable():
    """What a µVM says of itself is what a host says of itself."""
    assert here().platform == dataclasses.replace(
        here().platform, recipe=activation.RECIPE)
