# SPDX-License-Identifier: Apache-2.0
"""What libvirt would do for a save file that a guest wrote itself."""

import threading

import pytest
from microvms import BAKED, COOKIE, saved_xml
from test_bakery import options

from fastboot_common import exception
from fastboot_common.microvm import clone, document, saved, savefile, template
from fastboot_glance import bakery

#: As libvirt 9.0 saves it, some ports left out.
LIBVIRT = """<domain type='qemu'>
  <name>baking</name>
  <uuid>11111111-2222-4333-8444-555555555555</uuid>
  <genid>15d08b45-b692-41d3-b3dc-bb52c9985ff6</genid>
  <maxMemory slots='16' unit='KiB'>33554432</maxMemory>
  <memory unit='KiB'>524288</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static' current='1'>8</vcpu>
  <sysinfo type='smbios'>
    <system>
      <entry name='manufacturer'>OpenStack Foundation</entry>
      <entry name='uuid'>11111111-2222-4333-8444-555555555555</entry>
    </system>
  </sysinfo>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
    <smbios mode='sysinfo'/>
  </os>
  <features>
    <acpi/>
    <apic/>
    <tcg>
      <tb-cache unit='KiB'>262144</tb-cache>
    </tcg>
  </features>
  <cpu mode='custom' match='exact' check='none'>
    <model fallback='forbid'>Westmere</model>
    <topology sockets='8' dies='1' cores='1' threads='1'/>
    <numa>
      <cell id='0' cpus='0-7' memory='524288' unit='KiB'/>
    </numa>
  </cpu>
  <clock offset='utc'>
    <timer name='hpet' present='no'/>
  </clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='unsafe' queues='1'/>
      <source file='/run/root.qcow2'/>
      <backingStore type='network'>
        <format type='raw'/>
        <source protocol='nbd'>
          <host transport='unix' socket='/run/nbd.sock'/>
        </source>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00'/>
    </disk>
    <controller type='pci' index='1' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='1' port='0x10'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02'/>
    </controller>
    <controller type='sata' index='0'/>
    <serial type='file'>
      <source path='/run/console.log'/>
      <target type='isa-serial' port='0'>
        <model name='isa-serial'/>
      </target>
    </serial>
    <console type='file'>
      <source path='/run/console.log'/>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <source mode='bind' path='/run/port.sock'/>
      <target type='virtio' name='org.openstack.fastboot.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='2'/>
    </channel>
    <input type='mouse' bus='ps2'/>
    <audio id='1' type='none'/>
    <video>
      <model type='virtio' heads='1' primary='yes'/>
    </video>
    <watchdog model='itco' action='reset'/>
    <memballoon model='virtio' autodeflate='on' freePageReporting='on'/>
    <rng model='virtio'>
      <backend model='random'>/dev/urandom</backend>
    </rng>
  </devices>
</domain>
"""


@pytest.mark.parametrize('xml', [LIBVIRT, saved_xml()])
def test_what_the_bakery_saves(xml):
    assert saved.parse(xml).findtext('uuid') == str(BAKED)


def test_another_place_of_the_same_emulator():
    saved.parse(LIBVIRT.replace('/usr/bin/qemu-system-x86_64',
                                '/usr/libexec/qemu-kvm'))


@pytest.mark.parametrize('old, new', [
    ('<input type', "<disk type='file' device='disk'><source file='/x'/>"
                    "<target dev='vdx'/></disk><input type"),
    ('<input type', "<disk type='block' device='lun'><source "
                    "dev='/dev/sda'/><target dev='vda'/></disk><input type"),
    ("device='disk'", "device='disk' rawio='yes'"),
    ("<target dev='vda'", "<mirror file='/x'/><target dev='vda'"),
    ('<input type', "<hostdev mode='subsystem' type='pci'><source><address "
                    "domain='0' bus='1' slot='0' function='0'/></source>"
                    "</hostdev><input type"),
    ('<input type', "<filesystem type='mount'><source dir='/'/><target "
                    "dir='x'/></filesystem><input type"),
    ('<input type', "<interface type='bridge'><source bridge='br-ex'/>"
                    "</interface><input type"),
    ("<domain type='qemu'", "<domain type='qemu/x'"),
    ("<input type='mouse' bus='ps2'/>",
     "<input type='evdev'><source dev='/dev/input/event1'/></input>"),
    ("<audio id='1' type='none'/>",
     "<audio id='1' type='file' path='/x'/>"),
    ("<audio id='1' type='none'/>",
     "<audio id='1' type='pulseaudio' serverName='a'/>"),
    ("<model type='virtio' heads='1' primary='yes'/>",
     "<model type='virtio'/><driver name='vhostuser'/>"
     "<acceleration rendernode='/dev/dri/renderD128'/>"),
    ("<backend model='random'>/dev/urandom<",
     "<backend model='random'>/dev/sda<"),
    ("<backend model='random'>/dev/urandom<",
     "<backend model='egd' type='tcp'><source host='a' service='1'/><"),
    ("<channel type='unix'>", "<channel type='dbus'>"),
    ("<channel type='unix'>", "<channel type='unix'><log file='/x'/>"),
    ('/usr/bin/qemu-system-x86_64', '/bin/sh'),
    ('/usr/bin/qemu-system-x86_64', '/run/../x/../qemu-system-x86_64'),
    ('/usr/bin/qemu-system-x86_64', 'qemu-system-x86_64'),
    ("<boot dev='hd'/>", '<kernel>vmlinuz</kernel>'),
    ("<boot dev='hd'/>", "<loader type='pflash'>/x</loader>"),
    ('<features>', '<memoryBacking><hugepages/></memoryBacking><features>'),
    ('<features>', "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas"
                   "/domain/qemu/1.0'><qemu:arg value='-s'/>"
                   "</qemu:commandline><features>"),
    ('<devices>', "<devices><serial type='null'/></devices><devices>"),
    ("<sysinfo type='smbios'>",
     "<sysinfo type='fwcfg'><entry name='a' file='/etc/shadow'/>"),
])
def test_what_it_does_not(old, new):
    assert old in LIBVIRT
    with pytest.raises(exception.Corrupt):
        saved.parse(LIBVIRT.replace(old, new, 1))


def test_what_is_replaced_may_be_anything():
    saved.parse(LIBVIRT.replace('/run/', '/etc/').replace(
        '<genid>', "<seclabel type='none'/><seclabel type='none'/><genid>"))


EVIL = saved_xml().replace('<devices>', (
    "<devices><hostdev mode='subsystem' type='usb'/>"))


def test_a_host_refuses_it():
    tree = document.parse(saved_xml())
    one = clone.Instance('', tree, 'a', BAKED, template.root_disk(tree), [],
                         [], 1, 0)
    assert clone.live(saved_xml(), one)
    with pytest.raises(exception.Corrupt, match='hostdev'):
        clone.live(EVIL, one)


def test_a_builder_refuses_it(tmp_path):
    one = bakery._Bakery(
        tmp_path / 'raw', 1 << 30, tmp_path, options(),
        (tmp_path / 'raw', 'raw'), lambda phase: None, threading.Event())
    one._uuid = BAKED
    one._key(savefile.SaveFile(saved_xml(), COOKIE, 65536))
    with pytest.raises(exception.Corrupt, match='hostdev'):
        one._key(savefile.SaveFile(EVIL, COOKIE, 65536))
