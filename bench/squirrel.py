# SPDX-License-Identifier: Apache-2.0
"""A host's state for 607 images shaped like those of Squirrel.

Squirrel (tables 1 and 2, section 4.3) has 607 images with 78.5 GB of boot
sets, which take 10 GB at blocks of 64 KiB. The packs here have true indexes
and no content: what is measured is what describes the images, and how large
the packs would be.
"""

import hashlib
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from typing import Any

import numpy as np

from bench import result
from fastboot_common import (
    extents,
    files,
    journal,
    manifest,
    pack,
    repository,
    store,
)
from fastboot_common.store.local import LocalStore

IMAGES = 607
BOOT_BYTES = 78.5e9 / IMAGES
#: Of a boot set, what no earlier image brought, and zstd on that: together
#: they give the 10 GB.
NEW_SHARE = 0.25
COMPRESSION = 78.5e9 * NEW_SHARE / 10e9
VIRTUAL_SIZE = 30 << 30
#: Where an image's data lies: 1.4 TB of 607 images are not zeros.
DATA_SIZE = 4 << 30
FAMILIES = 12
#: Images that guests of this host use: these have slots.
IN_USE = 40


def measure(table: result.Table, path: pathlib.Path) -> None:
    """Make the state, serve it, and add two rows."""
    room = path / 'squirrel'
    shutil.rmtree(room, ignore_errors=True)
    block_size = 16384
    packs = _make(room, block_size)
    manifests = _allocated(room / 'host' / 'mirror' / 'manifests')
    done = subprocess.run(
        [sys.executable, '-m', 'bench.squirrel_host', room],
        check=True, capture_output=True, text=True,
        cwd=pathlib.Path(__file__).parent.parent)
    memory, used = map(int, done.stdout.split())
    table.add('607 images: memory of host process, export and shield',
              memory / 2**20, 'MiB', 60,
              note=f'proportional set size; {IN_USE} images have slots')
    total = packs + manifests + used
    table.add('607 images: disk of each', total / IMAGES / 1e6, 'MB', 17,
              note=f'packs {packs / 1e9:.2f} GB, manifests '
                   f'{manifests / 1e6:.0f} MB, slots {used / 1e6:.0f} MB')
    shutil.rmtree(room)


def _allocated(path: pathlib.Path) -> int:
    return sum(one.stat().st_blocks * 512 for one in path.rglob('*'))


def _make(room: pathlib.Path, block_size: int) -> int:
    """The mirror of a host that is in sync; the bytes of its packs."""
    mirror = room / 'host' / 'mirror'
    random = np.random.default_rng(1)
    (room / 'repository').mkdir(parents=True)
    target = LocalStore(room / 'repository')
    repository.init(target, block_size)
    files.write_atomically(mirror / 'config.json', target.get('config.json'))
    state = journal.State(version=IMAGES, previous='0' * 64)
    families: list[list[pack.PackRef]] = [[] for _ in range(FAMILIES)]
    total = 0
    for serial in range(1, IMAGES + 1):
        family = families[serial % FAMILIES]
        image, size = _image(mirror, serial, family, random, block_size)
        state.images[image.image_id] = image
        total += size
    files.write_atomically(mirror / 'state.json', state.to_json())
    return total


def _image(mirror: pathlib.Path, serial: int, family: list[pack.PackRef],
           random: Any, block_size: int) -> tuple[journal.Image, int]:
    count = int(BOOT_BYTES / block_size)
    fresh = int(count * NEW_SHARE)
    ref = _pack(mirror, serial, fresh, block_size, random)
    used = [*family[-8:], ref]
    family.append(ref)
    boot = _runs(random, count, DATA_SIZE // block_size)
    packs = np.full(count, len(used) - 1)
    ordinals = np.arange(count) % ref.blocks
    # What it shares comes in runs, as files do.
    run = 16
    for start in range(fresh, count - run, run):
        which = int(random.integers(max(len(used) - 1, 1)))
        first = int(random.integers(max(used[which].blocks - run, 1)))
        packs[start:start + run] = which
        ordinals[start:start + run] = first + np.arange(run)
    found = manifest.Manifest(
        f'image-{serial}', f'image {serial}', VIRTUAL_SIZE, block_size,
        '0' * 64, used, extents.merge(boot, packs, ordinals), boot=boot)
    data = found.pack()
    digest = hashlib.sha256(data).hexdigest()
    files.write_atomically(
        mirror / store.object_name('manifests', digest), data)
    files.write_atomically(mirror / 'ready' / found.image_id,
                           digest.encode())
    return journal.Image(found.image_id, found.name, serial, digest,
                         len(data), VIRTUAL_SIZE), ref.size


def _runs(random: Any, count: int, limit: int) -> Any:
    """Different blocks in random runs of 8, as boots read."""
    starts = random.choice(limit // 8, -(-count // 8), replace=False) * 8
    return (starts[:, None] + np.arange(8)).reshape(-1)[:count]


def _pack(mirror: pathlib.Path, serial: int, count: int, block_size: int,
          random: Any) -> pack.PackRef:
    """A pack with an index and a hole for its frames."""
    per_frame = pack.FRAME // block_size
    frames = -(-count // per_frame)
    rows = np.zeros(frames, pack.FRAME_DTYPE)
    rows['blocks'] = per_frame
    rows['blocks'][-1] = count - per_frame * (frames - 1)
    rows['length'] = rows['blocks'] * (block_size / COMPRESSION)
    ends = np.cumsum(rows['length'], dtype=np.uint64)
    rows['offset'] = 16 + ends - rows['length']
    index = rows.tobytes() + random.bytes(32 * count)
    offset = 16 + int(ends[-1])
    digest = hashlib.sha256(struct.pack('<Q', serial)).hexdigest()
    path = mirror / store.object_name('packs', digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('wb') as file:
        os.truncate(file.fileno(), offset + len(index) + 56)
        os.pwrite(file.fileno(), index, offset)
    return pack.PackRef(digest, offset + len(index) + 56, count, offset,
                        hashlib.sha256(index).hexdigest())
