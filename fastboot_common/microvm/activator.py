# SPDX-License-Identifier: Apache-2.0
"""What waits in a baked guest, and makes a server of each copy of it.

This runs inside guests, by the Python that cloud-init runs by, 3.6 and
later; no other part of the project is there. It lives in /run, that is in
memory: in what is saved, and on no disk. It waits with all of cloud-init
imported, which takes a guest without KVM half a minute. The host's side is
activation.py; both speak as reference/microvm says.
"""

import collections.abc
import ctypes
import fcntl
import gc
import glob
import importlib
import mmap
import os
import pkgutil
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import traceback
import types

PORT = '/dev/virtio-ports/org.openstack.fastboot.0'
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
LINE_LIMIT = 4096
SETTLE_SECONDS = 180
PLUG_SECONDS = 8
#: The links come when Nova and Neutron are ready; Nova's limit is 300.
LINK_SECONDS = 600
KEY_SECONDS = 30
TRIM_SECONDS = 20
#: MiB that stay free when the rest is wiped, and bytes wiped at a time.
WIPE_MARGIN, WIPE_PIECE = 10, 4 << 20
MEMORY = '/sys/devices/system/memory/memory[0-9]*'
CPUS = '/sys/devices/system/cpu/cpu[0-9]*'
INTERFACES = '/sys/class/net/*/device'
#: Of a server's first boot; whoever has them twice has two servers.
STATE = ('/var/lib/cloud/instance', '/var/lib/cloud/instances',
         '/var/lib/cloud/data', '/var/lib/cloud/sem', '/run/cloud-init')
SECRETS = ('/etc/ssh/ssh_host_*key*', '/var/lib/systemd/random-seed',
           '/var/lib/dhcp/*', '/var/lib/dhclient/*', '/var/lib/dhcpcd/*',
           '/etc/dhcpcd.duid', '/var/lib/wicked/*',
           '/var/lib/NetworkManager/*.lease',
           '/var/lib/NetworkManager/secret_key',
           '/var/lib/systemd/network/*', '/run/systemd/netif/leases/*')
#: Services that go on over the sleep. All others that run are stopped for
#: it: their generators of random numbers, and what they know of the machine,
#: would be in every copy.
KEPT = re.compile(
    r'(systemd-(journald|udevd|logind)|dbus|dbus-broker|qemu-(guest-agent|ga)'
    r'|(serial-|console-)?getty(@.*)?|user@.*|cloud-.*|fastboot-.*|polkit)'
    r'\.service')
#: They went on, and show the name of the guest that was baked.
PROMPTS = ('getty@*.service', 'serial-getty@*.service')
NETWORK = ('systemd-networkd.service', 'systemd-resolved.service',
           'NetworkManager.service')
ONLINE_SECONDS = 150
MODULES = ('cloudinit.config', 'cloudinit.sources', 'cloudinit.net',
           'cloudinit.distros', 'cloudinit.handlers', 'cloudinit.reporting')
SOURCES = ('DataSourceConfigDrive', 'DataSourceOpenStack', 'DataSourceNone')
RUNTIME = '/run/cloud-init/cloud.cfg'
LOG = '/var/log/cloud-init-output.log'
REHEARSAL = '/run/fastboot/rehearsal'


def say(port: int, word: str, *more: int) -> None:
    """Tell the host something: a word, the uptime, numbers."""
    with open('/proc/uptime') as file:
        uptime = file.read().split()[0]
    line = ' '.join([word, uptime] + [str(one) for one in more])
    # A host that has hung up must not stop us: writes would wait for it.
    os.set_blocking(port, False)
    try:
        os.write(port, line.encode() + b'\n')
    except OSError as error:
        print(word, error, file=sys.stderr)
    finally:
        os.set_blocking(port, True)


def lines(port: int) -> 'collections.abc.Iterator[list[str]]':
    """What the host says."""
    rest = b''
    while True:
        line, newline, behind = rest.partition(b'\n')
        if newline:
            rest = behind
            yield line.decode('ascii', 'replace').split()
            continue
        if len(rest) > LINE_LIMIT:
            rest = b''
        data = os.read(port, 4096)
        if not data:
            time.sleep(0.05)  # nobody is connected
        rest += data


def write(path: str, text: str) -> None:
    """Make or replace a small file."""
    with open(path, 'w') as file:
        file.write(text)


def read(path: str) -> str:
    """A small file without the white space around it."""
    with open(path) as file:
        return file.read().strip()


def run(*command: str, timeout: 'float | None' = None) -> int:
    """Run a program; its status."""
    try:
        return subprocess.call(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return 127


def remove(patterns: 'tuple[str, ...]') -> None:
    """Remove files, links and directories."""
    for pattern in patterns:
        for path in glob.glob(pattern):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)


def erase(patterns: 'tuple[str, ...]') -> None:
    """Overwrite files, links aside; where the file system copies on write,
    what it wrote before is left to trimming."""
    for path in (path for pattern in patterns for path in glob.glob(pattern)):
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, 'r+b') as file:
                file.write(bytes(os.path.getsize(path)))
                file.flush()
                os.fsync(file.fileno())


# Before the guest is saved

def randomize_children() -> None:
    """Lay programs out at random again; bakery.sh did not do so for this."""
    os.environ.pop('PYTHONHASHSEED', None)
    ctypes.CDLL(None).personality(0)


def preload() -> 'types.ModuleType':
    """Import what cloud-init may need; its main module."""
    for package in MODULES:
        path = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(path):
            name = module.name
            if package == 'cloudinit.sources' and name not in SOURCES:
                continue
            if package == 'cloudinit.config' and not name.startswith('cc_'):
                continue
            try:
                importlib.import_module(package + '.' + name)
            except Exception as error:
                print('without', name, error, file=sys.stderr)
    return importlib.import_module('cloudinit.cmd.main')


def settle() -> None:
    """Wait until the boot is over; the host's patience ends sooner."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        if os.path.exists('/run/cloud-init/result.json'):
            break
        time.sleep(0.5)
    run('systemctl', 'is-system-running', '--wait', timeout=SETTLE_SECONDS)


def running() -> 'list[str]':
    """The services that run, without those that go on."""
    try:
        words = subprocess.check_output(
            ['systemctl', 'list-units', '--type=service', '--state=running',
             '--no-legend', '--plain', '--no-pager'],
            stdin=subprocess.DEVNULL, timeout=60).decode()
    except (OSError, subprocess.SubprocessError):
        return []
    names = [line.split()[0] for line in words.splitlines() if line.split()]
    return [name for name in names if not KEPT.fullmatch(name)]


def possible() -> int:
    """Processors that this kernel can ever have.

    Linux 6.9 and later refuse those that come later where they see no
    hypervisor, as under TCG.
    """
    last = read('/sys/devices/system/cpu/possible').split(',')[-1]
    return int(last.split('-')[-1]) + 1


def machine_ids() -> 'list[str]':
    """The files with this machine's id."""
    other = '/var/lib/dbus/machine-id'
    has_other = os.path.exists(other) and not os.path.islink(other)
    return ['/etc/machine-id'] + ([other] if has_other else [])


def forget(started: float) -> None:
    """Remove what this boot left on the disk for itself."""
    # Of a cluster that holds something else as well, nothing is trimmed.
    erase(SECRETS)
    remove(STATE + SECRETS)
    # Whose guest ends before its own is on the disk gets a new one at its
    # next boot, and not the same as all the others.
    for path in machine_ids():
        write(path, '')
    for path in glob.glob('/var/log/*'):
        if os.path.isfile(path) and os.path.getmtime(path) >= started:
            os.truncate(path, 0)
    os.makedirs('/run/cloud-init', exist_ok=True)


def free() -> int:
    """MiB that nothing is in."""
    found = re.search(r'MemFree: *(\d+) kB', read('/proc/meminfo'))
    return int(found.group(1)) >> 10 if found else 0


def wipe() -> None:
    """Fill free memory with zeros, which cost nothing to save.

    A page that was freed keeps what was in it. In a child, as the kernel may
    kill who takes the last.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        write('/proc/self/oom_score_adj', '1000')
        held = []
        while free() > WIPE_MARGIN:
            piece = mmap.mmap(-1, WIPE_PIECE)
            for at in range(0, WIPE_PIECE, mmap.PAGESIZE):
                piece[at] = 0
            held.append(piece)
    finally:
        os._exit(0)


def rehearse() -> None:
    """Have in memory what a server needs first.

    It is read a page here and there, each a wait for the host: 218 reads
    until a server was somebody, 57 with this. A Debian's µVM grows by 3.6
    MiB, and by 0.3 in the repository, which has many of them as the image's.
    """
    randomize(os.urandom(64))
    try:
        os.makedirs(REHEARSAL)
        key = keygen(REHEARSAL, 'rehearsal')
        if key:
            key.wait(KEY_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        print('rehearsal', error, file=sys.stderr)
    finally:
        shutil.rmtree(REHEARSAL, ignore_errors=True)
    run('udevadm', 'trigger', '--action=change', '--subsystem-match=block',
        '--subsystem-match=memory', '--subsystem-match=net')
    run('udevadm', 'settle', '--timeout=10')


def quiesce() -> None:
    """Leave as little in memory and in the air as the guest can."""
    gc.collect()
    os.sync()
    # What the bake deleted, its keys among it, is still in the blocks.
    run('fstrim', '--all', timeout=TRIM_SECONDS)
    write('/proc/sys/vm/drop_caches', '3')
    rehearse()
    wipe()
    # Who wakes up gets a name first, which takes 0.9 s and not 1.7 if udev
    # starts no programs meanwhile for all that was plugged (one processor,
    # without KVM).
    announce(False)


def announce(now: bool) -> None:
    """Have udev tell of new hardware now, or later."""
    run('udevadm', 'control', '--timeout=5',
        '--start-exec-queue' if now else '--stop-exec-queue')


# After it woke up as a server

def randomize(entropy: bytes) -> None:
    """Give the kernel's generator bits of its own, and make it use them.

    Writing alone does not: copies go on giving the same numbers until the
    kernel reseeds by itself, a minute or more later.
    """
    with open('/dev/urandom', 'wb') as file:
        fcntl.ioctl(file, RNDADDENTROPY, struct.pack(
            'ii', len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(file, RNDRESEEDCRNG)  # Linux 4.14
    random.seed()


def switch_on(pattern: str, value: str, known: 'set[str]') -> None:
    """Switch on what was plugged; each is looked at once."""
    for path in set(glob.glob(pattern)) - known:
        try:
            if read(path) != value:
                write(path, value)
            known.add(path)
        except OSError as error:  # it is tried again
            print(path, error, file=sys.stderr)


def wait_for_hardware(cpus: int, blocks: int) -> None:
    """Switch on processors and memory when the kernel has found them."""
    deadline = time.monotonic() + PLUG_SECONDS
    known = set()  # type: set[str]
    while True:
        switch_on(CPUS + '/online', '1', known)
        switch_on(MEMORY + '/state', 'online', known)
        on = os.sysconf('SC_NPROCESSORS_ONLN')
        if on >= cpus and len(glob.glob(MEMORY + '/state')) >= blocks:
            return
        if time.monotonic() > deadline:
            raise RuntimeError('plugged hardware does not come')
        time.sleep(0.02)


def rename(uuid: str, hostname: str) -> None:
    """Become somebody: ids, name and seed."""
    for path in machine_ids():
        write(path, uuid.replace('-', '') + '\n')
    socket.sethostname(hostname)
    write('/etc/hostname', hostname + '\n')
    if os.path.isdir('/var/lib/systemd'):
        with open('/var/lib/systemd/random-seed', 'wb') as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(os.urandom(512))


def begin_key(hostname: str) -> 'subprocess.Popen[bytes] | None':
    """Begin to make a host key, which takes a while; for clients may come
    before cloud-init does. It makes the kinds that lack: each costs a
    program's start at least, RSA takes seconds.
    """
    remove(SECRETS)
    return keygen('/etc/ssh', hostname)


def keygen(directory: str, hostname: str
           ) -> 'subprocess.Popen[bytes] | None':
    """What makes a key in a directory, if anything does."""
    if not shutil.which('ssh-keygen') or not os.path.isdir(directory):
        return None
    return subprocess.Popen(
        ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '',
         '-C', 'root@' + hostname,
         '-f', directory + '/ssh_host_ed25519_key'],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def interfaces() -> 'list[str]':
    """The names of those that are hardware."""
    return [path.split('/')[-2] for path in glob.glob(INTERFACES)]


def switch(name: str, up: bool) -> bool:
    """Set an interface up or down; whether it was otherwise."""
    request = struct.Struct('16sh22x')
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            flags = request.unpack(fcntl.ioctl(
                control, SIOCGIFFLAGS, request.pack(name.encode(), 0)))[1]
            if bool(flags & IFF_UP) == up:
                return False
            fcntl.ioctl(control, SIOCSIFFLAGS, request.pack(
                name.encode(), flags ^ IFF_UP))
            return True
    except OSError as error:  # it is gone
        print(name, error, file=sys.stderr)
        return False


def has_link(name: str) -> bool:
    """Whether an interface, which is up, has a carrier, or is gone."""
    try:
        return read('/sys/class/net/' + name + '/carrier') == '1'
    except FileNotFoundError:
        return True  # it was unplugged: none is to come
    except OSError:
        return False


def wait_for_links(count: int) -> None:
    """Wait until the host has raised the links of its interfaces.

    It does so when Nova and Neutron are ready, for which a server that boots
    waits, too, before its first instruction. Only an interface that is up
    tells; it is left as it was, as cloud-init is used to.
    """
    deadline = time.monotonic() + LINK_SECONDS
    plugged = time.monotonic() + PLUG_SECONDS
    while len(interfaces()) < count and time.monotonic() < plugged:
        time.sleep(0.02)
    # Names that udev gives are not taken by an interface that is up.
    run('udevadm', 'settle', '--timeout=10')
    found = interfaces() if count else []
    raised = [name for name in found if switch(name, True)]
    while not all(map(has_link, found)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for name in raised:
        switch(name, False)


def stage(main: 'types.ModuleType', *words: str) -> int:
    """One of cloud-init's stages, in a child; its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] >> 8
    status = 99  # type: int | str | None
    try:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ['/usr/bin/cloud-init'] + list(words)
        status = main.main(sys.argv)
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else bool(status))


def be_born(port: int, main: 'types.ModuleType', services: 'list[str]',
            machine: str) -> None:
    """cloud-init for the new server, and the services that were stopped."""
    os.makedirs('/run/cloud-init', exist_ok=True)
    write('/run/cloud-init/enabled', '')
    # A key is new already, and clients may have seen it.
    write(RUNTIME, 'datasource_list: [ ConfigDrive, OpenStack, None ]\n'
                   'ssh_deletekeys: false\n')
    status = stage(main, 'init', '--local')
    say(port, 'LOCAL', status)
    network = [name for name in NETWORK if name in services]
    if network:
        run('systemctl', 'restart', *network)
    elif shutil.which('ifup'):
        run('systemctl', 'restart', 'networking.service')
    for name in network:  # as a boot does before the second stage
        unit = name.replace('.service', '-wait-online.service')
        if run('systemctl', 'is-enabled', '--quiet', unit) == 0:
            run('systemctl', 'restart', unit, timeout=ONLINE_SECONDS)
    say(port, 'NETWORK')
    status = stage(main, 'init') or status
    others = [name for name in services if name not in NETWORK]
    run('systemctl', 'restart', '--no-block', 'systemd-journald.service',
        *PROMPTS, *others)
    say(port, 'SERVICES')
    status = stage(main, 'modules', '--mode=config') or status
    status = stage(main, 'modules', '--mode=final') or status
    if machine:
        # Not before it runs anew: it makes its directory again if it finds
        # that its files are gone.
        run('systemctl', 'start', 'systemd-journald.service')
        shutil.rmtree('/var/log/journal/' + machine, ignore_errors=True)
    say(port, 'DONE', status)


def activate(port: int, main: 'types.ModuleType', words: 'list[str]',
             services: 'list[str]', blocks: int, machine: str) -> None:
    """Take the words of the host, in order of their urgency."""
    if words[0] != '2':
        raise ValueError('this activator speaks version 2')
    uuid, hostname, clock, cpus, memory, links, entropy = words[1:]
    if entropy != '-':
        randomize(bytes.fromhex(entropy))
    say(port, 'RANDOM')
    time.clock_settime(time.CLOCK_REALTIME, float(clock))
    say(port, 'CLOCK')
    key = begin_key(hostname)
    size = int(read('/sys/devices/system/memory/block_size_bytes'), 16)
    wait_for_hardware(int(cpus), blocks + (int(memory) << 20) // size)
    say(port, 'PLUGGED')
    rename(uuid, hostname)
    if key:
        key.wait(KEY_SECONDS)
    say(port, 'IDENTITY')
    announce(True)
    wait_for_links(int(links))
    say(port, 'LINKED')
    be_born(port, main, services, machine)


def main() -> None:
    """Prepare, wait, wake up, and be gone."""
    randomize_children()
    os.environ['PATH'] = ('/usr/local/sbin:/usr/local/bin:'
                          '/usr/sbin:/usr/bin:/sbin:/bin')
    started = time.time() - float(read('/proc/uptime').split()[0])
    cloud_init = preload()
    port = os.open(PORT, os.O_RDWR)
    settle()
    services = running()
    if services:
        run('systemctl', 'stop', *services)
    machine = read('/etc/machine-id')
    forget(started)
    blocks = len(glob.glob(MEMORY + '/state'))
    say(port, 'READY', possible())
    for words in lines(port):
        if words[:1] == ['QUIESCE']:
            quiesce()
            say(port, 'QUIET')
        elif words[:1] == ['ACTIVATE']:
            break
    try:
        activate(port, cloud_init, words[1:], services, blocks, machine)
    except BaseException:
        traceback.print_exc()
        say(port, 'FAILED')
    shutil.rmtree('/run/fastboot', ignore_errors=True)


if __name__ == '__main__':
    if sys.argv[1:] == ['--try']:
        preload()
        randomize(os.urandom(64))
    else:
        main()
