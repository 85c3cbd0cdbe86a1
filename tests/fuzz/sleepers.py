# SPDX-License-Identifier: Apache-2.0
"""What µVMs are made of, and what their guests say."""

import dataclasses
import os
import pathlib
import tempfile

import microvms
from kit import Parts, Target

from fastboot_common import exception
from fastboot_common.microvm import (
    activation,
    artifact,
    clone,
    document,
    identity,
    key,
    savefile,
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


# microvm.json

def read_description(data):
    found = artifact.Description.parse(data)
    assert artifact.Description.parse(found.pack()) == found
    assert key.Key.parse(found.key.canonical) == found.key
    assert set(found.parts) == {artifact.MEMORY, artifact.DISK}
    for at in found.identity.binary + found.identity.text:
        assert 0 < at < found.parts[artifact.MEMORY].size


def description_seeds():
    with tempfile.TemporaryDirectory() as name:
        one = microvms.make(pathlib.Path(name))
    newer = one.pack().replace(b'"version": 1', b'"version": 2')
    bare = dataclasses.replace(one, identity=identity.Places(
        microvms.BAKED, (1,), ()))
    return [one.pack(), bare.pack(), newer]


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
    Target('microvm', read_description, description_seeds, longest=4096),
    Target('activator', hear_activator, activator_seeds, ()),
)
