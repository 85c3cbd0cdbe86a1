# SPDX-License-Identifier: Apache-2.0
"""Suite ``operations``: guests that run, with fastboot and without.

Needs a sandbox that is up. What guests read of an image that is whole on
their host, beside guests of the same bytes on a stock base; and how long a
guest that reads blocks which are not there stands still while the agent or
the export starts anew.
"""

import concurrent.futures
import os
import pathlib
import shlex
import signal
import time
from collections.abc import Callable
from typing import Any

from bench import result
from bench.openstack import AGENT, HOST, Bench
from fastboot_common import nbdkit

import witness  # isort: skip
from cloud.user import CloudError  # isort: skip

#: Runs inside a guest and prints the seconds of a kind of reads.
READER = '''
import mmap, os, random, sys, time
disk = os.open('/dev/vda', os.O_RDONLY | os.O_DIRECT)
memory = mmap.mmap(-1, 1 << 20)
size, places = {
    'sequential': (1 << 20, [place << 20 for place in range(256)]),
    'random': (4096, [random.Random(1).randrange(1 << 18) * 4096
                      for _ in range(2000)]),
}[sys.argv[1]]
buffer = memoryview(memory)[:size]
began = time.monotonic()
for place in places:
    os.preadv(disk, [buffer], place)
print(time.monotonic() - began)
'''
KINDS = {'sequential': 'sequential read, 1 MiB',
         'random': 'random read, 4 KiB'}
#: Seconds that a guest is watched for after a restart.
WATCHED = 20
TICK = 0.01


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure everything, or what has the word `only` in its name."""
    bench = Bench(table, path, runs)
    for measure in (reads, stalls):
        if only is None or measure.__name__ in only.split(','):
            measure(bench, runs)


def reads(bench: Bench, runs: int) -> None:
    """Reads inside guests, ours and stock in turn."""
    user = bench.user
    image = bench.image('bench')
    user.wait_built(image)
    user.wait_on_hosts(image)
    user.ask_agent(HOST, 'POST', '/v1/prepare', {'image': image})
    user.wait(lambda: user.agent_state(HOST, image) == 'complete', 300,
              'the image to be whole')
    stock = bench.image('bench-stock', fastboot='off')
    boots = [user.boot('reads', one, HOST) for one in (image, stock)]
    try:
        readers = [_reader(bench, boot.server.id) for boot in boots]
        for kind, words in KINDS.items():
            ratios, ours = [], []
            for number in range(runs + 1):
                found = [reader(kind) for reader in readers]
                if number:  # the first one fills caches
                    ratios.append(found[1] / found[0])
                    ours.append(found[0])
            bench.table.add(f'{words}, speed of a whole image / stock',
                            sorted(ratios)[runs // 2], 'ratio', 0.95, '>=',
                            runs=runs, note=f'{min(ratios):.2f} to '
                            f'{max(ratios):.2f}; {min(ours):.2f} s')
    finally:
        user.delete(*(boot.server for boot in boots))


def _reader(bench: Bench, server: str) -> Callable[[str], float]:
    """A function that reads inside a guest; it gives seconds."""
    user = bench.user
    address = next(
        one['addr'] for found in user.cloud.compute.get_server(
            server).addresses.values() for one in found)

    def read(kind: str) -> float:
        return float(user.inside(
            'control', 'ssh', f'root@{address}', 'python3', '-c',
            shlex.quote(READER), kind))

    def ready() -> bool:
        try:
            return read('random') > 0
        except (ValueError, CloudError):
            return False

    user.wait(ready, 200, 'ssh')
    return read


def stalls(bench: Bench, runs: int) -> None:
    """How long a guest stands still, beyond the restart itself."""
    user = bench.user
    image = _witness(bench)
    for words, restart in (('the agent', _restart_agent),
                           ('the export', _restart_export)):
        gaps, usual, took = [], [], []
        for _ in range(min(runs, 3)):
            bench.make_cold(image)
            boot = user.boot('stalls', image, HOST, flavor='m1.nano',
                             prompt='.')
            try:
                usual.append(_gap(bench, boot.server, _nothing, 3)[0])
                gap, seconds = _gap(bench, boot.server, restart, WATCHED)
                gaps.append(gap)
                took.append(seconds)
            finally:
                user.delete(boot.server)
        bench.table.add(
            f'longest stall over a restart of {words}, beyond the restart',
            max(gap - seconds for gap, seconds in zip(gaps, took,
                                                      strict=True)),
            's', 2, runs=len(gaps),
            note=f'stalls {_words(gaps)}, restarts {_words(took)}, '
                 f'without one {_words(usual)} s')
    user.cloud.image.delete_image(image)


def _words(values: list[float]) -> str:
    return ' '.join(f'{value:.2f}' for value in values)


def _witness(bench: Bench) -> str:
    """An image most of which is not in its boot set."""
    file = bench.path / 'witness.raw'
    witness.Witness(size=96 << 20, lazy=2048, every=1).make(file)
    image = bench.user.upload('stalls', file, disk_format='raw')
    file.unlink()
    bench.user.wait_built(image)
    bench.user.wait_on_hosts(image)
    return image


def _gap(bench: Bench, server: Any, restart: Callable[[Bench], object],
         seconds: float) -> tuple[float, float]:
    """The longest time without progress, and what the restart took.

    :param seconds: to watch, from when the restart is asked for.
    """
    def timed() -> float:
        restart(bench)
        return time.monotonic() - began

    began = last = time.monotonic()
    longest, steps = 0.0, witness.steps(bench.user.console(server))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(timed)
        while time.monotonic() - began < seconds or not future.done():
            time.sleep(TICK)
            found = witness.steps(bench.user.console(server))
            if found > steps:
                longest = max(longest, time.monotonic() - last)
                steps, last = found, time.monotonic()
        took = future.result()
    return max(longest, time.monotonic() - last), took


def _nothing(bench: Bench) -> None:
    """What a guest's progress is without a restart."""


def _restart_agent(bench: Bench) -> None:
    bench.user.sandbox('restart', AGENT)


def _restart_export(bench: Bench) -> None:
    """Kill the export, and wait until the agent has started another."""
    user = bench.user
    path = user.home(HOST) / 'fastboot/run/export.sock'
    for pid in user.processes(HOST, 'nbdkit'):
        if b'export.sock' in pathlib.Path(
                f'/proc/{pid}/cmdline').read_bytes():
            os.kill(pid, signal.SIGKILL)
    user.wait(lambda: _answers(path), WATCHED, 'another export')


def _answers(path: pathlib.Path) -> bool:
    try:
        nbdkit.greet(path, 1)
    except OSError:
        return False
    return True
