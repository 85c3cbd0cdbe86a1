# SPDX-License-Identifier: Apache-2.0
"""What lies on a host: headers, tables, descriptions, disks.

A crash, a bad device or an operator may have damaged it, and the disks of
guests come from anywhere.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import sqlite3
import struct
import sys
import tempfile
import time
import types

import numpy as np
from kit import Parts, Target

from fastboot_common import (
    blockindex,
    chain,
    exception,
    overlay,
    qcow2,
    slot,
    volume,
)

IMAGE = 'image-1'
CLUSTER = 4096
PER = CLUSTER // 8
#: Blocks whose entries are tried: about the border of two L2 tables.
BLOCKS = 40
START = PER - BLOCKS // 2
SERIAL = 3
BASE = SERIAL * slot.SLOT
L1 = slot.DATA
TABLES = L1 + slot.SLOT
CLUSTERS = TABLES + slot.SLOT
ROOM = 64
SIZE = (START + BLOCKS) * CLUSTER
END = CLUSTERS + ROOM * CLUSTER
DESCRIPTION = {'image_id': IMAGE, 'serial': SERIAL, 'manifest': 'ab' * 32,
               'virtual_size': SIZE}


def encode(value):
    return json.dumps(value).encode()


# The header of a slot

def read_header(data):
    found = qcow2.Header.unpack(data)
    with contextlib.suppress(exception.Invalid):
        assert qcow2.Header.unpack(found.pack()) == (
            found if found.backing else found.__class__(**{
                **vars(found), 'backing': None}))
    assert 12 <= found.cluster_bits <= 16


def header(**changes):
    return qcow2.Header(**{
        'virtual_size': SIZE, 'cluster_bits': 12, 'l1_offset': L1 - BASE,
        'l1_entries': 2, 'refcount_offset': slot.REFCOUNTS - BASE,
        'backing': 'nbd+unix:///image-1?socket=/x', **changes}).pack()


def header_seeds():
    return [header(), header(backing=None), bytes(512),
            header(virtual_size=1 << 62, l1_entries=1 << 31)]


# The tables of a slot, and what the export makes of them

class Nbdkit(types.ModuleType):
    """What the export uses of nbdkit."""

    THREAD_MODEL_PARALLEL = 3
    FLAG_REQ_ONE = 8
    EXTENT_HOLE = 1
    EXTENT_ZERO = 2

    def __init__(self):
        super().__init__('nbdkit')
        self.name = IMAGE

    def set_error(self, number):
        self.number = number

    def export_name(self):
        return self.name


@functools.cache
def plugin():
    """The export, as a module of this process."""
    before = sys.modules.get('nbdkit')
    sys.modules['nbdkit'] = Nbdkit()
    try:
        from fastboot_common import export
    finally:
        if before:
            sys.modules['nbdkit'] = before
        else:
            del sys.modules['nbdkit']
    # No threads of nbdkit, and no writer who needs time.
    export._keep_state = lambda: setattr(export._thread, 'keeps', True)
    export.time = types.SimpleNamespace(
        sleep=lambda seconds: None, monotonic=time.monotonic)
    return export


class Disk:
    """A volume of one image whose header and tables are given."""

    def __init__(self):
        self._directory = tempfile.TemporaryDirectory(prefix='fuzz-')
        self.root = pathlib.Path(self._directory.name)
        self.domain = self.root / 'volumes' / 'public'
        (self.domain / 'images').mkdir(parents=True)
        self.description = self.domain / 'images' / IMAGE
        self.file = self.domain / 'volume'
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, END)
        for number in range(ROOM):
            os.pwrite(self.fd, bytes([number + 1]) * CLUSTER,
                      CLUSTERS + number * CLUSTER)
        os.pwrite(self.fd, np.full(PER, qcow2.ZERO, '>u8').tobytes(),
                  slot.ZERO_TABLE)

    def write(self, head, l1, entries):
        """Replace it all."""
        self.description.write_bytes(encode(DESCRIPTION))
        os.pwrite(self.fd, head.ljust(512, b'\0')[:512], BASE)
        os.pwrite(self.fd, l1, L1)
        os.pwrite(self.fd, bytes(2 * CLUSTER), TABLES)
        os.pwrite(self.fd, struct.pack(f'>{len(entries)}Q', *entries),
                  TABLES + START * 8)

    def content(self, place):
        """What a cluster at a place of the file reads as."""
        return os.pread(self.fd, CLUSTER, place) if place else bytes(CLUSTER)


@functools.cache
def disk():
    return Disk()


def read_tables(data):
    """Changes of header and L1, entries, and reads."""
    parts = Parts(data)
    head = bytearray(header())
    for _ in range(parts.number(1) % 4):
        at = parts.number(1)
        head[at:at + 8] = parts.take(8)
    l1 = b''.join((qcow2.COPIED | TABLES + number * CLUSTER - BASE ^ int(
        parts.number(8))).to_bytes(8, 'big') for number in range(2))
    disk().write(bytes(head[:512]), l1, [
        entry(parts) for _ in range(BLOCKS)])
    extents = [(parts.number(3), 1 + parts.number(2)) for _ in range(3)]
    places = ours = None
    with contextlib.suppress(exception.Corrupt, exception.NotFound):
        places = slot_places(slot.Slot(disk().fd, SERIAL))
    with contextlib.suppress(OSError):
        ours = serve(extents)
    if places is not None and ours is not None:
        compare(places, ours)
    return places


def entry(parts):
    """An entry: zeros, missing, a cluster, or anything."""
    kind = parts.number(1)
    if kind < 2:
        return 1 - kind
    if kind < 2 + ROOM:
        return qcow2.COPIED | CLUSTERS + (kind - 2) * CLUSTER - BASE
    return qcow2.COPIED | CLUSTERS - BASE ^ parts.number(8)


def slot_places(found):
    """Places of the blocks in the file; 0: zeros, -1: missing."""
    numbers = np.arange(found.block_count)[:START + BLOCKS]
    entries = found.entries(numbers)
    offsets = found.offsets(entries)
    assert found.missing() >= int((entries == 0).sum())
    assert found.present() == len(found.clusters())
    assert found.tables.min(initial=slot.DATA) >= slot.SLOTS_END
    return [int(place) if value > 1 else int(value) - 1 for place, value in
            zip(offsets.tolist(), entries.tolist(), strict=True)]


def serve(extents):
    """The export's answers to reads: offset, bytes or None.

    :raises OSError: it does not open.
    """
    export = plugin()
    export.nbdkit.name = IMAGE
    export.Settings.root, export.Settings.agent = str(disk().root), ''
    opened = export.open(True)
    try:
        answers = []
        for offset, length in extents:
            # What nbdkit lets through.
            offset %= max(opened.size, 1)
            length = min(length, opened.size - offset)
            if length:
                answers.append((offset, read(opened, offset, length),
                                holes(opened, offset, length)))
        return opened.cluster, answers
    finally:
        export.close(opened)


def read(opened, offset, length):
    buffer = bytearray(b'\xdb' * length)
    try:
        plugin().pread(opened, memoryview(buffer), offset, 0)
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ESHUTDOWN)
        assert error.errno == plugin().nbdkit.number
        return None
    return bytes(buffer)


def holes(opened, offset, length):
    answer = plugin().extents(opened, length, offset, 0)
    at = offset
    for start, count, _kind in answer:
        assert start == at and count > 0
        at += count
    assert offset < at <= offset + length
    return answer


def compare(places, ours):
    """Where the export gives bytes, they are those of the tables."""
    cluster, answers = ours
    for offset, data, extents in answers:
        if cluster != CLUSTER or (offset + len(data or b'')) > (
                len(places) * CLUSTER):
            continue
        for start, count, kind in extents:
            blocks = range(start // CLUSTER,
                           min(-(-(start + count) // CLUSTER), len(places)))
            assert not kind or all(places[one] == 0 for one in blocks)
        if data is not None:
            first = offset // CLUSTER
            last = (offset + len(data) - 1) // CLUSTER
            assert -1 not in places[first:last + 1]
            whole = b''.join(map(disk().content, places[first:last + 1]))
            skip = offset % CLUSTER
            assert data == whole[skip:skip + len(data)]


def table_seeds():
    plain = bytes(17)
    run = bytes(range(2, 2 + BLOCKS))
    reads = struct.pack('<HBHHBHHBH', START * CLUSTER & 0xffff,
                        START * CLUSTER >> 16, 0xffff, 5, 0, 9,
                        0, 0x1f, 0x9000)
    mixed = bytes((0, 2, 2, 4, 1, 0, 7, 8, 9, 255) * 4)
    return [plain + run + reads, plain + bytes(BLOCKS) + reads,
            plain + mixed + reads,
            b'\1\x18\0\0\1\0\0\0\0\0' + bytes(16) + run + reads,
            plain[:1] + b'\0\x10' + bytes(14) + run + reads]


# Descriptions, leases and names of a volume

def read_descriptions(data):
    """A description, a lease and an export's name, in lines."""
    words = (data.split(b'\n') + [b'', b''])[:3]
    disk().write(header(), b''.join(
        struct.pack('>Q', qcow2.COPIED | TABLES + number * CLUSTER - BASE)
        for number in range(2)), [0] * BLOCKS)
    disk().description.write_bytes(words[0])
    lease = disk().domain / 'leases' / IMAGE / 'holder'
    lease.parent.mkdir(parents=True, exist_ok=True)
    lease.write_bytes(words[1])
    read_leases()
    export = opened_by_name(words[2].decode(errors='replace') or IMAGE)
    with opened_volume() as found:
        image = found.image(IMAGE)
        assert found.images() == {IMAGE: image}
        target = found.slot_of(IMAGE)
        assert target.header.virtual_size == image.virtual_size
        if words[2] in (b'', IMAGE.encode()):
            assert export == image.virtual_size


def opened_volume():
    os.pwrite(disk().fd, qcow2.Header(
        1 << 20, 12, slot.REFCOUNTS, 1, slot.REFCOUNTS,
        volume.POISON).pack(), 0)
    return volume.Volume(
        disk().domain, CLUSTER, backing=lambda image_id: 'nbd:x',
        resolve=lambda image, numbers: [], writable=False)


def read_leases():
    with opened_volume() as found:
        for one in found.leased(IMAGE):
            assert one.name == 'holder'
            assert isinstance(one.holder, str) and isinstance(one.file, str)


def opened_by_name(name):
    """The size that the export says; None: it knows none of this name."""
    export = plugin()
    export.Settings.root, export.nbdkit.name = str(disk().root), name
    assert export.list_exports(True, False) == []
    try:
        opened = export.open(True)
    except OSError as error:
        assert error.errno == errno.ENOENT
        return None
    try:
        return export.get_size(opened)
    finally:
        export.close(opened)


def description_seeds():
    lease = encode({'holder': 'nova', 'file': '/x', 'since': 1.5})
    good = encode(DESCRIPTION)
    return [good + b'\n' + lease + b'\nimage-1', good + b'\n[]\n../volume',
            encode({**DESCRIPTION, 'serial': 1e999}),
            encode({**DESCRIPTION, 'virtual_size': -1}),
            b'[' * 990 + b']' * 990 + b'\n' + b'[' * 2000]


# Disks of guests

@functools.cache
def chained():
    """A directory with a volume's description; its name has no length of
    its own, so that inputs mean the same everywhere."""
    found = tempfile.TemporaryDirectory(prefix='fuzz-')
    (pathlib.Path(found.name) / 'images').mkdir()
    return found


def read_disk(data):
    """What a disk's backing string is (``j``), or all of the file (``f``).

    The description of the image is behind the first line feed; ``@`` is the
    directory.
    """
    kind, (rest, _, described) = data[:1], data[1:].partition(b'\n')
    directory = pathlib.Path(chained().name)
    (directory / 'images' / IMAGE).write_bytes(described)
    path = directory / f'{overlay.base_name(IMAGE)}_sm'
    path.write_bytes(data[1:] if kind == b'f' else qcow2_file(
        rest.replace(b'@', bytes(directory))))
    overlay.backing_format(path)
    found = overlay.read_stub(path)
    if found:
        assert overlay.read_backing(path)[1] == found.virtual_size
        assert found.directory.is_absolute()
    link = overlay.follow(path)
    assert link.start == found.start


def qcow2_file(backing):
    return struct.pack('>IIQIIQ', qcow2.MAGIC, 3, 512 if backing else 0,
                       len(backing), 16, SIZE).ljust(512, b'\0') + backing


def stub(directory='@', size=8 << 40, **changes):
    return chain.Link(**{
        'image_id': IMAGE, 'volume': pathlib.Path(directory) / 'volume',
        'size': size, 'start': BASE, 'virtual_size': SIZE,
        **changes}).backing.encode()


def disk_seeds():
    described = b'\n' + encode(DESCRIPTION)
    return [
        b'j' + stub() + described,
        b'j' + stub(complete=pathlib.Path('@/complete/' + IMAGE)) + described,
        b'j' + stub('/a\0b') + described, b'j' + stub('/' + 'x' * 300),
        b'j' + stub('/\ud800'), b'j' + stub('/dev/null'),
        b'j' + stub('@/images/' + IMAGE) + described,
        b'j/var/lib/nova/_base/x', b'f' + qcow2_file(b'json:{}'),
        b'j' + stub() + b'\n{"serial": 1e999}']


# The index of a volume's blocks

@functools.cache
def index_place():
    found = tempfile.TemporaryDirectory(
        prefix='fuzz-', dir='/dev/shm' if os.path.isdir('/dev/shm') else None)
    return found, pathlib.Path(found.name) / 'index.sqlite'


DIGESTS = [bytes([number]) * 32 for number in range(6)]


def read_index(data):
    """Any damage is the database's own word for it, or none."""
    _, path = index_place()
    for suffix in ('-wal', '-shm', '-journal'):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(data)
    index = blockindex.BlockIndex(path)
    try:
        assert index.end is None or isinstance(index.end, int)
        assert index.busy in (True, False)
        for offset in index.find(DIGESTS).values():
            assert isinstance(offset, int)
        index.keep(np.array([CLUSTERS], np.int64))
        index.add([(DIGESTS[5], CLUSTERS)], END)
        # Not END: a damaged tree may have two rows of one key. What is given
        # out behind a wrong end is looked at first: free space is zeros.
        assert index.end is None or isinstance(index.end, int)
    finally:
        index.close()


@functools.cache
def index_seeds():
    found = []
    for end in (END, 'x', None, 1.5):
        with tempfile.TemporaryDirectory() as name:
            path = pathlib.Path(name, 'index')
            index = blockindex.BlockIndex(path)
            # The smallest pages, so that inputs are small.
            index._db.executescript(
                'PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM')
            index.add([(one, CLUSTERS) for one in DIGESTS[:3]], end)
            index.close()
            found.append(path.read_bytes())
    return found


TARGETS = (
    Target('header', read_header, header_seeds,
           (exception.Corrupt, exception.NotFound), 600),
    Target('tables', read_tables, table_seeds),
    Target('descriptions', read_descriptions, description_seeds,
           (exception.Corrupt, exception.NotFound)),
    Target('disk', read_disk, disk_seeds,
           (exception.Corrupt, exception.NotFound)),
    Target('index', read_index, index_seeds, (sqlite3.DatabaseError,), 8192),
)
