# SPDX-License-Identifier: Apache-2.0
"""Suite ``openstack``: the sandbox cloud, with fastboot and without.

Needs a sandbox that is up. Stock rows are the same bytes under an image
whose owner keeps it from fastboot, on the same host, in the same run.
"""

import contextlib
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tests' / 'functional'),
                str(ROOT / 'tests' / 'openstack')]

import bootsector  # noqa: E402
from cloud import layout as layouts  # noqa: E402
from cloud.user import Boot, CloudError, User  # noqa: E402
from parts import settings  # noqa: E402

from bench import ballast, result  # noqa: E402
from bench import lab as labs  # noqa: E402
from fastboot_glance import import_plugin  # noqa: E402

HOST = 'h2'
RATE = '1gbit'
AGENT = f'fastboot-agent@{HOST}'
BUILDER = 'fastboot-builder'
MIB = 1 << 20
#: The test image: every byte of its disk goes over the link.
GUEST = ['build', '--suite', 'bookworm', '--format', 'raw']
CROWD = 20
#: Seconds in which Nova and Neutron tidy up after a server, and an agent that
#: was started looks at its lanes. Servers seldom start just then.
CALM = 5
#: Bytes that a guest and its QEMU may touch as they start.
GUEST_MEMORY = 1 << 30
_HIT = re.compile(r'hit for image \S+ in (\d+) ms \(agent (\d+) ms, '
                  r'(\d+) bytes thawed\)')
_MISS = re.compile(r'miss for image \S+ after (\d+) ms')


class Bench:
    """What the measurements share."""

    def __init__(self, table: result.Table, path: pathlib.Path,
                 runs: int) -> None:
        self.table = table
        self.path = path
        #: The second, of what takes minutes.
        self.most, self.runs = runs, min(runs, 3)
        state = os.environ.get('FASTBOOT_SANDBOX') or path.parent / 'sandbox'
        self.user = User(layouts.load(pathlib.Path(state)))
        self._boots: dict[str, list[Boot]] = {}

    def image(self, name: str, **properties: str) -> str:
        """The test image in Glance, under a name."""
        found = self.user.cloud.image.find_image(name)
        if found and found.status == 'active':
            return str(found.id)
        file = self.path / 'guest.raw'
        if not file.exists():
            subprocess.run([ROOT / 'tools' / 'guest-image', GUEST[0], file,
                            *GUEST[1:]], check=True)
        return self.user.upload(name, file, disk_format='raw', **properties)

    def boots(self, kind: str) -> list[Boot]:
        """Servers on the host, each kind measured once a run of the suite.

        :param kind: ``stock cold``, ``stock warm``, ``cold`` or ``warm``.
        """
        if kind not in self._boots:
            self._boots[kind] = [self._boot(kind, number == 0)
                                 for number in range(self.runs)]
        return self._boots[kind]

    def _boot(self, kind: str, first: bool) -> Boot:
        stock = kind.startswith('stock')
        image = self.image('bench-stock', fastboot='off') if stock \
            else self.image('bench')
        if not stock:
            self.user.wait_built(image)
            self.user.wait_on_hosts(image)
        if kind == 'cold':
            self.make_cold(image)
        elif kind == 'stock cold':
            self.user.forget_base(HOST, image)
            _forget_pages()
        # Only the bytes until the prompt need it, not the times.
        return self.boot(image, prompt=kind == 'cold' and first)

    def boot(self, image: str, prompt: bool = False, **more: Any) -> Boot:
        """One server; gone again when this returns, for a while."""
        with self.user.hypervisor(HOST) as hypervisor:
            before = hypervisor.numOfDomains()
            with ballast.held(GUEST_MEMORY, lambda: (
                    hypervisor.numOfDomains() > before)):
                found = self.user.boot(
                    'bench', image, HOST,
                    prompt='login:' if prompt else '', **more)
        self.user.delete(found.server)
        time.sleep(CALM)
        return found

    def make_cold(self, image: str) -> None:
        """Make the host one that never held the image: no base, no slot."""
        self.user.forget_base(HOST, image)
        with self.stopped(AGENT):
            volumes = self.user.home(HOST) / 'fastboot/host/volumes'
            subprocess.run(['rm', '-rf', volumes], check=True)
        self.user.wait(lambda: bool(self.user.ask_agent(
            HOST, 'GET', '/v1/status')), 60, 'the agent')
        # It looks at the repository first; hosts seldom start just then.
        time.sleep(10)
        _forget_pages()

    @contextlib.contextmanager
    def stopped(self, service: str) -> Iterator[None]:
        """Without a service of the sandbox."""
        self.user.sandbox('stop', service)
        try:
            yield
        finally:
            self.user.sandbox('start', service)


def _forget_pages() -> None:
    """No image is in memory; the programs are, as on any host in use."""
    labs.drop_caches()
    for words in (['qemu-system-x86_64', '-machine', 'pc', '-accel', 'tcg',
                   '-nodefaults', '-display', 'none', '-S', '-device',
                   'virtio-blk-pci,drive=d', '-device',
                   'virtio-net-pci,netdev=n', '-netdev',
                   'hubport,id=n,hubid=0',
                   '-drive', 'if=none,id=d,driver=null-co', '-monitor',
                   'stdio'], ['qemu-img', '--version'], ['nbdkit', '-V']):
        subprocess.run(words, input='quit\n', text=True, check=True,
                       stdout=subprocess.DEVNULL, timeout=60)


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure everything, or what has the word `only` in its name."""
    bench = Bench(table, path, runs)
    bench.user.sandbox('link-rate', RATE)
    for measure in (build, cold, warm, resumed, fallbacks, misses, plugin,
                    crowd, lost):
        if only is None or measure.__name__ in only.split(','):
            measure(bench)


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _active(boots: list[Boot]) -> float:
    return _median([boot.active for boot in boots])


def build(bench: Bench) -> None:
    """From active to ready on a host."""
    user = bench.user
    found = user.cloud.image.find_image('bench')
    if found:
        user.cloud.image.delete_image(found.id)
    image = bench.image('bench')
    began = time.monotonic()
    user.wait_built(image, 900)
    user.wait_on_hosts(image)
    seconds = time.monotonic() - began
    boots = user.fastboot_image(image)['capture']['last_read']
    bench.table.add('active to ready on the host', seconds, 's')
    bench.table.add(
        'active to ready on the host, without the boots',
        seconds - max(boots), 's', 20,
        note=f'{len(boots)} boots side by side, until their last reads; '
             f'10 s of silence after them')


def cold(bench: Bench) -> None:
    """A host that never held the image."""
    ours, stock = bench.boots('cold'), bench.boots('stock cold')
    add, runs = bench.table.add, bench.runs
    add('ACTIVE on a host without the image', _active(ours), 's', runs=runs)
    add('the same, stock at 1 Gb/s', _active(stock), 's', runs=runs)
    add('ACTIVE without the image / stock', _active(ours) / _active(stock),
        'ratio', 0.2, runs=runs)
    add('ACTIVE without the image - stock on a warm host',
        _active(ours) - _active(bench.boots('stock warm')), 's', 0.5,
        runs=runs)
    add('read from Glance until the prompt',
        max(boot.traffic.glance for boot in ours), 'bytes', 0, runs=runs)
    add('read from the repository until the prompt',
        max(boot.traffic.repository for boot in ours) / MIB, 'MiB', 1,
        runs=runs)
    add('added to spawn with the first thaw',
        _median([_hit(boot)[0] for boot in ours]), 'ms', 400, runs=runs)


def warm(bench: Bench) -> None:
    """A host that has the image."""
    ours, stock = bench.boots('warm'), bench.boots('stock warm')
    add, runs = bench.table.add, bench.runs
    add('ACTIVE on a warm host', _active(ours), 's', runs=runs)
    add('the same, stock', _active(stock), 's', runs=runs)
    add('added to spawn on a hit', _median(
        [_hit(boot)[0] for boot in ours]), 'ms', 50, runs=runs)


def resumed(bench: Bench) -> None:
    """A µVM of the image is on the host."""
    add, runs = bench.table.add, bench.most
    image = _microvm(bench)
    boots = _booted(bench, image, answer=True)
    ours = [_resumed(bench, image, answer=True) for _ in range(runs)]
    add('ACTIVE, resumed', _active(ours), 's', runs=runs)
    add('ACTIVE, resumed - booted from local blocks',
        _active(ours) - _active(boots), 's', 1.5, runs=runs)
    add('first answer, resumed', _answer(ours), 's', runs=runs)
    add('first answer, booted from local blocks', _answer(boots), 's',
        runs=runs)
    add('first answer, resumed / booted from local blocks',
        _answer(ours) / _answer(boots), 'ratio', 0.05, runs=runs)


def fallbacks(bench: Bench) -> None:
    """A µVM of the image is on the host, and does not come up.

    In turns with servers that boot: what is compared are fractions of a
    second, and a machine does not stay as fast as it was.
    """
    add, runs = bench.table.add, bench.most
    image = _microvm(bench)
    booted, refused, silent = [], [], []
    with settings(bench.user, HOST, 'fastboot', resume_deadline=_DEADLINE), \
            bench.user.booting_flavor('bench-boots') as flavor:
        for _ in range(runs):
            _forgive(bench, image)
            booted.append(bench.boot(image, flavor=flavor))
            refused.append(_damaged(bench, image))
            silent.append(_silent(bench, image))
    cached = _active(booted)
    add('ACTIVE, a load that is refused - booted from local blocks',
        _active(refused) - cached, 's', 1, runs=runs)
    add('ACTIVE, a guest that is silent - booted from local blocks',
        _active(silent) - cached, 's', _DEADLINE, runs=runs)


def _microvm(bench: Bench) -> str:
    """An image whose servers are resumed."""
    image = bench.image('bench-microvm', fastboot='microvm',
                        hw_qemu_guest_agent='yes')
    bench.user.wait_for_microvm(image)
    return image


def _booted(bench: Bench, image: str, **more: Any) -> list[Boot]:
    """Servers of the same image that are not."""
    with bench.user.booting_flavor('bench-boots') as flavor:
        return [bench.boot(image, flavor=flavor, **more)
                for _ in range(bench.most)]


#: Seconds that a resume may take, by default.
_DEADLINE = 10.0
#: That a host keeps of a µVM, by default.
_LANES = 2


def _resumed(bench: Bench, image: str, log: str = 'resumed', **more: Any
             ) -> Boot:
    user = bench.user
    user.wait_for_lanes(image, HOST, seconds=120)
    boot = bench.boot(image, **more)
    if not boot.log.startswith(log):
        raise RuntimeError(f'not {log}: {boot.log}')
    return boot


def _silent(bench: Bench, image: str) -> Boot:
    """A server whose guest stands still as soon as it runs."""
    _forgive(bench, image)
    with bench.user.suspending(HOST):
        return _resumed(bench, image, 'resume failed (wait)')


def _damaged(bench: Bench, image: str) -> Boot:
    """A server whose lane has devices damaged, at its end.

    More than the end: a description follows there that nobody reads.
    """
    _forgive(bench, image)
    microvms = bench.user.home(HOST) / 'fastboot/host/microvms'
    for lane in (microvms / 'lanes').iterdir():
        with lane.open('r+b') as file:
            file.seek(-(512 << 10), os.SEEK_END)
            file.write(bytes(512 << 10))
    return _resumed(bench, image, 'resume failed (load)')


def _forgive(bench: Bench, image: str) -> None:
    """Start the agent anew: it puts aside what fails again and again."""
    bench.user.sandbox('restart', AGENT)
    # All of them: one that comes later would be whole.
    bench.user.wait_for_lanes(image, HOST, count=_LANES, seconds=120)
    time.sleep(CALM)


def _answer(boots: list[Boot]) -> float:
    return _median([boot.answer for boot in boots if boot.answer])


def _hit(boot: Boot) -> tuple[float, float]:
    """Milliseconds of the driver, and of the agent in it."""
    found = _HIT.search(boot.log)
    if not found:
        raise RuntimeError(f'no hit: {boot.log or "no line in the log"}')
    return float(found[1]), float(found[2])


def misses(bench: Bench) -> None:
    """What a server that cannot have local blocks loses."""
    stock = _active(bench.boots('stock warm'))
    image = bench.image('bench')
    with bench.stopped(AGENT):
        _miss(bench, image, 'the agent is down', stock)
    bench.user.wait(lambda: bool(bench.user.ask_agent(
        HOST, 'GET', '/v1/status')), 60, 'the agent')
    (pid,) = bench.user.pids(AGENT)
    os.kill(pid, signal.SIGSTOP)
    try:
        _miss(bench, image, 'the agent hangs', stock)
    finally:
        os.kill(pid, signal.SIGCONT)
    _miss(bench, bench.image('bench-stock', fastboot='off'),
          'the image is not ours', stock)


def _miss(bench: Bench, image: str, words: str, stock: float) -> None:
    bench.boot(image)  # brings the stock base
    boots = [bench.boot(image) for _ in range(bench.runs)]
    lost = []
    for boot in boots:
        found = _MISS.search(boot.log)
        if not found:
            raise RuntimeError(f'no miss: {boot.log}')
        lost.append(float(found[1]))
    bench.table.add(f'added by a miss: {words}', _median(lost) / 1000, 's',
                    1, runs=bench.runs, note='in the driver')
    bench.table.add(f'ACTIVE - stock: {words}', _active(boots) - stock, 's',
                    1, runs=bench.runs)


def plugin(bench: Bench) -> None:
    """The import plugin, and uploads while things are broken."""
    took = []
    for number in range(20):
        began = time.perf_counter()
        flow = import_plugin.get_flow(task_id=str(number), image_id='none')
        for task, _ in flow.iter_nodes():
            task.execute()
        took.append((time.perf_counter() - began) * 1000)
    bench.table.add('added to an import by the plugin, at most', max(took),
                    'ms', 50, runs=len(took),
                    note='its flow, as Glance runs it; no jobboard answers')
    failed = uploads = 0
    for stopped in ((), ('redis',), ('rabbitmq',)):
        with contextlib.ExitStack() as stack:
            for service in stopped:
                stack.enter_context(bench.stopped(service))
            for number in range(bench.runs):
                uploads += 1
                failed += not _imports(bench, number)
    bench.table.add('imports that failed, without jobboard or bus too',
                    failed, 'imports', 0, runs=uploads)


def _imports(bench: Bench, number: int) -> bool:
    user = bench.user
    try:
        image = user.upload(f'bench-plugin-{number}', _tiny(bench, 0),
                            how='import', disk_format='raw', fastboot='off')
    except CloudError as error:
        print(f'upload failed: {error}', file=sys.stderr)
        return False
    user.cloud.image.delete_image(image)
    return True


def _tiny(bench: Bench, number: int) -> pathlib.Path:
    """A disk whose boot takes a second."""
    file = bench.path / f'tiny-{number}.raw'
    sector = bootsector.sector(f'{number} login: '.encode(), count=50,
                               first=2048, step=64)
    file.write_bytes(sector + os.urandom((4 << 20) - len(sector)))
    return file


def _crowd(bench: Bench, count: int, name: str) -> list[str]:
    """Images uploaded at the same time."""
    uploads: list[Any] = []
    for number in range(count):
        image = bench.user.cloud.image.create_image(
            f'{name}-{number}', filename=str(_tiny(bench, number)),
            disk_format='raw', container_format='bare', wait=False,
            timeout=120, visibility='public')
        uploads.append(image.id)
    return uploads


def crowd(bench: Bench) -> None:
    """Many uploads at once, and a builder that is killed midway."""
    user = bench.user
    began = time.monotonic()
    images = _crowd(bench, CROWD, 'bench-crowd')
    try:
        user.wait(lambda: _ready(user, images) >= CROWD // 4, 900,
                  'some to be ready')
        for pid in user.pids(BUILDER):
            os.kill(pid, signal.SIGKILL)
        user.sandbox('start', BUILDER)
        user.wait(lambda: _ready(user, images) == CROWD, 1800,
                  'all to be ready')
        bench.table.add(f'{CROWD} images at once, a builder killed midway',
                        time.monotonic() - began, 's')
        bench.table.add('images of them that did not end ready',
                        CROWD - _ready(user, images), 'images', 0)
        bench.table.add('images of them registered twice',
                        _registered_twice(user, images), 'images', 0)
    finally:
        for image in images:
            user.cloud.image.delete_image(image, ignore_missing=True)


def _ready(user: User, images: list[str]) -> int:
    return sum(user.cloud.image.get_image(image).properties.get(
        'fastboot_state') == 'ready' for image in images)


def _registered_twice(user: User, images: list[str]) -> int:
    home = user.layout.home(user.layout.control)
    text = [path.read_text() for path in sorted(
        (home / 'fastboot/repository/journal').glob('*'))]
    return sum(sum(image in entry and '"register"' in entry
                   for entry in text) > 1 for image in images)


def lost(bench: Bench) -> None:
    """The broker was away: the audit finds what nobody heard of."""
    user = bench.user
    with bench.stopped('rabbitmq'):
        image = _crowd(bench, 1, 'bench-lost')[0]
    began = time.monotonic()
    try:
        user.wait_built(image, 900)
        bench.table.add('from a broker that is back to ready, by the audit',
                        time.monotonic() - began, 's')
    finally:
        user.cloud.image.delete_image(image, ignore_missing=True)

