# SPDX-License-Identifier: Apache-2.0
"""What a µVM consists of: save files, keys, identity, descriptions."""

import dataclasses
import json
import os
import struct

import microvms
import pytest
from hostile import survives, variants
from hypothesis import given
from hypothesis import strategies as st
from microvms import BAKED, CONFIG, OTHER

from fastboot_common import exception
from fastboot_common.microvm import (
    artifact,
    document,
    identity,
    key,
    savefile,
    template,
)


def header(magic=savefile.MAGIC, version=2, length=None, running=1,
           compression=0, cookie=0, data=b'<domain/>\0'):
    length = len(data) if length is None else length
    return struct.pack('<16s5I', magic, version, length, running,
                       compression, cookie) + bytes(56) + data


class TestSaveFile:

    def test_layout_is_libvirts(self):
        data = b'<domain/>\0<c/>\0' + bytes(7)
        found = savefile.SaveFile.parse(header(data=data, cookie=10))
        assert found == savefile.SaveFile('<domain/>', '<c/>', len(data))
        assert found.stream == 92 + len(data)
        assert found.pack() == header(data=data, cookie=10)

    @given(st.text(st.characters(exclude_characters='<>&\0\r'),
                   max_size=50), st.booleans(), st.integers(0, 1000))
    def test_what_is_packed_is_parsed(self, text, running, room):
        xml = f'<domain>{document.ElementTree.Element("x").tag}</domain>'
        try:
            tree = document.Element('domain')
            tree.text = text
            xml = document.text_of(tree)
            document.parse(xml)
        except exception.Corrupt:
            return  # control characters are no XML
        one = savefile.SaveFile(xml, '<c/>', len(xml.encode()) + 6 + room,
                                running)
        assert savefile.SaveFile.parse(one.pack() + b'stream') == one

    def test_another_xml_leaves_the_stream_in_its_place(self):
        one = microvms.save_file()
        other = one.having('<domain/>')
        assert len(other.pack()) == len(one.pack()) == one.stream
        assert savefile.SaveFile.parse(other.pack()).cookie == one.cookie

    def test_an_xml_that_does_not_fit_is_refused(self):
        one = savefile.SaveFile('<domain/>', '', 10)
        one.pack()
        with pytest.raises(exception.Invalid):
            one.having('<domain />').pack()
        with pytest.raises(exception.Invalid):
            one.having('<a>\0').pack()

    @pytest.mark.parametrize('data', [
        header(magic=b'LibvirtQemudPart'), header(length=0),
        header(length=1 << 31), header(running=2), header(compression=1),
        header(cookie=5), header(cookie=1 << 30), header(length=100),
        header(data=b'<domain/>'), header(data=b'<domain/>\0x'),
        header(data=b'<network/>\0'), header(data=b'<domain>\xff</domain>\0'),
        header(data=b'<domain/>\0\0', cookie=10), header()[:91],
        header()[:60] + b'\1' + header()[61:],
        header(data=b'<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>\0'),
        header(data=b'<?xml version="1.0"?><domain/>\0'),
        header(data=b'<domain>' + b'<a>' * 100 + b'</a>' * 100
               + b'</domain>\0'),
        header(data=b'<domain>' + b'<a/>' * 30000 + b'</domain>\0'),
    ])
    def test_what_libvirt_does_not_write_is_refused(self, data):
        with pytest.raises(exception.Corrupt):
            savefile.SaveFile.parse(data)

    def test_a_newer_version_is_told(self):
        with pytest.raises(exception.UnknownVersion):
            savefile.SaveFile.parse(header(version=3))

    def test_damage(self):
        for data, found in survives(savefile.SaveFile.parse,
                                    microvms.save_file(room=4096).pack()):
            assert found.pack() == data[:found.stream]


class TestPlatform:
    """Its line, which hosts report."""

    def test_there_and_back(self):
        one = microvms.a_key().platform
        assert key.Platform.parse(one.text) == one

    @pytest.mark.parametrize('text', [
        None, 1, '', 'x86_64', 'x86_64/qemu/2/3', 'x86_64/qemu/2/3/',
        'x86_64/qemu/02/3/7', 'x86_64/qemu/2/x/7', 'x86_64/qemu/2/3/7\n',
        'x86_64/qemu/2/3/\x1b[31m', 'x86_64//2/3/7', 'é/qemu/2/3/7',
        'x86_64/qemu/٢/3/7', 'x86_64/qemu/2/3/' + '7' * 221,
        'x86_64/qemu/999999/3/7'])
    def test_other_lines(self, text):
        with pytest.raises(exception.Corrupt) as caught:
            key.Platform.parse(text)
        assert len(str(caught.value)) < 200

    @given(st.text() | st.from_regex(
        r'\A[\w-]+/[\w-]+/[0-9]+/[0-9]+/[ -~]+\Z', fullmatch=True))
    def test_any_line(self, text):
        try:
            found = key.Platform.parse(text)
        except exception.Corrupt:
            return
        assert found.text == text
        assert len(text) <= 255


class TestKey:

    def test_both_ways(self):
        one = microvms.a_key()
        assert key.Key.parse(one.canonical) == one
        assert one.differences(one) == []
        assert one.differences(microvms.a_key(qemu='8.0.0')) == ['qemu']
        assert one.digest != microvms.a_key(save=3).digest

    @pytest.mark.parametrize('change', [
        {'qemu': 7}, {'save': True}, {'save': 0}, {'save': 1 << 40},
        {'cpu': ''}, {'cpu': 'a\nb'}, {'template': 'x'}, {'more': 1},
        {'recipe': '1'}, {'arch': None}])
    def test_nonsense_is_refused(self, change):
        with pytest.raises(exception.Corrupt):
            key.Key.from_json({**microvms.a_key().to_json(), **change})

    def test_damage(self):
        for _, found in survives(key.Key.parse, microvms.a_key().canonical):
            assert key.Key.parse(found.canonical) == found

    @given(st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
    def test_any_json(self, value):
        with pytest.raises(exception.Corrupt):
            key.Key.parse(json.dumps(value).encode())

    def test_the_processor_is_the_cookies(self):
        assert key.cpu_of(microvms.COOKIE) == 'Westmere,+sse4.2,-aes'
        for cookie in ('', '<cookie/>', '<cookie><cpu mode="host-model">'
                       '<model>x</model></cpu></cookie>', '<domain/>'):
            with pytest.raises(exception.Corrupt):
                key.cpu_of(cookie)


class TestTemplate:

    def test_all_that_counts_is_in_the_digest(self):
        known = {template.digest(CONFIG)}
        for change in ({'memory': 1024}, {'vcpus': 2}, {'slots': 9},
                       {'machine': 'pc-q35-8.0'}, {'cpu': 'Nehalem'},
                       {'max_memory': 8192}, {'virt_type': 'kvm'}):
            known.add(template.digest(dataclasses.replace(CONFIG, **change)))
        assert len(known) == 8

    def test_who_is_baked_is_not_in_it(self):
        one, two = (template.build(CONFIG, name, str(uuid),
                                   microvms.places(name))
                    for name, uuid in (('/a', BAKED), ('/b', OTHER)))
        assert one != two
        assert template.digest(CONFIG) == template.digest(CONFIG)


class TestIdentity:

    def file(self, tmp_path, data):
        path = tmp_path / 'memory'
        path.write_bytes(data)
        return os.open(path, os.O_RDWR)

    def test_found_and_replaced(self, tmp_path):
        data = bytes(100) + microvms.stream()
        fd = self.file(tmp_path, data)
        found = identity.find(fd, 100, BAKED)
        assert len(found.binary) == 1 and len(found.text) == 3
        done = found.patch(fd, OTHER)
        now = os.pread(fd, len(data), 0)
        assert done.uuid == OTHER and done.text == found.text
        assert OTHER.bytes_le in now and BAKED.bytes_le not in now
        # That in a log stays.
        assert now.count(str(BAKED).encode()) == 1
        assert now.count(str(OTHER).encode()) == 3
        done.patch(fd, BAKED)
        assert os.pread(fd, len(data), 0) == data
        os.close(fd)

    def test_also_where_pieces_meet(self, tmp_path, monkeypatch):
        monkeypatch.setattr(identity, '_CHUNK', 997)
        fd = self.file(tmp_path, microvms.stream())
        found = identity.find(fd, 0, BAKED)
        assert len(found.binary) == 1 and len(found.text) == 3
        os.close(fd)

    @pytest.mark.parametrize('cut', range(-1, 38))
    def test_on_two_pages(self, tmp_path, cut):
        """QEMU puts the head of each page in between."""
        product = template.PRODUCT.encode()
        words = b'x' * 20 + product + b'\0\0' + str(BAKED).encode()
        memory = bytearray(os.urandom(4 * 4096))
        memory[100:116] = BAKED.bytes_le
        at = 2 * 4096 - len(words) + 36 - cut
        memory[at:at + len(words)] = words
        at = 3 * 4096 - min(max(cut, 1), 15)
        memory[at:at + 16] = BAKED.bytes_le
        stream, places = microvms.qemu_stream([
            bytes(memory[at:at + 4096]) for at in range(0, len(memory), 4096)],
            per_section=2)
        fd = self.file(tmp_path, b'head' + stream)
        found = identity.find(fd, 4, BAKED)
        assert (len(found.binary), len(found.text)) == (2, 1)
        assert identity.Places.from_json(found.to_json()) == found
        found.patch(fd, OTHER)
        patched = os.pread(fd, len(stream) + 4, 0)
        now = b''.join(patched[4 + at:4 + at + 4096] for at in places)
        assert now == memory.replace(
            BAKED.bytes_le, OTHER.bytes_le).replace(
            str(BAKED).encode(), str(OTHER).encode())
        os.close(fd)

    def test_nothing_is_written_where_it_is_not(self, tmp_path):
        data = bytearray(microvms.stream())
        fd = self.file(tmp_path, data)
        found = identity.find(fd, 0, BAKED)
        os.pwrite(fd, b'x', found.text[-1][0][0] + 3)
        before = os.pread(fd, len(data), 0)
        with pytest.raises(exception.Corrupt):
            found.patch(fd, OTHER)
        assert os.pread(fd, len(data), 0) == before
        os.close(fd)

    def test_a_guest_without_it(self, tmp_path):
        fd = self.file(tmp_path, os.urandom(10000))
        with pytest.raises(exception.Corrupt):
            identity.find(fd, 0, BAKED)
        os.pwrite(fd, BAKED.bytes_le * 200, 0)
        with pytest.raises(exception.Corrupt):
            identity.find(fd, 0, BAKED)
        os.close(fd)

    @pytest.mark.parametrize('value', [
        None, [], {}, {'uuid': 'x', 'binary': [], 'text': []},
        {'uuid': str(BAKED), 'binary': [1]},
        {'uuid': str(OTHER).upper(), 'binary': [1], 'text': []},
        {'uuid': str(BAKED), 'binary': [2, 1], 'text': []},
        {'uuid': str(BAKED), 'binary': [1, 1], 'text': []},
        {'uuid': str(BAKED), 'binary': [0], 'text': []},
        {'uuid': str(BAKED), 'binary': [True], 'text': []},
        {'uuid': str(BAKED), 'binary': [1 << 70], 'text': []},
        {'uuid': str(BAKED), 'binary': [[[1, 15]]], 'text': []},
        {'uuid': str(BAKED), 'binary': [[[1, 17], [30, -1]]], 'text': []},
        {'uuid': str(BAKED), 'binary': [[[1, 8], [8, 8]]], 'text': []},
        {'uuid': str(BAKED), 'binary': [[[1, 5], [9, 5], [20, 6]]],
         'text': []},
        {'uuid': str(BAKED), 'binary': [[[1, '16']]], 'text': []},
        {'uuid': str(BAKED), 'binary': [5, [[6, 8], [30, 8]]], 'text': []},
        {'uuid': str(BAKED), 'binary': list(range(1, 99)), 'text': []}])
    def test_nonsense_is_refused(self, value):
        with pytest.raises(exception.Corrupt):
            identity.Places.from_json(value)


class TestArtifact:

    def test_both_ways(self, tmp_path):
        made = microvms.make(tmp_path / 'a')
        assert artifact.read(tmp_path / 'a') == made

    def test_none(self, tmp_path):
        with pytest.raises(exception.NotFound):
            artifact.read(tmp_path)

    def test_parts_of_another_size(self, tmp_path):
        microvms.make(tmp_path)
        with (tmp_path / artifact.DISK).open('ab') as file:
            file.write(b'x')
        with pytest.raises(exception.Corrupt):
            artifact.read(tmp_path)
        (tmp_path / artifact.DISK).unlink()
        with pytest.raises(exception.NotFound):
            artifact.read(tmp_path)

    def test_a_newer_version_is_told(self, tmp_path):
        value = json.loads(microvms.make(tmp_path).pack())
        with pytest.raises(exception.UnknownVersion):
            artifact.Description.parse(json.dumps(
                {**value, 'version': 2}).encode())

    def test_damage(self, tmp_path):
        data = microvms.make(tmp_path).pack()
        for _, found in survives(artifact.Description.parse, data):
            assert artifact.Description.parse(found.pack()) == found

    @given(st.binary(max_size=50_000), st.integers(0, 3),
           st.integers(0, 70_000))
    def test_copies_are_equal_and_sparse(self, tmp_path_factory, data, times,
                                         zeros):
        room = tmp_path_factory.mktemp('copy')
        data = data + (bytes(zeros) + data) * times
        (room / 'a').write_bytes(data)
        with (room / 'a').open('rb') as file:
            part = artifact.copy(file.fileno(), room / 'b')
            with pytest.raises(exception.Exists):
                artifact.copy(file.fileno(), room / 'b')
        assert (room / 'b').read_bytes() == data
        assert part == microvms.part(room / 'a')

    def test_zeros_take_no_room(self, tmp_path):
        (tmp_path / 'a').write_bytes(b'x' + bytes(3 << 20) + b'y')
        with (tmp_path / 'a').open('rb') as file:
            artifact.copy(file.fileno(), tmp_path / 'b')
            assert (tmp_path / 'b').stat().st_blocks * 512 <= 16384
            with pytest.raises(exception.Corrupt):
                artifact.copy(file.fileno(), tmp_path / 'c', 1 << 20)


def test_variants_have_the_original_length_in_mind():
    # The tests above would be in vain without any that are nearly right.
    data = microvms.a_key().canonical
    assert any(abs(len(one) - len(data)) < 3 for one in variants(data, 50))
