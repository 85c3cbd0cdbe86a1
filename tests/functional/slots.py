# SPDX-License-Identifier: Apache-2.0
"""Test volumes, made by the format page and :mod:`fastboot_common.qcow2`.

No volume writer: the simplest thing that a reader of volumes can be tested
against. It keeps nothing in memory but where the next free cluster is.
"""

import dataclasses
import json
import os
import pathlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Final

from fastboot_common import qcow2

SLOT: Final = 65536
SLOTS_END: Final = 64 << 30
SIZE: Final = 8 << 40
_U64: Final = struct.Struct('>Q')


@dataclasses.dataclass(frozen=True)
class Image:
    """An image in a slot. Places and sizes in bytes."""

    name: str
    raw: pathlib.Path
    serial: int
    size: int
    cluster: int
    l1: int

    @property
    def base(self) -> int:
        """Where the slot begins in the volume."""
        return self.serial * SLOT

    @property
    def blocks(self) -> int:
        """Number of clusters."""
        return -(-self.size // self.cluster)


def make_raw(path: pathlib.Path, size: int, seed: int = 1,
             holes: float = 0.3, cluster: int = 16384) -> pathlib.Path:
    """A raw disk of random clusters, a share of them zeros."""
    rng = random.Random(seed)
    with path.open('wb') as file:
        file.truncate(size)
        for offset in range(0, size, cluster):
            if rng.random() >= holes:
                file.seek(offset)
                file.write(rng.randbytes(min(cluster, size - offset)))
    return path


class Volume:
    """One domain's volume and descriptions beneath `root`."""

    def __init__(self, root: pathlib.Path, domain: str = 'public',
                 cluster: int = 16384, size: int = SIZE,
                 seed: int = 7) -> None:
        self.root = root
        self.directory = root / 'volumes' / domain
        (self.directory / 'images').mkdir(parents=True)
        self.path = self.directory / 'volume'
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o640)
        os.ftruncate(self.fd, size)
        self.free = SLOTS_END
        self.refcounts = self.allocate(SLOT)
        self.zeros = self.allocate(SLOT)
        self.write(self.zeros, _U64.pack(qcow2.ZERO) * (cluster // 8))

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> 'Volume':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allocate(self, length: int) -> int:
        place = self.free
        self.free += -(-length // SLOT) * SLOT
        return place

    def write(self, place: int, data: bytes) -> None:
        assert os.pwrite(self.fd, data, place) == len(data)

    def word(self, place: int) -> int:
        return int(_U64.unpack(os.pread(self.fd, 8, place))[0])

    def add(self, name: str, raw: pathlib.Path, serial: int = 1,
            present: Callable[[int], bool] = lambda block: True,
            scatter: bool = False, backing: str | None = None) -> Image:
        """Make a slot and put the clusters in that `present` chooses."""
        size = raw.stat().st_size
        count = qcow2.l1_entries(size, self.cluster)
        l1 = self.allocate(max(count * 8, 8))
        image = Image(name, raw, serial, size, self.cluster, l1)
        self.describe(image)
        self._tables(image, count)
        chosen = [block for block in data_blocks(image) if present(block)]
        self._put(image, chosen, scatter)
        self.head(image, backing)
        return image

    def describe(self, image: Image) -> None:
        path = self.directory / 'images' / image.name
        path.write_text(json.dumps({
            'serial': image.serial, 'virtual_size': image.size,
            'manifest': '0' * 64}))
        path.chmod(0o640)

    def head(self, image: Image, backing: str | None = None) -> None:
        self.write(image.base, qcow2.Header(
            image.size, self.cluster.bit_length() - 1, image.l1 - image.base,
            qcow2.l1_entries(image.size, self.cluster),
            self.refcounts - image.base, backing).pack())

    def _tables(self, image: Image, count: int) -> None:
        per = self.cluster // 8
        with_data: dict[int, list[int]] = {}
        for block in data_blocks(image):
            with_data.setdefault(block // per, []).append(block % per)
        words = [qcow2.COPIED | self.zeros - image.base] * count
        tables = self.allocate(len(with_data) * self.cluster)
        for number, blocks in with_data.items():
            table = [qcow2.ZERO] * per
            for block in blocks:
                table[block] = 0
            self.write(tables, struct.pack(f'>{per}Q', *table))
            words[number] = qcow2.COPIED | tables - image.base
            tables += self.cluster
        self.write(image.l1, struct.pack(f'>{count}Q', *words))

    def entry(self, image: Image, block: int) -> int:
        """Where the L2 entry of a cluster is, in the file."""
        per = self.cluster // 8
        word = self.word(image.l1 + block // per * 8)
        return (word & qcow2.OFFSET_MASK) + image.base + block % per * 8

    def fill(self, image: Image, offset: int, length: int) -> int:
        """Bring clusters as the agent does: data, then entries."""
        first = offset // self.cluster
        last = -(-(offset + length) // self.cluster)
        todo = [block for block in range(first, min(last, image.blocks))
                if not self.word(self.entry(image, block))]
        self._put(image, todo, False)
        return len(todo)

    def _put(self, image: Image, blocks: list[int], scatter: bool) -> None:
        start = self.allocate(len(blocks) * self.cluster)
        order = list(range(len(blocks)))
        if scatter:
            self.rng.shuffle(order)
        places = [start + turn * self.cluster for turn in order]
        with image.raw.open('rb') as file:
            for block, place in zip(blocks, places, strict=True):
                file.seek(block * self.cluster)
                data = file.read(self.cluster)
                self.write(place, data.ljust(self.cluster, b'\0'))
        for block, place in zip(blocks, places, strict=True):
            self.write(self.entry(image, block),
                       _U64.pack(qcow2.COPIED | place - image.base))

    def evict(self, image: Image) -> None:
        """Header, entries, holes, description."""
        self.write(image.base, bytes(qcow2.HEADER_LIMIT))
        for block in data_blocks(image):
            place = self.entry(image, block)
            word = self.word(place)
            self.write(place, bytes(8))
            if word > 1:
                self.write((word & qcow2.OFFSET_MASK) + image.base,
                           b'\xee' * self.cluster)
        (self.directory / 'images' / image.name).unlink()


def data_blocks(image: Image) -> Iterator[int]:
    """The clusters that are not zeros."""
    with image.raw.open('rb') as file:
        done = 0
        while done < image.size:
            try:
                start = os.lseek(file.fileno(), done, os.SEEK_DATA)
                stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError:  # no data behind
                return
            first = max(start, done) // image.cluster
            done = min(-(-stop // image.cluster) * image.cluster, image.size)
            file.seek(first * image.cluster)
            for block in range(first, -(-done // image.cluster)):
                if file.read(image.cluster).strip(b'\0'):
                    yield block
