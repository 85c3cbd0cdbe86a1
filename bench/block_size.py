# SPDX-License-Identifier: Apache-2.0
"""Suite ``block-size``: what the size of blocks costs and brings.

Dedup, compression, CCR and cross-similarity as Squirrel defines them
(sections 2.2 and 4.3.1), on real images and their boot sets, and the replay
of a boot from volumes with such clusters.
"""

import collections
import concurrent.futures
import functools
import hashlib
import pathlib
import shutil

import numpy as np
import zstandard

from bench import lab as labs
from bench import result
from bench.lab import MAIN
from fastboot_common import (
    blocks,
    chain,
    extents,
    manifest,
    publish,
    repository,
    trace,
)
from fastboot_common.store.local import LocalStore
from fastboot_nova import host as hosts
from fastboot_nova import node

SIZES = (4096, 8192, 16384, 32768, 65536, 131072)


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Measure all sizes."""
    lab = labs.Lab(path)
    lab.open_repository()
    for size in SIZES:
        for what in ('boot sets', 'images'):
            _similarity(table, lab, size, what)
    _replays(table, lab, max(runs, 5))


def _similarity(table: result.Table, lab: labs.Lab, size: int,
                what: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        per_image = list(pool.map(
            _digests, [lab.raw(name) for name in labs.NAMES],
            [_boot(lab, name, size) if what == 'boot sets' else None
             for name in labs.NAMES], [size] * len(labs.NAMES)))
    seen: collections.Counter[bytes] = collections.Counter()
    packed: dict[bytes, int] = {}
    total = 0
    for found, lengths in per_image:
        total += len(found)
        seen.update(set(found))
        packed |= lengths
    unique = len(seen)
    dedup = total / unique
    compression = unique * size / sum(packed.values())
    repeated = sum(count for count in seen.values() if count > 1)
    own = sum(seen.values())
    kib = size >> 10
    note = f'{len(labs.NAMES)} images, {total * size / 2**20:.0f} MiB'
    for name, value in (('dedup', dedup), ('compression', compression),
                        ('CCR', dedup * compression),
                        ('cross-similarity', repeated / own)):
        table.add(f'{what}, {kib:3} KiB: {name}', value, 'ratio', note=note)


def _boot(lab: labs.Lab, name: str, size: int) -> list[int]:
    found = lab.open_repository()
    image = found.read_manifest(found.image(name).manifest)
    numbers: list[int] = trace.boot_set(
        image.trace, size, image.virtual_size).tolist()
    return numbers


def _digests(raw: pathlib.Path, numbers: list[int] | None,
             size: int) -> tuple[list[bytes], dict[bytes, int]]:
    """Digests of all (or some) blocks that are not zeros, in a process of
    its own, and what each takes under zstd by itself."""
    found, lengths = [], {}
    compressor = zstandard.ZstdCompressor(level=3)
    count = -(-raw.stat().st_size // size)
    with raw.open('rb') as file:
        for number in numbers if numbers is not None else range(count):
            file.seek(number * size)
            data = file.read(size).ljust(size, b'\0')
            if data.count(0) == size:
                continue
            digest = hashlib.sha256(data).digest()
            found.append(digest)
            if digest not in lengths:
                lengths[digest] = min(len(compressor.compress(data)), size)
    return found, lengths


def _replays(table: result.Table, lab: labs.Lab, runs: int) -> None:
    reads, virtual_size = lab.reads(MAIN)

    def replay(options: list[str], cold: bool) -> float:
        if cold:
            labs.drop_caches()
        return trace.replay(options, reads, virtual_size, 300).seconds

    sizes = [size for size in SIZES if size in blocks.BLOCK_SIZES]
    disks = {size: _disk(lab, size) for size in sizes}
    for cold in (True, False):
        if not cold:
            for disk in disks.values():
                replay(disk, False)
        cases = {str(size): functools.partial(replay, disk, cold)
                 for size, disk in disks.items()}
        cases['stock'] = functools.partial(replay, lab.stock(MAIN), cold)
        times = result.interleaved(runs, cases)
        for name, values in times.items():
            label = f'{int(name) >> 10:3} KiB' if name != 'stock' else name
            table.add(f'replay {"cold" if cold else "warm"}, {label}',
                      float(np.median(values)), 's', runs=runs,
                      note=result.spread(values))


def _disk(lab: labs.Lab, size: int) -> list[str]:
    """An overlay on the complete slot of a volume with such clusters."""
    room = lab.path / f'block-{size}'
    shutil.rmtree(room, ignore_errors=True)
    (room / 'repository').mkdir(parents=True)
    store = LocalStore(room / 'repository')
    repository.init(store, size)
    found = repository.Repository(store)
    main = lab.open_repository()
    image = main.read_manifest(main.image(MAIN).manifest)
    publish.Publisher(found, room / 'cache').publish(
        lab.raw(MAIN), manifest.Manifest(
            MAIN, MAIN, image.virtual_size, size, '', [],
            np.empty(0, extents.DTYPE),
            boot=trace.boot_set(image.trace, size, image.virtual_size)))
    with hosts.Host(room / 'host', store, socket=room / 'n') as host, \
            node.Node(host, room, socket=room / 'n', wait=5, shield_wait=2):
        host.sync()
        host.acquire(MAIN, 'bench')
        host.hydrate(MAIN)
        link = host.link(MAIN)
        chain.make_stub(room / 'stub', link)
        chain.make_disk(room / 'disk', room / 'stub', link.virtual_size)
    return ['-f', 'qcow2', str(room / 'disk')]
