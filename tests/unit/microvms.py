# SPDX-License-Identifier: Apache-2.0
"""µVMs as small as their formats allow."""

import hashlib
import os
import pathlib
import struct
import uuid

from fastboot_common.microvm import (
    activation,
    artifact,
    document,
    identity,
    key,
    savefile,
    template,
)

BAKED = uuid.UUID('11111111-2222-4333-8444-555555555555')
OTHER = uuid.UUID('aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee')
CONFIG = template.Config()
COOKIE = ('<cookie><cpu mode="custom"><model>Westmere</model>'
          '<feature policy="require" name="sse4.2"/>'
          '<feature policy="disable" name="aes"/></cpu></cookie>')


def places(directory='/room'):
    room = pathlib.Path(directory)
    return template.Places(room / 'disk', room / 'nbd', room / 'drive',
                           room / 'console', room / 'port')


def saved_xml():
    """As libvirt saves it, nearly: the drive is gone."""
    tree = document.parse(template.build(
        CONFIG, 'baking', str(BAKED), places()))
    devices = tree.find('devices')
    devices.remove(devices.find("disk[readonly]"))
    return document.text_of(tree)


def save_file(xml=None, room=65536):
    return savefile.SaveFile(xml or saved_xml(), COOKIE, room)


def stream(known=BAKED):
    """Memory with the UUID in the places where guests have it."""
    near = b'OpenStack Nova\0pc-q35-7.2\0'
    return b''.join((
        os.urandom(5000), known.bytes_le, os.urandom(70),
        near, str(known).encode(), b'\0', bytes(20000),
        near, str(known).encode(), b'\0\0', str(known).encode(),
        os.urandom(900), b'in a log: ', str(known).encode(),
        os.urandom(500)))


def a_key(**changes):
    return key.Key(**{
        'arch': 'x86_64', 'virt_type': 'qemu', 'machine': 'pc-q35-7.2',
        'qemu': '7.2.22 (Debian)', 'save': 2, 'cpu': 'Westmere,+sse4.2',
        'template': template.digest(CONFIG),
        'recipe': activation.RECIPE, **changes})


def qemu_stream(pages, per_section=5, tail=b'\4devices', machine=b'pc'):
    """A stream as QEMU 7.2 writes it: its bytes, and where the pages are.

    :param pages: 4 KiB each; None: of zeros.
    """
    size = max(len(pages), 1) * 4096
    name = bytes([3]) + b'ram'
    head = (b'QEVM\0\0\0\3\7' + struct.pack('>I', len(machine)) + machine
            + b'\1\0\0\0\2' + name + struct.pack('>II', 0, 4)
            + struct.pack('>Q', size + 4096 | 4)
            + name + struct.pack('>Q', size)
            + b'\4bios' + struct.pack('>Q', 4096)
            + struct.pack('>Q', 0x10) + b'\x7e\0\0\0\2')
    made, places, fresh = bytearray(head), [], True
    groups = [range(at, min(at + per_section, len(pages)))
              for at in range(0, len(pages), per_section)] or [range(0)]
    for group in groups:
        made += (b'\3' if group is groups[-1] else b'\2') + b'\0\0\0\2'
        for number in group:
            flags = 2 if pages[number] is None else 8
            made += struct.pack('>Q', number * 4096 | flags
                                | (0 if fresh else 0x20))
            made += name if fresh else b''
            fresh = False
            if pages[number] is None:
                made += b'\0'
            else:
                places.append(len(made))
                made += pages[number]
        made += struct.pack('>Q', 0x10) + b'\x7e\0\0\0\2'
    return bytes(made + tail), places


def make(directory, memory=b'', disk=b'', size=1 << 30, group=None):
    """An artifact whose memory no QEMU would load.

    :param memory: put in front of the stream's end.
    :param disk: put behind the disk's beginning.
    :param size: of the image.
    :param group: the class of hosts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    head = save_file().pack()
    (directory / artifact.MEMORY).write_bytes(head + memory + stream())
    (directory / artifact.DISK).write_bytes(b'QFI\xfb' + bytes(200) + disk)
    with (directory / artifact.MEMORY).open('rb') as file:
        found = identity.find(file.fileno(), len(head), BAKED)
    description = artifact.Description(
        group or a_key(), artifact.Machine.of(CONFIG), found, size,
        {name: part(directory / name)
         for name in (artifact.MEMORY, artifact.DISK)}, 1_700_000_000)
    artifact.write(directory, description)
    return description


def part(path):
    data = path.read_bytes()
    return artifact.Part(len(data), hashlib.sha256(data).hexdigest())
