# SPDX-License-Identifier: Apache-2.0
"""The XML of an instance that is a copy of a baked guest.

Two documents make it: what libvirt saved of the guest, which says what the
machine is made of, and how the instance was defined, which says whose it is
and what is behind its devices. Whatever the guest can see comes from the
first; name, files, sockets, metadata from the second.
"""

import copy
import dataclasses
import pathlib
import string
import uuid
from collections.abc import Iterator
from typing import Final

from fastboot_common import exception
from fastboot_common.microvm import artifact, document, saved, template

#: What a definition may have. Anything else asks for a machine that the
#: template is not.
_KNOWN: Final = frozenset((
    *saved.OWN, 'genid', 'memory', 'currentMemory', 'maxMemory', 'vcpu',
    'sysinfo', 'os', 'features', 'cpu', 'clock', 'on_poweroff', 'on_reboot',
    'on_crash', 'pm', 'devices', 'perf', 'iothreads'))
_KNOWN_DEVICES: Final = frozenset((
    *saved.BEHIND, 'emulator', 'disk', 'controller', 'interface', 'channel',
    'input', 'video', 'memballoon', 'rng', 'audio'))
#: What the template has as well, or what no guest sees.
_KNOWN_FEATURES: Final = frozenset(('acpi', 'apic', 'pae', 'tcg',
                                    'vmcoreinfo'))
_KNOWN_CPU: Final = frozenset(('model', 'vendor', 'topology', 'feature'))
#: Others need a device of the host's, or memory that another shares.
_INTERFACES: Final = frozenset(('bridge', 'ethernet', 'network', 'user'))
_MEMORY_BLOCK: Final = 128
_UNITS: Final = {'b': 1, 'bytes': 1, 'KB': 1000, 'k': 1 << 10,
                 'KiB': 1 << 10, 'MB': 10**6, 'M': 1 << 20, 'MiB': 1 << 20,
                 'GB': 10**9, 'G': 1 << 30, 'GiB': 1 << 30}


class Unsuitable(exception.Invalid):
    """The instance cannot be a copy of this guest. Boot it."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """An instance, by its definition.

    :ivar xml: the definition, as it came.
    :ivar tree: the same, read.
    :ivar disk: its root disk's element.
    :ivar plugged: XML of what is plugged, in this order: processors are
        not among it.
    :ivar interfaces: XML of network interfaces, links up.
    :ivar memory: MiB that are plugged.
    """

    xml: str
    tree: document.Element
    name: str
    uuid: uuid.UUID
    disk: document.Element
    plugged: list[document.Element]
    interfaces: list[document.Element]
    vcpus: int
    memory: int


def instance(xml: str, machine: artifact.Machine) -> Instance:
    """Read a definition.

    :param machine: limits of the guest that it would be a copy of.
    :raises Unsuitable: it asks for what such a copy cannot be.
    :raises Corrupt: it is no definition.
    """
    tree = document.parse(xml)
    _check(tree)
    vcpus = _vcpus(tree, machine)
    memory = _memory(tree, machine)
    disk = template.root_disk(tree)
    source = disk.find('source')
    if disk.get('type') != 'file' or source is None or not source.get('file'):
        raise Unsuitable('its root disk is no file')
    plugged = [_pluggable(one) for one in _disks(tree, disk)]
    if len(plugged) > 1:
        raise Unsuitable('it has more than one disk besides the root disk')
    interfaces = [_pluggable(one) for one in
                  tree.iterfind('devices/interface')]
    if len(plugged) + len(interfaces) > machine.slots:
        raise Unsuitable(f'it has more than {machine.slots} devices')
    if memory:
        plugged.insert(0, template.memory_device(memory))
    return Instance(xml, tree, tree.findtext('name') or '',
                    _uuid(tree), disk, plugged, interfaces, vcpus, memory)


def live(xml: str, one: Instance) -> str:
    """The XML that the copy is loaded with.

    :param xml: the one in the save file.
    :raises Corrupt: that is no XML of ours.
    """
    tree = saved.parse(xml)
    for tag in saved.OWN:
        _replace(tree, tag, one.tree.findall(tag))
    for event in ('on_poweroff', 'on_crash'):
        _replace(tree, event, one.tree.findall(event))
    # The definition is another machine: a reboot must begin there.
    reboot = tree.find('on_reboot')
    if reboot is not None:
        reboot.text = 'destroy'
    features = tree.find('features')
    if features is not None:
        # A bound of the bakery's sandbox, which the guest does not see.
        _replace(features, 'tcg', [])
    _system(tree, one.uuid)
    devices = tree.find('devices')
    if devices is None:
        raise exception.Corrupt('the saved domain has no devices')
    for tag in saved.BEHIND:
        _replace(devices, tag, one.tree.findall(f'devices/{tag}'))
    if devices.find('serial') is None:
        # The machine has one, whoever reads it.
        devices.append(document.Element('serial', {'type': 'null'}))
    _root_disk(tree, one.disk)
    balloon = devices.find('memballoon')
    if balloon is not None:
        _replace(balloon, 'stats',
                 one.tree.findall('devices/memballoon/stats'))
    for channel in devices.iterfind('channel'):
        # libvirt finds a place of its own.
        for source in channel.findall('source'):
            channel.remove(source)
    return document.text_of(tree)


def linked(interface: document.Element, state: str) -> document.Element:
    """The interface with its link up or down."""
    found = copy.deepcopy(interface)
    for link in found.findall('link'):
        found.remove(link)
    link = document.Element('link', {'state': state})
    found.append(link)
    return found


def _check(tree: document.Element) -> None:
    for path, known in (('*', _KNOWN), ('devices/*', _KNOWN_DEVICES),
                        ('features/*', _KNOWN_FEATURES),
                        ('cpu/*', _KNOWN_CPU)):
        for child in tree.iterfind(path):
            if child.tag not in known:
                raise Unsuitable(f'it has <{child.tag}>')
    for topology in tree.iterfind('cpu/topology'):
        if any(topology.get(name, '1') != '1'
               for name in ('dies', 'clusters', 'cores', 'threads')):
            raise Unsuitable('its processors are not one socket each')
    for path in ('os/loader', 'os/nvram', 'os/kernel',
                 'cputune/vcpupin', 'cputune/emulatorpin',
                 "vcpu[@cpuset]", 'devices/disk/encryption',
                 # The template's root disk has rings of the other kind.
                 "devices/disk/driver[@packed='on']"):
        if tree.find(path) is not None:
            raise Unsuitable(f'it has {path}')
    for interface in tree.iterfind('devices/interface'):
        if interface.get('type') not in _INTERFACES:
            raise Unsuitable(f'it has an interface of type '
                             f'{interface.get("type")!r:.50}')
        # The machine's free ports are PCI Express.
        if interface.find("model[@type='virtio']") is None:
            raise Unsuitable('it has an interface that is not virtio')
    if len(tree.findall('devices/serial')) > 1:
        raise Unsuitable('it has more than one serial port')
    system = tree.find('os')
    if system is not None and system.get('firmware'):
        raise Unsuitable('its firmware is not BIOS')


def _vcpus(tree: document.Element, machine: artifact.Machine) -> int:
    element = tree.find('vcpu')
    count = 1 if element is None else _number(
        element.get('current') or element.text)
    if not 0 < count <= machine.vcpus:
        raise Unsuitable(f'it has {count} processors; {machine.vcpus} are '
                         f'the most')
    return count


def _memory(tree: document.Element, machine: artifact.Machine) -> int:
    """MiB that the instance has beyond the guest."""
    element = tree.find('memory')
    if element is None:
        raise exception.Corrupt('the definition has no memory')
    unit = _UNITS.get(element.get('unit', 'KiB'))
    if unit is None:
        raise exception.Corrupt('the definition has memory of no known unit')
    size = _number(element.text) * unit
    mib, rest = divmod(size, 1 << 20)
    if not machine.memory <= mib <= machine.max_memory:
        raise Unsuitable(f'it has {mib} MiB; {machine.memory} to '
                         f'{machine.max_memory} can be')
    # Kernels plug memory in blocks, or not at all.
    if rest or (mib - machine.memory) % _MEMORY_BLOCK:
        raise Unsuitable(f'{mib} MiB are not {machine.memory} and a '
                         f'multiple of {_MEMORY_BLOCK}')
    return mib - machine.memory


def _number(text: str | None) -> int:
    if not text or not text.strip().isdecimal() or len(text) > 18:
        raise exception.Corrupt(f'not a number in the definition: '
                                f'{text!r:.50}')
    return int(text)


def _uuid(tree: document.Element) -> uuid.UUID:
    try:
        return uuid.UUID(tree.findtext('uuid') or '')
    except ValueError as error:
        raise exception.Corrupt(f'the definition has no UUID: '
                                f'{error}') from error


def _disks(tree: document.Element, root: document.Element
           ) -> list[document.Element]:
    """The disks to plug, a CD with something in it as a disk as well.

    A guest names those that are there when it wakes up in the order that it
    is told of them: QEMU goes through its ports from the last (7.2 to 10).
    A booted one begins with the first. Where there are two, the owner's
    ``/dev/vdb`` could be the other one.
    """
    found = []
    names = _names(tree)
    for disk in tree.iterfind('devices/disk'):
        source = disk.find('source')
        if disk is root or source is None:
            continue
        file = source.get('file')
        if disk.get('device') == 'cdrom' and file:
            name = next(names, None)
            if name is None:
                raise Unsuitable('it has no name left for another disk')
            found.append(template.drive(pathlib.Path(file), name))
        elif (disk.get('device', 'disk') == 'disk'
              and disk.find("target[@bus='virtio']") is not None):
            found.append(disk)
        else:
            raise Unsuitable('it has a disk that cannot be plugged')
    return found


def _names(tree: document.Element) -> Iterator[str]:
    """Names of disks that the definition does not use, from the last."""
    taken = {target.get('dev') for target in
             tree.iterfind('devices/disk/target')}
    return (name for letter in reversed(string.ascii_lowercase)
            if (name := f'vd{letter}') not in taken)


def _pluggable(device: document.Element) -> document.Element:
    """A copy without an address: that was one on another machine's bus."""
    found = copy.deepcopy(device)
    for tag in ('address', 'alias'):
        for child in found.findall(tag):
            found.remove(child)
    driver = found.find('driver')
    if driver is not None:
        # The running machine has no such threads.
        driver.attrib.pop('iothread', None)
    return found


def _replace(parent: document.Element, tag: str,
             children: list[document.Element]) -> None:
    """Put children in the place of those that have the tag now."""
    old = parent.findall(tag)
    place = list(parent).index(old[0]) if old else len(parent)
    for child in old:
        parent.remove(child)
    for number, child in enumerate(children):
        new = copy.deepcopy(child)
        if parent.tag == 'devices':
            new = _pluggable(new)
        parent.insert(place + number, new)


def _system(tree: document.Element, known: uuid.UUID) -> None:
    for entry in tree.iterfind('sysinfo/system/entry'):
        if entry.get('name') in ('uuid', 'serial'):
            entry.text = str(known)


def _root_disk(tree: document.Element, own: document.Element) -> None:
    """What is behind the disk is the instance's, the device is not."""
    disk = template.root_disk(tree)
    driver, own_driver = disk.find('driver'), own.find('driver')
    queues = None if driver is None else driver.get('queues')
    disk.set('type', own.get('type', 'file'))
    for tag in saved.ROOT_DISK:
        _replace(disk, tag, own.findall(tag))
    driver = disk.find('driver')
    if driver is None or own_driver is None:
        raise Unsuitable('its root disk has no <driver>')
    driver.attrib.pop('iothread', None)
    driver.attrib.pop('queues', None)
    if queues:
        driver.set('queues', queues)
