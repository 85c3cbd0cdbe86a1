# SPDX-License-Identifier: Apache-2.0
"""A guest that paused because the export was away runs on.

Real QEMU under libvirt's embedded driver.
"""

import os
import shutil
import time
from xml.etree import ElementTree

import bootsector
import embedded
import numpy as np
import pytest

from fastboot_common import chain
from fastboot_nova import hold, host, node
from fastboot_nova.agent import resume

libvirt = pytest.importorskip('libvirt')

pytestmark = [
    pytest.mark.skipif(shutil.which('qemu-system-x86_64') is None,
                       reason='QEMU is not installed'),
    pytest.mark.skipif(os.geteuid() != 0, reason='libvirt needs root'),
]

SIZE = 32 << 20
TEXT = b'read it all\r\n'


def boot(write):
    """Reads or writes 4 KiB of each of 100 blocks that are in no boot set."""
    return bootsector.sector(TEXT, count=100, first=4096, step=256,
                             write=write)


def domain(room, backing):
    store = ElementTree.tostring(backing, encoding='unicode')
    return f'''
        <domain type='qemu'><name>guest</name>
        <memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='pc'>hvm</type></os>
        <devices>
        <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2' error_policy='stop'
         rerror_policy='stop'/>
        <source file='{room}/disk'/>{store}
        <target dev='vda' bus='virtio'/></disk>
        <controller type='usb' model='none'/><memballoon model='none'/>
        <serial type='file'><source path='{room}/serial'/></serial>
        </devices></domain>'''


def publish(room, write):
    from fastboot_common import extents, manifest, publish, repository
    from fastboot_common.store.local import LocalStore

    raw = room / 'raw'
    sector = boot(write)
    raw.write_bytes(sector + np.random.default_rng(1).bytes(
        SIZE - len(sector)))
    (room / 'repository').mkdir()
    store = LocalStore(room / 'repository')
    repository.init(store, 16384)
    publish.Publisher(repository.Repository(store), room).publish(
        raw, manifest.Manifest(
            'image', 'image', SIZE, 16384, '', [],
            np.empty(0, extents.DTYPE), boot=np.array([0])))
    return store


def run(room, write):
    uri, connection = embedded.opened(room)
    store = publish(room, write)
    socket = room / 'nbd.sock'
    reachable, resumed = [False], []
    with host.Host(room / 'host', store, socket=socket) as served:
        served.sync()
        link = served.acquire('image', 'guest')
        chain.make_stub(room / 'stub', link)
        chain.make_disk(room / 'disk', room / 'stub', SIZE)

        def export():
            return node.Node(served, room, socket=socket, wait=5,
                             shield_wait=2)

        looker = resume.Resumer(
            uri, [served.path / 'volumes'], lambda: reachable[0],
            lambda: resumed.append(1))
        stranger = resume.Resumer(
            uri, [room / 'elsewhere'], lambda: True,
            lambda: resumed.append(2))
        with export():
            guest = connection.defineXML(domain(
                room, chain.backing_store(room / 'stub', link, socket)))
            guest.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        try:
            guest.resume()
            embedded.wait_for(lambda: guest.state() == [
                libvirt.VIR_DOMAIN_PAUSED,
                libvirt.VIR_DOMAIN_PAUSED_IOERROR])
            # Not without the export, and not a guest of others.
            looker._step()
            stranger.look()
            assert guest.state()[0] == libvirt.VIR_DOMAIN_PAUSED
            assert not resumed
            # Its owner wants it to stand still: libvirt does nothing then.
            hold.mark(guest)
            guest.suspend()
            assert guest.state() == hold.WAITING
            looker.look()
            assert not looker._failures
            hold.unmark(guest)
            # In vain: it pauses again, and is left alone for a while.
            looker.look()
            assert not resumed
            with export():
                reachable[0] = True
                looker.start()
                embedded.wait_for(
                    lambda: TEXT in (room / 'serial').read_bytes())
                assert resumed == [1]
                # One that an operator paused stays paused.
                guest.suspend()
                time.sleep(0.5)
                looker.look()
                assert guest.state()[0] == libvirt.VIR_DOMAIN_PAUSED
                assert resumed == [1]
                looker.worker.stop()
                assert looker.worker.join(time.monotonic() + 20)
        finally:
            guest.destroy()


@pytest.mark.parametrize('write', [False, True], ids=['reads', 'writes'])
def test_a_paused_guest_runs_on(write):
    embedded.run(run, write)
