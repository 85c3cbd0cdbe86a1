# SPDX-License-Identifier: Apache-2.0
"""Uploaded images of every format, sound and hostile, through QEMU."""

import hashlib
import os
import pathlib
import random
import struct
import subprocess
import threading
import zlib

import bootsector
import pytest

from fastboot_common import exception
from fastboot_glance import guest, source

SIZE = (6 << 20) + 512
SEED = 7


def run(*command):
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope='module')
def content(tmp_path_factory):
    """A raw disk with data, zeros and holes."""
    path = tmp_path_factory.mktemp('content') / 'raw'
    noise = random.Random(SEED)
    bootsector.disk(path, SIZE, bootsector.sector(b'text'))
    with path.open('r+b') as disk:
        for offset in (65536, 1 << 20, (3 << 20) + 4096, SIZE - 512):
            disk.seek(offset)
            disk.write(noise.randbytes(min(SIZE - offset, 200000)))
    return path


def make(tmp_path, content, image_format, *options):
    path = tmp_path / f'image.{image_format}'
    run('qemu-img', 'convert', '-f', 'raw', '-O', image_format, *options,
        str(content), str(path))
    return path


@pytest.fixture
def work(tmp_path):
    """A work directory that must be empty afterwards."""
    work = tmp_path / 'work'
    work.mkdir(0o700)
    yield work
    assert list(work.iterdir()) == []


@pytest.mark.parametrize('image_format, options', [
    ('raw', ()),
    ('qcow2', ()),
    ('qcow2', ('-o', 'compat=0.10')),
    ('qcow2', ('-c',)),
    ('qcow2', ('-c', '-o', 'compression_type=zstd')),
    ('qcow2', ('-o', 'extended_l2=on,cluster_size=128k')),
    ('qcow2', ('-o', 'lazy_refcounts=on')),
    ('qcow2', ('-o', 'cluster_size=512')),
    ('vmdk', ()),
    ('vmdk', ('-o', 'subformat=streamOptimized')),
    ('vdi', ()),
    ('vdi', ('-o', 'static=on')),
    ('vhdx', ()),
    ('vhdx', ('-o', 'subformat=fixed')),
])
def test_every_format(tmp_path, content, work, image_format, options):
    image = make(tmp_path, content, image_format, *options)
    before = image.read_bytes(), image.stat()
    with source.open_source(image, work, claimed_format=image_format,
                            hashes=('sha256', 'sha512')) as found:
        assert found.format == image_format
        assert found.virtual_size == SIZE
        assert found.raw_path.read_bytes() == content.read_bytes()
        assert found.size == image.stat().st_size
        assert found.os_hash == {
            name: hashlib.new(name, before[0]).hexdigest()
            for name in ('sha256', 'sha512')}
        if image_format != 'raw':
            status = found.raw_path.stat()
            assert (status.st_uid, status.st_mode & 0o777) == (
                os.geteuid(), 0o440)
            assert status.st_blocks * 512 < SIZE // 2
    after = image.stat()
    assert image.read_bytes() == before[0]
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before[1].st_mode, before[1].st_uid, before[1].st_mtime_ns)


def test_internal_snapshot_is_not_the_disk(tmp_path, content, work):
    image = make(tmp_path, content, 'qcow2')
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 65536 65536', str(image))
    run('qemu-img', 'snapshot', '-c', 'old', str(image))
    run('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 65536 65536', str(image))
    with source.open_source(image, work) as found:
        data = found.raw_path.read_bytes()
        assert data[65536:131072] == b'\2' * 65536


def test_image_only_its_owner_may_read(tmp_path, content, work):
    image = make(tmp_path, content, 'qcow2')
    image.chmod(0o600)
    tmp_path.chmod(0o700)
    with source.open_source(image, work) as found:
        assert found.raw_path.read_bytes() == content.read_bytes()


def test_raw_of_odd_size(tmp_path, content, work):
    image = tmp_path / 'odd'
    image.write_bytes(content.read_bytes()[:-300])
    with source.open_source(image, work) as found:
        assert found.raw_path == image
        assert found.virtual_size == SIZE


@pytest.mark.parametrize('claimed', ['raw', 'gpt', None])
def test_raw_may_be_partitioned(tmp_path, content, work, claimed):
    with source.open_source(content, work, claimed_format=claimed) as found:
        assert (found.format, found.virtual_size) == ('raw', SIZE)


def test_random_bytes_are_raw_and_nothing_else(tmp_path, work):
    image = tmp_path / 'noise'
    image.write_bytes(random.Random(SEED).randbytes(1 << 20))
    with source.open_source(image, work) as found:
        assert found.format == 'raw'
    for claimed in ('qcow2', 'vmdk', 'vdi', 'vhdx', 'iso', 'ami'):
        refuse(image, work, 'said to be', claimed)


def refuse(image, work, reason, claimed=None):
    with pytest.raises(exception.ImageRejected, match=reason):
        with source.open_source(image, work, claimed_format=claimed):
            pass


def test_empty(tmp_path, work):
    (tmp_path / 'empty').touch()
    refuse(tmp_path / 'empty', work, 'empty')
    refuse(tmp_path, work, 'no file')


@pytest.mark.parametrize('made, claimed', [
    ('qcow2', 'raw'), ('qcow2', 'vmdk'), ('vmdk', 'qcow2'), ('raw', 'qcow2'),
    ('vdi', 'vhdx'), ('vhdx', 'vdi'), ('qcow2', 'iso'), ('raw', 'iso'),
])
def test_not_what_it_is_said_to_be(tmp_path, content, work, made, claimed):
    refuse(make(tmp_path, content, made), work, f'said to be {claimed}',
           claimed)


def test_qcow2_backing_file(tmp_path, content, work):
    image = tmp_path / 'image'
    run('qemu-img', 'create', '-f', 'qcow2', '-b', str(content), '-F', 'raw',
        str(image))
    refuse(image, work, 'backing file')


def test_qcow2_backing_file_that_the_inspector_misses(
        tmp_path, content, work, monkeypatch):
    monkeypatch.setattr(source, '_check_safety', lambda *_: None)
    test_qcow2_backing_file(tmp_path, content, work)


def test_qcow2_data_file(tmp_path, content, work):
    image = tmp_path / 'image'
    run('qemu-img', 'create', '-f', 'qcow2', '-o',
        f'data_file={tmp_path / "data"},data_file_raw=on', str(image), '4M')
    refuse(image, work, 'data.file')


def test_qcow2_data_file_that_the_inspector_misses(
        tmp_path, content, work, monkeypatch):
    monkeypatch.setattr(source, '_check_safety', lambda *_: None)
    test_qcow2_data_file(tmp_path, content, work)


@pytest.mark.parametrize('backing', [
    'json:{"driver":"raw","file":{"driver":"file",'
    '"filename":"/etc/passwd"}}',
    'json:{"driver":"nbd","server":{"type":"inet","host":"127.0.0.1",'
    '"port":"1"}}',
    'nbd://127.0.0.1:1/', 'https://127.0.0.1:1/', '/etc/passwd',
    '/dev/stdin', 'fd:0', 'image'])
@pytest.mark.parametrize('inspected', [True, False])
def test_qcow2_backing_elsewhere(tmp_path, work, monkeypatch, backing,
                                 inspected):
    """Where the inspector misses it, QEMU is told to open none."""
    if not inspected:
        monkeypatch.setattr(source, '_check_safety', lambda *_: None)
    image = tmp_path / 'image'
    run('qemu-img', 'create', '-u', '-f', 'qcow2', '-b', backing, '-F', 'raw',
        str(image), '1M')
    refuse(image, work, 'backing file')


@pytest.mark.parametrize('method', [1, 2])
def test_qcow2_encrypted(tmp_path, content, work, method):
    image = make(tmp_path, content, 'qcow2')
    with image.open('r+b') as header:
        header.seek(32)
        header.write(struct.pack('>I', method))
    refuse(image, work, 'encrypted')


def test_luks(tmp_path, work):
    # Made by hand: qemu-img measures CPU time for it, and may fail at that.
    image = tmp_path / 'image'
    image.write_bytes(b'LUKS\xba\xbe\0\1' + bytes(4 << 20))
    refuse(image, work, 'luks')
    refuse(image, work, 'luks', 'raw')


@pytest.mark.parametrize('bit', [2, 5, 31, 63])
def test_qcow2_features(tmp_path, content, work, bit):
    image = make(tmp_path, content, 'qcow2')
    with image.open('r+b') as header:
        header.seek(72)
        features, = struct.unpack('>Q', header.read(8))
        header.seek(72)
        header.write(struct.pack('>Q', features | 1 << bit))
    refuse(image, work, 'features|data_file')


def test_qcow2_version_1(tmp_path, content, work):
    refuse(make(tmp_path, content, 'qcow'), work, 'version')


@pytest.mark.parametrize('keep', [600, 70000, 200000, -65536])
def test_qcow2_cut_short(tmp_path, content, work, keep):
    image = make(tmp_path, content, 'qcow2')
    size = image.stat().st_size
    os.truncate(image, keep if keep > 0 else size + keep)
    refuse(image, work, r'qcow2\)')


@pytest.mark.parametrize('made', ['vdi', 'vhdx', 'vmdk'])
def test_header_only(tmp_path, content, work, made):
    image = make(tmp_path, content, made)
    os.truncate(image, 512)
    with pytest.raises(exception.ImageRejected):
        with source.open_source(image, work, claimed_format=made):
            pass


def test_qcow2_impossible_size(tmp_path, work):
    image = tmp_path / 'image'
    run('qemu-img', 'create', '-f', 'qcow2', '-o', 'cluster_size=2M',
        str(image), str(source.LARGEST + (1 << 20)))
    refuse(image, work, 'at most')


def test_qcow2_huge_and_empty(tmp_path, work):
    """A large disk costs nothing as such."""
    image = tmp_path / 'image'
    run('qemu-img', 'create', '-f', 'qcow2', '-o', 'cluster_size=2M',
        str(image), str(source.LARGEST))
    with source.open_source(image, work, timeout=60) as found:
        assert found.virtual_size == source.LARGEST
        assert found.raw_path.stat().st_blocks * 512 <= 1 << 20


def bomb(path, tables=64):
    """A sound qcow2 of 330 KiB: all 64 KiB of its 32 GiB are one cluster,
    compressed, and all its tables are one."""
    cluster = 1 << 16
    count = cluster // 8
    squeeze = zlib.compressobj(9, wbits=-12)
    data = squeeze.compress(b'bomb' * (cluster // 4)) + squeeze.flush()
    sectors = -(-len(data) // 512)
    header = struct.pack(
        '>4sIQIIQIIQQIIQQQQII', b'QFI\xfb', 3, 0, 0, 16,
        tables * count * cluster, 0, tables, 3 * cluster, cluster, 1, 0, 0,
        0, 0, 0, 5, 104)
    # One of each, but all tables are one, and so are all clusters.
    refcounts = struct.pack('>6I', 1, 1, 1, 1, tables, tables * count)
    parts = [header, struct.pack('>Q', 2 * cluster), refcounts,
             struct.pack('>Q', 4 * cluster) * tables,
             struct.pack('>Q', 1 << 62 | (sectors - 1) << 54 | 5 * cluster)
             * count, data.ljust(sectors * 512, b'\0')]
    with path.open('wb') as image:
        for number, part in enumerate(parts):
            image.seek(number * cluster)
            image.write(part)
    return path


def test_qcow2_bomb(tmp_path, work, monkeypatch):
    image = bomb(tmp_path / 'image')
    assert image.stat().st_size < 400 << 10
    free = os.statvfs(work)
    monkeypatch.setattr(guest, 'RESERVE',
                        free.f_bavail * free.f_frsize - (128 << 20))
    most = 0
    check = guest.check_room

    def spy(room):
        nonlocal most
        most = max(most, *(path.stat().st_blocks * 512
                           for path in room.glob('guest/*')))
        check(room)

    monkeypatch.setattr(guest, 'check_room', spy)
    with pytest.raises(exception.NoSpace, match='larger disk'):
        with source.open_source(image, work):
            pass
    assert 0 < most < 4 << 30


def test_qcow2_bomb_where_there_is_room(tmp_path, work, monkeypatch):
    """One image may take its share of a disk, and not all of it."""
    check, told = source._Copy._check_limit, []

    def spy(copy):
        told.append(guest.disk_usage(copy._guest))
        check(copy)

    monkeypatch.setattr(source._Copy, '_check_limit', spy)
    image = bomb(tmp_path / 'image')
    with pytest.raises(source.CopyTooLarge, match='copy_limit'):
        with source.open_source(image, work, copy_limit=64 << 20):
            pass
    assert 64 << 20 < told[-1] < 4 << 30


def test_copy_that_is_done_at_once(tmp_path, content, work, monkeypatch):
    monkeypatch.setattr(source._Copy, '_wait',
                        lambda self, process, *_: process.wait())
    image = make(tmp_path, content, 'qcow2')
    with pytest.raises(source.CopyTooLarge, match='copy_limit'):
        with source.open_source(image, work, copy_limit=4096):
            pass
    with source.open_source(image, work, copy_limit=SIZE):
        pass


def test_qcow2_small_bomb_is_an_image(tmp_path, work):
    """The one above is stopped for what it takes, not for its shape."""
    image = bomb(tmp_path / 'image', 2)
    with image.open('r+b') as header:
        header.seek(24)
        header.write(struct.pack('>Q', 1 << 20))
    with source.open_source(image, work) as found:
        assert found.raw_path.read_bytes() == b'bomb' * (1 << 18)


#: Offset in the header, and how the field is packed.
_L1_SIZE, _L1, _REFCOUNTS = (36, '>I'), (40, '>Q'), (48, '>Q')
_REFCOUNT_CLUSTERS, _SNAPSHOTS, _SNAPSHOT_TABLE = (
    (56, '>I'), (60, '>I'), (64, '>Q'))
_CLUSTER_BITS, _REFCOUNT_ORDER, _LENGTH = (20, '>I'), (96, '>I'), (100, '>I')
_EVERYWHERE = (0, 1, 512, 65536, 1 << 30, 1 << 40, (1 << 63) - 1,
               (1 << 64) - 65536, (1 << 64) - 1)


@pytest.mark.parametrize('field, values', [
    (_L1, _EVERYWHERE), (_REFCOUNTS, _EVERYWHERE),
    (_L1_SIZE, (0, 1 << 24, 1 << 31, (1 << 32) - 1)),
    (_REFCOUNT_CLUSTERS, (0, 1 << 16, (1 << 32) - 1)),
    (_CLUSTER_BITS, (0, 8, 22, 31, 63, (1 << 32) - 1)),
    (_REFCOUNT_ORDER, (0, 7, 31, (1 << 32) - 1)),
    (_LENGTH, (0, 103, 65536, (1 << 32) - 1)),
])
def test_qcow2_hostile_header(tmp_path, content, work, field, values):
    """Such an image is refused, or its bytes are its own."""
    good = make(tmp_path, content, 'qcow2').read_bytes()
    image = tmp_path / 'image'
    at, form = field
    for value in values:
        image.write_bytes(good[:at] + struct.pack(form, value)
                          + good[at + struct.calcsize(form):])
        assert harmless(image, work), value


def harmless(image, work):
    try:
        with source.open_source(image, work, timeout=60) as found:
            # All of it comes from the file: clusters of it, or zeros.
            whole = image.read_bytes()
            raw = found.raw_path.read_bytes()
            assert len(raw) <= SIZE
            return all(raw[at:at + 4096].strip(b'\0') == b''
                       or raw[at:at + 4096] in whole
                       for at in range(0, len(raw) - 4096, 4096))
    except exception.ImageRejected:
        return True


@pytest.mark.parametrize('count, offset', [
    (1, 0), (1, 65536), (1, 1 << 40), (65536, 65536), (65537, 0),
    ((1 << 32) - 1, 65536), ((1 << 32) - 1, (1 << 64) - 1)])
def test_qcow2_hostile_snapshots(tmp_path, content, work, count, offset):
    image = make(tmp_path, content, 'qcow2')
    with image.open('r+b') as header:
        header.seek(_SNAPSHOTS[0])
        header.write(struct.pack('>IQ', count, offset))
    assert harmless(image, work)


@pytest.mark.parametrize('word', [
    1, 511, 65536, 3 << 16, 1 << 40, (1 << 56) - 512, 1 << 62,
    1 << 62 | (1 << 62) - 1, (1 << 64) - 1, 1 << 63 | 65536])
@pytest.mark.parametrize('level', [1, 2])
def test_qcow2_hostile_tables(tmp_path, content, work, level, word):
    """Entries that name other tables, other places, and none."""
    image = make(tmp_path, content, 'qcow2')
    data = bytearray(image.read_bytes())
    at = struct.unpack_from('>Q', data, _L1[0])[0]
    if level == 2:
        at = struct.unpack_from('>Q', data, at)[0] & 0x00fffffffffffe00
    struct.pack_into('>Q', data, at, word)
    image.write_bytes(data)
    assert harmless(image, work)


_FLAT = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="{kind}"

RW 4 {extent} "/etc/passwd"{offset}

ddb.adapterType = "ide"
"""


@pytest.mark.parametrize('kind, extent, offset', [
    ('monolithicFlat', 'FLAT', ' 0'), ('twoGbMaxExtentFlat', 'FLAT', ' 0'),
    ('vmfs', 'VMFS', ''), ('monolithicSparse', 'FLAT', ' 0'),
    ('monolithicSparse', 'SPARSE', '')])
@pytest.mark.parametrize('inspected', [True, False])
def test_vmdk_that_names_a_file_of_the_host(
        tmp_path, work, monkeypatch, kind, extent, offset, inspected):
    if not inspected:
        monkeypatch.setattr(source, 'inspect', lambda *_: 'vmdk')
    image = tmp_path / 'image'
    image.write_text(_FLAT.format(kind=kind, extent=extent, offset=offset))
    refuse(image, work, None, 'vmdk')


@pytest.mark.parametrize('image_format', ['raw', 'qcow2', 'vmdk'])
def test_larger_than_this_site_allows(tmp_path, content, work, image_format):
    image = make(tmp_path, content, image_format)
    with pytest.raises(exception.ImageRejected, match='at most 1048576'):
        with source.open_source(image, work, largest=1 << 20):
            pass


def edit_descriptor(image, old, new):
    data = image.read_bytes()
    assert old in data[512:20 * 512]
    at = data.index(old)
    end = data.index(b'\0', at)
    text = data[at:end].replace(old, new, 1)
    image.write_bytes(data[:at] + text + bytes(
        max(len(data[at:end]) - len(text), 0)) + data[at + max(
            len(text), len(data[at:end])):])


@pytest.mark.parametrize('old, new', [
    (b'SPARSE "image.vmdk"', b'SPARSE "/etc/passwd"'),
    (b'monolithicSparse', b'monolithicFlat'),
    (b'monolithicSparse', b'twoGbMaxExtentSparse'),
    (b'createType=', b'parentFileNameHint="/etc/passwd"\ncreateType='),
])
def test_vmdk_descriptor(tmp_path, content, work, old, new):
    image = make(tmp_path, content, 'vmdk')
    edit_descriptor(image, old, new)
    with pytest.raises(exception.ImageRejected):
        with source.open_source(image, work):
            pass


@pytest.mark.parametrize('subformat', [
    'monolithicFlat', 'twoGbMaxExtentSparse', 'twoGbMaxExtentFlat'])
def test_vmdk_with_extents_elsewhere(tmp_path, content, work, subformat):
    image = make(tmp_path, content, 'vmdk', '-o', f'subformat={subformat}')
    with pytest.raises(exception.ImageRejected):
        with source.open_source(image, work, claimed_format='vmdk'):
            pass
    # Without a claim, a descriptor is vmdk to the inspector, or text.
    try:
        with source.open_source(image, work) as found:
            assert found.format == 'raw'
            assert found.raw_path == image
    except exception.ImageRejected:
        pass


def test_vmdk_without_extents_reads_no_neighbour(tmp_path, content, work):
    """A sparse header of no capacity makes QEMU follow the descriptor."""
    image = make(tmp_path, content, 'vmdk')
    edit_descriptor(image, b'createType="monolithicSparse"',
                    b'CREATETYPE="monolithicSparse"\n'
                    b'createType="monolithicFlat"')
    with image.open('r+b') as header:
        header.seek(12)
        header.write(bytes(8))
    refuse(image, work, 'vmdk')


def test_two_formats_at_once(tmp_path, content, work):
    image = make(tmp_path, content, 'qcow2')
    with image.open('r+b') as both:
        both.seek(0x40)
        both.write(struct.pack('<I', 0xBEDA107F))
    refuse(image, work, 'formats')


def test_no_space(tmp_path, content, work, monkeypatch):
    monkeypatch.setattr(guest, 'RESERVE', 1 << 62)
    image = make(tmp_path, content, 'qcow2')
    with pytest.raises(exception.NoSpace):
        with source.open_source(image, work):
            pass


def test_cancelled(tmp_path, content, work):
    cancel = threading.Event()
    cancel.set()
    image = make(tmp_path, content, 'qcow2')
    with pytest.raises(exception.Busy):
        with source.open_source(image, work, cancel=cancel):
            pass


def test_copy_replaced_by_a_link_is_not_taken(tmp_path, content, work,
                                              monkeypatch):
    image = make(tmp_path, content, 'qcow2')

    def convert(self, *_):
        (self._guest / 'disk.raw').symlink_to(content)

    monkeypatch.setattr(source._Copy, 'convert', convert)
    mode = content.stat().st_mode
    refuse(image, work, 'something else')
    assert content.stat().st_mode == mode


def test_no_reads_are_noted(tmp_path, content, work):
    image = make(tmp_path, content, 'qcow2')
    with source.open_source(image, work):
        assert not list(work.glob('**/*.log'))


def test_error_inside_the_context_leaves_nothing(tmp_path, content, work):
    image = make(tmp_path, content, 'vdi')
    with pytest.raises(RuntimeError):
        with source.open_source(image, work) as found:
            raw = pathlib.Path(found.raw_path)
            raise RuntimeError
    assert not raw.exists()
