# SPDX-License-Identifier: Apache-2.0
"""Completing an image from one server of the repository and from several."""

import contextlib
import functools
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from bench import result
from fastboot_common import store
from fastboot_common.store import striped
from fastboot_nova import host, mirror

SIZE = 64 << 20
RATE = 5_000_000
SLOW = 250_000
DELAY = 0.002

#: Name of a case, and the links of its servers (bytes a second).
CASES = {
    'one server of 5 MB/s': (RATE,),
    'two of 5 MB/s': (RATE, RATE),
    'two of 5 MB/s and one of 0.25 MB/s': (RATE, RATE, SLOW),
}


def run(table: result.Table, state_dir: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure all; `only` has no use here."""
    room = state_dir / 'hydration'
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    _publish(room)
    with contextlib.ExitStack() as stack:
        links = {name: _source(stack, room, rates)
                 for name, rates in CASES.items()}
        links['single'] = links['one server of 5 MB/s']
        cases = {name: functools.partial(_hydrate, room, links[name])
                 for name in CASES}
        cases['single'] = functools.partial(_frame_by_frame, room,
                                            links['single'])
        measured = result.interleaved(min(runs, 3), cases)
    one, two, slow = (measured[name] for name in CASES)
    for name in CASES:
        table.add(f'image of 64 MiB whole, {name}',
                  statistics.median(measured[name]), 's',
                  runs=len(measured[name]),
                  note=result.spread(measured[name]))
    table.add('two servers against one', result.ratio(one, two), 'times',
              1.7, '>=', runs=len(two))
    table.add('a slow third one against two', result.ratio(slow, two),
              'times', 1.2, runs=len(slow))
    table.add('one server, each frame a request',
              statistics.median(measured['single']), 's',
              runs=len(measured['single']),
              note=result.spread(measured['single']))


def _publish(room: pathlib.Path) -> None:
    # Half of it compresses: frames are smaller than requests.
    rng = random.Random(1)
    with (room / 'raw').open('wb') as file:
        for _ in range(SIZE >> 14):
            file.write(rng.randbytes(8192) + rng.randbytes(1) * 8192)
    subprocess.run([sys.executable, '-m', 'bench.publish_once',
                    room / 'raw', room], check=True)


def _source(stack: contextlib.ExitStack, room: pathlib.Path,
            rates: tuple[int, ...]) -> store.ReadStore:
    stores = [store.open_store(stack.enter_context(_served(room, rate)),
                               retries=0) for rate in rates]
    return stores[0] if len(stores) == 1 else striped.StripedStore(stores)


@contextlib.contextmanager
def _served(room: pathlib.Path, rate: int) -> Iterator[str]:
    with subprocess.Popen(
            [sys.executable, '-m', 'bench.throttled', room / 'repository',
             str(rate), str(DELAY)], stdout=subprocess.PIPE,
            text=True) as process:
        assert process.stdout
        try:
            yield f'http://127.0.0.1:{process.stdout.readline().strip()}'
        finally:
            process.kill()


def _hydrate(room: pathlib.Path, source: store.ReadStore) -> float:
    """Seconds that it takes."""
    shutil.rmtree(room / 'host', ignore_errors=True)
    with host.Host(room / 'host', source, socket=room / 'nbd') as served:
        served.mirror.refresh()
        served.acquire('image', 'guest')
        begun = time.monotonic()
        served.hydrate('image')
        return time.monotonic() - begun


def _frame_by_frame(room: pathlib.Path, source: store.ReadStore) -> float:
    before, mirror._REQUEST = mirror._REQUEST, 1
    try:
        return _hydrate(room, source)
    finally:
        mirror._REQUEST = before
