# SPDX-License-Identifier: Apache-2.0
"""Guests that attack their builder, in the real QEMU and sandbox."""

import concurrent.futures
import configparser
import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import bootsector
import intruder
import pytest
from test_capture import LOGIN, SIZE, children, options

from fastboot_common import exception, qemu, sockets
from fastboot_glance import capture, guest

UNIT = pathlib.Path(__file__).parents[2] / (
    'etc/systemd/fastboot-builder.service')

as_root = pytest.mark.skipif(os.geteuid() != 0, reason='needs root')


class Host:
    """What a guest could reach: one TCP and one UDP port everywhere."""

    def __init__(self):
        self._exit = contextlib.ExitStack()

    def __enter__(self):
        enter = self._exit.enter_context
        self.tcp = enter(socket.create_server(
            ('::', 0), family=socket.AF_INET6, dualstack_ipv6=True))
        self.udp = enter(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        self.udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.udp.bind(('::', 0))
        self.ports = (self.tcp.getsockname()[1], self.udp.getsockname()[1])
        return self

    def __exit__(self, *_):
        self._exit.close()

    def came(self):
        """Addresses that connections and datagrams came from."""
        found = {'tcp': [], 'udp': []}
        for name, server in (('tcp', self.tcp), ('udp', self.udp)):
            server.settimeout(.2)
            with contextlib.suppress(TimeoutError):
                while True:
                    if name == 'tcp':
                        line, peer = server.accept()
                        line.close()
                    else:
                        _, peer = server.recvfrom(100)
                    found[name].append(peer[0])
        return found


@pytest.fixture
def host():
    with Host() as one:
        yield one


def addresses():
    """IPv4 addresses of this host that are not its loopback's."""
    shown = subprocess.run(['ip', '-j', '-4', 'addr'], capture_output=True,
                           check=True).stdout
    return [address['local'] for link in json.loads(shown)
            for address in link['addr_info']
            if not address['local'].startswith('127.')]


@pytest.fixture
def attacker(tmp_path, host):
    """The raw disk of a guest that tries all ways out."""
    return intruder.disk(tmp_path / 'raw', intruder.attack(
        *host.ports, addresses()[:1]), SIZE)


USER = ('-netdev', 'user,id=link')


def run(path, disk, prefix=()):
    """Run a guest until it is done, and return what it printed."""
    room = path / 'room'
    room.mkdir(0o700)
    os.link(disk, room / 'disk')
    guest.Sandbox('nobody').own(room)
    config = qemu.Config(disk=qemu.file_disk('disk', 'raw'), memory=64,
                         dhcp=True)
    said = b''
    with qemu.Machine(config, room, prefix) as machine:
        deadline = time.monotonic() + 60
        while intruder.PROMPT not in said:
            assert machine.alive() and time.monotonic() < deadline, said
            said += machine.console()
            time.sleep(.05)
    return said


def prefix():
    return guest.Sandbox('nobody').prefix(guest.Limits(
        (64 << 20) + qemu.OVERHEAD, 1 << 30, 60))


def kinds(console):
    return {intruder.kind(frame) for frame in intruder.received(console)}


def test_the_attacker_is_one(tmp_path, host, attacker, monkeypatch):
    """Without any of our walls its packets arrive."""
    monkeypatch.setattr(qemu, '_DHCP', USER)
    said = run(tmp_path, attacker)
    came = host.came()
    # Of slirp, both the loopback's and the other address's.
    assert len(came['tcp']) >= 2 and len(came['udp']) >= 2, (came, said)
    frames = intruder.received(said)
    assert any(frame[23] == 6 and frame[47] == 0x12 for frame in frames)


@pytest.mark.parametrize('wall', ['sandbox', 'restrict', 'both'])
def test_each_wall_holds_alone(tmp_path, host, attacker, monkeypatch, wall):
    """QEMU's user network lets nothing pass, and if it did: where to?"""
    if wall == 'sandbox':
        monkeypatch.setattr(qemu, '_DHCP', USER)
    said = run(tmp_path, attacker, () if wall == 'restrict' else prefix())
    assert host.came() == {'tcp': [], 'udp': []}
    assert kinds(said) >= {intruder.ARP, intruder.DHCP}, said


def test_capture_of_an_attacker(tmp_path, host, attacker, monkeypatch):
    """Both machines of a capture: with a config drive, and with DHCP."""
    said = []

    class Machine(qemu.Machine):
        def console(self):
            more = super().console()
            said[self._config.dhcp] += more
            return more

    said = [b'', b'']
    monkeypatch.setattr(qemu, 'Machine', Machine)
    work = tmp_path / 'work'
    work.mkdir()
    found = capture.capture(attacker, SIZE, work, options(
        boots=2, config_drive=True))
    assert (found.state, len(found.seconds)) == ('booted', 2)
    assert host.came() == {'tcp': [], 'udp': []}
    drive, dhcp = said
    assert intruder.PROMPT in drive and not intruder.received(drive)
    assert kinds(dhcp) >= {intruder.ARP, intruder.DHCP}, dhcp


def caught(tmp_path, sector, **values):
    """The capture of a guest that is stopped, and the most that it took.

    :returns: the reason, and bytes on disk.
    """
    work = tmp_path / 'work'
    work.mkdir()
    most = 0

    def watch(*_):
        nonlocal most
        most = max(most, sum(path.lstat().st_blocks * 512
                             for path in work.glob('*/guest/*')))

    raw = bootsector.disk(tmp_path / 'raw', 1 << 30, sector)
    found = capture.capture(raw, 1 << 30, work, options(**values),
                            progress=watch)
    assert (found.state, found.trace.size) == ('failed', 0)
    assert not list(work.iterdir()) and not children()
    return found.reason, most


@pytest.mark.parametrize('sector', [
    bootsector.glutton(), bootsector.chatterbox()])
def test_a_guest_that_writes_endlessly(tmp_path, monkeypatch, sector):
    monkeypatch.setattr(capture, '_WRITTEN', 1 << 20)
    monkeypatch.setattr(capture, '_LONGEST', 4 << 20)
    reason, most = caught(tmp_path, sector)
    assert reason.endswith('it wrote more than 1048576 bytes')
    assert most <= 2 * (4 << 20)


@pytest.mark.parametrize('sector', [
    bootsector.glutton(), bootsector.chatterbox()])
def test_no_file_is_longer_than_the_kernel_allows(tmp_path, monkeypatch,
                                                  sector):
    """Nobody looks, and the disk is not filled all the same."""
    monkeypatch.setattr(capture, '_LONGEST', 512 << 10)
    reason, most = caught(tmp_path, sector, timeout=3)
    assert reason.endswith('no end in 3 seconds')
    assert 300 << 10 < most <= 2 * (512 << 10)


def test_guests_leave_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, 'RESERVE', 1 << 62)
    with pytest.raises(exception.NoSpace):
        caught(tmp_path, bootsector.sector(b'hello'))
    assert not list((tmp_path / 'work').iterdir()) and not children()


@pytest.mark.parametrize('code', [b'\xeb\xfe', b'\x0f\x0b'])
def test_a_guest_that_loops(tmp_path, code):
    """It computes, or faults for ever."""
    reason, _ = caught(tmp_path, bootsector.signed(code), timeout=1)
    assert reason.endswith('no end in 1 seconds')


@pytest.mark.parametrize('words', [
    b'x' * 4096, b'{"return": {}}\n' * 300])
def test_a_guest_that_floods_the_agents_port(tmp_path, monkeypatch, words):
    """What QEMU hands on of it, as fast as it comes."""
    pair, threads = socket.socketpair, []

    def socketpair():
        near, far = pair()
        threads.append(threading.Thread(
            target=flood, args=(far.dup(),), daemon=True))
        if len(threads) == 2:  # the first is the monitor's
            threads[1].start()
        return near, far

    def flood(far):
        with far, contextlib.suppress(OSError):
            while True:
                far.sendall(words)

    monkeypatch.setattr(qemu.socket, 'socketpair', socketpair)
    reason, _ = caught(tmp_path, bootsector.sector(b'hello'), timeout=2,
                       end=['agent', 'console'])
    assert reason.endswith('no end in 2 seconds')
    threads[1].join(20)
    assert not threads[1].is_alive()


#: Ours may be in a directory that is closed to nobody.
_PYTHON = (shutil.which('python3', path='/usr/bin:/bin')
           or os.path.realpath(sys.executable))
# Runs in the sandbox, as what broke out of QEMU would.
_BREAKOUT = '''
import os, socket, sys
print(*(name for name in os.listdir('/proc') if name.isdigit()))
tcp, udp, name, *hosts = sys.argv[1:]
for host in hosts:
    with socket.socket() as line:
        line.settimeout(1)
        if line.connect_ex((host, int(tcp))) == 0:
            print('tcp', host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        try:
            line.sendto(b'x', (host, int(udp)))
        except OSError:
            continue
with socket.socket(socket.AF_UNIX) as line:
    if line.connect_ex(bytes.fromhex(name)) == 0:
        print('unix', name)
for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
    try:
        socket.socket(socket.AF_PACKET, kind)
    except OSError:
        continue
    print('packet')
for line in open('/proc/net/dev'):
    if ':' in line:
        print(line.split(':')[0].strip())
'''


# The process that bakes, which libvirt lives in, once it is who it will be.
_OVEN = '''
import json, os, socket, sys, types
sys.path[:] = json.loads(sys.argv.pop(1))
sys.modules['libvirt'] = types.SimpleNamespace(**{
    f'VIR_DOMAIN_EVENT_STOPPED_{end}': end for end in (
        'SHUTDOWN', 'DESTROYED', 'CRASHED', 'FAILED')})
from fastboot_glance import oven
request = json.loads(sys.argv.pop(1))
oven.move_in(request)
oven.drop(request['uid'], request['gid'])
os.chdir('/')
for line in open('/proc/self/status'):
    word, _, value = line.partition(':')
    if word in ('CapInh', 'CapPrm', 'CapEff'):
        assert not int(value, 16), line
    if word == 'NoNewPrivs':
        assert int(value), line
    if word in ('Uid', 'Gid'):
        assert set(value.split()) == {str(request[word.lower()])}, line
'''


def baking(sandbox, limits, room):
    """The command of a program where one would be that breaks out of the
    process that bakes."""
    uid, gid = sandbox.ids
    sandbox.own(room)
    home = '/run' if os.geteuid() == 0 else str(room)
    request = {'room': str(room), 'home': home, 'uid': uid, 'gid': gid,
               'mounts': os.stat('/proc/self/ns/mnt').st_ino}
    return [*sandbox.enclosure(limits), sys.executable, '-P', '-c',
            _OVEN + _BREAKOUT, json.dumps(sys.path), json.dumps(request)]


def capturing(sandbox, limits, room):
    """The same, of the QEMU of a capture."""
    return [*sandbox.prefix(limits), _PYTHON, '-I', '-c', _BREAKOUT]


def break_out(where, ports, name, hosts):
    """What a program in the sandbox says that it reaches."""
    sandbox = guest.Sandbox('nobody')
    if not sandbox.isolated:
        return None
    with tempfile.TemporaryDirectory() as room:
        command = where(sandbox, guest.Limits(1 << 30, 1 << 20, 10),
                        pathlib.Path(room))
        done = subprocess.run(
            [*command, *map(str, ports), name.hex(), *hosts], cwd='/',
            text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Of processes it sees itself, unless a container forbids a /proc.
    if '--mount-proc' in command:
        assert done.stdout.startswith('1\n'), done.stdout
    return done.stdout.partition('\n')[2]


@as_root
def test_what_breaks_out_of_qemu_reaches_no_socket_of_ours():
    with tempfile.TemporaryDirectory() as name, \
            socket.socket(socket.AF_UNIX) as server:
        os.chmod(name, 0o755)
        path = pathlib.Path(name, 'agent.sock')
        server.bind(str(path))
        sockets.admit(path, None)
        server.listen()
        done = subprocess.run(
            [*guest.Sandbox('nobody').prefix(guest.Limits(
                1 << 30, 1 << 20, 10)), _PYTHON, '-I', '-c',
             'import socket, sys; print(socket.socket(socket.AF_UNIX)'
             '.connect_ex(sys.argv[1]))', path],
            capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == errno.EACCES


def has_proc(covered):
    """Whether a sandbox of nobody has its own /proc, where parts of the
    host's are covered, as systemd does it."""
    cover = ''.join(f'mount --bind {path} {path}; '
                    f'mount -o remount,bind,ro {path}; ' for path in covered)
    done = subprocess.run(
        ['unshare', '--mount', '--propagation', 'private', 'sh', '-ec',
         f'{cover}setpriv --reuid=65534 --regid=65534 --clear-groups '
         f'--no-new-privs unshare --map-current-user --net --pid --ipc --uts '
         f'--fork --kill-child --mount-proc echo ours || echo none'],
        capture_output=True, text=True, check=True, timeout=60)
    return done.stdout == 'ours\n'


@as_root
def test_the_unit_leaves_the_sandbox_its_proc():
    """The kernel lets nobody mount one where a part of the other is hidden,
    and the builder goes on without."""
    if not has_proc([]):
        pytest.skip('this container forbids a /proc')
    assert not has_proc(['/proc/sys'])
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(UNIT)
    assert has_proc([
        path for option, path in (('ProtectKernelTunables', '/proc/sys'),
                                  ('ProtectKernelLogs', '/proc/kmsg'))
        if unit['Service'].getboolean(option, fallback=False)])


def as_nobody(function, *arguments):
    """Call it in a process that is not root's."""
    with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context('fork'), drop) as pool:
        return pool.submit(function, *arguments).result(60)


def drop():
    guest._namespaces.cache_clear()
    # Imported when it is first named, from where nobody may not look.
    assert concurrent.futures.ThreadPoolExecutor
    if os.geteuid() == 0:
        account = pwd.getpwnam('nobody')
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)


def as_we_are(function, *arguments):
    return function(*arguments)


@pytest.mark.parametrize('run_as, where', [
    pytest.param(as_we_are, capturing, marks=as_root),
    # It imports our code, which may be where nobody may not look.
    pytest.param(as_we_are, baking, marks=as_root),
    (as_nobody, capturing)])
def test_what_breaks_out_of_qemu_reaches_nothing(host, run_as, where):
    name = b'\0fastboot-' + os.urandom(4)
    with socket.socket(socket.AF_UNIX) as hidden:
        hidden.bind(name)
        hidden.listen()
        said = run_as(break_out, where, host.ports, name,
                      ['127.0.0.1', *addresses()])
    if said is None:
        pytest.skip('users have no namespaces of their own here')
    assert said == 'lo\n'
    assert host.came() == {'tcp': [], 'udp': []}


def plain_capture(path):
    """A capture, with and without DHCP, by whoever runs this."""
    found = capture.capture(
        path / 'raw', SIZE, path / 'work',
        options(boots=2, config_drive=True))
    return found.state, found.reason, len(found.seconds)


def test_captures_need_no_root():
    with tempfile.TemporaryDirectory(prefix='fastboot-test-') as name:
        path = pathlib.Path(name)
        bootsector.disk(path / 'raw', SIZE, bootsector.sector(LOGIN))
        (path / 'work').mkdir()
        if os.geteuid() == 0:
            for one in (path, path / 'raw', path / 'work'):
                shutil.chown(one, 'nobody')
        assert as_nobody(plain_capture, path) == ('booted', None, 2)


def test_no_dhcp_in_the_hosts_own_network(tmp_path, monkeypatch):
    """Where the kernel grants no namespaces, there is no network at all."""
    monkeypatch.setattr(guest, '_namespaces', lambda root: [])
    configs = []

    class Machine(qemu.Machine):
        def __init__(self, config, *rest):
            configs.append(config)
            super().__init__(config, *rest)

    monkeypatch.setattr(qemu, 'Machine', Machine)
    bootsector.disk(tmp_path / 'raw', SIZE, bootsector.sector(LOGIN))
    (tmp_path / 'work').mkdir()
    assert plain_capture(tmp_path) == ('booted', None, 2)
    assert [config.dhcp for config in configs] == [False, False]


def test_processor_time_ends():
    """Also for the first process of its namespace, which no soft limit
    stops."""
    sandbox = guest.Sandbox('nobody')
    begun = time.monotonic()
    done = subprocess.run(
        [*sandbox.prefix(guest.Limits(1 << 30, 1 << 20, 1)), 'sh', '-c',
         'trap "" XCPU; while :; do :; done'], check=False, timeout=60)
    assert done.returncode and time.monotonic() - begun < 30
