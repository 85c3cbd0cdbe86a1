# SPDX-License-Identifier: Apache-2.0
"""What µVMs are made of, and what their guests say."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import struct
import tempfile

import microvms
from kit import Parts, Target

from fastboot_common import exception
from fastboot_common.blocks import PAGE
from fastboot_common.microvm import (
    activation,
    artifact,
    blob,
    clone,
    document,
    identity,
    key,
    pages,
    savefile,
    stream,
)

MACHINE = artifact.Machine(512, 8192, 4, 4)


# A save file: what is in front of the stream

def read_save(data):
    found = savefile.SaveFile.parse(data)
    assert found.pack() == data[:found.stream]
    tree = document.parse(found.xml)
    document.text_of(tree)
    document.canonical(tree)
    if found.cookie:
        words = key.cpu_of(found.cookie)
        assert '<' not in words or words


def save_seeds():
    one = savefile.SaveFile('<domain><name>a</name></domain>',
                            microvms.COOKIE, 600)
    return [one.pack(), one.having('<domain/>').pack(),
            savefile.SaveFile('<domain/>', '', 10, False).pack()]


# A definition, as others give it, and a copy made for it

def read_definition(data):
    one = clone.instance(data.decode('latin-1'), MACHINE)
    assert 0 < one.vcpus <= MACHINE.vcpus
    assert 0 <= one.memory <= MACHINE.max_memory - MACHINE.memory
    assert len(one.plugged) + len(one.interfaces) <= MACHINE.slots + 1
    live = clone.live(microvms.saved_xml(), one)
    assert clone.live(live, one) == live


def definition_seeds():
    return [(
        '<domain><name>a</name><uuid>' + str(microvms.OTHER) + '</uuid>'
        '<memory unit="MiB">1024</memory><vcpu>2</vcpu><devices>'
        '<disk type="file"><driver name="qemu"/><source file="/d"/>'
        '<target dev="vda" bus="virtio"/></disk>' + more
        + '</devices></domain>').encode() for more in (
            '', '<disk type="file" device="cdrom"><source file="/c"/></disk>',
            '<interface type="user"/><serial type="pty"/>')]


# The XML of a saved guest, by who broke out of it

def read_saved(data):
    text = data.decode('latin-1')
    one = clone.instance(definition_seeds()[0].decode(), MACHINE)
    made = document.parse(clone.live(text, one))
    known = set(files_in(one.tree))
    for word in files_in(made):
        assert word in known or word == '/dev/urandom' or pathlib.PurePath(
            word).name.startswith(('qemu-system-', 'qemu-kvm', 'kvm')), word
    # All that libvirt would run, share or ask for is known by its element.
    assert {child.tag for child in made.find('devices')} <= {
        'emulator', 'disk', 'controller', 'channel', 'input', 'audio',
        'video', 'watchdog', 'memballoon', 'rng', 'panic', 'serial'}


def files_in(tree):
    for element in tree.iter():
        for word in (element.text or '', *element.attrib.values()):
            if '/' in word:
                yield word.strip()


def saved_seeds():
    text = microvms.saved_xml()
    return [text.encode(), text.replace(
        '</devices>', '<watchdog model="itco" action="reset"/>'
        '<emulator>/usr/bin/qemu-system-x86_64</emulator></devices>'
        ).encode()]


# microvm.json

def read_description(data):
    found = artifact.Description.parse(data)
    assert artifact.Description.parse(found.pack()) == found
    assert key.Key.parse(found.key.canonical) == found.key
    assert set(found.parts) == {artifact.MEMORY, artifact.DISK}
    for place in found.identity.binary + found.identity.text:
        for at, length in place:
            assert 0 < at < at + length <= found.parts[artifact.MEMORY].size


def description_seeds():
    with tempfile.TemporaryDirectory() as name:
        one = microvms.make(pathlib.Path(name))
    newer = one.pack().replace(b'"version": 1', b'"version": 2')
    bare = dataclasses.replace(one, identity=identity.Places(
        microvms.BAKED, (((1, 16),),), ()))
    cut = dataclasses.replace(one, identity=identity.Places(
        microvms.BAKED, (((1, 6), (20, 10)),), (((40, 35), (90, 1)),)))
    return [one.pack(), bare.pack(), cut.pack(), newer]


# The memory of a guest: where its pages are

def walk_stream(data):
    """Two bytes of where the stream begins, and a file."""
    parts = Parts(data)
    start, rest = parts.number(2), parts.rest()
    found = list(stream.pages(rest, start))
    ends = [start, *(at + PAGE for at in found)]
    assert all(end <= at for end, at in zip(ends, found, strict=False))
    assert not found or ends[-1] <= len(rest)
    cuts = pages.cut(len(rest), found)
    assert set(found) <= set(cuts.tolist())
    layout = pages.Layout.of(memoryview(rest), cuts,
                             lambda page: (pages.ZEROS, 0))
    assert layout.size == len(rest)


def stream_seeds():
    one, _ = microvms.qemu_stream([None, b'x' * 4096, None], 2)
    two, _ = microvms.qemu_stream([None] * 5, 2)
    return [b'\0\0' + one, b'\3\0abc' + two, b'\0\0' + one[:200]]


# A µVM as one file

def read_blob(data):
    """A byte of how many pages it has, and what is in front of them."""
    parts = Parts(data)
    count, head = parts.number(1), parts.rest()
    whole = head + bytes(-len(head) % PAGE)
    whole += b'p' * PAGE * count

    def read(numbers):
        return b''.join(
            whole[at * PAGE:(at + 1) * PAGE].ljust(
                PAGE, b'\0') for at in numbers.tolist())

    found = blob.Blob.read(read, len(whole))
    assert found.count <= count + len(head) // PAGE
    for layout in found.layouts.values():
        assert layout.size <= pages.LIMIT + PAGE * len(whole)
        if layout.size < 1 << 20:
            made = b''.join(layout.join(read, read, 5000))
            assert len(made) == layout.size
    with contextlib.suppress(exception.Corrupt):
        artifact.Description.parse(found.description)


def blob_seeds():
    zeros, page = bytes(PAGE), b'x' * PAGE
    seeds = []
    for memory, known, places in (
            (b'ab' + page + zeros + b'c', {}, [2]), (b'', {}, []),
            (page + zeros + zeros, {hashlib.sha256(page).digest(): 7}, [])):
        builder = blob.Builder(known)
        builder.add(artifact.MEMORY, memoryview(memory), places)
        builder.add(artifact.DISK, memoryview(b'QFI' + page), [])
        with tempfile.TemporaryDirectory() as name:
            made = builder.write(pathlib.Path(name, 'blob'), 'image',
                                 'ab' * 32, b'{}')
        seeds.append(bytes([made.count]) + made.head().rstrip(b'\0'))
    return seeds


def read_rows(data):
    """Pages of the blob, rows (a byte each), the rows, and the rest."""
    parts = Parts(data)
    count, rows = parts.number(1), parts.number(1)
    layout = pages.Layout.parse(
        parts.take(rows * pages.DTYPE.itemsize), parts.rest(), count)
    kinds = pages.BLOB, pages.IMAGE, pages.ZEROS
    assert sum(map(layout.count, kinds)) == layout.count()
    if layout.count() < 300:
        made = b''.join(layout.join(
            lambda numbers: blob_page(numbers, count),
            lambda numbers: b'i' * PAGE * len(numbers), 5000))
        assert len(made) == layout.size
        assert made.count(b'i') >= PAGE * layout.count(pages.IMAGE)


def blob_page(numbers, count):
    assert not len(numbers) or 0 <= numbers.min() <= numbers.max() < count
    return b'b' * PAGE * len(numbers)


def rows_seeds():
    return [bytes([len(rows) and 4, len(rows)]) + b''.join(
        struct.pack('<HHIQ', *row) for row in rows) + rest
        for rows, rest in (
            (((8, 0, 2, 1), (0, 1, 3, 1 << 39), (5, 2, 4, 0)), b'x' * 40),
            ((), b''), (((0, 2, 1 << 25, 0),), b'end'),
            (((4095, 0, 4, 0),), b'x' * 10))]


# What a guest says, in pieces

def hear_activator(data):
    parts = Parts(data)
    sizes = parts.take(4)
    lines, rest = activation.Lines(), parts.rest()
    whole = list(activation.Lines().feed(rest))
    found = []
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        found += lines.feed(piece)
    found += lines.feed(rest)
    assert found == whole
    for line in found:
        assert line.word.isalpha() and line.word.isascii()
        assert line.number is None or 0 <= line.number < 10**9


def activator_seeds():
    return [b'\5\5\5\5READY 1.5\nQUIET 2.25 300\nDONE 3 0\n',
            b'\x01\x02\x03\x04' + b'x' * 200 + b'\nFAILED 1\r\nNO 1\n',
            b'\0\0\0\0' + os.urandom(20)]


TARGETS = (
    Target('save-file', read_save, save_seeds),
    Target('definition', read_definition, definition_seeds,
           (exception.Corrupt, clone.Unsuitable)),
    Target('saved-xml', read_saved, saved_seeds,
           (exception.Corrupt, clone.Unsuitable), longest=6000),
    Target('microvm', read_description, description_seeds, longest=4096),
    Target('stream', walk_stream, stream_seeds, (), longest=6000),
    Target('blob', read_blob, blob_seeds, longest=1024),
    Target('rows', read_rows, rows_seeds),
    Target('activator', hear_activator, activator_seeds, ()),
)
