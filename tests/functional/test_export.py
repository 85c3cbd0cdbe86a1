# SPDX-License-Identifier: Apache-2.0
"""The export, read by QEMU, libnbd's tools and fio through real nbdkits."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time

import pytest
import slots

from fastboot_common import ensure, exception, localapi, nbdkit, qcow2

pytestmark = pytest.mark.skipif(
    not (shutil.which('nbdkit') and shutil.which('qemu-img')),
    reason='nbdkit or qemu-img is not installed')

IMAGE = '0a0a0a0a-1111-2222-3333-444444444444'
K = 1024
WAIT = 2


def run(*command, timeout=120, ok=True):
    done = subprocess.run([str(word) for word in command], timeout=timeout,
                          capture_output=True, text=True)
    if ok:
        assert done.returncode == 0, done.stderr + done.stdout
    return done


def serve(path, agent):
    return localapi.Server(path, [ensure.route(agent)])


def uri(server, image=IMAGE):
    return f'nbd+unix:///{image}?socket={server.path}'


def compare(server, raw, image=IMAGE):
    run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', raw,
        uri(server, image))


def qemu_io(server, *commands, ok=True, image=IMAGE):
    words = [word for command in commands for word in ('-c', command)]
    done = run('qemu-io', '-r', '-f', 'raw', *words, uri(server, image),
               ok=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def said(server, words):
    """The server's stderr has these words, or has them soon."""
    deadline = time.monotonic() + 20
    while words not in server.words:
        assert time.monotonic() < deadline, server.words
        time.sleep(0.01)


@pytest.fixture
def run_dir():
    """A directory whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix='fb') as name:
        yield pathlib.Path(name)


@pytest.fixture
def volume(tmp_path):
    with slots.Volume(tmp_path / 'root') as made:
        yield made


@pytest.fixture
def export(volume, run_dir):
    """An export of `volume`, with an agent's socket where none listens."""
    with nbdkit.Export(volume.root, run_dir / 'e', agent=run_dir / 'a',
                       wait=WAIT) as server:
        yield server


class Agent:
    """Fills the volume, as the real one does."""

    def __init__(self, volume, *images):
        self.volume = volume
        self.images = {image.name: image for image in images}
        self.calls = []
        self._lock = threading.Lock()

    def __call__(self, name, offset, length):
        if name not in self.images:
            raise exception.NotFound(f'no image {name}')
        with self._lock:
            self.calls.append((name, offset, length))
            self.volume.fill(self.images[name], offset, length)


# Content

@pytest.mark.parametrize('scatter', [False, True])
@pytest.mark.parametrize('cluster', [4 * K, 16 * K, 64 * K])
def test_same_bytes(tmp_path, run_dir, cluster, scatter):
    raw = slots.make_raw(tmp_path / 'raw', 24 * K * K + 512, cluster=cluster)
    with slots.Volume(tmp_path, cluster=cluster) as volume:
        volume.add(IMAGE, raw, 5, scatter=scatter)
        with nbdkit.Export(tmp_path, run_dir / 'e') as server:
            compare(server, raw)
            run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri(server),
                tmp_path / 'copy')
            run('cmp', raw, tmp_path / 'copy')
            run('nbdcopy', '--connections=4', '--no-extents', uri(server),
                tmp_path / 'copied')
            run('cmp', raw, tmp_path / 'copied')


def test_a_wrong_byte_would_be_seen(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', K * K)
    image = volume.add(IMAGE, raw)
    place = volume.word(volume.entry(
        image, next(slots.data_blocks(image)))) & qcow2.OFFSET_MASK
    volume.write(place + image.base + 5000, b'\xa5\x5a\xa5\x5a')
    with pytest.raises(AssertionError, match='mismatch'):
        compare(export, raw)


class Client:
    """Just enough of NBD to read with any alignment."""

    def __init__(self, path, name):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(os.fspath(path))
        assert self.receive(18).startswith(b'NBDMAGICIHAVEOPT')
        option = struct.pack('>IQII', 3, 0x49484156454F5054, 1, len(name))
        self.socket.sendall(option + name.encode())
        self.size, _flags = struct.unpack('>QH', self.receive(10))

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            assert more, 'the server hung up'
            data += more
        return bytes(data)

    def read(self, offset, length):
        self.socket.sendall(struct.pack(
            '>IHHQQI', 0x25609513, 0, 0, 7, offset, length))
        _magic, error, _handle = struct.unpack('>IIQ', self.receive(16))
        assert not error, os.strerror(error)
        return self.receive(length)


def test_random_reads_of_any_alignment(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 9 * K * K + 1536, holes=0.5)
    image = volume.add(IMAGE, raw, scatter=True,
                       present=lambda block: block % 7)
    data = raw.read_bytes()
    rng = random.Random(3)
    with serve(export.path.parent / 'a', Agent(volume, image)):
        client = Client(export.path, IMAGE)
        assert client.size == len(data)
        with client.socket:
            for _ in range(600):
                start = rng.randrange(len(data))
                length = min(rng.choice([1, 511, 4096, 70000, 1 << 20]),
                             len(data) - start)
                assert (client.read(start, length)
                        == data[start:start + length])


@pytest.mark.skipif(not shutil.which('fio'), reason='fio is not installed')
def test_fio_verifies_what_it_wrote(tmp_path, volume, export):
    raw = tmp_path / 'raw'
    job = ['--name=x', '--bs=4k', '--size=16m', '--verify=crc32c',
           '--verify_state_save=0', '--verify_fatal=1']
    run('fio', *job, '--ioengine=psync', '--rw=write', '--do_verify=0',
        f'--filename={raw}')
    volume.add(IMAGE, raw, scatter=True)
    job += ['--ioengine=nbd', f'--uri={uri(export)}', '--iodepth=16']
    run('fio', *job, '--rw=read')
    run('fio', *job, '--rw=randread')


def test_map_is_that_of_the_disk(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 8 * K * K, holes=0.5)
    volume.add(IMAGE, raw)
    data = raw.read_bytes()
    extents = json.loads(run('nbdinfo', '--map', '--json', uri(export)).stdout)
    assert sum(extent['length'] for extent in extents) == len(data)
    for one in extents:
        chunk = data[one['offset']:one['offset'] + one['length']]
        assert one['type'] in (0, 3)
        assert (one['type'] == 3) == (not chunk.strip(b'\0'))
    mapped = json.loads(run('qemu-img', 'map', '-f', 'raw', '--output=json',
                            uri(export)).stdout)
    assert ([(one['start'], one['zero']) for one in mapped]
            == [(one['offset'], one['type'] == 3) for one in extents])


def test_many_connections_are_allowed(tmp_path, volume, export):
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K))
    run('nbdinfo', '--can', 'multi-conn', uri(export))
    run('nbdinfo', '--is', 'read-only', uri(export))


@pytest.mark.parametrize('size', [512, 16 * K, 16 * K + 512, 40 * K,
                                  32 * K * K + 512])
def test_sizes(tmp_path, volume, export, size):
    raw = slots.make_raw(tmp_path / 'raw', size, holes=0)
    volume.add(IMAGE, raw)
    assert run('nbdinfo', '--size', uri(export)).stdout == f'{size}\n'
    compare(export, raw)


def test_empty_image(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 0)
    volume.add(IMAGE, raw)
    assert run('nbdinfo', '--size', uri(export)).stdout == '0\n'
    compare(export, raw)


def test_sparse_tebibyte(tmp_path, volume, export):
    raw = tmp_path / 'raw'
    with raw.open('wb') as file:
        file.truncate(1 << 40)
        for offset in (0, 5 << 30, (1 << 40) - 16 * K):
            file.seek(offset)
            file.write(b'x' * 16 * K)
    volume.add(IMAGE, raw)
    found = run('nbdinfo', '--map', '--totals', uri(export), timeout=60)
    assert f'{48 * K}' in found.stdout
    compare(export, raw)


def test_two_domains(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', K * K, seed=1)
    other = slots.make_raw(tmp_path / 'other', K * K, seed=2)
    volume.add(IMAGE, raw)
    with slots.Volume(volume.root, 'project-x') as second:
        second.add('private', other, 9)
        compare(export, raw)
        compare(export, other, 'private')
        # Who may read an image knows its id; nobody is told.
        listed = json.loads(run(
            'nbdinfo', '--list', '--json', f'nbd+unix://?socket={export.path}'
        ).stdout)
    assert listed['exports'] == []


# What is missing

def test_missing_clusters_come_from_the_agent(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 32 * K * K)
    image = volume.add(IMAGE, raw, present=lambda block: block % 3 == 0)
    agent = Agent(volume, image)
    with serve(export.path.parent / 'a', agent):
        compare(export, raw)
        calls = len(agent.calls)
        assert calls
        compare(export, raw)
    assert len(agent.calls) == calls
    compare(export, raw)


def test_one_call_for_one_read(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', K * K + 512, holes=0)
    image = volume.add(IMAGE, raw, present=lambda block: block in (0, 5))
    agent = Agent(volume, image)
    with serve(export.path.parent / 'a', agent):
        qemu_io(export, f'read 0 {96 * K}')
        assert agent.calls == [(IMAGE, 16 * K, 64 * K)]
        qemu_io(export, f'read {K * K} 512')
    assert agent.calls[1:] == [(IMAGE, K * K, 512)]


def test_filled_while_many_read(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 48 * K * K)
    image = volume.add(IMAGE, raw, present=lambda block: False)
    with serve(export.path.parent / 'a', Agent(volume, image)):
        copies = [subprocess.Popen(
            ['nbdcopy', '--connections=4', '--request-size=65536',
             uri(export), str(tmp_path / f'copy{number}')])
            for number in range(3)]
        try:
            assert [copy.wait(120) for copy in copies] == [0, 0, 0]
        finally:
            for copy in copies:
                copy.kill()
                copy.wait()
    for number in range(3):
        run('cmp', raw, tmp_path / f'copy{number}')


def test_reads_wait_for_an_agent_that_restarts(tmp_path, volume, run_dir):
    raw = slots.make_raw(tmp_path / 'raw', 8 * K * K, holes=0)
    image = volume.add(IMAGE, raw, present=lambda block: False)
    agent = Agent(volume, image)

    def agents():
        """Comes and goes; each time it serves a while."""
        for _ in range(200):
            if stop.is_set():
                return
            with serve(run_dir / 'a', agent):
                stop.wait(0.2)
            stop.wait(0.2)

    stop = threading.Event()
    thread = threading.Thread(target=agents)
    with nbdkit.Export(volume.root, run_dir / 'e', agent=run_dir / 'a',
                       wait=30) as server:
        thread.start()
        try:
            run('nbdcopy', '--connections=1', '--requests=4',
                '--request-size=65536', uri(server), tmp_path / 'copy')
        finally:
            stop.set()
            thread.join()
    run('cmp', raw, tmp_path / 'copy')


@pytest.mark.parametrize('refusal', [
    None, exception.Unavailable('store'), exception.NotFound('x'),
    exception.Corrupt('pack'), RuntimeError('bug')])
def test_no_agent_no_bytes(tmp_path, volume, export, refusal):
    raw = slots.make_raw(tmp_path / 'raw', K * K, holes=0)
    volume.add(IMAGE, raw, present=lambda block: block == 0)

    def refuse(*_):
        raise refusal

    with contextlib.ExitStack() as stack:
        if refusal:
            stack.enter_context(
                serve(export.path.parent / 'a', refuse))
        assert 'Input/output error' in qemu_io(
            export, f'read {16 * K} 4096', ok=False)
    said(export, IMAGE)
    said(export, str(refusal or 'a'))
    qemu_io(export, 'read 0 4096')


def test_agent_that_lies(tmp_path, volume, export):
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K, holes=0),
               present=lambda block: False)
    calls = []
    with serve(export.path.parent / 'a',
               lambda *call: calls.append(call)):
        assert 'Input/output error' in qemu_io(
            export, 'read 0 4096', ok=False)
    assert 1 < len(calls) < 10


def test_agent_that_never_answers(tmp_path, volume, export):
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K, holes=0),
               present=lambda block: False)
    stop = threading.Event()
    with serve(export.path.parent / 'a',
               lambda *_: stop.wait(60)):
        assert 'Input/output error' in qemu_io(
            export, 'read 0 4096', ok=False)
        stop.set()


# Slots that go, tables that lie

def test_evicted_slot_fails(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 4 * K * K, holes=0)
    image = volume.add(IMAGE, raw)
    reader = subprocess.Popen(
        ['qemu-io', '-r', '-f', 'raw', uri(export)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    try:
        reader.stdin.write('read -v 0 16\n')
        reader.stdin.flush()
        assert reader.stdout.readline()
        volume.evict(image)
        words, _ = reader.communicate('read -P 0xee 0 64k\n', timeout=60)
    finally:
        reader.kill()
        reader.wait()
    assert 'read failed' in words
    said(export, 'evicted')
    qemu_io(export, 'read 0 1', ok=False)
    said(export, 'not on this host')


def hostile_words(volume, image):
    """Entries that no table may hold."""
    size = slots.SIZE
    return [
        2, qcow2.COPIED, 1 << 62, qcow2.COPIED | 1, (1 << 64) - 1,
        qcow2.COPIED | 1 << 62 | volume.zeros - image.base,
        volume.zeros - image.base,
        qcow2.COPIED | 512 + volume.zeros - image.base,
        qcow2.COPIED | size - image.base,
        qcow2.COPIED | 1 << 55,
        qcow2.COPIED | 65536,
    ]


@pytest.mark.parametrize('which', range(11))
@pytest.mark.parametrize('level', ['l1', 'l2'])
def test_hostile_entries(tmp_path, volume, export, level, which):
    raw = slots.make_raw(tmp_path / 'raw', 64 * K * K, holes=0.9)
    image = volume.add(IMAGE, raw)
    word = hostile_words(volume, image)[which]
    place = image.l1 if level == 'l1' else volume.entry(image, 2)
    volume.write(place, struct.pack('>Q', word))
    for length in ('4k', '64k', '8M'):
        assert 'Input/output error' in qemu_io(
            export, f'read {32 * K} {length}', ok=False)
    run('nbdinfo', '--map', uri(export))
    assert qemu_io(export, f'read {40 * K * K} 64k')
    assert export.pid


def test_random_tables(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 64 * K * K, holes=0)
    image = volume.add(IMAGE, raw)
    rng = random.Random(11)
    table = volume.word(image.l1) & qcow2.OFFSET_MASK
    volume.write(table + image.base, rng.randbytes(volume.cluster))
    qemu_io(export, 'read 0 1M', ok=False)
    volume.write(image.l1, rng.randbytes(16))
    qemu_io(export, 'read 0 1M', ok=False)
    run('nbdinfo', '--map', uri(export))
    assert export.pid


@pytest.mark.parametrize('garbage', [
    b'\0' * 512, b'\xff' * 512, b'QFI\xfb\0\0\0\2',
    b'QFI\xfb\0\0\0\3' + b'\xff' * 100])
def test_hostile_headers(tmp_path, volume, export, garbage):
    image = volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K))
    volume.write(image.base, garbage)
    qemu_io(export, 'read 0 1', ok=False)
    said(export, IMAGE)
    volume.head(image)
    qemu_io(export, 'read 0 1')


@pytest.mark.parametrize('field, value', [
    (20, struct.pack('>I', 40)), (20, struct.pack('>I', 9)),
    (24, struct.pack('>Q', 1 << 60)), (32, struct.pack('>I', 1)),
    (36, struct.pack('>I', 0)), (36, struct.pack('>I', (1 << 32) - 1)),
    (40, struct.pack('>Q', 0)), (40, struct.pack('>Q', 1 << 63)),
    (40, struct.pack('>Q', (8 << 40) - 65536)),
    (60, struct.pack('>I', 3)), (72, struct.pack('>Q', 1)),
])
def test_hostile_header_fields(tmp_path, volume, export, field, value):
    if field == 36 and value == b'\xff' * 4:
        # Behind the first 32 GiB of an 8 TiB file there is room for it.
        value = struct.pack('>I', 0)
    image = volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K))
    volume.write(image.base + field, value)
    qemu_io(export, 'read 0 1', ok=False)
    assert export.pid


@pytest.mark.parametrize('text', [
    '', '{', '[]', '{}', '{"serial": 0, "virtual_size": 1048576}',
    '{"serial": true, "virtual_size": 1048576}',
    '{"serial": 1048576, "virtual_size": 1048576}',
    '{"serial": "1", "virtual_size": 1048576}',
    '{"serial": 1, "virtual_size": 512}', '[' * 50000])
def test_hostile_descriptions(tmp_path, volume, export, text):
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K))
    (volume.directory / 'images' / IMAGE).write_text(text)
    qemu_io(export, 'read 0 1', ok=False)
    assert export.pid


def test_truncated_volume(tmp_path, volume, export):
    raw = slots.make_raw(tmp_path / 'raw', 64 * K * K, holes=0)
    image = volume.add(IMAGE, raw)
    os.truncate(volume.path, volume.free - 20 * K * K)
    qemu_io(export, 'read 0 1M')
    qemu_io(export, 'read 60M 1M', ok=False)
    os.truncate(volume.path, image.l1 + 4)
    qemu_io(export, 'read 0 1', ok=False)
    os.truncate(volume.path, 100)
    qemu_io(export, 'read 0 1', ok=False)
    assert export.pid


@pytest.mark.parametrize('name', [
    '', '.', '..', '../x', '%2e%2e/images/x', 'a' * 65, '-x', 'x/y',
    '%00', 'x%00', 'x%0a', '%c3%a4'])
def test_hostile_names(tmp_path, volume, export, name):
    raw = slots.make_raw(tmp_path / 'raw', K * K)
    volume.add(IMAGE, raw)
    with contextlib.suppress(OSError):
        shutil.copy(volume.directory / 'images' / IMAGE,
                    volume.directory / 'images' / name)
    run('nbdinfo', '--size', uri(export, name), ok=False)
    assert run('nbdinfo', '--size', uri(export, name), ok=False).returncode
    compare(export, raw)


# The shield

def test_export_restarts_under_the_shield(tmp_path, volume, run_dir):
    raw = slots.make_raw(tmp_path / 'raw', 16 * K * K)
    volume.add(IMAGE, raw)
    server = nbdkit.Export(volume.root, run_dir / 'e')
    with nbdkit.Shield(run_dir / 's', run_dir / 'e', wait=10) as shield:
        server.start()
        reader = subprocess.Popen(
            ['nbdcopy', '--request-size=4096', '--requests=1',
             '--connections=1', uri(shield), 'null:'])
        try:
            for _ in range(3):
                time.sleep(0.1)
                os.kill(server.pid, 9)
                server.close()
                time.sleep(0.5)
                server.start()
            compare(shield, raw)
            assert reader.wait(60) == 0
        finally:
            reader.kill()
            reader.wait()
            server.close()


def test_reads_go_on_while_the_export_is_away(tmp_path, volume, run_dir):
    raw = slots.make_raw(tmp_path / 'raw', 4 * K * K, holes=0)
    volume.add(IMAGE, raw)
    server = nbdkit.Export(volume.root, run_dir / 'e')
    server.start()
    with nbdkit.Shield(run_dir / 's', run_dir / 'e', wait=10) as shield:
        reader = subprocess.Popen(
            ['qemu-io', '-r', '-f', 'raw', uri(shield)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        try:
            reader.stdin.write('read -v 0 16\n')
            reader.stdin.flush()
            assert reader.stdout.readline()
            os.kill(server.pid, 9)
            server.close()
            timer = threading.Timer(1.5, server.start)
            timer.start()
            words, _ = reader.communicate('read 1M 64k\n', timeout=60)
            timer.join()
        finally:
            reader.kill()
            reader.wait()
            server.close()
    assert 'read failed' not in words
    assert 'read 65536/65536' in words


def test_shield_gives_up(tmp_path, volume, run_dir):
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K))
    with nbdkit.Shield(run_dir / 's', run_dir / 'e', wait=2,
                       log=tmp_path / 'log') as shield:
        qemu_io(shield, 'read 0 1', ok=False)
        with nbdkit.Export(volume.root, run_dir / 'e'):
            qemu_io(shield, 'read 0 4096')
    assert 'Read id=' in (tmp_path / 'log').read_text()
    with pytest.raises(exception.Invalid):
        nbdkit.Shield(run_dir / 's', run_dir / 'e', wait=0)


# The wrappers

def test_tap_notes_reads(tmp_path, run_dir):
    raw = slots.make_raw(tmp_path / 'a=b,c', K * K)
    log = tmp_path / 'log'
    with nbdkit.Tap(raw, run_dir / 't', log) as tap:
        compare(tap, raw, '')
        qemu_io(tap, f'read {64 * K} 512', image='')
        assert tap.path.stat().st_mode & 0o7777 == 0o660
        assert log.stat().st_mode & 0o7777 == 0o640
        pid = tap.pid
    assert 'Read id=1 offset=0x10000 count=0x200 ' in log.read_text()
    assert not tap.path.exists()
    assert tap.pid is None
    assert not pathlib.Path(f'/proc/{pid}').exists()


def test_start_fails_with_its_words(tmp_path, run_dir):
    with pytest.raises(exception.CommandFailed, match='nowhere'):
        nbdkit.Tap(tmp_path / 'nowhere', run_dir / 't',
                   tmp_path / 'log').start()
    bad = nbdkit.Export(tmp_path, run_dir / 'e', wait=-1)
    with pytest.raises(exception.CommandFailed, match='0 to 3600'):
        bad.start()
    assert bad.pid is None


def test_paths_of_sockets(tmp_path, run_dir):
    raw = slots.make_raw(tmp_path / 'raw', K * K)
    with pytest.raises(exception.ConfigError, match='107'):
        nbdkit.Tap(raw, run_dir / ('x' * 107), tmp_path / 'log').start()
    with pytest.raises(exception.ConfigError, match='no socket'):
        nbdkit.Tap(raw, raw, tmp_path / 'log').start()
    assert raw.stat().st_size == K * K
    with nbdkit.Tap(raw, run_dir / 't', tmp_path / 'log') as first:
        with pytest.raises(exception.Busy):
            nbdkit.Tap(raw, run_dir / 't', tmp_path / 'log2').start()
        os.kill(first.pid, 9)
        while first.pid:
            time.sleep(0.01)
        with nbdkit.Tap(raw, run_dir / 't', tmp_path / 'log3') as second:
            compare(second, raw, '')


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root')
def test_user_and_group(tmp_path, volume, run_dir):
    raw = slots.make_raw(tmp_path / 'raw', K * K)
    volume.add(IMAGE, raw)
    # Beneath a directory that only root enters nobody could read it.
    shutil.copytree(volume.root / 'volumes', run_dir / 'volumes',
                    ignore=shutil.ignore_patterns('volume'))
    os.link(volume.path, run_dir / 'volumes' / 'public' / 'volume')
    os.chown(run_dir / 'volumes' / 'public' / 'volume', 0, 65534)
    os.chown(run_dir / 'volumes' / 'public' / 'images' / IMAGE, 0, 65534)
    run_dir.chmod(0o755)
    with nbdkit.Export(run_dir, run_dir / 'e', user='nobody',
                       group='nogroup') as server:
        status = pathlib.Path(f'/proc/{server.pid}/status').read_text()
        assert 'Uid:\t65534' in status
        assert server.path.stat().st_gid == 65534
        compare(server, raw)


def test_connections_leave_nothing_behind(tmp_path, volume, export):
    """Neither files nor what Python knows of a thread: 16 KiB and more."""
    volume.add(IMAGE, slots.make_raw(tmp_path / 'raw', K * K, holes=0))

    def memory(connections):
        for _ in range(connections):
            client = Client(export.path, IMAGE)
            with client.socket:
                client.read(5, 7)
        status = pathlib.Path(f'/proc/{export.pid}/status').read_text()
        return int(status.split('VmRSS:')[1].split()[0])

    before = memory(300)
    assert memory(1200) < before + 4 * K
    deadline = time.monotonic() + 20
    while len(os.listdir(f'/proc/{export.pid}/fd')) > 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_clients_that_are_killed(tmp_path, volume, export):
    """With requests under way; nbdkit lives on (unless it has threads)."""
    raw = slots.make_raw(tmp_path / 'raw', 64 * K * K, holes=0)
    volume.add(IMAGE, raw)
    pid = export.pid
    for _ in range(40):
        reader = subprocess.Popen(
            ['nbdcopy', '--requests=16', '--request-size=4096', uri(export),
             'null:'], stderr=subprocess.DEVNULL)
        time.sleep(0.05)
        reader.kill()
        reader.wait()
    compare(export, raw)
    assert export.pid == pid
