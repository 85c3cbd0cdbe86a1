# SPDX-License-Identifier: Apache-2.0
"""Suite ``microvm``: servers resumed and booted, on libvirt alone.

Both kinds take turns in one run, so that what else the machine does hits
both. The figures that need Nova are of the suite ``openstack``.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

from bench import ballast, result, servers, times
from bench import lab as labs
from fastboot_common import blocks, exception, publish, repository
from fastboot_common.microvm import activation, artifact, clone, shelf
from fastboot_common.store.local import LocalStore
from fastboot_glance import bakery
from fastboot_nova.microvm import resume

MAIN: Final = labs.MAIN
#: An image of its user's: the same with a package more.
DERIVED: Final = 'deb12-nginx'
CROWD: Final = 8
MIB: Final = 1 << 20
#: Bytes of its host's memory that a resumed guest touches.
GUEST_MEMORY: Final = 400 * MIB
#: Bytes of devices at a stream's end.
_CUT: Final = 64 << 10
_ENTROPY: Final = """\
i=0
while [ $i -lt 64 ]; do
    read x < /proc/sys/kernel/random/uuid; echo $x; i=$((i+1))
done"""
#: What no two guests may have in common, and how many of them each prints.
_OWN: Final = {
    'random numbers': (_ENTROPY, 64),
    # cloud-init makes more while we ask.
    'host keys': ("cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub", 1),
    'MACs': ('cat /sys/class/net/e*/address', 1),
    'ids': ('cat /etc/machine-id /sys/class/dmi/id/product_uuid', 2),
}


class Bench:
    """What the measurements share.

    :ivar fresh: µVMs are baked anew, and not taken from an earlier run.
    """

    def __init__(self, table: result.Table, path: pathlib.Path, runs: int,
                 libvirt: Any, fresh: bool) -> None:
        self.table = table
        self.runs = runs
        self.libvirt = libvirt
        self.fresh = fresh
        self.lab = labs.Lab(path)
        self.path = path / 'microvm'
        self._baked: set[str] = set()

    def say(self, text: str) -> None:
        """What is done, and how busy the machine is."""
        print(f'   {time.strftime("%H:%M:%S")} load '
              f'{os.getloadavg()[0]:.1f}: {text}', file=sys.stderr,
              flush=True)

    def artifact(self, name: str) -> pathlib.Path:
        """The µVM of an image."""
        found = self.path / name
        if name not in self._baked:
            if self.fresh or not _usable(found):
                self._bake(name, found)
            self._baked.add(name)
        return found

    def _bake(self, name: str, target: pathlib.Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        raw, image = self.lab.raw(name), self.lab.image(name)
        self.lab.conf.set_override('timeout', servers.PATIENCE, 'bakery')
        done = bakery.bake(
            raw, raw.stat().st_size, target,
            self.lab.directory('work', 0o711), self.lab.conf.bakery,
            backing=(image, 'qcow2'),
            progress=lambda phase: self.say(f'baking {name}: {phase}'))
        if done.state != 'baked':
            raise RuntimeError(f'{name} was not baked: {done.reason}')
        total = sum(done.seconds.values())
        self.table.add(f'bake of {name}', total, 's', note=', '.join(
            f'{phase} {seconds:.3g}' for phase, seconds
            in done.seconds.items() if seconds >= 0.1))

    @contextlib.contextmanager
    def server(self, name: str) -> Iterator[servers.Server]:
        """A server that is gone again afterwards."""
        with servers.Server(self.libvirt, self.path / 'servers' / name,
                            name) as found:
            yield found

    def median(self, name: str, values: list[float], unit: str = 's',
               bar: float | None = None) -> None:
        """A row with the median of values, and their spread."""
        self.table.add(name, statistics.median(values), unit, bar,
                       runs=len(values), note=result.spread(values))


def _usable(directory: pathlib.Path) -> bool:
    try:
        found = artifact.read(directory)
    except exception.FastbootError:
        return False
    return found.key.recipe == activation.RECIPE


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure everything, or what has the word `only` in its name."""
    # Whoever ends this run has no guests of it left, and the rows so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with servers.hypervisor() as libvirt:
        bench = Bench(table, path, runs, libvirt, only is None)
        shutil.rmtree(bench.path / 'servers', ignore_errors=True)
        for measure in (boots, crowd, refused, silent, lanes, store):
            if only is None or only in measure.__name__:
                print(f'-- {measure.__doc__}', file=sys.stderr, flush=True)
                measure(bench)


def boots(bench: Bench) -> None:
    """Cold boots and resumes in turn: stages, and memory."""
    baked, image = bench.artifact(MAIN), bench.lab.image(MAIN)
    # What the first one finds in no cache is not measured.
    with bench.server('first') as one:
        one.resume(one.furnish(baked), stage=activation.STAGES[0])
    booted: list[times.Times] = []
    resumed: list[times.Times] = []
    sizes = _Sizes()
    try:
        for number in range(bench.runs):
            with bench.server(f'cold-{number}') as one:
                booted.append(one.boot(image))
                sizes.booted.append(one.resident() / MIB)
            bench.say(_words('booted', booted[-1]))
            with bench.server(f'resumed-{number}') as one:
                resumed.append(one.resume(one.furnish(baked)))
                sizes.over.append(one.resident() / MIB)
            bench.say(_words('resumed', resumed[-1]))
            with bench.server(f'someone-{number}') as one:
                one.resume(one.furnish(baked), stage=activation.IDENTITY)
                sizes.resumed.append(one.resident() / MIB)
    finally:
        # An interrupted run has the figures of what it did.
        if sizes.resumed:
            _timed(bench, booted, resumed)
            sizes.report(bench)


@dataclasses.dataclass
class _Sizes:
    """MiB that QEMU has in memory."""

    booted: list[float] = dataclasses.field(default_factory=list)
    resumed: list[float] = dataclasses.field(default_factory=list)
    over: list[float] = dataclasses.field(default_factory=list)

    def report(self, bench: Bench) -> None:
        """Its rows."""
        bench.median('memory of QEMU, booted, cloud-init over',
                     self.booted, 'MiB')
        bench.median('memory of QEMU, resumed, at IDENTITY',
                     self.resumed, 'MiB')
        bench.median('memory of QEMU, resumed, cloud-init over',
                     self.over, 'MiB')


def _words(what: str, found: times.Times) -> str:
    return f'{what}: ' + ', '.join(
        f'{name} {seconds:.2f}' for name, seconds in found.items())


def _timed(bench: Bench, booted: list[times.Times],
           resumed: list[times.Times]) -> None:
    """Rows of times, and the file with the timelines."""
    def of(rounds: list[times.Times], name: str) -> list[float]:
        return [found[name] for found in rounds]

    for name in times.OF_BOOTS:
        bench.median(f'boot: call to {name}', of(booted, name))
    answer, someone = times.ANSWER, activation.IDENTITY
    bench.median(f'resume: call to {answer}', of(resumed, answer), bar=1.2)
    bench.table.add(
        f'{answer}: resume / boot',
        result.ratio(of(resumed, answer), of(booted, answer)), 'ratio', 0.02,
        runs=len(resumed))
    bench.median(f'resume: call to {someone}', of(resumed, someone), bar=5)
    bench.table.add(
        f'{someone} / {times.MULTI_USER} of a boot', result.ratio(
            of(resumed, someone), of(booted, times.MULTI_USER)), 'ratio',
        0.06, runs=len(resumed))
    bench.median(f'resume: call to {activation.DONE}',
                 of(resumed, activation.DONE))
    bench.table.add(
        f'{activation.DONE} / {times.CLOUD_INIT} of a boot', result.ratio(
            of(resumed, activation.DONE), of(booted, times.CLOUD_INIT)),
        'ratio', runs=len(resumed))
    before = [0.0] * len(resumed)
    for name in ('dress', 'load', 'plug', 'activate'):
        ends = of(resumed, name)
        bench.median(
            {'dress': 'phase: define and dress', 'activate':
             'phase: say who, first instruction'}.get(name, f'phase: {name}'),
            [end - begun for begun, end in zip(before, ends, strict=True)])
        before = ends
    for name in (answer, *activation.STAGES):
        bench.median(f'first instruction to {name}', [
            end - begun for begun, end in zip(before, of(resumed, name),
                                              strict=True)])
    timelines = bench.path / 'timelines.json'
    timelines.write_text(json.dumps([
        times.phases('boot', times.medians(booted)),
        times.phases('resume', times.medians(resumed))]))
    bench.say(f'timelines: fastbootctl report timeline {timelines}')


def crowd(bench: Bench) -> None:
    """Several resumes of one image at once; what their guests share."""
    baked = bench.artifact(MAIN)
    with contextlib.ExitStack() as stack:
        with bench.server('alone') as one:
            lane = one.furnish(baked)
            ballast.touch(GUEST_MEMORY)
            alone = one.resume(lane, stage=activation.IDENTITY)
        made = [stack.enter_context(bench.server(f'crowd-{number}'))
                for number in range(CROWD)]
        ready = [one.furnish(baked) for one in made]
        found: list[times.Times] = [{} for _ in made]

        def start(number: int) -> None:
            found[number] = made[number].resume(
                ready[number], stage=activation.IDENTITY)

        ballast.touch(CROWD * GUEST_MEMORY)
        labs.at_once([lambda number=number: start(number)  # type: ignore
                      for number in range(CROWD)])
        bench.say(_words('the last', max(
            found, key=lambda one: one[activation.IDENTITY])))
        runs = [one['activate'] for one in found]
        bench.table.add(f'{CROWD} at once: until all run', max(runs), 's',
                        note=result.spread(runs))
        for name in (times.ANSWER, activation.IDENTITY):
            ends = [one[name] for one in found]
            bench.table.add(f'{CROWD} at once: until all have {name}',
                            max(ends), 's', note=result.spread(ends))
            bench.table.add(
                f'{CROWD} at once / one: {name}', max(ends) / alone[name],
                'times', 10 if name == times.ANSWER else None,
                note=f'one: {alone[name]:.3g} s')
        bench.say('asking what is their own')
        for name, (script, count) in _OWN.items():
            sets = [set(one.run(script).split()) for one in made]
            if any(len(one) != count for one in sets):
                raise RuntimeError(f'{name}: {sets}')
            bench.table.add(f'{name} that two of {CROWD} share',
                            times.shared(sets), '', 0, runs=CROWD,
                            note=f'{count} of each')


def refused(bench: Bench) -> None:
    """Until a load that is refused is known, and all is removed."""

    def other(saved: str, instance: clone.Instance) -> str:
        return live(saved, instance).replace('freePageReporting="on"', '')

    live = clone.live
    with mock.patch.object(clone, 'live', other):
        bench.median('failure: another machine in the stream',
                     _failures(bench, 'load'), bar=1)

    def cut(path: pathlib.Path) -> None:
        # Behind all that a lane is dressed with, wherever the guest has it.
        os.truncate(path, path.stat().st_size - _CUT)

    bench.median('failure: a stream that is cut off',
                 _failures(bench, 'load', cut), bar=1)


def silent(bench: Bench) -> None:
    """The same for a guest that says nothing within its deadline."""
    with mock.patch.object(activation, 'request',
                           lambda *words, **more: b'NOISE\n'):
        found = _failures(bench, 'wait', runs=min(bench.runs, 3))
    bench.median('failure: a guest that is silent, beyond its deadline',
                 [seconds - resume.DEADLINE for seconds in found])


def _failures(bench: Bench, phase: str,
              damage: Callable[[pathlib.Path], None] = lambda path: None,
              runs: int | None = None) -> list[float]:
    """Seconds from the call until a resume has failed and left nothing."""
    baked, found = bench.artifact(MAIN), []
    for number in range(runs or bench.runs):
        with bench.server(f'failing-{number}') as one:
            lane = one.furnish(baked)
            damage(lane.path)
            begun = time.monotonic()
            try:
                one.resume(lane, stage=activation.IDENTITY,
                           deadline=resume.DEADLINE)
            except resume.ResumeFailed as error:
                found.append(time.monotonic() - begun)
                if error.phase != phase:
                    raise
            else:
                raise RuntimeError('it was resumed')
            if bench.libvirt.listAllDomains():
                raise RuntimeError('a domain was left')
    return found


def lanes(bench: Bench) -> None:
    """Copies that a host makes ahead."""
    baked = bench.artifact(MAIN)
    took = []
    for number in range(bench.runs):
        with bench.server(f'lane-{number}') as one:
            begun = time.monotonic()
            one.furnish(baked)
            took.append(time.monotonic() - begun)
    bench.median('lane and disk: copied, compared and synced', took)
    bench.table.add('lane: bytes on disk', sum(
        (baked / name).stat().st_blocks * 512
        for name in (artifact.MEMORY, artifact.DISK)) / MIB, 'MiB')


def store(bench: Bench) -> None:
    """A µVM in the repository, one of a derived image, and back."""
    images = bench.lab.open_repository((MAIN, DERIVED))
    path = bench.path / 'repository'
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    repository.init(LocalStore(path), blocks.PAGE)
    microvms = repository.Repository(LocalStore(path))
    group = bench.lab.conf.repository
    publisher = publish.Publisher(
        microvms, bench.lab.directory('cache'),
        level=group.boot_compression_level,
        boot_level=group.boot_compression_level,
        threads=group.threads or None)
    stored = []
    for name in (MAIN, DERIVED):
        baked = bench.artifact(name)
        bench.say(f'publishing {name}')
        done = shelf.put(baked, images.image(name), images, publisher,
                         bench.lab.directory('work', 0o711))
        stored.append(done.published.stored_bytes / MIB)
        bench.table.add(
            f'µVM of {name} in packs, beyond all before', stored[-1], 'MiB',
            32 if name == MAIN else None,
            note=f'{done.pages} pages, {done.shared} of them the image\'s')
        for phase, seconds in done.seconds.items():
            bench.table.add(f'{phase}: µVM of {name}', seconds, 's')
    bench.table.add('µVM of a derived image / the first',
                    stored[1] / stored[0], 'ratio', 0.6)
    bench.median('fetch: µVM from the repository',
                 [_fetch(bench, microvms, images)
                  for _ in range(bench.runs)])


def _fetch(bench: Bench, microvms: repository.Repository,
           images: repository.Repository) -> float:
    target = bench.path / 'fetched'
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    begun = time.monotonic()
    entry = shelf.find(microvms.state(), MAIN)
    shelf.take(entry, microvms, images.image(MAIN), images, target)
    return time.monotonic() - begun
