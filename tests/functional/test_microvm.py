# SPDX-License-Identifier: Apache-2.0
"""A real Debian, baked once and resumed as several servers.

libvirt's embedded driver runs them: no service is needed. They take minutes
without KVM.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import pytest
from oslo_config import cfg

from fastboot_common import configdrive, exception, localapi
from fastboot_common.conf import opts
from fastboot_common.microvm import activation, artifact, clone
from fastboot_common.store.local import LocalStore
from fastboot_glance import bakery, source
from fastboot_nova import client, mirror
from fastboot_nova.agent import api, metrics, microvms, window

libvirt = pytest.importorskip('libvirt')
libvirt_qemu = pytest.importorskip('libvirt_qemu')

from fastboot_nova.microvm import (  # noqa: E402
    compatible,
    connection,
    definition,
    disk,
    lane,
    remote,
    resume,
)

TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'guest-image'
GIB = 1 << 30
MAC = 'fa:16:3e:11:22:33'
PCAP_HEADER = 24
#: Of guests without KVM, while other tests run as well.
PATIENCE = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason='building needs root'),
    pytest.mark.skipif(shutil.which('qemu-system-x86_64') is None,
                       reason='QEMU is not installed'),
]


def options(**changes):
    conf = opts.register(cfg.ConfigOpts())
    conf([], default_config_files=[])
    conf.set_override('timeout', 900, 'bakery')
    for name, value in changes.items():
        conf.set_override(name, value, 'bakery')
    return conf.bakery


@pytest.fixture(scope='module')
def house():
    """A directory with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix='fb') as name:
        path = pathlib.Path(name)
        path.chmod(0o711)
        (path / 's').mkdir()
        yield path


def ctl(house, *words):
    """The answer of fastbootctl."""
    done = subprocess.run(
        [pathlib.Path(sys.executable).with_name('fastbootctl'),
         '--state-dir', house / 's', *map(str, words), '-f', 'json'],
        capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return json.loads(done.stdout)


def build(path, *words):
    subprocess.run([TOOL, 'build', path, '--suite', 'bookworm', *words],
                   check=True, timeout=900)


@pytest.fixture(scope='module')
def baked(house):
    """The artifact, and what came of the bake."""
    if shutil.which('mmdebstrap') is None:
        pytest.skip('mmdebstrap is not installed')
    image = house / 'image.qcow2'
    build(image)
    done = ctl(house, 'microvm', 'bake', image, house / 'microvm',
               '--timeout', 900)
    print('bake:', done)
    assert done['state'] == 'baked', done['reason']
    assert done['memory_bytes'] < 200 << 20
    return house / 'microvm'


@pytest.fixture(scope='module')
def hypervisor(house):
    with connection.opened(connection.embedded(house / 'root')) as found:
        yield found


class Server:
    """A server that is resumed, and asked by its guest agent."""

    def __init__(self, baked, hypervisor, room, name='web', wishes=b'',
                 **changes):
        self.baked, self.hypervisor, self.room = baked, hypervisor, room
        self.uuid = str(uuid.uuid4())
        self.drive = room / 'config.iso'
        configdrive.build(
            self.drive, name, b'#cloud-config\nwrite_files:\n- path: /mark\n'
            b'  content: ' + self.uuid.encode() + b'\nruncmd:\n'
            b'- cat /proc/self/personality /proc/self/environ > /started\n'
            + wishes, plain=True)
        disk.make(baked, room / 'disk', 10 * GIB)
        self.lane = lane.Lane.create(baked, room / 'lane')
        self.xml = definition.Server(**{
            'name': name, 'uuid': self.uuid, 'disk': room / 'disk',
            'console': room / 'console', 'config_drive': self.drive,
            **changes}).xml()
        self.name = name
        self.domain = None

    def resume(self, told=None, **changes):
        done = resume.resume(self.hypervisor, self.lane, resume.Spec(**{
            'xml': self.xml, 'hostname': self.name, 'disk_size': 10 * GIB,
            'deadline': PATIENCE, **changes}), told=told)
        print(self.name, done.seconds)
        self.domain = done.domain
        return done

    def ask(self, command, **arguments):
        return json.loads(libvirt_qemu.qemuAgentCommand(
            self.domain, json.dumps({'execute': command,
                                     'arguments': arguments}), 60, 0)
            )['return']

    def listen(self, path):
        """Write down each frame between the guest and its network."""
        domain = self.hypervisor.lookupByName(self.name)
        path.touch(0o666)
        path.chmod(0o666)
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(
            domain, json.dumps({'execute': 'object-add', 'arguments': {
                'qom-type': 'filter-dump', 'id': 'wire',
                'netdev': 'hostnet0', 'file': str(path)}}), 0))
        assert 'return' in answer, answer

    def run(self, script):
        """What a script in the guest prints."""
        known = self.ask('guest-exec', path='/bin/sh', arg=['-c', script],
                         **{'capture-output': True})['pid']
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.ask('guest-exec-status', pid=known)
            if found['exited']:
                return base64.b64decode(
                    found.get('out-data', '')).decode().strip()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def boot(self):
        """Start it as it is defined, and wait for its agent."""
        self.domain.create()
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                self.ask('guest-ping')
                return
            assert time.monotonic() < deadline
            time.sleep(1)

    def destroy(self):
        if self.domain:
            with contextlib.suppress(libvirt.libvirtError):
                self.domain.destroy()
            self.domain.undefine()


@pytest.fixture
def servers(baked, hypervisor, house):
    """Makes servers, which are gone afterwards."""
    made = []
    with tempfile.TemporaryDirectory(dir=house) as name:

        def make(server='web', **changes):
            room = pathlib.Path(name, str(len(made)))
            room.mkdir()
            made.append(Server(baked, hypervisor, room, server, **changes))
            return made[-1]

        try:
            yield make
        finally:
            for one in made:
                one.destroy()


IDENTITY = {
    'machine-id': 'cat /etc/machine-id',
    'uuid': 'cat /sys/class/dmi/id/product_uuid',
    'serial': 'cat /sys/class/dmi/id/product_serial',
    'hostname': 'hostname',
    'key': 'cat /etc/ssh/ssh_host_ed25519_key.pub',
}


def identity(server):
    return {name: server.run(script) for name, script in IDENTITY.items()}


def with_interface(server):
    server.xml = server.xml.replace('</devices>', (
        f"<interface type='user'><mac address='{MAC}'/>"
        f"<model type='virtio'/></interface></devices>"))
    return server


def test_what_a_bake_leaves(baked):
    found = artifact.read(baked)
    assert {path.name for path in baked.iterdir()} == {
        'memory', 'disk.qcow2', 'microvm.json'}
    assert len(found.identity.binary) >= 1
    assert len(found.identity.text) >= 3
    assert found.machine.vcpus == options().max_vcpus
    assert found.parts['memory'].size < 300 << 20
    assert found.parts['disk.qcow2'].size < 40 << 20
    info = json.loads(subprocess.run(
        ['qemu-img', 'info', '-U', '--output=json', baked / 'disk.qcow2'],
        check=True, capture_output=True).stdout)
    assert info['backing-filename'].endswith('/image.qcow2')
    assert not list((baked.parent / 's' / 'work').iterdir())


def test_the_id_of_the_bake_is_not_on_the_disk(baked, tmp_path):
    """A server whose host fails before its own is written gets a new one."""
    raw = tmp_path / 'raw'
    subprocess.run(['qemu-img', 'convert', '-O', 'raw', baked / 'disk.qcow2',
                    raw], check=True)
    assert subprocess.run(
        ['debugfs', '-R', 'cat /etc/machine-id', f'{raw}?offset={1 << 20}'],
        check=True, capture_output=True).stdout == b''
    assert len(subprocess.run(
        ['debugfs', '-R', 'cat /etc/hostname', f'{raw}?offset={1 << 20}'],
        check=True, capture_output=True).stdout) > 1


def test_the_keys_of_the_bake_are_not_on_the_disk(baked, house, tmp_path):
    """cloud-init made some, and they were removed; so were their blocks."""
    raw = tmp_path / 'raw'
    subprocess.run(['qemu-img', 'convert', '-O', 'raw',
                    baked / 'disk.qcow2', raw], check=True)
    # The first words in them; the line above is in programs, too.
    words = base64.b64encode(b'openssh-key-v1\0')
    for path in (baked / 'disk.qcow2', raw):
        assert subprocess.run(
            ['grep', '-q', '-a', words, path]).returncode == 1, path


def test_copies_are_servers_of_their_own(servers, hypervisor, baked):
    compatible.check(artifact.read(baked).key, hypervisor)
    one = with_interface(servers('one', memory=1024, vcpus=2))
    one.resume(stage=activation.DONE)
    two = servers('two')
    two.resume()
    # Once: the second time it would be a running server's disk.
    with pytest.raises(resume.ResumeFailed, match='there is a domain'):
        two.resume()
    assert (two.room / 'disk').exists() and two.domain.isActive()
    mine, others = identity(one), identity(two)
    for name in IDENTITY:
        assert mine[name] and mine[name] != others[name], name
    assert mine['uuid'] == mine['serial'] == one.uuid
    assert mine['machine-id'] == one.uuid.replace('-', '')
    assert mine['hostname'] == 'one'
    seed = 'sha256sum /var/lib/systemd/random-seed'
    assert one.run(seed) != two.run(seed) != ''
    leases = 'ls /var/lib/dhcp/*.leases /run/systemd/netif/leases/* ' \
        '/var/lib/systemd/network/* /etc/dhcpcd.duid 2>/dev/null'
    assert one.run(leases) and not two.run(leases)
    numbers = 'for i in 1 2 3 4 5 6 7 8; do read x < ' \
        '/proc/sys/kernel/random/uuid; echo $x; done'
    assert not (set(one.run(numbers).split())
                & set(two.run(numbers).split()))

    # What was plugged is there, and what the metadata says was done.
    assert one.run('nproc') == '2'
    assert int(one.run("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' "
                       "/proc/meminfo")) > 850 << 10
    assert int(one.run('df --output=size -B1 / | tail -n 1')) > 9 * GIB
    assert one.run('cat /mark') == one.uuid
    # cloud-init made the kinds of keys that lacked, and kept the other.
    assert one.run('ls /etc/ssh/ssh_host_*_key | wc -l') == '2'
    assert MAC in one.run('cat /sys/class/net/*/address')
    assert '10.0.2.15' in one.run('ip -4 address')
    assert one.run('systemctl is-active ssh') == 'active'
    assert not one.run('systemctl --failed --no-legend')
    assert abs(int(one.run('date +%s')) - time.time()) < 30

    # What it runs is laid out at random, as what woke it up was not.
    started = one.run('tr "\\000" "\\n" < /started').splitlines()
    assert started[0] == '00000000'
    assert not any(word.startswith('PYTHONHASHSEED') for word in started)

    # Of what woke it up nothing is left, nor of the guest it was.
    assert not one.run('ls -d /run/fastboot 2>/dev/null')
    assert not one.run('systemctl list-units --all --no-legend '
                       '"fastboot-activator*"')
    assert one.run('ls /var/log/journal') == mine['machine-id']
    baked_uuid = str(artifact.read(baked).identity.uuid)
    assert not one.run(
        f'grep -rlIs -e {baked_uuid} -e {baked_uuid.replace("-", "")} '
        f'-e baking /etc /root /home /var/lib /var/log')
    assert not one.run('cat /root/.ssh/authorized_keys '
                       '/home/*/.ssh/authorized_keys 2>/dev/null')


def test_cloud_init_waits_for_the_links(servers):
    """Nova raises them when Neutron is ready, which may take longer than
    the guest."""
    one = with_interface(servers('linked'))
    wire = one.room / 'wire'
    done = one.resume(linked=False, told=lambda phase: (
        phase == 'plug' and one.listen(wire)))
    time.sleep(20)
    assert one.run('cat /sys/class/net/e*/carrier') == '0'
    assert wire.stat().st_size == PCAP_HEADER, 'nobody spoke'
    assert one.run('ls /run/fastboot') and not one.run(
        'ls /run/cloud-init/enabled /mark 2>/dev/null')
    done.link()
    deadline = time.monotonic() + PATIENCE
    while one.run('cat /mark 2>/dev/null') != one.uuid:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert '10.0.2.15' in one.run('ip -4 address')
    assert wire.stat().st_size > PCAP_HEADER, 'it would have been heard'
    assert not one.run('systemctl --failed --no-legend')


def test_what_user_data_leaves_running(servers):
    """It outlives cloud-init, as it does where a server boots.

    The one that ends the machine waits until cloud-init is gone, and then
    for a daemon to say that it is there.
    """
    one = servers('daemons', wishes=(
        b"- nohup sh -c 'sleep 15; touch /alive' >/dev/null 2>&1 &\n"
        b'power_state:\n'
        b'  mode: poweroff\n'
        b'  condition: while ! [ -e /alive ]; do sleep 1; done\n'))
    one.resume(stage=activation.DONE)
    assert one.domain.isActive()
    deadline = time.monotonic() + PATIENCE
    while one.domain.isActive():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_without_entropy_copies_are_alike(servers):
    numbers = 'i=0; while [ $i -lt 2000 ]; do read x < ' \
        '/proc/sys/kernel/random/uuid; echo $x; i=$((i+1)); done'
    seen = []
    for _ in range(2):
        one = servers()
        one.resume(entropy=b'', stage='RANDOM')
        seen.append(set(one.run(numbers).split()))
        one.destroy()
        one.domain = None
    assert seen[0] & seen[1], 'the step would not be needed'


def test_it_boots_as_defined_afterwards(servers):
    one = servers('again', memory=1024)
    one.resume(stage=activation.DONE)
    before = identity(one)
    one.run('echo kept > /root/kept; sync')
    # From inside: that ends this machine, and the next is the defined one.
    one.ask('guest-exec', path='/bin/systemctl', arg=['reboot'])
    deadline = time.monotonic() + PATIENCE
    while one.domain.isActive():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert 'pcie-root-port' not in one.xml
    one.boot()
    assert one.run('systemctl is-system-running --wait') in (
        'running', 'degraded')
    assert identity(one) == before
    assert one.run('cat /root/kept') == 'kept'
    assert one.run('cat /mark') == one.uuid
    assert not one.run('find / -xdev -path /proc -prune -o '
                       '-name "*fastboot-activator*" -print')
    assert not one.run('ls -d /dev/virtio-ports/org.openstack.fastboot.0 '
                       '/run/fastboot 2>/dev/null')


def test_where_cloud_inits_python_cannot_be_had(
        baked, hypervisor, house, tmp_path, monkeypatch):
    """The shell's activator does what the other does."""
    script, tried = activation.user_data(), b"if sys.argv[1:] == ['--try']:\n"
    assert script.count(tried) == 1
    monkeypatch.setattr(activation, 'user_data', lambda: script.replace(
        tried, tried + b'        sys.exit(1)\n'))
    image = house / 'image.qcow2'
    with source.open_source(image, house) as raw:
        done = bakery.bake(raw.raw_path, raw.virtual_size, house / 'shell',
                           house, options(), backing=(image, 'qcow2'))
    assert done.state == 'baked', done.reason
    one = with_interface(Server(house / 'shell', hypervisor, tmp_path,
                                'shell', memory=1024, vcpus=2))
    try:
        one.resume(stage=activation.DONE)
        found = identity(one)
        assert found['uuid'] == found['serial'] == one.uuid
        assert found['machine-id'] == one.uuid.replace('-', '')
        assert found['hostname'] == 'shell'
        assert one.run('ls /etc/ssh/ssh_host_*_key | wc -l') == '2'
        assert one.run('nproc') == '2'
        assert int(one.run("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' "
                           "/proc/meminfo")) > 850 << 10
        assert one.run('cat /mark') == one.uuid
        assert '10.0.2.15' in one.run('ip -4 address')
        assert one.run('systemctl is-active ssh') == 'active'
        assert abs(int(one.run('date +%s')) - time.time()) < 30
        assert not one.run('systemctl --failed --no-legend')
        assert not one.run('ls -d /run/fastboot 2>/dev/null')
        assert one.run('ls /var/log/journal') == found['machine-id']
    finally:
        one.destroy()


def nothing_left(hypervisor, house, one):
    assert not hypervisor.listAllDomains()
    assert not (one.room / 'disk').exists()
    assert not machines(house)


def fails(one, seconds, *phases, **changes):
    """It is not resumed, and that is known in time."""
    begun = time.monotonic()
    with pytest.raises(resume.ResumeFailed) as caught:
        one.resume(**changes)
    assert caught.value.phase in phases
    assert time.monotonic() - begun < seconds


def test_a_stream_that_is_cut_off(servers, hypervisor, house):
    one = servers()
    os.truncate(one.lane.path, one.lane.path.stat().st_size // 2)
    fails(one, 20, 'dress', 'load')
    nothing_left(hypervisor, house, one)


def test_a_machine_that_is_another(servers, hypervisor, house, monkeypatch):
    one = servers()
    live = clone.live

    def other(saved, instance):
        return live(saved, instance).replace(
            'freePageReporting="on"', '')

    monkeypatch.setattr(clone, 'live', other)
    with pytest.raises(resume.ResumeFailed) as caught:
        one.resume()
    assert caught.value.phase == 'load'
    nothing_left(hypervisor, house, one)


def machines(house):
    """Numbers of the processes that the hypervisor runs guests in."""
    words = subprocess.run(['ps', 'axww', '-o', 'pid,args'], check=True,
                           capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in words.splitlines()
            if line.split()[1].startswith('/usr/bin/qemu-system')
            and f'{house}/root' in line]


def test_a_processor_that_this_host_has_not(servers, hypervisor, house):
    """QEMU takes it, and the guest would hang; libvirt compares before."""
    one = servers()
    head = one.lane._head
    assert "name='hypervisor'" in head.cookie
    one.lane._head = dataclasses.replace(head, cookie=head.cookie.replace(
        "name='hypervisor'", "name='avx512ifma'"))
    with pytest.raises(resume.ResumeFailed, match='avx512ifma') as caught:
        one.resume()
    assert caught.value.phase == 'load'
    nothing_left(hypervisor, house, one)


def test_a_machine_that_hangs_while_it_loads(servers, hypervisor, house):
    one = servers()
    stopped = []

    def stop():
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            for number in machines(house):
                os.kill(number, signal.SIGSTOP)
                stopped.append(number)

    thread = threading.Thread(target=stop)
    thread.start()
    fails(one, 60, 'load', deadline=5)
    thread.join()
    assert stopped
    nothing_left(hypervisor, house, one)


def test_a_machine_that_hangs_when_it_is_woken(
        servers, hypervisor, house, monkeypatch):
    one = servers()
    request = activation.request

    def stop(*words, **more):
        [number] = machines(house)
        os.kill(number, signal.SIGSTOP)
        return request(*words, **more)

    monkeypatch.setattr(activation, 'request', stop)
    fails(one, 60, 'activate', deadline=20)
    nothing_left(hypervisor, house, one)


def test_a_guest_that_is_silent(servers, hypervisor, house, monkeypatch):
    monkeypatch.setattr(activation, 'request',
                        lambda *words, **more: b'NOISE\n')
    one = servers()
    fails(one, 30, 'wait', deadline=15)
    nothing_left(hypervisor, house, one)


def test_the_command(baked, house):
    """It leaves a running server, whose QEMU we end by its number."""
    done = ctl(house, 'microvm', 'resume', baked, '--name', 'cmd',
               '--memory', 640, '--deadline', PATIENCE,
               '--uri', connection.embedded(house / 'r2'))
    number = int((house / 'r2' / 'run' / 'qemu' / 'cmd.pid').read_text())
    try:
        assert list(done['seconds'])[:4] == [
            'define', 'dress', 'load', 'plug']
        disk = pathlib.Path(done['disk'])
        assert disk.stat().st_size > 1 << 20
        assert {path.name for path in disk.parent.iterdir()} == {
            'config.iso', 'console.log', 'disk.qcow2'}
        words = pathlib.Path(f'/proc/{number}/cmdline').read_text()
        assert done['uuid'] in words
    finally:
        os.kill(number, signal.SIGKILL)


@pytest.fixture(scope='module')
def repository(house):
    """A repository with the image that was baked, as hosts have it."""
    subprocess.run(
        [pathlib.Path(sys.executable).with_name('fastbootctl'),
         '--state-dir', house / 's', 'repo', 'init'], check=True, timeout=60)
    add(house, 'debian', house / 'image.qcow2')


def add(house, name, image):
    done = ctl(house, 'image', 'add', image, '--id', name, '--boots', 1)
    assert done['boot'] == 'booted'


def put(house, directory, name):
    """Publish and fetch; what that took, and the artifact that came."""
    done = ctl(house, 'microvm', 'publish', directory, name)
    assert done['created']
    target = house / f'{name}-again'
    came = ctl(house, 'microvm', 'fetch', name, target)
    for path in directory.iterdir():
        subprocess.run(['cmp', path, target / path.name], check=True)
    print(f'{name}: {done["stored_bytes"] / 2**20:.1f} MiB stored of '
          f'{done["pages"] / 256:.0f}, {done["shared_pages"] / 256:.0f} of '
          f'them the image\'s; split {done["seconds"]["split"]} s, publish '
          f'{done["seconds"]["publish"]} s, fetch {came["seconds"]} s')
    return done, target


def test_in_a_repository(baked, repository, house, hypervisor, tmp_path):
    """Small, equal, and what comes back is a server."""
    first, came = put(house, baked, 'debian')
    assert first['stored_bytes'] <= 32 << 20
    one = Server(came, hypervisor, tmp_path, 'fetched')
    try:
        one.resume()
        assert one.run('hostname') == 'fetched'
    finally:
        one.destroy()

    derived = house / 'derived.qcow2'
    subprocess.run([TOOL, 'derive', '--package', 'git',
                    house / 'image.qcow2', derived], check=True, timeout=900)
    add(house, 'derived', derived)
    done = ctl(house, 'microvm', 'bake', derived, house / 'other',
               '--timeout', 900)
    assert done['state'] == 'baked', done['reason']
    second, _ = put(house, house / 'other', 'derived')
    share = second['stored_bytes'] / first['stored_bytes']
    print(f'the second takes {share:.0%} of the first')
    assert share <= .6


class Room:
    """A disk that is never full."""

    def is_roomy(self, count):
        return True


def mirrored(path, location):
    found = mirror.Mirror(path, LocalStore(location))
    found.refresh()
    for image in found.state.images.values():
        found.pull(image)
    return found


def test_lanes_that_the_agent_has(servers, baked, repository, house,
                                  hypervisor, tmp_path):
    """As nova-compute does it: one lane, one server after the other."""
    ctl(house, 'microvm', 'publish', baked, 'debian')
    location = house / 's' / 'repository'
    known = microvms.Microvms(
        house / 'host', mirrored(tmp_path / 'images', location), Room(),
        metrics.Metrics(), enabled=True,
        opened=lambda path: mirrored(path, location / 'microvms'),
        platforms=lambda: compatible.platforms(hypervisor),
        times=window.Window(''), limit=None, interval=60, jitter=0, lanes=1,
        disk=20 * GIB, memory=1 << 30)
    known.follow()
    begun = time.monotonic()
    known.keep()
    print(f'ready after {time.monotonic() - begun:.1f} s: {known.rows()}')
    path = house / 'agent.sock'
    with localapi.Server(path, api.routes(lambda: known, dict)):
        agent = client.Agent(str(path), 5)
        seen = []
        for name in ('first', 'second'):
            one = servers(name)
            begun = time.monotonic()
            one.lane.remove()
            one.lane = remote.take(agent, 'debian', one.uuid)
            print(f'taken after {time.monotonic() - begun:.3f} s')
            # The disk, too, is the artifact's.
            (one.room / 'disk').unlink()
            disk.make(one.lane.directory, one.room / 'disk', 10 * GIB)
            done = one.resume()
            one.lane.give_back(remote.RESUMED, seconds=done.seconds)
            seen.append((one.lane.path, identity(one)))
            assert seen[-1][1]['uuid'] == one.uuid
            assert seen[-1][1]['hostname'] == name
    assert seen[0][0] == seen[1][0]
    assert not set(seen[0][1].values()) & set(seen[1][1].values())
    row, = [row for row in known.rows() if row['image'] == 'debian']
    assert (row['resumed'], row['fallbacks'], row['lanes']) == (2, 0, 1)


def test_another_class_of_hosts(baked, hypervisor):
    key = artifact.read(baked).key
    for change in ({'qemu': '7.2.0'}, {'arch': 'aarch64'}, {'recipe': 99},
                   {'virt_type': 'xen'}):
        with pytest.raises(clone.Unsuitable):
            compatible.check(dataclasses.replace(key, **change), hypervisor)


def test_an_image_without_cloud_init(house):
    image = house / 'minimal.qcow2'
    build(image, '--variant', 'minimal', '--size', '1G')
    with source.open_source(image, house) as raw:
        done = bakery.bake(raw.raw_path, raw.virtual_size,
                           house / 'minimal', house, options(timeout=60))
    assert done.state == 'refused'
    assert 'cloud-init' in done.reason
    assert not list((house / 'minimal').iterdir())


def test_no_directory_with_files(house, tmp_path):
    (tmp_path / 'mine').write_text('')
    with pytest.raises(exception.Exists):
        bakery.bake(tmp_path / 'x', GIB, tmp_path, house, options())
