# SPDX-License-Identifier: Apache-2.0
"""A repository with images, a host of it, and what its slots really hold."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import time

from disks import (
    data_blocks,
    disk,
    make_repository,
    open_repository,
    put,
    write_raw,
)

from fastboot_common import chain, exception, store, volume  # noqa: E402
from fastboot_common.store.local import LocalStore  # noqa: E402
from fastboot_nova.host import Host  # noqa: E402

__all__ = ['data_blocks', 'disk']

GIB = 1 << 30
SLOT = 65536


class CountingStore(LocalStore):
    """Counts the bytes of packs that are read.

    :ivar broken: names that cannot be read; None: none can.
    :ivar error: what is raised then.
    """

    def __init__(self, path):
        super().__init__(path)
        self.bytes = 0
        self.broken = ()
        self.error = exception.Unavailable

    def _guard(self, name):
        if self.broken is None or name in self.broken:
            raise self.error(f'{name}: out of reach')

    def get(self, name, limit=64 << 20, check=None):
        self._guard(name)
        return super().get(name, limit, check)

    def read(self, name, offset, length, check=None):
        self._guard(name)
        data = super().read(name, offset, length, check)
        self.bytes += length
        return data

    def fetch(self, name, path, *args, **options):
        self._guard(name)
        super().fetch(name, path, *args, **options)
        self.bytes += path.stat().st_size


class World:
    """A repository in ``repo``, a host in ``host``, originals by image id."""

    def __init__(self, path, block_size=4096, volume_size=65 * GIB):
        self.path = path
        self.block_size = block_size
        self.volume_size = volume_size
        self.socket = path / 'nbd'
        self.data = {}
        if not (path / 'repo').exists():
            make_repository(path / 'repo', block_size)

    def packs(self, image_id):
        """Names of the packs of an image."""
        found = self.repository
        return [store.object_name('packs', ref.digest)
                for ref in found.read_manifest(
                    found.image(image_id).manifest).packs]

    @property
    def repository(self):
        return open_repository(self.path / 'repo')

    def publish(self, image_id, data, boot=(), **options):
        self.data[image_id] = data
        return put(self.repository, self.path / 'work', image_id, data,
                   boot, **options).image

    def host(self, source=None, **options):
        return Host(
            self.path / 'host', source or LocalStore(self.path / 'repo'),
            socket=self.socket, threads=2, volume_size=self.volume_size,
            **options)

    def copy(self, path):
        """The same world elsewhere: holes and hard links stay."""
        subprocess.run(['cp', '-a', '--sparse=always', f'{self.path}/.',
                        path], check=True, timeout=60)
        other = World(path, self.block_size, self.volume_size)
        other.data = dict(self.data)
        return other

    @contextlib.contextmanager
    def export(self):
        """The originals as NBD exports, where misses go."""
        originals = self.path / 'originals'
        originals.mkdir(exist_ok=True)
        for image_id, data in self.data.items():
            write_raw(originals / image_id, data)
        process = subprocess.Popen(
            ['nbdkit', '-f', '-r', '-U', self.socket, 'file',
             f'dir={originals}'], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while not self.socket.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(.01)
            yield
        finally:
            process.terminate()
            process.wait(20)
            self.socket.unlink(missing_ok=True)


@contextlib.contextmanager
def fast_directory():
    """A directory in memory, where syncs cost nothing."""
    base = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    path = pathlib.Path(tempfile.mkdtemp(prefix='fastboot-test-', dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def qemu(*command):
    """Run a program of QEMU: status and what it said."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True,
        timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def compare(raw, link_or_path):
    """QEMU reads the same there as in the raw file."""
    name = link_or_path.backing if isinstance(link_or_path, chain.Link) \
        else link_or_path
    status, words = qemu('qemu-img', 'compare', '-U', '-f', 'raw', '-F',
                         'qcow2', raw, name)
    assert status == 0, words
    status, words = qemu('qemu-img', 'info', '-U', '--output=json', '-f',
                         'qcow2', name)
    assert json.loads(words)['virtual-size'] == os.stat(raw).st_size


class Reader:
    """A slot, read by the letter of the format's page and nothing else."""

    def __init__(self, file, serial):
        self.fd = os.open(file, os.O_RDONLY)
        self.start = serial * SLOT
        header = os.pread(self.fd, 104, self.start)
        if header[:4] == bytes(4):
            raise LookupError('empty slot')
        assert header[:8] == b'QFI\xfb\0\0\0\3'
        self.backing = struct.unpack_from('>Q', header, 8)[0] != 0
        bits, self.size = struct.unpack_from('>IQ', header, 20)
        self.cluster = 1 << bits
        self.l1 = struct.unpack_from('>Q', header, 40)[0] + self.start

    def close(self):
        os.close(self.fd)

    def word(self, place):
        return struct.unpack('>Q', os.pread(self.fd, 8, place))[0]

    def entries(self):
        per = self.cluster // 8
        count = -(-self.size // self.cluster)
        for number in range(0, count, per):
            table = (self.word(self.l1 + number // per * 8)
                     & 0x00fffffffffffe00) + self.start
            raw = os.pread(self.fd, self.cluster, table)
            words = struct.unpack(f'>{per}Q', raw)
            yield from words[:count - number]

    def read(self):
        """Bytes of each block; None for those that are not here."""
        found = []
        for word in self.entries():
            if word < 2:
                found.append(bytes(self.cluster) if word else None)
                continue
            assert word >> 63
            place = (word & 0x00fffffffffffe00) + self.start
            assert place >= 64 * GIB and place % self.cluster == 0
            found.append(os.pread(self.fd, self.cluster, place))
        return found


def verify(one, image, data):
    """What is in the slot is right; how many blocks lack.

    :param one: the directory of the volume.
    :returns: missing blocks, or None where there is no slot.
    """
    try:
        reader = Reader(one / 'volume', image.serial)
    except LookupError:
        assert not (one / 'complete' / image.image_id).exists()
        return None
    name = one / 'complete' / image.image_id
    # Before the blocks: it may become complete while they are read.
    named = name.exists()
    try:
        assert reader.size == len(data)
        missing = 0
        size = reader.cluster
        for number, block in enumerate(reader.read()):
            want = data[number * size:(number + 1) * size].ljust(size, b'\0')
            if block is None:
                assert any(want)
                missing += 1
            elif block != want:
                raise AssertionError(
                    f'block {number} of {image.image_id} is wrong')
        if named:
            assert missing == 0
            assert name.samefile(one / 'volume')
        if not reader.backing:
            assert missing == 0
        return missing
    finally:
        reader.close()


def batch(data, numbers, block_size):
    """Blocks of some bytes, as a frame gives them."""
    import numpy as np
    parts = [data[number * block_size:(number + 1) * block_size].ljust(
        block_size, b'\0') for number in numbers]
    return volume.Batch(
        np.array(numbers, np.int64),
        [hashlib.sha256(part).digest() for part in parts],
        np.arange(len(parts)), lambda: b''.join(parts))
