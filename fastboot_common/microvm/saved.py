# SPDX-License-Identifier: Apache-2.0
"""What the XML of a saved guest may say.

Who breaks out of a guest that is baked writes the save file himself, and on
each host that takes it libvirt does what its XML says, with more rights than
the guest ever had. So it may have what the template has, and what libvirt
adds to that; nothing else that a host has may be in it. What is replaced for
each instance anyhow (:mod:`clone`) is not looked at.
"""

import re
from collections.abc import Iterator
from typing import Final

from fastboot_common import exception
from fastboot_common.microvm import document

#: Replaced for each instance, with all that is in them. Of the definition:
OWN: Final = ('name', 'uuid', 'title', 'description', 'metadata', 'cputune',
              'resource', 'seclabel')
#: Devices that the guest does not see, or sees alike in all machines.
BEHIND: Final = ('serial', 'console', 'graphics')
ROOT_DISK: Final = ('driver', 'source', 'backingStore', 'iotune')
#: What an element may have; of the others all that names no file.
_KNOWN: Final = {
    'domain': frozenset((
        *OWN, 'genid', 'maxMemory', 'memory', 'currentMemory', 'vcpu',
        'vcpus', 'sysinfo', 'os', 'features', 'cpu', 'clock', 'on_poweroff',
        'on_reboot', 'on_crash', 'pm', 'devices')),
    'os': frozenset(('type', 'boot', 'bootmenu', 'bios', 'smbios')),
    'devices': frozenset((
        *BEHIND, 'emulator', 'disk', 'controller', 'channel', 'input',
        'audio', 'video', 'watchdog', 'memballoon', 'rng', 'panic')),
    'disk': frozenset((*ROOT_DISK, 'target', 'alias', 'address')),
    'channel': frozenset(('source', 'target', 'alias', 'address')),
    'rng': frozenset(('backend', 'rate', 'driver', 'alias', 'address')),
}
#: Values that such an attribute of an element has, wherever it is.
_VALUES: Final = {
    ('disk', 'device'): 'disk', ('channel', 'type'): 'unix',
    ('backend', 'model'): 'random', ('audio', 'type'): 'none',
}
_DISK: Final = frozenset(('type', 'device'))
_RANDOM: Final = '/dev/urandom'
_EMULATOR: Final = re.compile(
    r'(?:/\w[\w.+-]*)*/(?:qemu-system-\w+|qemu-kvm|kvm)', re.ASCII)


def parse(xml: str) -> document.Element:
    """Read the XML in a save file.

    :raises Corrupt: it is none, or says what the bakery's cannot.
    """
    tree = document.parse(xml)
    tags = [child.tag for child in tree if child.tag not in OWN]
    if len(set(tags)) != len(tags):
        raise exception.Corrupt('the saved domain has something twice')
    if len(tree.findall('devices/disk')) > 1:
        raise exception.Corrupt('the saved domain has more than one disk')
    for element in (tree, *_looked_at(tree)):
        _check(element)
    return tree


def _looked_at(tree: document.Element) -> Iterator[document.Element]:
    """All elements that instances have as they are."""
    for child in tree:
        if tree.tag == 'domain' and child.tag in OWN \
                or tree.tag == 'devices' and child.tag in BEHIND \
                or tree.tag == 'disk' and child.tag in ROOT_DISK \
                or tree.tag == 'channel' and child.tag == 'source':
            continue
        yield child
        yield from _looked_at(child)


def _check(element: document.Element) -> None:
    tag = element.tag
    _check_children(element)
    if tag == 'disk' and not set(element.attrib) <= _DISK:
        raise exception.Corrupt('the saved domain has another disk')
    for (owner, name), value in _VALUES.items():
        if tag == owner and element.get(name) != value:
            raise exception.Corrupt(
                f'the saved domain has <{tag}> with another {name}')
    text = (element.text or '').strip()
    if tag == 'emulator' and not _EMULATOR.fullmatch(text):
        raise exception.Corrupt('the saved domain has another emulator')
    if tag == 'emulator' or tag == 'backend' and text == _RANDOM:
        text = ''
    if any('/' in one for one in (text, *element.attrib.values())):
        raise exception.Corrupt(
            f'the saved domain names a file in <{tag:.50}>')


def _check_children(parent: document.Element) -> None:
    known = _KNOWN.get(parent.tag)
    for child in parent:
        if known is not None and child.tag not in known:
            raise exception.Corrupt(
                f'the saved domain has <{child.tag:.50}> in <{parent.tag}>')
