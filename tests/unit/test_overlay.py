# SPDX-License-Identifier: Apache-2.0
"""Reading stubs and overlays: ours exactly, and nothing else."""

import dataclasses
import errno
import json
import os
import pathlib
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import chain, exception, overlay

IMAGE = '5f0c2c2e-0000-4000-8000-000000000001'
TIB = 1 << 40


def qcow2(path, backing, size=1 << 30):
    data = backing.encode()
    path.write_bytes(struct.pack('>IIQIIQ', 0x514649FB, 3, 512 if data else 0,
                                 len(data), 16, size).ljust(512, b'\0')
                     + data)
    return path


@pytest.fixture
def host(tmp_path):
    """A volume's directory with one image of serial 7, and its link."""
    directory = tmp_path / 'public'
    (directory / 'images').mkdir(parents=True)
    (directory / 'complete').mkdir()
    (directory / 'volume').write_bytes(b'')
    (directory / 'images' / IMAGE).write_text(json.dumps(
        {'image_id': IMAGE, 'serial': 7, 'manifest': 'x',
         'virtual_size': 1 << 30}))
    return chain.Link(IMAGE, directory / 'volume', 8 * TIB, 7 * 65536,
                      1 << 30)


def stub(tmp_path, link):
    return qcow2(tmp_path / (overlay.base_name(IMAGE) + '_sm'), link.backing,
                 link.virtual_size)


def test_base_name_is_novas():
    # nova.virt.libvirt.imagecache.get_cache_fname('x')
    assert overlay.base_name('x') == '11f6ad8ec52a2984abaafd7c3b516503785c2072'


def test_follow_lazy_and_complete(tmp_path, host):
    path = stub(tmp_path, host)
    assert overlay.follow(path) == host
    name = host.volume.parent / 'complete' / IMAGE
    os.link(host.volume, name)
    assert overlay.follow(path).complete == name
    # A stub of the complete form follows what is true now, too.
    stub(tmp_path, overlay.follow(path))
    name.unlink()
    assert overlay.follow(path) == host


def test_make_stub_is_read_back(tmp_path, host):
    path = tmp_path / (overlay.base_name(IMAGE) + '_sm')
    chain.make_stub(path, host)
    assert overlay.follow(path) == host
    found = overlay.read_stub(path)
    assert (found.start, found.virtual_size) == (7 * 65536, 1 << 30)
    # Replaced, not written into: who has it open keeps it.
    before = os.stat(path).st_ino
    chain.make_stub(path, host)
    assert os.stat(path).st_ino != before
    assert os.listdir(tmp_path).count(path.name) == 1


def test_contradictions_are_refused(tmp_path, host):
    path = stub(tmp_path, chain.Link(
        IMAGE, host.volume, 8 * TIB, 8 * 65536, 1 << 30))
    with pytest.raises(exception.Corrupt, match='must not be used'):
        overlay.follow(path)
    path = stub(tmp_path, chain.Link(
        IMAGE, host.volume, 8 * TIB, 7 * 65536, 2 << 30))
    with pytest.raises(exception.Corrupt):
        overlay.follow(path)


def test_an_evicted_image_is_not_found(tmp_path, host):
    path = stub(tmp_path, host)
    (host.volume.parent / 'images' / IMAGE).unlink()
    with pytest.raises(exception.NotFound, match='evicted'):
        overlay.follow(path)


@pytest.mark.parametrize('text', [
    '', '[]', '{', '{"serial": 7}', '{"serial": "x", "virtual_size": 1}',
    '{"serial": 1e999, "virtual_size": 1}', '[' * 100000])
def test_a_damaged_description(tmp_path, host, text):
    path = stub(tmp_path, host)
    (host.volume.parent / 'images' / IMAGE).write_text(text)
    with pytest.raises(exception.Corrupt):
        overlay.follow(path)


@pytest.mark.parametrize('backing', [
    '', '/var/lib/nova/instances/_base/abc', 'json:', 'json:[]', 'json:{}',
    'json:{"file":7}', 'json:' + '[' * 900,
    'json:{"file":{"driver":"raw","offset":0,"size":1,'
    '"file":{"driver":"file","filename":"/etc/shadow"}}}',
    'json:{"file":{"driver":"raw","offset":65536,"size":65536,'
    '"file":{"driver":"file","filename":"volume"}}}',
    'json:{"file":{"driver":"raw","offset":65536,"size":65536,"file":'
    '{"driver":"file","filename":"/v/volume","cache":{"direct":true}}}}',
    'nbd+unix:///x?socket=y'])
def test_other_backings_are_no_stubs(tmp_path, backing):
    path = qcow2(tmp_path / 'file', backing)
    assert overlay.read_stub(path) is None
    with pytest.raises(exception.NotFound):
        overlay.follow(path)


@pytest.mark.parametrize('directory', [
    '/a\0b', '/\ud800', '/' + 'x' * 300, '/dev/null'])
def test_a_stub_that_names_no_directory(tmp_path, host, directory):
    path = stub(tmp_path, dataclasses.replace(
        host, volume=pathlib.Path(directory, 'volume')))
    assert overlay.read_stub(path)
    with pytest.raises(exception.NotFound):
        overlay.follow(path)


@pytest.mark.parametrize('offset', [3 << 20, 1 << 62, (1 << 64) - 1])
def test_a_backing_string_that_is_far_away(tmp_path, offset):
    path = tmp_path / 'file'
    path.write_bytes(struct.pack('>IIQIIQ', 0x514649FB, 3, offset, 9, 16, 0))
    with pytest.raises(exception.Corrupt):
        overlay.read_backing(path)


def extended(*extensions, version=3, length=104):
    """A header with extensions (type and data), and nothing else."""
    head = struct.pack('>IIQIIQ', 0x514649FB, version, 512, 5, 16, 0)
    head = head.ljust(100, b'\0') + struct.pack('>I', length)
    return head[:72 if version == 2 else 104] + b''.join(
        struct.pack('>II', kind, len(data)) + data + bytes(-len(data) % 8)
        for kind, data in extensions)


FORMAT = 0xE2792ACA


@pytest.mark.parametrize(('data', 'found'), [
    (extended((FORMAT, b'qcow2')), 'qcow2'),
    (extended((FORMAT, b'raw'), version=2), 'raw'),
    (extended((0x6803F857, b'x' * 13), (FORMAT, b'qcow2'), (0, b'')),
     'qcow2'),
    (extended(), None), (extended((0, b''), (FORMAT, b'qcow2')), None),
    (extended((FORMAT, b'qcow2'))[:108], None),
    (extended((FORMAT, b'\xff')), '\ufffd'),
    (extended((FORMAT, b'qcow2'), length=(1 << 32) - 1), None),
    (extended((FORMAT, b'qcow2'))[:50], None),
    (b'raw' * 100, None), (b'', None)])
def test_backing_format(tmp_path, data, found):
    (tmp_path / 'file').write_bytes(data)
    assert overlay.backing_format(tmp_path / 'file') == found


def test_backing_format_is_qemus(tmp_path):
    for words in ('qcow2', 'raw'):
        subprocess.run(
            ['qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b', 'base',
             '-F', words, tmp_path / words, '1M'], check=True, timeout=20)
        assert overlay.backing_format(tmp_path / words) == words


def test_files_that_are_not_there_or_no_qcow2(tmp_path):
    for read in (overlay.read_backing, overlay.is_empty,
                 overlay.backing_format):
        with pytest.raises(exception.NotFound):
            read(tmp_path / 'none')
    (tmp_path / 'raw').write_bytes(b'\0' * 1024)
    assert overlay.read_backing(tmp_path / 'raw') is None
    assert overlay.read_stub(tmp_path / 'raw') is None


@pytest.mark.parametrize(('table', 'entries', 'is_empty'), [
    (bytes(16), 2, True),
    (bytes(15) + b'\1', 2, False),
    (bytes(8), 2, False),
    (bytes(16), 1 << 31, False)])
def test_is_empty(tmp_path, table, entries, is_empty):
    path = qcow2(tmp_path / 'disk', '/stub')
    with path.open('r+b') as file:
        file.seek(36)
        file.write(struct.pack('>IQ', entries, 4096))
        file.seek(4096)
        file.write(table)
    assert overlay.is_empty(path) is is_empty


@given(st.binary(max_size=2048), st.booleans())
def test_random_files(tmp_path_factory, data, magic):
    path = tmp_path_factory.getbasetemp() / 'random'
    path.write_bytes((b'QFI\xfb' if magic else b'') + data)
    try:
        assert overlay.read_stub(path) is None
    except exception.Corrupt:
        assert magic
    assert overlay.is_empty(path) in (magic, False)
    assert magic or overlay.backing_format(path) is None


SERVER = '01234567-89ab-cdef-0123-456789abcdef'


@pytest.mark.parametrize('error', [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize('name, counts', [
    (SERVER, True), (f'{SERVER}_resize', True), ('', True),
    ('lost+found', False)])
def test_disks_that_nobody_can_see_are_not_gone(
        tmp_path, monkeypatch, name, counts, error):
    bases = tmp_path / '_base'
    bases.mkdir()
    (tmp_path / 'compute_id').touch()
    for one in (SERVER, f'{SERVER}_resize', 'lost+found'):
        (tmp_path / one).mkdir()
        (tmp_path / one / 'disk.config').touch()
    assert list(overlay.lying_on(bases / 'base')) == []
    real = os.listdir

    def listdir(path):
        if pathlib.Path(path) == tmp_path / name:
            raise OSError(error, os.strerror(error))
        return real(path)

    monkeypatch.setattr(os, 'listdir', listdir)
    if counts:
        with pytest.raises(OSError):
            list(overlay.lying_on(bases / 'base'))
    else:
        assert list(overlay.lying_on(bases / 'base')) == []


def test_the_disks_of_a_server_that_is_gone(tmp_path):
    assert overlay.disks(tmp_path, SERVER) == []
