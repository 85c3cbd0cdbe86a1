# SPDX-License-Identifier: Apache-2.0
"""Suite ``core``: boot, replay, thaw, publish, export, state."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench import lab as labs
from bench import result, squirrel
from bench.lab import MAIN
from fastboot_common import (
    configdrive,
    extents,
    manifest,
    publish,
    qemu,
    repository,
    trace,
    upkeep,
)
from fastboot_common.store.local import LocalStore
from fastboot_nova import host as hosts


class Bench:
    """What the measurements share."""

    def __init__(self, table: result.Table, path: pathlib.Path,
                 runs: int) -> None:
        self.table = table
        self.path = path
        self.runs = runs
        self.lab = labs.Lab(path)

    def replay(self, options: list[str], name: str) -> float:
        """Seconds that QEMU's block layer takes for an image's boot."""
        reads, size = self.lab.reads(name)
        return trace.replay(options, reads, size, 300).seconds

    def cold(self, options: list[str], name: str) -> float:
        """The same from a cold page cache."""
        labs.drop_caches()
        return self.replay(options, name)


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure everything, or what has the word `only` in its name."""
    bench = Bench(table, path, max(runs, 5))
    for measure in (boots, replays, contention, thaw, publishing, export,
                    derived, state):
        if only is None or only in measure.__name__:
            print(f'-- {measure.__doc__}', file=sys.stderr, flush=True)
            measure(bench)


def boots(bench: Bench) -> None:
    """Reads that reach NBD before the login prompt."""
    lab, missed, seconds = bench.lab, [], []
    log = lab.path / 'run' / 'misses.log'
    options = lab.conf.capture
    pattern = re.compile(options.console_pattern.encode())
    with lab.open_host('host-boots') as host:
        host.sync()
        for _ in range(5):
            disk = lab.disk(host, MAIN)[-1]
            log.write_bytes(b'')
            with tempfile.TemporaryDirectory() as room:
                drive = pathlib.Path(room) / 'config.iso'
                configdrive.build(drive)
                config = qemu.Config(
                    disk=qemu.file_disk(disk, 'qcow2'),
                    memory=options.memory, vcpus=options.vcpus,
                    config_drive=str(drive))
                with qemu.Machine(config, pathlib.Path(room)) as machine:
                    seconds.append(_prompt(machine, pattern))
                    missed.append(len(trace.parse_log(log)))
    bench.table.add(
        'reads that reach NBD before the login prompt, synced',
        float(np.median(missed)), 'reads', 0, runs=len(missed),
        note=f'each: {missed}; boots {result.spread(seconds)} s')


def _prompt(machine: qemu.Machine, pattern: 're.Pattern[bytes]') -> float:
    begun, seen = time.monotonic(), b''
    while time.monotonic() - begun < 600:
        seen += machine.console()
        if pattern.search(seen[-4096:]):
            return time.monotonic() - begun
        if not machine.alive():
            break
        time.sleep(0.02)
    raise RuntimeError(f'no prompt: {seen[-500:]!r}')


def replays(bench: Bench) -> None:
    """The boot's reads through QEMU's block layer."""
    lab, table = bench.lab, bench.table
    with lab.open_host() as host:
        host.sync()
        ours = lab.disk(host, MAIN)
        stock, raw = lab.stock(MAIN), lab.plain(MAIN)
        image = host.image(MAIN)
        volume = host.open_volume(image.domain)
        boot = host.mirror.read_manifest(image.manifest).boot

        def ahead() -> float:
            labs.drop_caches()
            volume.read_ahead(MAIN, boot)
            time.sleep(0.3)
            return bench.replay(ours, MAIN)

        cold = result.interleaved(2 * bench.runs, {
            'ours': lambda: bench.cold(ours, MAIN),
            'raw': lambda: bench.cold(raw, MAIN),
            'stock': lambda: bench.cold(stock, MAIN),
            'ahead': ahead,
            'then warm': lambda: bench.replay(ours, MAIN),
        })
        for options in (ours, raw, stock):
            bench.replay(options, MAIN)
        # Fast, and nearly equal: more runs, for a median that stands.
        warm = result.interleaved(5 * bench.runs, {
            'ours': lambda: bench.replay(ours, MAIN),
            'raw': lambda: bench.replay(raw, MAIN),
            'stock': lambda: bench.replay(stock, MAIN),
        })
        seconds = {f'cold {k}': result.spread(v) for k, v in cold.items()} \
            | {f'warm {k}': result.spread(v) for k, v in warm.items()}
        note = '; '.join(f'{k} {v} s' for k, v in seconds.items())
        table.add('cold replay: overlay on slot / raw local file',
                  result.ratio(cold['ours'], cold['raw']), 'ratio', 0.65,
                  runs=2 * bench.runs, note=note)
        table.add('cold replay: overlay on slot / stock overlay',
                  result.ratio(cold['ours'], cold['stock']), 'ratio',
                  runs=2 * bench.runs)
        table.add('cold, read ahead 0.3 s before / warm',
                  result.ratio(cold['ahead'], cold['then warm']), 'ratio',
                  1.25, runs=2 * bench.runs)
        table.add('warm replay: overlay on slot / stock overlay',
                  result.ratio(warm['ours'], warm['stock']), 'ratio', 1.0,
                  runs=5 * bench.runs)
        _eight(bench, host)


def _eight(bench: Bench, host: hosts.Host) -> None:
    """Eight different images at once."""
    lab = bench.lab
    ours = {name: lab.disk(host, name) for name in labs.NAMES}
    stock = {name: lab.stock(name) for name in labs.NAMES}
    memory: dict[str, list[float]] = {'ours': [], 'stock': []}

    def all_of(kind: str, disks: dict[str, list[str]],
               names: tuple[str, ...]) -> float:
        labs.drop_caches()
        before, begun = labs.cached(), time.perf_counter()
        labs.at_once([
            lambda name=name: bench.replay(disks[name], name)
            for name in names])
        seconds = time.perf_counter() - begun
        memory[kind].append(labs.cached() - before)
        return seconds

    names = labs.NAMES
    for name in names:
        lab.reads(name)
    times = result.interleaved(bench.runs, {
        'ours': lambda: all_of('ours', ours, names),
        'stock': lambda: all_of('stock', stock, names)})
    bench.table.add(
        '8 images at once, cold: slots / stock overlays',
        result.ratio(times['ours'], times['stock']), 'ratio', 0.5,
        runs=bench.runs, note='; '.join(
            f'{k} {result.spread(v)} s' for k, v in times.items()))
    for values in memory.values():
        values.clear()
    derived = ('deb12', *labs.DERIVED)
    result.interleaved(bench.runs, {
        'ours': lambda: all_of('ours', ours, derived),
        'stock': lambda: all_of('stock', stock, derived)})
    bench.table.add(
        'page cache of 5 derived images at once: slots / stock',
        result.ratio(memory['ours'], memory['stock']), 'ratio', 0.6,
        runs=bench.runs, note='; '.join(
            f'{k} {result.spread([one / 2**20 for one in v])} MiB'
            for k, v in memory.items()))


def contention(bench: Bench) -> None:
    """A cold replay beside a busy disk, and with too little memory."""
    lab = bench.lab
    with lab.open_host() as host:
        host.sync()
        ours, stock = lab.disk(host, MAIN), lab.stock(MAIN)
        with _busy_disk(bench.path):
            times = result.interleaved(bench.runs, {
                'ours': lambda: bench.cold(ours, MAIN),
                'stock': lambda: bench.cold(stock, MAIN)})
        bench.table.add(
            'cold replay beside fio (random, depth 8): slot / stock',
            result.ratio(times['ours'], times['stock']), 'ratio', 0.5,
            runs=bench.runs, note='; '.join(
                f'{k} {result.spread(v)} s' for k, v in times.items()))
        limit = 48 << 20
        image = host.image(MAIN)
        volume = host.open_volume(image.domain)
        boot = host.mirror.read_manifest(image.manifest).boot
        times = result.interleaved(bench.runs, {
            'ours': lambda: _limited(bench, ours, limit),
            'stock': lambda: _limited(bench, stock, limit),
            # As acquiring does it: by the host's process, not the guest's.
            'ahead': lambda: _limited(
                bench, ours, limit, lambda: volume.read_ahead(MAIN, boot)),
        })
        note = '; '.join(
            f'{k} {result.spread(v)} s' for k, v in times.items())
        bench.table.add(
            'cold replay in a 48 MiB cgroup: slot / stock',
            result.ratio(times['ours'], times['stock']), 'ratio', 0.5,
            runs=bench.runs, note=note)
        bench.table.add(
            'the same, boot set read ahead by the host: slot / stock',
            result.ratio(times['ahead'], times['stock']), 'ratio',
            runs=bench.runs)


@contextlib.contextmanager
def _busy_disk(path: pathlib.Path) -> Iterator[None]:
    file = path / 'fio.dat'
    common = ['fio', '--name=busy', f'--filename={file}', '--size=2G']
    if not file.exists():
        subprocess.run([*common, '--rw=write', '--bs=1M'], check=True,
                       stdout=subprocess.DEVNULL)
    process = subprocess.Popen(
        [*common, '--rw=randread', '--bs=64k', '--direct=1', '--iodepth=8',
         '--ioengine=libaio', '--time_based', '--runtime=600'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _limited(bench: Bench, options: list[str], limit: int,
             ahead: Callable[[], Any] | None = None) -> float:
    """A cold replay in a memory cgroup of `limit` bytes."""
    v2 = pathlib.Path('/sys/fs/cgroup/cgroup.controllers').exists()
    base = pathlib.Path('/sys/fs/cgroup' if v2 else '/sys/fs/cgroup/memory')
    group = base / 'fastboot-bench'
    if v2:
        (base / 'cgroup.subtree_control').write_text('+memory')
    group.mkdir(exist_ok=True)
    (group / ('memory.max' if v2 else 'memory.limit_in_bytes')
     ).write_text(str(limit))
    home = base / 'cgroup.procs'
    # Before: QEMU's program is charged to nobody's guest.
    labs.drop_caches()
    if ahead:
        ahead()
        time.sleep(0.3)
    try:
        (group / 'cgroup.procs').write_text(str(os.getpid()))
        return bench.replay(options, MAIN)
    finally:
        home.write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            group.rmdir()


def thaw(bench: Bench) -> None:
    """From local packs into the volume."""
    lab = bench.lab
    seconds, sizes = [], []
    path = lab.path / 'host-thaw'
    for _ in range(bench.runs):
        shutil.rmtree(path, ignore_errors=True)
        with hosts.Host(path, lab.open_repository().store,
                        socket=path / 'nbd.sock') as host:
            image = host_image(host)
            host.sync([image.image_id])
            begun = time.perf_counter()
            sizes.append(host.thaw(image))
            seconds.append(time.perf_counter() - begun)
    size = float(np.median(sizes))
    shutil.rmtree(path, ignore_errors=True)
    scaled = float(np.median(seconds)) * 80e6 / size
    bench.table.add(
        'thaw of a boot set, as for 80 MB', scaled, 's', 0.25,
        runs=bench.runs,
        note=f'{size / 1e6:.0f} MB in {result.spread(seconds)} s, synced')


def host_image(host: hosts.Host) -> Any:
    """The main image, after the journal was read."""
    host.mirror.refresh()
    return host.image(MAIN)


def publishing(bench: Bench) -> None:
    """Publishing a whole image, beside what others do."""
    lab, table = bench.lab, bench.table
    raw = lab.raw(MAIN)
    data = int(subprocess.run(
        ['du', '-B1', raw], capture_output=True, text=True,
        check=True).stdout.split()[0])
    room = lab.path / 'publish'
    dense = lab.dense(MAIN)

    def ours() -> float:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        begun = time.perf_counter()
        subprocess.run([sys.executable, '-m', 'bench.publish_once', raw,
                        room], check=True, cwd=labs.ROOT)
        return time.perf_counter() - begun

    def tools() -> float:
        begun = time.perf_counter()
        # Without the holes: they cost these much, and us nothing.
        subprocess.run(f'zstd -q -3 -T2 -c {dense} > {room}/z; '
                       f'openssl sha256 {dense} > /dev/null',
                       shell=True, check=True)
        return time.perf_counter() - begun

    def restic() -> float:
        target = room / 'restic'
        shutil.rmtree(target, ignore_errors=True)
        env = {**os.environ, 'RESTIC_PASSWORD': 'x',
               'RESTIC_REPOSITORY': str(target),
               'RESTIC_CACHE_DIR': str(room / 'cache')}
        subprocess.run(['restic', '-q', 'init'], env=env, check=True)
        begun = time.perf_counter()
        subprocess.run(['restic', '-q', 'backup', raw], env=env, check=True)
        return time.perf_counter() - begun

    def borg() -> float:
        target = room / 'borg'
        shutil.rmtree(target, ignore_errors=True)
        env = {**os.environ, 'BORG_BASE_DIR': str(room)}
        subprocess.run(['borg', 'init', '-e', 'none', target], env=env,
                       check=True)
        begun = time.perf_counter()
        subprocess.run(['borg', 'create', '-C', 'zstd,3', f'{target}::a',
                        raw], env=env, check=True)
        return time.perf_counter() - begun

    cases = {'ours': ours, 'zstd+openssl': tools}
    for name, case in (('restic', restic), ('borg', borg)):
        if shutil.which(name):
            cases[name] = case
    times = result.interleaved(5, cases)
    memory = json.loads((room / 'memory.json').read_text())
    rate = data / float(np.median(times['ours'])) / 1e6
    table.add('publishing a whole image', rate, 'MB/s', 150, '>=', runs=5,
              note=f'{data / 1e6:.0f} MB not zero; ' + '; '.join(
                  f'{k} {result.spread(v)} s' for k, v in times.items()))
    table.add('publishing: memory', memory / 2**20, 'MiB', 300, runs=5)
    for name in cases:
        if name != 'ours':
            table.add(f'publishing: ours / {name}', result.ratio(
                times['ours'], times[name]), 'ratio', runs=5)
    shutil.rmtree(room, ignore_errors=True)


def export(bench: Bench) -> None:
    """The export beside nbdkit's file plugin."""
    lab = bench.lab
    sockets = lab.path / 'run' / 'file.sock'
    with lab.open_host('host-export') as host:
        host.sync()
        image = host.image(MAIN)
        host.thaw(image)
        host.hydrate(MAIN)
        ours = f'nbd+unix:///{MAIN}?socket={lab.path}/run/export.sock'
        theirs = f'nbd+unix:///?socket={sockets}'
        with _file_plugin(lab.raw(MAIN), sockets):
            for name, options, key, bar in (
                    ('sequential at 128 KiB',
                     ['--rw=read', '--bs=128k', '--iodepth=4'], 'bw', 0.75),
                    ('4 KiB reads at depth 16',
                     ['--rw=randread', '--bs=4k', '--iodepth=16'],
                     'iops', 0.6)):
                for uri in (ours, theirs):
                    _fio(uri, options, key)
                speeds = result.interleaved(bench.runs, {
                    'ours': lambda o=options, k=key: _fio(ours, o, k),
                    'file': lambda o=options, k=key: _fio(theirs, o, k)})
                bench.table.add(
                    f'export / nbdkit file plugin: {name}',
                    result.ratio(speeds['ours'], speeds['file']), 'ratio',
                    bar, '>=', runs=bench.runs, note='; '.join(
                        f'{k} {result.spread(v)} '
                        + ('KiB/s' if key == 'bw' else 'reads/s')
                        for k, v in speeds.items()))


@contextlib.contextmanager
def _file_plugin(raw: pathlib.Path, socket: pathlib.Path) -> Iterator[None]:
    """nbdkit as people start it: with its default threads."""
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        ['nbdkit', '-f', '-r', '-U', str(socket), 'file', str(raw)])
    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _fio(uri: str, options: list[str], key: str) -> float:
    done = subprocess.run(
        ['fio', '--name=x', '--ioengine=nbd', f'--uri={uri}', '--size=1G',
         '--time_based', '--runtime=4', '--output-format=json', *options],
        capture_output=True, text=True, check=True)
    text = done.stdout[done.stdout.index('{'):]
    return float(json.loads(text)['jobs'][0]['read'][key])


def derived(bench: Bench) -> None:
    """What a derived image adds."""
    lab = bench.lab
    found = lab.open_repository()
    size = found.block_size
    base = _raw_blocks(lab.raw(MAIN))
    for name in labs.DERIVED:
        fresh = _raw_blocks(lab.raw(name)) - base
        # Alone in a new repository beside its base, so that what the other
        # images brought does not count.
        added, stored = _added(lab, name)
        bench.table.add(
            f'{name}: bytes added / bytes truly new',
            added / max(len(fresh) * 4096, 1), 'ratio', 1.15,
            note=f'{added / 1e6:.1f} MB in blocks of {size}, '
                 f'{len(fresh) * 4096 / 1e6:.1f} MB new in blocks of 4096; '
                 f'{stored / 1e6:.1f} MB stored')


def _raw_blocks(path: pathlib.Path) -> set[bytes]:
    seen = set()
    with path.open('rb') as file:
        while data := file.read(1 << 20):
            for at in range(0, len(data), 4096):
                block = data[at:at + 4096]
                if any(block):
                    seen.add(hashlib.sha256(block).digest())
    return seen


def _added(lab: labs.Lab, name: str) -> tuple[int, int]:
    with tempfile.TemporaryDirectory(dir=lab.path) as room:
        path = pathlib.Path(room)
        store = LocalStore(path)
        repository.init(store, lab.conf.repository.block_size)
        found = repository.Repository(store)
        publisher = publish.Publisher(found, path / 'cache')
        for one in (MAIN, name):
            raw = lab.raw(one)
            done = publisher.publish(raw, manifest.Manifest(
                one, one, raw.stat().st_size, found.block_size, '', [],
                np.empty(0, extents.DTYPE)))
    return done.new_bytes, done.stored_bytes


def state(bench: Bench) -> None:
    """607 images as Squirrel had them."""
    squirrel.measure(bench.table, bench.path)
    figures = upkeep.statistics(bench.lab.open_repository())
    bench.table.add('dedup x compression of the 8 images',
                    figures['combined_ratio'], 'ratio', note=str(figures))
