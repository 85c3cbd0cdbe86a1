# SPDX-License-Identifier: Apache-2.0
"""The agent as a process: guests, restarts, and neighbours that fail."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from xml.etree import ElementTree

import pytest
from agents import Agent, Line, call, needs_nbdkit, wait_for
from images import World, compare, data_blocks, disk, fast_directory, verify

from fastboot_common import chain

pytestmark = needs_nbdkit

IMAGE = '0a0a0a0a-1111-2222-3333-444444444444'


@pytest.fixture
def room():
    with fast_directory() as path:
        yield path


@pytest.fixture
def world(room):
    made = World(room)
    made.publish(IMAGE, disk(600 * 4096, 1), range(60))
    return made


@pytest.fixture
def agent(world):
    """An agent beside a repository in a directory."""
    made = Agent(world.path / 's', world.path / 'repo')
    try:
        yield made
    finally:
        made.clean()


def qemu_io(agent, image=IMAGE, offset=0, length=4096):
    """A reader behind the shield."""
    return subprocess.Popen(
        ['qemu-io', '-r', '-f', 'raw', '-c', f'read {offset} {length}',
         f'nbd+unix:///{image}?socket={agent.nbd}'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_all(agent, world, image=IMAGE):
    raw = world.path / 'raw'
    raw.write_bytes(world.data[image])
    done = subprocess.run(
        ['qemu-img', 'compare', '-f', 'raw', '-F', 'raw', raw,
         f'nbd+unix:///{image}?socket={agent.nbd}'],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr + agent.words()


def link_of(answer):
    complete = answer['complete']
    return chain.Link(
        answer['image'], pathlib.Path(answer['volume']), answer['size'],
        answer['start'], answer['virtual_size'],
        complete and pathlib.Path(complete))


def test_a_guest(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    stub = world.path / '_base' / 'stub'
    stub.parent.mkdir()
    status, answer = agent.acquire(IMAGE, stub)
    assert status == 200, answer
    assert answer['thawed'] > 0 and answer['loop'] is None
    assert answer['socket'] == str(agent.nbd)
    assert agent.acquire(IMAGE, stub)[1]['thawed'] == 0
    assert agent.image(IMAGE)['leases'] == 1
    chain.make_stub(stub, link_of(answer))
    raw = world.path / 'raw'
    raw.write_bytes(world.data[IMAGE])
    compare(raw, stub)
    read_all(agent, world)
    # Released by name, it stays: the stub is there.
    assert agent.call('release', image=IMAGE, holder='nova',
                      file=str(stub)) == (200, {})
    assert agent.image(IMAGE)['leases'] == 1
    agent.stop()
    assert not agent.socket.exists()
    assert 'Traceback' not in agent.words()


def test_answers(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    stub = world.path / 'stub'
    assert agent.acquire('unknown', stub)[0] == 404
    for body in ({}, {'image': IMAGE}, {'image': IMAGE, 'holder': 'nova'},
                 {'image': IMAGE, 'holder': 'nova', 'file': 'relative'},
                 {'image': IMAGE, 'holder': 'nova', 'file': '/a/../b'},
                 {'image': '../x', 'holder': 'nova', 'file': '/a'}):
        for verb in ('acquire', 'release'):
            assert agent.call(verb, **body)[0] == 400, (verb, body)
    assert agent.call('prepare', image='unknown')[0] == 404
    assert agent.call('nothing')[0] == 404
    assert call(agent.socket, 'GET', '/v1/acquire')[0] == 405
    assert call(agent.socket, 'GET', '/v1/images/unknown')[0] == 404
    status, answer = call(agent.socket, 'GET', '/v1/images')
    assert (status, answer['version']) == (200, 1)
    [row] = answer['images']
    assert {'id', 'name', 'serial', 'domain', 'state', 'progress', 'leases',
            'pinned', 'error'} <= row.keys()
    assert agent.call('sync') == (202, {})
    assert agent.status()['state'] == 'serving'


def test_prepare(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    assert agent.call('prepare', image=IMAGE) == (202, {})
    row = agent.await_state(IMAGE, 'complete')
    assert row['progress'] == 1
    status, answer = agent.acquire(IMAGE, world.path / 'stub')
    assert pathlib.Path(answer['complete']).exists()


def test_new_images_and_deleted_ones(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    world.publish('second', disk(90 * 4096, 2), range(20))
    agent.await_state('second', 'ready')
    stub = world.path / 'stub'
    assert agent.acquire('second', stub)[0] == 200
    stub.write_text('')
    for image in (IMAGE, 'second'):
        world.repository.remove(image)
    row = agent.await_state('second', 'stale')
    assert 'deregistered' in row['error']
    wait_for(lambda: not agent.image(IMAGE))
    assert agent.acquire('second', stub)[0] == 404
    assert agent.image('second')['leases'] == 1
    read_all(agent, world, 'second')


def test_kill_under_a_reader(agent, world):
    """What a guest misses while the agent is away, it gets when it is back;
    the export goes on, and is found again."""
    agent.start()
    agent.await_state(IMAGE, 'ready')
    stub = world.path / 'stub'
    agent.acquire(IMAGE, stub)
    stub.write_text('')
    pids = agent.pids()
    assert set(pids) == {'export', 'nbd'}
    agent.kill()
    reader = qemu_io(agent, offset=400 * 4096, length=8192)
    time.sleep(0.5)
    assert reader.poll() is None
    agent.start()
    words, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0 and 'read 8192/8192' in words, words
    assert agent.pids() == pids
    assert agent.words().count('it goes on') == 2
    assert agent.image(IMAGE)['leases'] == 1
    read_all(agent, world)


def test_stop_leaves_the_export(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    agent.acquire(IMAGE, world.path / 'stub')
    pids = agent.pids()
    agent.stop()
    reader = qemu_io(agent, offset=0)  # in the boot set: needs no agent
    words, _ = reader.communicate(timeout=60)
    assert 'read 4096/4096' in words
    agent.start()
    assert agent.pids() == pids


@pytest.mark.parametrize('which', ['export', 'nbd'])
def test_nbdkit_that_dies_is_started_again(agent, world, which):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    agent.acquire(IMAGE, world.path / 'stub')
    before = agent.pids()
    os.kill(before[which], 9)
    wait_for(lambda: agent.pids()[which] != before[which])
    wait_for(lambda: agent.status()['export'])
    read_all(agent, world)
    other = {'export': 'nbd', 'nbd': 'export'}[which]
    assert agent.pids()[other] == before[other]


def test_other_options_replace_the_running_ones(agent, world):
    agent.start()
    before = agent.pids()
    agent.stop()
    agent.configure(world.path / 'repo', export={'wait': 7})
    agent.start()
    after = agent.pids()
    assert after['nbd'] == before['nbd']
    assert after['export'] != before['export']
    command = pathlib.Path(f'/proc/{after["export"]}/cmdline').read_bytes()
    assert b'wait=7' in command


def test_an_export_of_others_is_left_alone(agent, world):
    agent.start()
    pids = agent.pids()
    agent.stop()
    agent.configure(world.path / 'repo', export={'wait': 7},
                    agent={'manage_export': False})
    agent.start()
    assert agent.pids() == pids
    for pid in pids.values():
        os.kill(pid, 9)
    wait_for(lambda: not agent.status()['export'])
    agent.await_state(IMAGE, 'ready')
    status, answer = agent.acquire(IMAGE, world.path / 'stub')
    assert status == 503 and 'export' in answer['error']


def test_leases_end_with_their_files(agent, world):
    agent.configure(world.path / 'repo', agent={
        'lease_interval': 1, 'lease_grace': 60})
    agent.start()
    agent.await_state(IMAGE, 'ready')
    stub = world.path / 'stub'
    agent.acquire(IMAGE, stub)
    assert agent.call('release', image=IMAGE, holder='nova',
                      file=str(stub)) == (200, {})
    assert agent.image(IMAGE)['leases'] == 0


def test_two_agents(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    agent.acquire(IMAGE, world.path / 'stub')
    other = Agent(agent.state, world.path / 'repo')
    other.start(wait=False)
    assert other.process.wait(60) == 1
    assert 'another process serves' in agent.words()
    assert agent.status()['state'] == 'serving'
    read_all(agent, world)


@pytest.mark.parametrize('line, words', [
    ({'agent': {'window': '25:00-26:00'}}, 'window'),
    ({'export': {'group': 'no-such-group'}}, 'no-such-group'),
])
def test_configuration_that_cannot_work(agent, world, line, words):
    agent.configure(world.path / 'repo', **line)
    agent.start(wait=False)
    assert agent.process.wait(60) == 1
    assert words in agent.words()
    assert 'Traceback' not in agent.words()


def test_two_at_once(agent, world):
    agent.start()
    agent.await_state(IMAGE, 'ready')
    stubs = [world.path / f'stub-{number % 3}' for number in range(24)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(
            lambda stub: agent.acquire(IMAGE, stub), stubs))
    assert {status for status, _ in answers} == {200}
    assert agent.image(IMAGE)['leases'] == 3
    read_all(agent, world)


def test_no_repository_yet(agent, world):
    """It answers from the first moment, and serves as soon as it can."""
    agent.configure(world.path / 'later')
    agent.start()
    assert agent.status()['state'] == 'waiting'
    for verb in ('acquire', 'release'):
        assert agent.call(verb, image=IMAGE, holder='nova',
                          file='/s')[0] == 503
    assert agent.call('ensure', image=IMAGE, offset=0, length=1)[0] == 503
    (world.path / 'later').symlink_to(world.path / 'repo')
    agent.await_state(IMAGE, 'ready')
    assert agent.acquire(IMAGE, world.path / 'stub')[0] == 200


def closed():
    """A window that is not open now, nor soon."""
    hour = time.localtime().tm_hour
    return f'{(hour + 6) % 24:02}:00-{(hour + 7) % 24:02}:00'


class Silent:
    """A server that accepts, and says nothing."""

    def __enter__(self):
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self.socket.getsockname()[1]}'
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_a_repository_that_hangs(agent, world):
    """What is here is served at once; what is not, is a miss at once."""
    world.publish('absent', disk(90 * 4096, 2), range(20))
    agent.configure(world.path / 'repo', agent={'window': closed()})
    agent.start()
    agent.call('prepare', image=IMAGE)
    agent.await_state(IMAGE, 'complete')
    world.publish('thin', disk(900 * 4096, 3), range(20))
    wait_for(lambda: agent.image('thin'))
    stub = world.path / 'stub'
    assert agent.acquire('thin', stub)[0] == 404  # which brings it
    agent.await_state('thin', 'ready')
    assert agent.acquire('thin', stub)[0] == 200
    assert agent.image('absent')['state'] == 'absent'
    agent.stop()
    with Silent() as silent:
        agent.configure(silent.url, repository={'timeout': 60,
                                                'retries': 9})
        agent.start()
        wait_for(lambda: agent.status()['state'] == 'serving')
        # Guests that miss wait in the agent, more than it has threads for.
        lines = [Line(agent.socket) for _ in range(70)]
        for number, line in enumerate(lines):
            with contextlib.suppress(OSError):
                line.connect()
                line.request('POST', '/v1/ensure', json.dumps({
                    'image': 'thin', 'offset': (100 + number) * 4096,
                    'length': 4096}))
        time.sleep(0.3)
        begun = time.monotonic()
        assert agent.acquire(IMAGE, stub, seconds=10)[0] == 200
        assert agent.acquire('thin', stub, seconds=10)[0] == 200
        assert agent.acquire('absent', stub, seconds=10)[0] == 404
        assert agent.acquire('unknown', stub, seconds=10)[0] == 404
        assert time.monotonic() - begun < 10
        for line in lines:
            line.close()
        agent.stop()


def test_killed_while_it_pulls(agent, world, nginx):
    data = disk(5000 * 4096, 9, zeros=0)
    world.publish('large', data, range(5000))
    server = nginx(world.path / 'repo')
    agent.configure(server.url, agent={'sync_rate': 6 << 20})
    for _ in range(3):
        agent.start()
        wait_for(lambda: agent.image('large').get('progress', 0) > 0
                 or agent.image('large').get('state') == 'ready')
        assert agent.image('large')['state'] in ('transferring', 'ready')
        agent.kill()
    agent.configure(server.url)
    agent.start()
    agent.await_state('large', 'ready')
    assert agent.acquire('large', world.path / 'stub')[0] == 200
    read_all(agent, world, 'large')


def test_one_of_two_servers_is_killed_while_it_hydrates(
        agent, world, nginx):
    world.publish('large', disk(9000 * 4096, 3, zeros=0), range(60))
    servers = [nginx(world.path / 'repo', extra='limit_rate 1m;')
               for _ in range(2)]
    agent.configure(servers[0].url, repository={
        'replicas': servers[1].url, 'timeout': 2, 'retries': 1})
    agent.start()
    agent.await_state('large', 'ready')
    assert agent.call('prepare', image='large')[0] == 202
    wait_for(lambda: agent.image('large')['progress'] > .2)
    servers[1].stop()
    # A guest's read does not wait for the one that is gone.
    begun = time.monotonic()
    assert agent.call('ensure', image='large', offset=8999 * 4096,
                      length=4096) == (200, {})
    assert time.monotonic() - begun < 10
    agent.await_state('large', 'complete')
    read_all(agent, world, 'large')
    for server in servers:
        lines = (server.prefix / 'access.log').read_text().splitlines()
        assert sum('/packs/' in line for line in lines) > 4, lines
    assert 'is left out for a while' in agent.words()


def test_killed_while_guests_come(agent, world):
    """-9 in the middle of thaws, hydration and leases, again and again."""
    images = [f'image-{number}' for number in range(4)]
    for seed, image in enumerate(images):
        world.publish(image, disk(2000 * 4096, seed, pool=3000), range(900))
    agent.configure(world.path / 'repo', agent={'hydrate': 'leased',
                             'hydrate_delay': 0})
    kept = []
    for turn, image in enumerate(images):
        agent.start()
        agent.await_state(image, 'ready', 'thawed', 'complete')
        stub = world.path / f'stub-{turn}'
        answers = []

        def come(image=image, stub=stub, answers=answers):
            with contextlib.suppress(OSError, Exception):
                answers.append(agent.acquire(image, stub)[0])

        thread = threading.Thread(target=come)
        thread.start()
        time.sleep(0.02 * turn)
        agent.kill()
        thread.join(40)
        if answers == [200]:
            stub.write_text('')
            kept.append(image)
    agent.configure(world.path / 'repo', agent={'hydrate': 'leased',
                             'hydrate_delay': 0})
    agent.start()
    for turn, image in enumerate(images):
        agent.await_state(image, 'ready', 'thawed', 'complete')
        assert agent.acquire(image, world.path / f'stub-{turn}')[0] == 200
        agent.await_state(image, 'complete')
        row = agent.image(image)
        assert row['leases'] == 1

        class Here:
            image_id, serial = image, row['serial']

        assert verify(agent.state / 'host' / 'volumes' / 'public', Here,
                      world.data[image]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason='mounting needs root')
def test_a_full_disk(world):
    """Guests get an answer, nothing breaks, and room helps."""
    with tempfile.TemporaryDirectory(prefix='fb') as name:
        mount = pathlib.Path(name)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=40m', 'none',
                           mount]).returncode:
            pytest.skip('nothing can be mounted here')
        agent = Agent(mount / 's', world.path / 'repo',
                      agent={'hydrate': 'leased',
                             'hydrate_delay': 0})
        try:
            for number in range(4):
                world.publish(f'image-{number}', disk(
                    2000 * 4096, 20 + number, zeros=0), range(1500))
            agent.start()
            for number in range(4):
                agent.await_state(f'image-{number}', 'ready', 'error')
            (mount / 'filler').write_bytes(bytes(max(
                0, shutil.disk_usage(mount).free - (9 << 20))))
            answers = [agent.acquire(f'image-{number}', mount / 's')
                       for number in range(4)]
            codes = [status for status, _ in answers]
            assert set(codes) <= {200, 503, 404}, answers
            assert codes.count(200) >= 1 and 503 in codes, answers
            good = codes.index(200)
            agent.kill()
            # Else another image may take the room that comes.
            agent.configure(world.path / 'repo')
            agent.start()
            (mount / 'filler').unlink()
            for number in range(4):
                agent.await_state(f'image-{number}', 'ready', 'thawed',
                                  'complete')
            image = f'image-{good}'
            assert agent.acquire(image, mount / 's')[0] == 200
            raw = world.path / 'raw'
            raw.write_bytes(world.data[image])
            subprocess.run(
                ['qemu-img', 'compare', '-f', 'raw', '-F', 'raw', raw,
                 f'nbd+unix:///{image}?socket={agent.nbd}'], check=True,
                timeout=120)
        finally:
            agent.clean()
            subprocess.run(['umount', '-l', mount], check=True)


def test_metrics(agent, world):
    from conftest import free_port
    port = free_port()
    agent.configure(world.path / 'repo', agent={'metrics_port': port})
    agent.start()
    agent.await_state(IMAGE, 'ready')
    agent.acquire(IMAGE, world.path / 'stub')
    agent.acquire('unknown', world.path / 'stub')
    assert agent.call('ensure', image=IMAGE, offset=500 * 4096,
                      length=4096)[0] == 200
    import urllib.request

    def text():
        with urllib.request.urlopen(
                f'http://127.0.0.1:{port}/metrics', timeout=20) as answer:
            return answer.read().decode()

    wait_for(lambda: 'fastboot_leases 1.0' in text())
    words = text()
    for line in ('fastboot_hits_total 1.0',
                 'fastboot_misses_total{reason="unknown"} 1.0',
                 'fastboot_ensure_requests_total{result="ok"} 1.0',
                 'fastboot_ensure_bytes_total 4096.0',
                 'fastboot_images{state="thawed"} 1.0',
                 'fastboot_version 1.0', 'fastboot_version_lag 0.0'):
        assert line + '\n' in words, words
    assert IMAGE not in words


GUEST = '11111111-1111-1111-1111-11111111111'


def running(number, stub, answer, socket=None):
    """A guest as libvirt's test driver takes it."""
    store = ElementTree.tostring(chain.backing_store(
        stub, link_of(answer), socket or pathlib.Path(answer['socket'])))
    return f"""<domain type='test'><name>guest-{number}</name>
        <uuid>{GUEST}{number}</uuid><memory>65536</memory>
        <os><type>hvm</type></os><devices><disk type='file'>
        <source file='/disk-{number}'/>{store.decode()}
        <target dev='vda'/></disk></devices></domain>"""


def test_guests_that_need_the_export(agent, world):
    """Those that were started before their image was complete."""
    pytest.importorskip('libvirt')
    agent.start()
    wait_for(lambda: agent.status().get('lazy_guests') == [])
    agent.await_state(IMAGE, 'ready')
    stub = world.path / 'stub'
    guests = [running(0, stub, agent.acquire(IMAGE, stub)[1])]
    assert agent.call('prepare', image=IMAGE)[0] == 202
    agent.await_state(IMAGE, 'complete')
    answer = agent.acquire(IMAGE, stub)[1]
    assert answer['complete']
    guests.append(running(1, stub, answer))
    elsewhere = running(2, stub, answer | {'complete': None},
                        pathlib.Path('/others'))
    (world.path / 'guests').write_text(
        f'<node>{"".join([*guests, elsewhere])}</node>')
    agent.stop()
    agent.configure(world.path / 'repo', agent={
        'libvirt_uri': f'test://{world.path}/guests'})
    agent.start()
    wait_for(lambda: agent.status().get('lazy_guests'))
    assert agent.status()['lazy_guests'] == [f'{GUEST}0']
    # It was started again: the disk is as it was, its chain is another.
    (world.path / 'guests').write_text(
        f'<node>{running(0, stub, answer)}</node>')
    agent.stop()
    agent.start()
    wait_for(lambda: agent.status().get('lazy_guests') == [])


def test_no_libvirt(agent, world):
    agent.configure(world.path / 'repo', agent={
        'libvirt_uri': f'test://{world.path}/nothing'})
    agent.start()
    agent.await_state(IMAGE, 'ready')
    assert agent.status()['lazy_guests'] is None


def test_service_manager(agent, world):
    path = world.path / 'notify'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(60)
        agent.start(wait=False, NOTIFY_SOCKET=str(path),
                    WATCHDOG_USEC='200000')
        assert manager.recv(99) == b'READY=1'
        assert agent.status()
        assert manager.recv(99) == b'WATCHDOG=1'
        agent.process.terminate()
        said = {manager.recv(99) for _ in range(1)}
        while b'STOPPING=1' not in said:
            said.add(manager.recv(99))
        assert agent.process.wait(40) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason='giving away needs root')
def test_groups(agent, world):
    """QEMU reads the volumes, nova-compute calls the agent, nobody more."""
    with world.host() as host:
        host.sync()
        host.acquire(IMAGE, 'by-hand')
    agent.state.mkdir(exist_ok=True)
    (world.path / 'host').rename(agent.state / 'host')
    world.publish('private', disk(90 * 4096, 2), range(9),
                  visibility='private', owner='p')
    agent.configure(world.path / 'repo', export={'group': 'daemon'},
                    agent={'group': 'games'})
    agent.start()
    agent.await_state('private', 'ready')
    for image in (IMAGE, 'private'):
        status, answer = agent.acquire(image, world.path / image)
        assert status == 200
        path = pathlib.Path(answer['volume'])
        assert (path.stat().st_mode & 0o777, path.group()) == (
            0o640, 'daemon')
        for parent in list(path.parents)[:3]:
            assert parent.group() == 'daemon', parent
            # (Others than the agent made some of them.)
            assert parent.stat().st_mode & 0o750 == 0o750
    assert agent.call('prepare', image='private')[0] == 202
    agent.await_state('private', 'complete')
    complete = agent.acquire('private', world.path / 's')[1]['complete']
    assert pathlib.Path(complete).parent.group() == 'daemon'
    for path, group in ((agent.socket, 'games'), (agent.nbd, 'daemon'),
                        (agent.nbd.with_name('export.sock'), 'daemon')):
        assert path.group() == group
        assert path.stat().st_mode & 0o777 == 0o660
    for path in (agent.state, agent.nbd.parent):
        assert path.stat().st_mode & 0o777 == 0o751


def test_data_of_a_host_that_others_made(agent, world):
    """What fastbootctl did before is served as it is."""
    with world.host() as host:
        host.sync()
        host.acquire(IMAGE, 'by-hand')
        assert data_blocks(world.data[IMAGE])
    (world.path / 's').mkdir(exist_ok=True)
    (world.path / 'host').rename(world.path / 's' / 'host')
    agent.start()
    row = agent.await_state(IMAGE, 'thawed')
    assert row['leases'] == 1
    assert agent.acquire(IMAGE, world.path / 'stub')[0] == 200
    agent.call('release', image=IMAGE, holder='by-hand', file='/x')
    assert agent.image(IMAGE)['leases'] == 2
