#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Servers that are resumed one after the other, while what it takes breaks.

Needs a sandbox that is up. Whatever a fault does, drawn by a seed, each
server becomes ACTIVE; each that was resumed is nobody that was there before;
and nothing is left in the end: machines, lanes, files.

Run by "make resumes [RESUMES=N] [SEED=N]".
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import harness
from cloud import layout as layouts
from cloud.user import Boot, CloudError, User
from harness import Fault, Lab

from bench import result

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGE = NAME = 'resumes'
FLAVOR = 'm1.tiny'
ACTIVE_SECONDS = 240
LANES_SECONDS = 300
#: Bytes. Nothing comes beyond [agent] min_free that nobody waits for.
DISK = 12 << 30
#: What tells one server from all others, a line each.
IDENTITY = """
cat /etc/machine-id /proc/sys/kernel/random/uuid
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo
cat /etc/ssh/ssh_host_*_key.pub | sha256sum
cat /sys/class/net/e*/address
"""
WORDS = ('machine-id', 'random uuid', 'random bytes', 'host keys', 'MAC')


# Faults

@contextlib.contextmanager
def _nothing(lab: Lab) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _kill_machine(lab: Lab) -> Iterator[None]:
    """The first machine that loads dies, a little later."""
    over = threading.Event()
    delay = lab.rng.uniform(0, 0.6)

    def kill() -> None:
        while not over.wait(0.01):
            for host in lab.hosts:
                for pid in lab.user.processes(host, 'qemu-system'):
                    if _loads(pid):
                        time.sleep(delay)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                        return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _loads(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b'-incoming' in pathlib.Path(
            f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
    return False


@contextlib.contextmanager
def _damage_lanes(lab: Lab) -> Iterator[None]:
    for host in lab.hosts:
        for lane in (lab.place(host) / 'microvms/lanes').glob('*'):
            with contextlib.suppress(FileNotFoundError):
                _scribble(lab.rng, lane)
    yield


@contextlib.contextmanager
def _damage_artifacts(lab: Lab) -> Iterator[None]:
    for host in lab.hosts:
        for memory in (lab.place(host) / 'microvms/artifacts').rglob(
                'memory'):
            _scribble(lab.rng, memory)
    yield


def _scribble(rng: random.Random, path: pathlib.Path) -> None:
    with path.open('r+b') as file:
        file.seek(rng.randrange(max(1, path.stat().st_size - 4096)))
        file.write(rng.randbytes(4096))


@contextlib.contextmanager
def _other_key(lab: Lab) -> Iterator[None]:
    """The µVM says that it is for hosts of another kind."""
    before = {}
    for host in lab.hosts:
        for path in (lab.place(host) / 'microvms/artifacts').rglob(
                'microvm.json'):
            before[path] = text = path.read_text()
            value = json.loads(text)
            value['key']['virt_type'] = 'kvm'
            path.write_text(json.dumps(value))
    try:
        yield
    finally:
        for path, text in before.items():
            with contextlib.suppress(FileNotFoundError):
                path.write_text(text)


@contextlib.contextmanager
def _full(lab: Lab) -> Iterator[None]:
    with lab.full(lab.rng.choice(lab.hosts)):
        yield


FAULTS = [
    Fault('nothing', _nothing),
    Fault('machine killed while it loads', _kill_machine),
    Fault('lanes damaged', _damage_lanes),
    Fault('artifact damaged', _damage_artifacts),
    Fault('another key', _other_key),
    harness.service('fastboot-agent@', True),
    harness.hang('fastboot-agent@'),
    Fault('disk full', _full),
]


# Servers

@dataclasses.dataclass
class Toll:
    """What became of all servers.

    :ivar seconds: until ACTIVE, by how it went.
    :ivar known: identities that were seen, by word.
    :ivar shared: that were seen twice.
    :ivar asides: how often a host had put the µVM aside.
    """

    seconds: dict[str, list[float]]
    known: dict[str, set[str]]
    errors: int = 0
    shared: int = 0
    asides: int = 0

    def note(self, words: list[str]) -> None:
        """An identity."""
        for word, value in zip(WORDS, words, strict=True):
            self.shared += value in self.known[word]
            self.known[word].add(value)


def make_ready(lab: Lab, image: str, host: str) -> bool:
    """Wait until a host can resume servers; whether it had given that up.

    Failures in a row do that, for minutes. Who mended what was wrong has
    its agent started anew.
    """
    def state() -> str:
        return str(lab.user.microvm(image, host).get('state'))

    lab.user.wait(lambda: state() in ('ready', 'error'), LANES_SECONDS,
                  f'the µVM on {host}')
    given_up = state() == 'error'
    if given_up:
        lab.user.sandbox('restart', f'fastboot-agent@{host}')
    lab.user.wait_for_lanes(image, host, seconds=LANES_SECONDS)
    return given_up


def start(lab: Lab, image: str, host: str) -> Boot:
    """A server, as soon as Nova hears of the host."""
    lab.user.wait(lambda: lab.is_up(host), harness.RECOVERY,
                  f'nova-compute on {host} to be heard')
    return lab.user.boot(NAME, image, host, flavor=FLAVOR, prompt='',
                         seconds=ACTIVE_SECONDS)


def ask(user: User, server: Any, command: dict[str, Any]) -> Any:
    """What the guest agent of a server answers."""
    words = user.inside(
        server.hypervisor_hostname, 'virsh', '-q', '-c', 'qemu:///system',
        'qemu-agent-command', '--timeout', '20', server.instance_name,
        json.dumps(command))
    return json.loads(words)['return']


def identity(user: User, server: Any) -> list[str]:
    """Who a resumed server is."""
    pid = ask(user, server, {'execute': 'guest-exec', 'arguments': {
        'path': '/bin/sh', 'arg': ['-c', IDENTITY],
        'capture-output': True}})['pid']
    status: dict[str, Any] = {}

    def ended() -> bool:
        status.update(ask(user, server, {
            'execute': 'guest-exec-status', 'arguments': {'pid': pid}}))
        return bool(status['exited'])

    user.wait(ended, 60, f'{server.id} to say who it is')
    return base64.b64decode(status['out-data']).decode().split('\n')[:5]


def run(lab: Lab, image: str, count: int) -> Toll:
    """`count` servers, or until a human interrupts; faults are drawn."""
    toll = Toll(collections.defaultdict(list), collections.defaultdict(set))
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(count):
            words = one_server(lab, image, toll)
            print(f'[{time.monotonic() - began:6.0f} s] {number + 1}/{count} '
                  f'{words[:120]}', flush=True)
    return toll


def one_server(lab: Lab, image: str, toll: Toll) -> str:
    """A server while something breaks; how it went, in words."""
    fault = lab.rng.choice(FAULTS)
    host = lab.rng.choice(lab.hosts)
    toll.asides += sum(make_ready(lab, image, one) for one in lab.hosts)
    try:
        with fault.inject(lab):
            found = start(lab, image, host)
    except CloudError as error:
        toll.errors += 1
        for left in lab.user.cloud.compute.servers(name=NAME):
            lab.user.delete(left)
        return f'{fault.name}: {error}'
    how = found.log.split()[0] if found.log else 'nothing said'
    toll.seconds[f'{how}, {fault.name}'].append(found.active)
    if how == 'resumed':
        toll.note(identity(lab.user, found.server))
    lab.user.delete(found.server)
    return f'{fault.name}: {found.log}'


def settle(lab: Lab) -> dict[str, int]:
    """What is left when all is over; all zero if nothing leaked."""
    left = {}
    for host in lab.hosts:
        left[f'{host}: machines'] = len(lab.user.processes(
            host, 'qemu-system'))
        left[f'{host}: domains'] = len(lab.user.inside(
            host, 'virsh', '-q', '-c', 'qemu:///system', 'list', '--all',
            '--name').split())
        place = lab.place(host)
        left[f'{host}: lanes'] = len(list(
            (place / 'microvms/lanes').iterdir())) - sum(
                one['lanes'] for one in lab.user.microvms(host))
        left[f'{host}: temporary files'] = sum(
            name.endswith(('.tmp', '.new', '.part'))
            for top in (place, lab.user.home(host) / 'nova/instances')
            for _, _, names in os.walk(top) for name in names)
    return left


def report(table: result.Table, toll: Toll, left: dict[str, int],
           seed: int, seconds: float) -> None:
    """The figures."""
    count = sum(map(len, toll.seconds.values()))
    table.add('servers that became ACTIVE', count, 'servers', 200, '>=',
              note=f'seed {seed}, {seconds:.0f} s')
    table.add('of them resumed', sum(
        len(values) for name, values in toll.seconds.items()
        if name.startswith('resumed')), 'servers')
    table.add('times that a host had put the µVM aside', toll.asides, '')
    table.add('servers in ERROR', toll.errors, 'servers', 0)
    table.add('identities that two had', toll.shared, 'words', 0)
    table.add('left in the end', sum(map(abs, left.values())), 'things', 0,
              note=', '.join(f'{name} {value}'
                             for name, value in left.items() if value))
    for name, values in sorted(toll.seconds.items()):
        table.add(f'ACTIVE: {name}', statistics.median(values), 's',
                  note=f'at most {max(values):.1f} s', runs=len(values))


def make_image(user: User, directory: pathlib.Path) -> str:
    """A Debian with a µVM."""
    found = user.cloud.image.find_image(IMAGE)
    if found and found.status == 'active':
        return str(found.id)
    file = directory / f'{IMAGE}.qcow2'
    subprocess.run([ROOT / 'tools/guest-image', 'build', '--suite',
                    'bookworm', file], check=True)
    try:
        return user.upload(IMAGE, file, fastboot='microvm',
                           hw_qemu_guest_agent='yes')
    finally:
        file.unlink()


def main() -> int:
    """Status 1 if a server was harmed, or something is left."""
    parser = argparse.ArgumentParser(prog='resumes', description=__doc__)
    parser.add_argument('--state-dir', type=pathlib.Path, required=True,
                        help='of the sandbox, which is up')
    parser.add_argument('--resumes', type=int, default=200)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--no-results', action='store_true',
                        help='print only')
    args = parser.parse_args()
    user = User(layouts.load(args.state_dir.absolute()))
    lab = Lab(user, random.Random(args.seed))
    table = result.Table('resumes', command='make resumes')
    if args.no_results:
        table.save = lambda: None  # type: ignore[method-assign]
    began = time.monotonic()
    image = make_image(user, args.state_dir)
    user.wait_built(image)
    with lab.small_disks(DISK):
        user.wait_for_microvm(image)
        toll = run(lab, image, args.resumes)
        left = settle(lab)
    report(table, toll, left, args.seed, time.monotonic() - began)
    user.cloud.image.delete_image(image, ignore_missing=True)
    return int(toll.errors or toll.shared or any(left.values()))


if __name__ == '__main__':
    sys.exit(main())
