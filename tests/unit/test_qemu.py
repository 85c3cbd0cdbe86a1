# SPDX-License-Identifier: Apache-2.0
"""QEMU's arguments, and peers that lie."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import exception, qemu


def arguments(**values):
    disk = qemu.file_disk('root.qcow2', 'qcow2')
    return qemu.Config(disk=disk, **values).command(5, 6, 7)


def after(command, name):
    return [command[at + 1] for at, word in enumerate(command)
            if word == name]


def test_command_is_confined():
    command = arguments()
    assert after(command, '-sandbox') == [
        'on,obsolete=deny,elevateprivileges=deny,spawn=deny,'
        'resourcecontrol=deny']
    # A link, and nothing behind it.
    assert after(command, '-netdev') == ['hubport,id=link,hubid=0']
    assert '-nodefaults' in command
    assert '-no-user-config' in command
    assert not {'-net', '-nic', '-vnc', '-monitor'} & set(command)


@pytest.mark.parametrize('accelerator, expected', [
    ('tcg', ['tcg,thread=multi,tb-size=256']),
    ('kvm', ['kvm', 'tcg,thread=multi,tb-size=256']),
])
def test_command_accelerator(accelerator, expected):
    assert after(arguments(accelerator=accelerator), '-accel') == expected


def test_command_sizes():
    command = arguments(memory=768, vcpus=3)
    assert after(command, '-m') == ['768']
    assert after(command, '-smp') == ['3']


@pytest.mark.parametrize('cache, direct, no_flush', [
    ('none', True, False), ('writeback', False, False),
    ('unsafe', False, True)])
def test_command_disk(cache, direct, no_flush):
    disk, = map(json.loads, after(arguments(cache=cache), '-blockdev'))
    assert disk == {
        'driver': 'qcow2', 'node-name': 'root',
        'file': {'driver': 'file', 'filename': 'root.qcow2'},
        'cache': {'direct': direct, 'no-flush': no_flush}}


def test_command_file_names_are_data():
    name = 'a,b"c=d,driver=raw'
    command = qemu.Config(disk=qemu.file_disk(name, 'raw')).command(5, 6, 7)
    disk, = map(json.loads, after(command, '-blockdev'))
    assert disk['file']['filename'] == name


def test_command_config_drive():
    command = arguments(config_drive='config.iso')
    _, drive = map(json.loads, after(command, '-blockdev'))
    assert drive['read-only'] is True
    assert 'virtio-blk-pci,drive=config' in command
    assert 'virtio-blk-pci,drive=config' not in arguments()


def test_command_dhcp():
    link, = after(arguments(dhcp=True), '-netdev')
    assert link.startswith('user,') and 'restrict=on' in link
    assert 'ide-cd' in arguments(dhcp=True)
    link, = after(arguments(), '-netdev')
    assert link.startswith('hubport,')
    assert 'ide-cd' not in arguments()


def test_devices_name_the_version():
    config = qemu.Config(disk={})
    number = '.'.join(map(str, qemu.version()))
    assert config.devices() == f'pc, virtio-blk, tcg, QEMU {number}'


def test_version_missing_tool():
    with pytest.raises(exception.ConfigError):
        qemu.version('no-such-program')


def test_version_not_qemu():
    with pytest.raises(exception.ConfigError):
        qemu.version('true')


def test_version_too_old(monkeypatch):
    monkeypatch.setattr(qemu, 'OLDEST', (999,))
    qemu.version.cache_clear()
    with pytest.raises(exception.ConfigError):
        qemu.version()
    qemu.version.cache_clear()


def test_info(tmp_path):
    path = str(tmp_path / 'disk')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '1M'],
                   check=True)
    assert qemu.info(path, 'qcow2')['virtual-size'] == 1 << 20
    node = qemu.image(qemu.file_disk(path, 'qcow2'))
    assert qemu.info(node)['format'] == 'qcow2'
    with pytest.raises(exception.CommandFailed):
        qemu.info(path, 'vmdk')


def test_what_is_copied_up_stays(tmp_path):
    """Also zeros, and what lies behind the end of what is below."""
    old, new = tmp_path / 'old', tmp_path / 'new'
    data = os.urandom(3 << 20) + bytes(1 << 20)
    old.write_bytes(data)
    new.write_bytes(os.urandom(6 << 20))
    disk = tmp_path / 'disk,file.filename=x'
    qemu.create_overlay(disk, str(old), 'raw', 8 << 20)
    extents = [(1 << 20, 65536), ((3 << 20) - 4096, 8192), (5 << 20, 1 << 20)]
    qemu.copy_up(disk, extents, timeout=60)
    qemu.rename_backing(disk, new, 'raw')
    qemu.convert(qemu.image(qemu.file_disk(str(disk), 'qcow2')),
                 str(tmp_path / 'raw'), timeout=60)
    made = (tmp_path / 'raw').read_bytes()
    below, data = new.read_bytes(), data.ljust(8 << 20, b'\0')
    for offset, length in extents:
        assert made[offset:offset + length] == data[offset:offset + length]
    assert made[:1 << 20] == below[:1 << 20]
    assert made[7 << 20:] == bytes(1 << 20)
    # Twice does not change it, and nothing is nothing.
    qemu.copy_up(disk, [*extents, (6 << 20, 4096)], timeout=60)
    qemu.copy_up(disk, [], timeout=60)


def test_what_cannot_be_copied_up(tmp_path):
    (tmp_path / 'old').write_bytes(bytes(1 << 20))
    disk = tmp_path / 'disk'
    qemu.create_overlay(disk, str(tmp_path / 'old'), 'raw', 1 << 20)
    for extents in [(1 << 20, 4096)], [(0, 2 << 20)]:
        with pytest.raises(exception.CommandFailed):
            qemu.copy_up(disk, extents, timeout=60)
    (tmp_path / 'old').unlink()
    with pytest.raises(exception.CommandFailed):
        qemu.copy_up(disk, [(0, 4096)], timeout=60)


@given(present=st.lists(st.booleans(), min_size=1, max_size=12),
       wanted=st.sets(st.integers(0, 11)))
def test_what_an_overlay_has_itself(present, wanted):
    wanted = {at for at in wanted if at < len(present)}
    mapped = [{'start': at * 8, 'length': 8, 'present': has}
              for at, has in enumerate(present)]
    extents = [(at * 8 + 2, 3) for at in sorted(wanted)]
    assert qemu._covers(mapped, extents) == all(
        present[at] for at in wanted)


def test_create_overlay_opens_no_backing(tmp_path):
    path = tmp_path / 'overlay'
    qemu.create_overlay(path, 'nbd+unix:///?socket=gone', 'raw', 3 << 20)
    found = qemu.info(str(path), 'qcow2')
    assert found['virtual-size'] == 3 << 20
    assert found['backing-filename'] == 'nbd+unix:///?socket=gone'
    assert found['backing-filename-format'] == 'raw'


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    peer = qemu.Peer(near)
    yield peer, far
    peer.close()
    far.close()


def receive_all(peer, seconds=0.2):
    found = []
    deadline = time.monotonic() + seconds
    while (message := peer.receive(deadline)) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize('noise', [
    b'', b'\n\n', b'no json\n', b'[1, 2]\n', b'"text"\n', b'1e999\n',
    b'\xff\xfe\x80\n', b'[' * 60000 + b'\n', b'1' * 5000 + b'\n',
    b'{"a":' * 9000 + b'\n', b'x' * 300000 + b'\n',
])
def test_peer_skips_noise(pair, noise):
    peer, far = pair
    sender = threading.Thread(
        target=far.sendall, args=(noise + b'{"return": 1}\n',))
    sender.start()
    assert receive_all(peer, 1) == [{'return': 1}]
    sender.join()


def test_peer_endless_line_is_not_kept(pair):
    peer, far = pair

    def flood():
        try:
            for _ in range(2000):
                far.sendall(b'x' * 4096)
        except OSError:
            pass

    sender = threading.Thread(target=flood)
    sender.start()
    assert receive_all(peer) == []
    assert len(peer._rest) <= qemu._LINE_LIMIT + 4096
    peer.close()
    sender.join()


def test_peer_is_gone(pair):
    peer, far = pair
    far.close()
    assert peer.receive(time.monotonic() + 60) is None
    peer.send({'execute': 'quit'})


def test_peer_that_does_not_read(pair):
    peer, _ = pair
    for _ in range(10000):
        peer.send({'execute': 'x' * 100})


class Guest(threading.Thread):
    """Answers each line with what `reply` makes of it."""

    def __init__(self, far, reply):
        super().__init__()
        self.far, self.reply = far, reply
        self.far.settimeout(5)
        self.start()

    def run(self):
        try:
            with self.far.makefile('rb') as lines:
                for line in lines:
                    request = json.loads(line.strip(b'\xff'))
                    self.far.sendall(self.reply(request))
        except OSError:
            pass


def ping(pair, reply, seconds=1.0):
    peer, far = pair
    guest = Guest(far, reply)
    try:
        return qemu.GuestAgent(peer).ping(seconds)
    finally:
        far.shutdown(socket.SHUT_RDWR)
        guest.join()


def honest(request):
    if request['execute'] == 'guest-sync-delimited':
        return b'\xff' + json.dumps(
            {'return': request['arguments']['id']}).encode() + b'\n'
    return b'{"return": {}}\n'


def test_agent_answers(pair):
    assert ping(pair, honest)


def test_agent_answers_behind_old_answers(pair):
    assert ping(pair, lambda request: b'{"return": {}}\n{"return": 1}\nxx\n'
                + honest(request))


@pytest.mark.parametrize('reply', [
    lambda request: b'',
    lambda request: b'{"return": {}}\n',
    lambda request: b'{"return": true}\n{"return": null}\n',
    lambda request: b'{"error": {"class": "GenericError"}}\n',
    lambda request: b'{"return": {"id": 1}}\n' * 1000,
    lambda request: honest(request)[:-1],
    lambda request: honest(request).replace(b'}\n', b'}'),
])
def test_agent_lies(pair, reply):
    assert not ping(pair, reply, 0.2)


def test_agent_floods(pair):
    peer, far = pair
    stop = threading.Event()

    def flood():
        try:
            while not stop.is_set():
                far.sendall(b'{"return": 0}\n' * 100)
        except OSError:
            pass

    sender = threading.Thread(target=flood)
    sender.start()
    assert not qemu.GuestAgent(peer).ping(0.2)
    stop.set()
    peer.close()
    sender.join()


def test_words_of_a_program_are_one_line():
    """They may be those of an image, and logs have a line for each event."""
    error = exception.CommandFailed(['x'], 1, 'a\nb\x1b[2J\u2028c\n')
    assert str(error) == 'x exited with status 1: a b [2J c'
    assert error.words == 'a\nb\x1b[2J\u2028c'
