#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Guests that prove their disks, while what is around them breaks.

Starts guests on both hosts of a sandbox that is up, then injects faults, one
after the other, drawn by a seed. After each it waits until every guest goes
on, and counts how long that took. A guest that finds a wrong byte or gets an
I/O error ends the run. In the end the disks are read once more from outside,
and nothing may be left: processes, leases, work.

Run by "make faults [FAULTS=N] [SEED=N]".
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tests' / 'openstack'),
                str(ROOT)]

import parts  # noqa: E402
import witness  # noqa: E402
from cloud import layout as layouts  # noqa: E402
from cloud import node  # noqa: E402
from cloud.process import Records  # noqa: E402
from cloud.user import Boot, CloudError, User  # noqa: E402

from bench import result  # noqa: E402
from fastboot_common import qcow2, volume  # noqa: E402

FLAVOR = 'm1.nano'
#: Within this, everything must go on without a human (seconds).
RECOVERY = 60
POLL = 0.1
#: Callers of an agent at the same time.
CROWD = 50
#: Where Nova's base images are, whose leases end with them.
BASES = '/var/lib/nova/instances/_base'
#: Where fastboot's files are on hosts, and on the node with the repository.
PLACE = '/var/lib/fastboot/host'
REPOSITORY = '/var/lib/fastboot/repository'
#: Of the disks made for them (bytes).
DISK = 6 << 30

#: Makes those who look at a disk rest.
Quiet = Callable[[], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Guest:
    """A server, and what its disk must hold."""

    boot: Boot
    disk: witness.Witness


class Lab:
    """A sandbox with guests in it."""

    def __init__(self, user: User, rng: random.Random) -> None:
        self.user = user
        self.rng = rng
        self.guests: list[Guest] = []
        self.images: dict[str, witness.Witness] = {}

    @property
    def hosts(self) -> list[str]:
        """Names of the compute hosts."""
        return [node.name for node in self.user.layout.hosts]

    # Guests

    def image(self, name: str, directory: pathlib.Path) -> str:
        """An image of a new disk, ready on all hosts."""
        # It takes a guest two minutes to see it all for the first time,
        # through whatever breaks meanwhile. It never stops for longer than
        # a tick, and leaves the processor to what has to recover.
        disk = witness.Witness(size=96 << 20, lazy=2048, rest=1, every=4)
        file = disk.make(directory / f'{name}.raw')
        image = self.user.upload(name, file, disk_format='raw')
        file.unlink()
        self.user.wait_built(image)
        self.user.wait_on_hosts(image)
        self.images[image] = disk
        return image

    def start(self, image: str, host: str) -> Guest:
        """A guest; it begins to look at all of its disk."""
        # Nova itself starts nothing on a host that it has not heard of for a
        # minute; after a jump of the clock that is so until the next word.
        # Nor on one whose libvirtd was away, until it tries that again.
        self.user.wait(lambda: self.is_up(host), RECOVERY,
                       f'nova-compute on {host} to be heard')
        boot = self.user.boot('fault', image, host, flavor=FLAVOR, prompt='')
        return Guest(boot, self.images[image])

    def is_up(self, host: str) -> bool:
        return any((one.state, one.status) == ('up', 'enabled') for one in
                   self.user.cloud.compute.services(
                       binary='nova-compute', host=host))

    def steps(self, guest: Guest) -> int:
        """How far a guest is.

        :raises AssertionError: it found a wrong byte, or got an error.
        """
        return witness.steps(self.user.console(guest.boot.server))

    def check(self, guest: Guest) -> None:
        """Read a disk from outside; its guest is switched off for it."""
        compute = self.user.cloud.compute
        server = guest.boot.server
        compute.stop_server(server.id)
        self.user.wait(lambda: compute.get_server(server.id).status
                       == 'SHUTOFF', 120, f'{server.id} to stop')
        parts.check_disk(self.user, server, guest.disk)

    # What is around them

    @contextlib.contextmanager
    def stopped(self, service: str, kill: bool) -> Iterator[None]:
        """A service ends, and is started again as a supervisor would."""
        if kill:
            # With its workers, as a supervisor that finds it dead does.
            for pid in self.user.pids(service):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        else:
            self.user.sandbox('stop', service)
        try:
            yield
        finally:
            self.user.sandbox('start', service)
            if service == 'rabbitmq':
                # What is said to a service whose queue is not there yet is
                # lost, and Nova says nothing twice. Who waits for a lost
                # answer does so for a minute.
                since = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())
                self.user.wait(lambda: self._heard(since), 2 * RECOVERY,
                               "Nova's services to be heard")

    @contextlib.contextmanager
    def frozen(self, pids: list[int]) -> Iterator[None]:
        """Processes that hang."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def slow(self, host: str) -> Iterator[None]:
        """A host whose management link hardly lets anything out."""
        queue = ('dev', 'eth0', 'root')
        self.user.inside(host, 'tc', 'qdisc', 'add', *queue, 'tbf', 'rate',
                         '64kbit', 'burst', '4kb', 'latency', '1s')
        try:
            yield
        finally:
            self.user.inside(host, 'tc', 'qdisc', 'del', *queue)

    @contextlib.contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """A host without its management link."""
        self.user.inside(host, 'ip', 'link', 'set', 'eth0', 'down')
        try:
            yield
        finally:
            self.user.inside(host, 'ip', 'link', 'set', 'eth0', 'up')

    # Disks that can be filled

    def place(self, name: str, place: str = PLACE) -> pathlib.Path:
        """What a node sees at a place."""
        record = Records(self.user.layout.run).get(f'node@{name}')
        assert record, f'{name} is not up'
        return pathlib.Path('/proc', str(node.first_process(record)),
                            'root', place.lstrip('/'))

    @contextlib.contextmanager
    def small_disks(self, size: int = DISK) -> Iterator[None]:
        """What fastboot keeps on hosts is on disks of their own.

        They begin empty, as on hosts that are new.

        :param size: of each (bytes).
        """
        with contextlib.ExitStack() as stack:
            for host in self.user.layout.hosts:
                stack.enter_context(self._disk(
                    host, PLACE, size,
                    functools.partial(self._without_fastboot, host.name)))
            yield

    @contextlib.contextmanager
    def small_repository(self) -> Iterator[None]:
        """The repository is on a disk of its own, with all that it has."""
        with self._disk(self.user.layout.control, REPOSITORY, DISK,
                        self._without_builder, keep=True):
            yield

    @contextlib.contextmanager
    def _disk(self, where: layouts.Node, place: str, size: int,
              quiet: Quiet, keep: bool = False) -> Iterator[None]:
        """A disk of its own, mounted while nobody looks.

        :param keep: it has what was there, and that has in the end what it
            has.
        """
        home = self.user.layout.home(where) / 'fastboot'
        file, beneath = home / 'disk.img', home / pathlib.Path(place).name
        with file.open('wb') as disk:
            disk.truncate(size)
        try:
            with quiet():
                self.user.inside(where.name, 'mkfs.ext4', '-q', '-m', '0',
                                 file)
                self.user.inside(where.name, 'mount', '-o', 'loop,discard',
                                 file, place)
                self.user.inside(where.name, 'rmdir', f'{place}/lost+found')
                if keep:
                    _copy(beneath, self.place(where.name, place))
            try:
                yield
            finally:
                with quiet():
                    if keep:
                        _copy(self.place(where.name, place), beneath)
                    self.user.inside(where.name, 'umount', '--lazy', place)
        finally:
            file.unlink()

    @contextlib.contextmanager
    def _without_fastboot(self, host: str) -> Iterator[None]:
        with self.stopped(f'fastboot-agent@{host}', kill=False):
            for pid in self.user.processes(host, 'nbdkit'):
                os.kill(pid, signal.SIGKILL)
            yield

    @contextlib.contextmanager
    def _without_builder(self) -> Iterator[None]:
        with (self.stopped('fastboot-builder', kill=False),
              self.stopped('repository', kill=False)):
            yield

    @contextlib.contextmanager
    def full(self, name: str, place: str = PLACE) -> Iterator[None]:
        """A node whose disk for fastboot has no byte left."""
        # Nearly all of it without a byte of the machine's own disk: what is
        # asked for as a whole includes what the file system needs itself.
        filler = f'{place}/filler'
        self.user.inside(
            name, 'sh', '-c',
            # What was freed comes back with the journal.
            f'sync -f {place}; '
            f'left=$(df --output=avail -B1 {place} | tail -1); '
            f'fallocate -l $((left - (64 << 20))) {filler}; '
            f'cat /dev/zero >>{filler}; sync -f {place}; '
            f'cat /dev/zero >>{filler}; true')
        try:
            yield
        finally:
            self.user.inside(name, 'rm', filler)

    def command(self, host: str, *words: str) -> Any:
        """What `fastbootctl` answers on a host."""
        layout = self.user.layout
        return json.loads(self.user.inside(
            host, layout.bin('fastbootctl'), '--config-file',
            layout.etc / f'fastboot/agent-{host}.conf', *words,
            '-f', 'json'))

    @contextlib.contextmanager
    def other_time(self, seconds: float) -> Iterator[None]:
        """The clock of all hosts jumps, and back."""
        _set_clock(seconds)
        try:
            yield
        finally:
            _set_clock(-seconds)
            # MariaDB's timers may run on and on for the time that was left
            # out, under a lock that whoever writes to a table soon waits
            # for (seen once with 10.11.19, thr_timer.c).
            self.user.sandbox('restart', 'mariadb')
            # Neutron's agent sleeps until its last look is over by the
            # clock: an hour, if that is set back by one (29,
            # ovs_neutron_agent.py, loop_count_and_wait).
            # So does nova-compute, if it renewed its access to Placement
            # meanwhile (keystoneauth1 5.18, FairSemaphore).
            for host in self.hosts:
                self.user.sandbox('restart', f'neutron-ovs@{host}')
                self.user.sandbox('restart', f'nova-compute@{host}')
            # Nova takes a host for down that was last heard of at a time
            # to come.
            self.user.wait(self._all_up, RECOVERY, 'all hosts to be up')

    def _heard(self, since: str) -> bool:
        return all((service.updated_at or '') > since for service
                   in self.user.cloud.compute.services())

    def _all_up(self) -> bool:
        return all(service.state == 'up' for service
                   in self.user.cloud.compute.services())


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    subprocess.run(['cp', '-a', f'{source}/.', target], check=True)


def _set_clock(jump: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME,
                       time.clock_gettime(time.CLOCK_REALTIME) + jump)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that breaks for some seconds."""

    name: str
    inject: Callable[[Lab], contextlib.AbstractContextManager[None]]


def service(name: str, kill: bool) -> Fault:
    def inject(lab: Lab) -> contextlib.AbstractContextManager[None]:
        service = name.replace('@', '@' + lab.rng.choice(lab.hosts))
        return lab.stopped(service, kill)
    return Fault(f'{name.rstrip("@")} {"killed" if kill else "restarted"}',
                 inject)


def hang(name: str) -> Fault:
    def inject(lab: Lab) -> contextlib.AbstractContextManager[None]:
        service = name.replace('@', '@' + lab.rng.choice(lab.hosts))
        return lab.frozen(lab.user.pids(service))
    return Fault(f'{name.rstrip("@")} hangs', inject)


@contextlib.contextmanager
def _kill_export(lab: Lab) -> Iterator[None]:
    pids = lab.user.processes(lab.rng.choice(lab.hosts), 'nbdkit')
    if pids:
        os.kill(lab.rng.choice(pids), signal.SIGKILL)
    yield


@contextlib.contextmanager
def _kill_exports(lab: Lab) -> Iterator[None]:
    """Export, shield and agent at once."""
    host = lab.rng.choice(lab.hosts)
    for pid in lab.user.processes(host, 'nbdkit'):
        os.kill(pid, signal.SIGKILL)
    with lab.stopped(f'fastboot-agent@{host}', kill=True):
        yield


def _hang_export(lab: Lab) -> contextlib.AbstractContextManager[None]:
    return lab.frozen(lab.user.processes(lab.rng.choice(lab.hosts), 'nbdkit'))


def _cut(lab: Lab) -> contextlib.AbstractContextManager[None]:
    return lab.cut(lab.rng.choice(lab.hosts))


def _slow(lab: Lab) -> contextlib.AbstractContextManager[None]:
    return lab.slow(lab.rng.choice(lab.hosts))


def _full(lab: Lab) -> contextlib.AbstractContextManager[None]:
    return lab.full(lab.rng.choice(lab.hosts))


def _clock(lab: Lab) -> contextlib.AbstractContextManager[None]:
    return lab.other_time(lab.rng.choice((-3600, -60, 60, 3600)))


@contextlib.contextmanager
def _crowd(lab: Lab) -> Iterator[None]:
    """Fifty ask for images at once; each gets a lease or a refusal."""
    host = lab.rng.choice(lab.hosts)
    images = sorted(lab.images)

    def ask(verb: str, number: int) -> dict[str, Any]:
        return lab.user.ask_agent(host, 'POST', f'/v1/{verb}', {
            'image': images[number % len(images)],
            'holder': f'crowd-{number}', 'file': f'{BASES}/{number}'})

    with concurrent.futures.ThreadPoolExecutor(CROWD) as pool:
        answers = list(pool.map(lambda one: ask('acquire', one),
                                range(CROWD)))
        list(pool.map(lambda one: ask('release', one), range(CROWD)))
    assert all(answers), f'{answers.count({})} of {CROWD} got no answer'
    yield


@contextlib.contextmanager
def _flip(lab: Lab) -> Iterator[None]:
    """A bit of what a host keeps of the repository is another."""
    host = lab.rng.choice(lab.hosts)
    files = _kept(lab.place(host) / 'mirror')
    if files:
        path = lab.rng.choice(files)
        _flip_bit(lab, path, lab.rng.randrange(max(path.stat().st_size, 1)))
    yield


@contextlib.contextmanager
def _flip_repository(lab: Lab) -> Iterator[None]:
    """A bit of what all hosts get is another, until it is put right.

    Guests have that block read, and wait for it; nobody takes it.
    """
    path = lab.rng.choice(_kept(
        lab.place(lab.user.layout.control.name, REPOSITORY)))
    content = path.read_bytes()
    _flip_bit(lab, path, lab.rng.randrange(len(content)))
    try:
        yield
    finally:
        path.write_bytes(content)


def _kept(repository: pathlib.Path) -> list[pathlib.Path]:
    """What never changes in a repository, or in a host's mirror of one."""
    return sorted(path for name in ('packs', 'manifests')
                  for path in (repository / name).rglob('*')
                  if path.is_file())


def _flip_bit(lab: Lab, path: pathlib.Path, place: int) -> None:
    with path.open('r+b') as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ (1 << lab.rng.randrange(8))]))


@contextlib.contextmanager
def _rot(lab: Lab) -> Iterator[None]:
    """A bit of a volume is another, until an operator repairs it.

    Nothing below a guest sees that, so they sleep meanwhile.
    """
    host = lab.rng.choice(lab.hosts)
    with lab.frozen(lab.user.processes(host, 'qemu-system')):
        with lab.stopped(f'fastboot-agent@{host}', kill=False):
            files = sorted((lab.place(host) / 'volumes').glob('*/volume'))
            clusters = [(file, offset) for file in files
                        for offset in _clusters(file)]
            if clusters:
                file, offset = lab.rng.choice(clusters)
                _flip_bit(lab, file, offset + lab.rng.randrange(4096))
            rows = lab.command(host, 'volume', 'check', '--repair')
            assert bool(clusters) == any(row['Repaired'] for row in rows)
        yield


def _clusters(file: pathlib.Path) -> list[int]:
    """Where a volume's data lies."""
    with file.open('rb') as opened:
        header = qcow2.Header.unpack(opened.read(qcow2.HEADER_LIMIT))
    with volume.Volume(file.parent, 1 << header.cluster_bits,
                       backing=str, resolve=lambda *_: [],
                       writable=False) as one:
        return sorted({int(offset) for image in one.images()
                       for offset in one.slot_of(image).clusters()})


@contextlib.contextmanager
def _full_repository(lab: Lab) -> Iterator[None]:
    """An image comes while its repository has no byte left."""
    control, glance = lab.user.layout.control.name, lab.user.cloud.image
    file = lab.user.layout.state / 'fault.raw'
    witness.Witness(size=64 << 20).make(file)

    def tried() -> bool:
        said = glance.get_image(image).properties
        # Somebody may have given back as much as it takes.
        return bool(said.get('fastboot_error')
                    or said.get('fastboot_state') == 'ready')

    with lab.full(control, REPOSITORY):
        image = lab.user.upload('fault-full', file, disk_format='raw')
        lab.user.wait(tried, RECOVERY, f'{image} to be tried')
        yield
    lab.user.wait_built(image, RECOVERY)
    lab.user.wait_on_hosts(image, RECOVERY)
    glance.delete_image(image)
    file.unlink()


@contextlib.contextmanager
def _come_and_go(lab: Lab) -> Iterator[None]:
    """A server comes while an agent is away, and goes."""
    host = lab.rng.choice(lab.hosts)
    image = lab.rng.choice(sorted(lab.images))
    with lab.stopped(f'fastboot-agent@{host}', kill=True):
        guest = lab.start(image, host)
    lab.steps(guest)
    lab.user.delete(guest.boot.server)
    yield


FAULTS = [
    *(service(name, kill)
      for name in ('fastboot-agent@', 'fastboot-builder', 'redis',
                   'rabbitmq', 'glance', 'repository', 'libvirtd@',
                   'nova-compute@') for kill in (True, False)),
    *(hang(name) for name in ('fastboot-agent@', 'fastboot-builder',
                               'repository', 'redis', 'rabbitmq',
                               'glance')),
    Fault('a server of the export killed', _kill_export),
    Fault('export, shield and agent killed', _kill_exports),
    Fault('export hangs', _hang_export),
    Fault('link cut', _cut),
    Fault('link slow', _slow),
    Fault('disk full', _full),
    Fault('repository full', _full_repository),
    Fault('clock jumps', _clock),
    Fault('fifty acquires at once', _crowd),
    Fault('a bit of the mirror flipped', _flip),
    Fault('a bit of the repository flipped', _flip_repository),
    Fault('a bit of the volume flipped, and repaired', _rot),
    Fault('a server comes while the agent is away', _come_and_go),
]
#: The quick ones are drawn more often: they hit the guests' own path.
OFTEN = {'fastboot-agent killed', 'a server of the export killed',
         'export, shield and agent killed', 'export hangs',
         'repository hangs', 'fastboot-agent hangs', 'link cut',
         'a bit of the mirror flipped', 'repository killed'}


#: Seconds until all guests went on, by fault.
Toll = dict[str, list[float]]


def run(lab: Lab, faults: list[Fault], count: int, directory: pathlib.Path,
        say: Callable[[str], None]) -> Toll:
    """Inject some of `faults`, `count` in all.

    :raises AssertionError: a guest was harmed, or did not go on.
    """
    images = [lab.image(f'fault-{number}', directory) for number in range(2)]
    toll: Toll = collections.defaultdict(list)
    for host in lab.hosts:
        for image in images:
            lab.guests.append(lab.start(image, host))
    weights = [4 if fault.name in OFTEN else 1 for fault in faults]
    for number in range(count):
        (fault,) = lab.rng.choices(faults, weights)
        seconds = lab.rng.choice((0.0, 0.3, 1.0, 3.0))
        # Now and then a new guest of a new image: blocks that nobody has
        # read yet.
        if number % 50 == 49:
            images[number // 50 % 2] = lab.image(f'fault-{number}',
                                                 directory)
        if number % 10 == 9:
            renew(lab, images)
        say(f'{number + 1}/{count} {fault.name}, {seconds} s')
        with fault.inject(lab):
            time.sleep(seconds)
        toll[fault.name].append(recover(lab))
    return toll


def renew(lab: Lab, images: list[str]) -> None:
    """Another guest in the place of one, on a host without its blocks."""
    old = lab.guests.pop(0)
    lab.check(old)
    lab.user.delete(old.boot.server)
    host = str(old.boot.server.hypervisor_hostname)
    lab.guests.append(lab.start(lab.rng.choice(images), host))


def recover(lab: Lab) -> float:
    """Wait until all guests go on; seconds."""
    began = time.monotonic()
    before = [lab.steps(guest) for guest in lab.guests]
    left = set(range(len(lab.guests)))
    while left:
        left = {one for one in left
                if lab.steps(lab.guests[one]) <= before[one]}
        assert time.monotonic() - began < RECOVERY, (
            f'guests {left} do not go on after {RECOVERY} s')
        time.sleep(POLL)
    return time.monotonic() - began


def settle(lab: Lab) -> dict[str, int]:
    """What is left when all is over; all zero if nothing leaked."""
    for guest in lab.guests:
        lab.check(guest)
        lab.user.delete(guest.boot.server)
    left: dict[str, int] = {}
    for host in lab.hosts:
        left[f'{host}: nbdkits beyond two'] = len(
            lab.user.processes(host, 'nbdkit')) - 2
        left[f'{host}: guests'] = len(lab.user.processes(host, 'qemu-system'))
        left[f'{host}: temporary files'] = sum(
            name.endswith(('.tmp', '.new', '.part'))
            for _, _, names in os.walk(lab.place(host))
            for name in names)
        with contextlib.suppress(CloudError):  # the number says it
            lab.user.wait(lambda host=host: not idle_leases(lab, host), 120,
                          'leases to end')
        left[f'{host}: leases'] = idle_leases(lab, host)
    work = lab.user.layout.home(lab.user.layout.control) / 'fastboot/work'
    left['builder: work'] = sum(path.is_file() for path in work.rglob('*'))
    return left


def idle_leases(lab: Lab, host: str) -> int:
    """Leases on a host of those who are gone.

    Nova keeps its base images after the last server, and theirs with them.
    """
    place = lab.place(host)
    root = str(place).removesuffix(PLACE)
    files = [json.loads(path.read_bytes())['file'] for path in
             place.glob('volumes/*/leases/*/*')]
    return sum(not os.path.lexists(root + file) for file in files)


def report(table: result.Table, toll: Toll, left: dict[str, int],
           words: str) -> None:
    """The figures."""
    count = sum(map(len, toll.values()))
    table.add('faults injected, and survived by all guests', count,
              'faults', 500, '>=', note=words)
    for name, values in sorted(toll.items()):
        table.add(f'until guests go on: {name}', statistics.median(values),
                  's', note=f'at most {max(values):.1f} s',
                  runs=len(values))
    table.add('longest until guests go on',
              max(max(values) for values in toll.values()), 's',
              RECOVERY)
    table.add('left in the end', sum(map(abs, left.values())), 'things', 0,
              note=', '.join(f'{name} {value}'
                             for name, value in left.items() if value))


def main() -> int:
    """Status 1 if a guest was harmed, or something is left."""
    parser = argparse.ArgumentParser(prog='faults', description=__doc__)
    parser.add_argument('--state-dir', type=pathlib.Path, required=True,
                        help='of the sandbox, which is up')
    parser.add_argument('--faults', type=int, default=500)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--only', metavar='WORD',
                        help='faults with this in their names, and print '
                             'only')
    parser.add_argument('--no-results', action='store_true',
                        help='print only')
    args = parser.parse_args()
    user = User(layouts.load(args.state_dir.absolute()))
    lab = Lab(user, random.Random(args.seed))
    table = result.Table('faults', command='make faults')
    faults = [fault for fault in FAULTS if (args.only or '') in fault.name]
    if args.no_results or args.only:
        table.save = lambda: None  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        with lab.small_disks(), lab.small_repository():
            toll = run(lab, faults, args.faults, args.state_dir,
                       _say(began))
            left = settle(lab)
    except (AssertionError, CloudError) as error:
        print(f'FAILED, seed {args.seed}: {error}', file=sys.stderr)
        for guest in lab.guests:
            print(guest.boot.server.id, json.dumps(
                user.console(guest.boot.server)[-200:]), file=sys.stderr)
        return 1
    report(table, toll, left,
           f'seed {args.seed}, {time.monotonic() - began:.0f} s')
    for image in lab.images:
        user.cloud.image.delete_image(image, ignore_missing=True)
    return int(any(left.values()))


def _say(began: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f'[{time.monotonic() - began:6.0f} s] {text}', flush=True)
    return say


if __name__ == '__main__':
    sys.exit(main())
