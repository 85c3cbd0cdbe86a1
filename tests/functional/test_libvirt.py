# SPDX-License-Identifier: Apache-2.0
"""libvirt on our chains: the explicit one boots, any other fails loudly.

libvirt's embedded driver: the real QEMU driver in virsh's own process, with
a root directory of its own and no daemon.
"""

import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from xml.etree import ElementTree

import bootsector
import numpy as np
import pytest

from fastboot_common import (
    chain,
    extents,
    manifest,
    publish,
    repository,
    volume,
)
from fastboot_common.store.local import LocalStore
from fastboot_nova import host, node

SIZE = 32 << 20
TEXT = b'read it all\r\n'
#: Reads 4 KiB of each of 100 blocks that are in no boot set.
BOOT = bootsector.sector(TEXT, count=100, first=4096, step=256)

pytestmark = pytest.mark.skipif(
    shutil.which('virsh') is None, reason='libvirt-clients is not installed')


class Libvirt:
    """One embedded libvirt and the files of its guests."""

    def __init__(self, room: pathlib.Path) -> None:
        self.room = room
        (room / 'root' / 'etc').mkdir(parents=True)
        (room / 'root' / 'etc' / 'qemu.conf').write_text(
            'stdio_handler = "file"\ncgroup_controllers = []\n'
            'security_driver = "none"\nuser = "root"\ngroup = "root"\n')

    def virsh(self, *commands: str) -> subprocess.CompletedProcess[str]:
        """Run commands in one virsh: guests live as long as it does."""
        return subprocess.run(
            ['virsh', '-c', f'qemu:///embed?root={self.room}/root',
             '; '.join(commands)],
            capture_output=True, text=True, timeout=120)

    def run_until(self, text: bytes, *commands: str) -> str:
        """The same, and end the guest when it has printed `text`.

        :returns: what virsh said.
        """
        with subprocess.Popen(
                ['virsh', '-c', f'qemu:///embed?root={self.room}/root'],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdin
            process.stdin.write('\n'.join(commands) + '\n')
            process.stdin.flush()
            for _ in range(600):
                if text in self.console():
                    break
                time.sleep(0.1)
            said, _ = process.communicate('destroy guest\nquit\n', 60)
        return said

    def domain(self, disk: pathlib.Path,
               backing: ElementTree.Element | None) -> pathlib.Path:
        """A domain on `disk`, with this chain or none."""
        store = '' if backing is None else ElementTree.tostring(
            backing, encoding='unicode')
        path = self.room / 'domain.xml'
        path.write_text(f'''
            <domain type='qemu'><name>guest</name>
            <memory unit='MiB'>64</memory><vcpu>1</vcpu>
            <os><type arch='x86_64' machine='pc'>hvm</type></os>
            <devices>
            <disk type='file' device='disk'>
            <driver name='qemu' type='qcow2'/><source file='{disk}'/>{store}
            <target dev='vda' bus='virtio'/></disk>
            <controller type='usb' model='none'/><memballoon model='none'/>
            <serial type='file'><source path='{self.room}/serial'/></serial>
            </devices></domain>''')
        return path

    def console(self) -> bytes:
        """What the guest printed."""
        path = self.room / 'serial'
        return path.read_bytes() if path.exists() else b''


@pytest.fixture
def served(tmp_path: pathlib.Path) -> Iterator[host.Host]:
    """A host with the image ``image``: block 0 is its boot set."""
    raw = tmp_path / 'raw'
    random = np.random.default_rng(1)
    raw.write_bytes(BOOT + random.bytes(SIZE - len(BOOT)))
    (tmp_path / 'repository').mkdir()
    store = LocalStore(tmp_path / 'repository')
    repository.init(store, 16384)
    publish.Publisher(repository.Repository(store), tmp_path).publish(
        raw, manifest.Manifest(
            'image', 'image', SIZE, 16384, '', [],
            np.empty(0, extents.DTYPE), boot=np.array([0])))
    with host.Host(tmp_path / 'host', store,
                   socket=tmp_path / 'nbd.sock') as found:
        found.sync()
        with node.Node(found, tmp_path, socket=tmp_path / 'nbd.sock',
                       wait=5, shield_wait=2):
            yield found


@pytest.fixture
def disk(tmp_path: pathlib.Path, served: host.Host) -> pathlib.Path:
    """A guest's overlay on a stub of the lazy form."""
    link = served.acquire('image', 'guest')
    chain.make_stub(tmp_path / 'stub', link)
    chain.make_disk(tmp_path / 'disk', tmp_path / 'stub', SIZE)
    return tmp_path / 'disk'


@pytest.fixture
def libvirt(tmp_path: pathlib.Path) -> Libvirt:
    """An embedded libvirt."""
    return Libvirt(tmp_path)


def _explicit(served: host.Host, disk: pathlib.Path) -> ElementTree.Element:
    return chain.backing_store(disk.with_name('stub'), served.link('image'),
                               disk.with_name('nbd.sock'))


def test_explicit_chain_boots(served: host.Host, disk: pathlib.Path,
                              libvirt: Libvirt) -> None:
    xml = libvirt.domain(disk, _explicit(served, disk))
    owner = served.link('image').volume.stat().st_uid
    said = libvirt.run_until(TEXT, f'define {xml}', 'start guest',
                             'dumpxml guest')
    assert "<slice type='storage'" in said
    # The guest read 100 blocks through NBD, and said so.
    assert TEXT in libvirt.console(), said
    assert served.link('image').volume.stat().st_uid == owner
    assert served.status()[0].progress > 0.05


def test_without_chain_fails(served: host.Host, disk: pathlib.Path,
                             libvirt: Libvirt) -> None:
    xml = libvirt.domain(disk, None)
    done = libvirt.virsh(f'define {xml}', 'start guest')
    assert volume.POISON in done.stderr
    assert not libvirt.console()


def test_open_end_at_the_stub_fails(served: host.Host, disk: pathlib.Path,
                                    libvirt: Libvirt) -> None:
    backing = _explicit(served, disk)
    inner = backing.find('backingStore')
    assert inner is not None
    backing.remove(inner)
    done = libvirt.virsh(f'define {libvirt.domain(disk, backing)}',
                         'start guest')
    assert volume.POISON in done.stderr
    assert not libvirt.console()


def test_complete_chain_needs_the_name(tmp_path: pathlib.Path,
                                       served: host.Host,
                                       disk: pathlib.Path,
                                       libvirt: Libvirt) -> None:
    assert served.hydrate('image')
    link = served.link('image')
    assert link.complete
    backing = _explicit(served, disk)
    served.release('image', 'guest')
    served.evict(['image'])
    done = libvirt.virsh(f'define {libvirt.domain(disk, backing)}',
                         'start guest')
    assert 'complete/image' in done.stderr
    assert not libvirt.console()


def test_complete_chain_boots_without_export(tmp_path: pathlib.Path,
                                             libvirt: Libvirt,
                                             served: host.Host,
                                             disk: pathlib.Path) -> None:
    assert served.hydrate('image')
    chain.make_stub(tmp_path / 'stub', served.link('image'))
    backing = _explicit(served, disk)
    assert 'nbd' not in ElementTree.tostring(backing, encoding='unicode')
    (tmp_path / 'nbd.sock').rename(tmp_path / 'gone')
    said = libvirt.run_until(
        TEXT, f'define {libvirt.domain(disk, backing)}', 'start guest')
    assert TEXT in libvirt.console(), said
    (tmp_path / 'gone').rename(tmp_path / 'nbd.sock')
