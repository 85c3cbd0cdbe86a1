# SPDX-License-Identifier: Apache-2.0
"""A guest whose running machine ends with a reboot is started as defined.

Real QEMU under libvirt's embedded driver.
"""

import os
import shutil
import time

import bootsector
import embedded
import pytest

from fastboot_nova.agent import reboots

libvirt = pytest.importorskip('libvirt')

pytestmark = [
    pytest.mark.skipif(shutil.which('qemu-system-x86_64') is None,
                       reason='QEMU is not installed'),
    pytest.mark.skipif(os.geteuid() != 0, reason='libvirt needs root'),
]

#: ``hlt`` some times, then: movb $0xfe,%al; outb %al,$0x64
RESETS = bootsector.signed(bytes.fromhex('fbb91400f4e2fdb0fee664f4ebfd'))
#: ``hlt`` some times, then ACPI's power off, where ICH9 has it after SeaBIOS.
ENDS = bootsector.signed(bytes.fromhex(
    'fbb91400f4e2fdba0406b80020eff4ebfd'))


def domain(room, name, on_reboot):
    return f'''
        <domain type='qemu'><name>{name}</name>
        <memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='q35'>hvm</type></os>
        <features><acpi/></features><on_reboot>{on_reboot}</on_reboot>
        <devices>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/>
        <source file='{room}/{name}'/>
        <target dev='vda' bus='virtio'/></disk>
        <controller type='usb' model='none'/><memballoon model='none'/>
        </devices></domain>'''


def start(connection, room, name, code):
    """A guest that runs with a machine that ends, and is defined with one
    that does not."""
    (room / name).write_bytes(code.ljust(1 << 20, b'\0'))
    found = connection.defineXML(domain(room, name, 'destroy'))
    found.create()
    words = domain(room, name, 'restart').replace(
        '</name>', f'</name><uuid>{found.UUIDString()}</uuid>')
    return connection.defineXML(words)


def run(room):
    uri, connection = embedded.opened(room)
    started = []
    looker = reboots.Reboots(uri, lambda: started.append(1))
    assert not looker.watching
    looker.start()
    embedded.wait_for(lambda: looker.watching)
    ends = start(connection, room, 'ends', ENDS)
    (room / 'transient').write_bytes(RESETS.ljust(1 << 20, b'\0'))
    connection.createXML(domain(room, 'transient', 'destroy'), 0)
    killed = start(connection, room, 'killed', bootsector.sector())
    guest = start(connection, room, 'resets', RESETS)
    try:
        embedded.wait_for(lambda: started)
        assert guest.isActive()
        assert '<on_reboot>restart' in guest.XMLDesc()
        killed.destroy()
        embedded.wait_for(lambda: not ends.isActive())
        # Not those that switched themselves off, or were by others.
        time.sleep(3)
        assert not ends.isActive()
        assert not killed.isActive()
        assert 'transient' not in [
            one.name() for one in connection.listAllDomains()]
        assert started == [1]
        assert guest.isActive()
    finally:
        guest.destroy()
    looker.worker.stop()
    assert looker.worker.join(time.monotonic() + 20)


def test_a_reboot_starts_the_defined_machine():
    embedded.run(run)
