# SPDX-License-Identifier: Apache-2.0
"""µVMs as small as their formats allow."""

import hashlib
import os
import pathlib
import uuid

from fastboot_common.microvm import (
    activation,
    artifact,
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
    """As libvirt saves it, nearly."""
    return template.build(CONFIG, 'baking', str(BAKED), places())


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


def make(directory):
    """An artifact whose memory no QEMU would load."""
    directory.mkdir(exist_ok=True)
    head = save_file().pack()
    (directory / artifact.MEMORY).write_bytes(head + stream())
    (directory / artifact.DISK).write_bytes(b'QFI\xfb' + bytes(200))
    with (directory / artifact.MEMORY).open('rb') as file:
        found = identity.find(file.fileno(), len(head), BAKED)
    description = artifact.Description(
        a_key(), artifact.Machine.of(CONFIG), found, 1 << 30,
        {name: part(directory / name)
         for name in (artifact.MEMORY, artifact.DISK)}, 1_700_000_000)
    artifact.write(directory, description)
    return description


def part(path):
    data = path.read_bytes()
    return artifact.Part(len(data), hashlib.sha256(data).hexdigest())
