# SPDX-License-Identifier: Apache-2.0
"""An ordinary domain, for those who have no Nova that defines one.

Like Nova's for the same server: another machine than the template, so what
is tried with it holds for Nova's.
"""

import dataclasses
import pathlib
from xml.etree import ElementTree

from fastboot_common.microvm import document, template


@dataclasses.dataclass(frozen=True)
class Server:
    """What a server is.

    :ivar memory: MiB.
    :ivar network: of libvirt; None: none.
    :ivar mac: of the interface.
    """

    name: str
    uuid: str
    disk: pathlib.Path
    console: pathlib.Path
    memory: int = 512
    vcpus: int = 1
    config_drive: pathlib.Path | None = None
    network: str | None = None
    mac: str | None = None
    virt_type: str = 'qemu'
    cpu: str = 'Westmere'

    def xml(self) -> str:
        """Its definition."""
        tree = ElementTree.Element('domain', type=self.virt_type)
        _add(tree, 'name', self.name)
        _add(tree, 'uuid', self.uuid)
        _add(tree, 'memory', str(self.memory), unit='MiB')
        _add(tree, 'vcpu', str(self.vcpus))
        system = _add(_add(tree, 'sysinfo', type='smbios'), 'system')
        for key, value in (
                ('manufacturer', template.MANUFACTURER),
                ('product', template.PRODUCT), ('serial', self.uuid),
                ('uuid', self.uuid)):
            _add(system, 'entry', value, name=key)
        system = _add(tree, 'os')
        _add(system, 'type', 'hvm', arch='x86_64', machine='q35')
        _add(system, 'boot', dev='hd')
        _add(system, 'smbios', mode='sysinfo')
        features = _add(tree, 'features')
        _add(features, 'acpi')
        _add(features, 'apic')
        _add(_add(tree, 'cpu', mode='custom', match='exact'), 'model',
             self.cpu)
        _add(tree, 'clock', offset='utc')
        self._devices(_add(tree, 'devices'))
        return document.text_of(tree)

    def _devices(self, devices: document.Element) -> None:
        disk = _add(devices, 'disk', type='file', device='disk')
        _add(disk, 'driver', name='qemu', type='qcow2', cache='writeback',
             discard='unmap')
        _add(disk, 'source', file=str(self.disk))
        _add(disk, 'target', dev=template.ROOT, bus='virtio')
        if self.config_drive:
            devices.append(template.drive(self.config_drive, 'vdz'))
        if self.network:
            link = _add(devices, 'interface', type='network')
            _add(link, 'source', network=self.network)
            if self.mac:
                _add(link, 'mac', address=self.mac)
            _add(link, 'model', type='virtio')
        serial = _add(devices, 'serial', type='file')
        _add(serial, 'source', path=str(self.console), append='on')
        agent = _add(devices, 'channel', type='unix')
        _add(agent, 'target', type='virtio', name=template.AGENT_PORT)
        _add(devices, 'memballoon', model='virtio')
        _add(_add(devices, 'rng', model='virtio'), 'backend',
             '/dev/urandom', model='random')


def _add(parent: document.Element, tag: str, text: str | None = None,
         **attributes: str) -> document.Element:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = text
    return child
