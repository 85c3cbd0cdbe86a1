# SPDX-License-Identifier: Apache-2.0
"""The machine that µVMs are baked on, and resume on.

What the stream of a guest holds must be there when it is loaded: same
machine, same devices at the same addresses, same limits. So there is one
template, and what an instance has more is plugged before its first
instruction. What cannot be plugged is in it from the beginning: video,
balloon, and the limits of processors and memory.
"""

import dataclasses
import hashlib
import pathlib
from typing import Final
from xml.etree import ElementTree

from fastboot_common import exception
from fastboot_common.microvm import document

#: The port that the activator listens at.
PORT: Final = 'org.openstack.fastboot.0'
AGENT_PORT: Final = 'org.qemu.guest_agent.0'
#: As Nova has it, so that guests tell the cloud they are in.
MANUFACTURER: Final = 'OpenStack Foundation'
PRODUCT: Final = 'OpenStack Nova'
#: Target of the root disk, and of the drive that starts the bake.
ROOT: Final = 'vda'
DRIVE: Final = 'vdb'

#: A template with nothing of its own, to be compared.
_NOBODY: Final = '00000000-0000-0000-0000-000000000000'


@dataclasses.dataclass(frozen=True)
class Config:
    """What may differ between templates.

    :ivar virt_type: ``qemu`` or ``kvm``.
    :ivar machine: with its version: what an unversioned name means changes
        with every QEMU.
    :ivar cpu: a model of libvirt's; or ``host-model``.
    :ivar memory: MiB that the guest is baked with, and no instance has less.
    :ivar vcpus: that an instance may have at most.
    :ivar max_memory: MiB that an instance may have at most.
    :ivar slots: devices that can be plugged: ports of the PCI bus.
    """

    virt_type: str = 'qemu'
    machine: str = 'pc-q35-7.2'
    cpu: str = 'Westmere'
    memory: int = 512
    vcpus: int = 8
    max_memory: int = 32 << 10
    slots: int = 8
    arch: str = 'x86_64'


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a template's own files are: absolute names.

    :ivar disk: a qcow2.
    :ivar nbd: socket of what is behind the disk, raw.
    :ivar drive: the config drive that starts the bake.
    :ivar console: a file that the console is written to.
    :ivar port: the socket of the activator's port.
    """

    disk: pathlib.Path
    nbd: pathlib.Path
    drive: pathlib.Path
    console: pathlib.Path
    port: pathlib.Path


#: Ports that the template's own devices take: serial, disk, balloon, random
#: numbers, and the drive that is gone when the guest is saved.
_TAKEN: Final = 4
_MEMORY_SLOTS: Final = 16
_TRANSLATION_MIB: Final = 256


def build(config: Config, name: str, uuid: str, places: Places) -> str:
    """The XML of the domain that is baked.

    :param uuid: what is looked for in the guest's memory later, so one that
        nothing else has.
    """
    tree = _machine(config, name, uuid)
    devices = _add(tree, 'devices')
    _controllers(devices, config)
    devices.append(_disk(places))
    devices.append(drive(places.drive))
    serial = _add(devices, 'serial', type='file')
    _add(serial, 'source', path=str(places.console))
    _channel(devices, AGENT_PORT)
    _add(_channel(devices, PORT), 'source', mode='bind',
         path=str(places.port))
    _add(_add(devices, 'video'), 'model', type='virtio')
    _add(devices, 'memballoon', model='virtio', freePageReporting='on',
         autodeflate='on')
    _add(_add(devices, 'rng', model='virtio'), 'backend',
         '/dev/urandom', model='random')
    return document.text_of(tree)


def digest(config: Config) -> str:
    """sha256 of the template as such, whoever is baked on it."""
    nowhere = pathlib.Path('/')
    text = build(config, '', _NOBODY, Places(*[nowhere] * 5))
    return hashlib.sha256(
        document.canonical(document.parse(text)).encode()).hexdigest()


def drive(path: pathlib.Path, target: str = DRIVE) -> document.Element:
    """A config drive as it is plugged: a disk that cannot be written.

    No CD: the kernels of clouds may lack its drivers, and cloud-init finds
    it by a race with them; a disk is announced when it is there.
    """
    disk = ElementTree.Element('disk', type='file', device='disk')
    _add(disk, 'driver', name='qemu', type='raw')
    _add(disk, 'source', file=str(path))
    _add(disk, 'target', dev=target, bus='virtio')
    _add(disk, 'readonly')
    return disk


def memory_device(mib: int) -> document.Element:
    """Memory as it is plugged."""
    device = ElementTree.Element('memory', model='dimm')
    target = _add(device, 'target')
    _add(target, 'size', str(mib), unit='MiB')
    _add(target, 'node', '0')
    return device


def root_disk(tree: document.Element) -> document.Element:
    """The disk of a domain that the guest boots from.

    :raises Corrupt: there is none.
    """
    for disk in tree.iterfind('devices/disk'):
        target = disk.find('target')
        if (disk.get('device', 'disk') == 'disk' and target is not None
                and target.get('dev') == ROOT):
            return disk
    raise exception.Corrupt(f'the domain has no disk {ROOT}')


def _add(parent: document.Element, tag: str, text: str | None = None,
         **attributes: str) -> document.Element:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _machine(config: Config, name: str, uuid: str) -> document.Element:
    """All but the devices."""
    tree = ElementTree.Element('domain', type=config.virt_type)
    _add(tree, 'name', name)
    _add(tree, 'uuid', uuid)
    # libvirt makes a new one at each restore by itself.
    _add(tree, 'genid')
    _add(tree, 'maxMemory', str(config.max_memory), unit='MiB',
         slots=str(_MEMORY_SLOTS))
    _add(tree, 'memory', str(config.memory), unit='MiB')
    _add(tree, 'vcpu', str(config.vcpus), placement='static', current='1')
    system = _add(_add(tree, 'sysinfo', type='smbios'), 'system')
    for key, value in (('manufacturer', MANUFACTURER), ('product', PRODUCT),
                       ('serial', uuid), ('uuid', uuid),
                       ('family', 'Virtual Machine')):
        _add(system, 'entry', value, name=key)
    system_type = _add(tree, 'os')
    _add(system_type, 'type', 'hvm', arch=config.arch,
         machine=config.machine)
    _add(system_type, 'boot', dev='hd')
    _add(system_type, 'smbios', mode='sysinfo')
    features = _add(tree, 'features')
    _add(features, 'acpi')
    _add(features, 'apic')
    if config.virt_type == 'qemu':
        # QEMU's default is 1 GiB, half of what the sandbox lets it have.
        _add(_add(features, 'tcg'), 'tb-cache', str(_TRANSLATION_MIB),
             unit='MiB')
    tree.append(_cpu(config))
    clock = _add(tree, 'clock', offset='utc')
    _add(clock, 'timer', name='hpet', present='no')
    for event in ('on_poweroff', 'on_reboot', 'on_crash'):
        _add(tree, event, 'destroy')
    return tree


def _cpu(config: Config) -> document.Element:
    if config.cpu == 'host-model':
        cpu = ElementTree.Element('cpu', mode='host-model')
    else:
        cpu = ElementTree.Element('cpu', mode='custom', match='exact')
        _add(cpu, 'model', config.cpu, fallback='forbid')
    _add(cpu, 'topology', sockets=str(config.vcpus), cores='1', threads='1')
    # Memory can be plugged into guests with NUMA only, says libvirt.
    _add(_add(cpu, 'numa'), 'cell', id='0', cpus=f'0-{config.vcpus - 1}',
         memory=str(config.memory), unit='MiB')
    return cpu


def _controllers(devices: document.Element, config: Config) -> None:
    _add(devices, 'controller', type='pci', index='0', model='pcie-root')
    for index in range(1, config.slots + _TAKEN + 1):
        _add(devices, 'controller', type='pci', index=str(index),
             model='pcie-root-port')
    _add(devices, 'controller', type='virtio-serial', index='0')
    _add(devices, 'controller', type='usb', model='none')


def _disk(places: Places) -> document.Element:
    disk = ElementTree.Element('disk', type='file', device='disk')
    # As many queues as processors is the default, and then no instance
    # could be loaded that starts with another number of them.
    _add(disk, 'driver', name='qemu', type='qcow2', cache='unsafe',
         discard='unmap', queues='1')
    _add(disk, 'source', file=str(places.disk))
    backing = _add(disk, 'backingStore', type='network')
    _add(backing, 'format', type='raw')
    source = _add(backing, 'source', protocol='nbd')
    _add(source, 'host', transport='unix', socket=str(places.nbd))
    _add(backing, 'backingStore')
    _add(disk, 'target', dev=ROOT, bus='virtio')
    return disk


def _channel(devices: document.Element, name: str) -> document.Element:
    channel = _add(devices, 'channel', type='unix')
    _add(channel, 'target', type='virtio', name=name)
    return channel
