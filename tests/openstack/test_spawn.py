# SPDX-License-Identifier: Apache-2.0
"""What a new server does with a µVM: resumed, or booted from a fresh disk.

Nova's own disks on real volumes; lanes and resumes are stood in for. Needs
nova and libvirt's module, but no cloud.
"""

import pathlib
import types

import pytest
from test_backend import (  # noqa: F401
    CONF,
    flavor,
    image_of,
    instance,
    notices,
    place,
    stub,
)
from test_backend import spawn as make_disk

libvirt = pytest.importorskip('libvirt')

import microvms  # noqa: E402
from nova import objects  # noqa: E402
from nova.objects import image_meta  # noqa: E402

from fastboot_common import chain, exception, overlay  # noqa: E402
from fastboot_common.microvm import clone, document  # noqa: E402
from fastboot_nova import spawn  # noqa: E402
from fastboot_nova.microvm import remote, resume  # noqa: E402

SIZE = 2 << 20


class Lane:
    """One that is given back."""

    directory = pathlib.Path('artifact')

    def __init__(self):
        self.returns = []

    def give_back(self, *words, **more):
        self.returns.append((*words, *more))


@pytest.fixture
def world(place, monkeypatch):  # noqa: F811
    """A new server with its disk; a lane; what a bake would write."""
    server = instance(hostname='web')
    image = image_of(place, server)
    make_disk(place, image, size=SIZE)
    lane = Lane()
    found = types.SimpleNamespace(
        server=server, path=pathlib.Path(image.path), lane=lane, prepared=[],
        xml=f"<domain><devices><disk type='file'><source file='{image.path}'"
            f"/><target dev='vda'/></disk></devices></domain>",
        linked=[])

    def bake(directory, path, size, backing):
        assert (directory, size, backing) == (
            lane.directory, SIZE, (stub(place), 'qcow2'))
        chain.make_disk(path, stub(place), size)
        with path.open('ab') as file:
            file.write(b'baked')
        path.chmod(0o640)  # as artifacts have it

    def succeed(connection, lane, spec, prepare):
        assert (spec.hostname, spec.disk_size, spec.linked) == (
            'web', SIZE, False)
        prepare()
        assert found.path.read_bytes().endswith(b'baked')
        return types.SimpleNamespace(domain='domain', seconds={'load': 1.0},
                                     link=lambda: found.linked.append(1))

    found.resume = succeed
    monkeypatch.setattr(spawn.remote, 'take', lambda *words: lane)
    monkeypatch.setattr(spawn.baked, 'make', bake)
    monkeypatch.setattr(spawn.resume, 'resume',
                        lambda *words, **more: found.resume(*words, **more))
    found.attempt = lambda: spawn.attempt(
        types.SimpleNamespace(get_connection=lambda: 'connection'),
        found.xml, server, lambda: found.prepared.append(1))
    yield found
    for name in ('resume', 'resume_wait'):
        CONF.clear_override(name, 'fastboot')


def test_resumed(world, notices):  # noqa: F811
    world.path.chmod(0o644)
    guest = world.attempt()
    assert guest._domain == 'domain'
    assert world.prepared == [1]
    assert world.path.stat().st_mode & 0o777 == 0o644
    assert not world.linked
    guest.resume()
    assert world.linked == [1]
    assert world.lane.returns == [('resumed', 'seconds')]
    assert [event for event, *_ in notices] == ['hit', 'resumed']
    assert {path.name for path in world.path.parent.iterdir()} == {
        'disk', 'disk.info'}


class Ending:
    """The domain of a guest that ends.

    :param runs: what libvirt says of it, one after the other.
    :param started: the agent is quicker.
    """

    def __init__(self, *runs, started=False):
        self.runs = list(runs)
        self.started = started
        self.created = 0

    def isActive(self):
        return self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]

    def create(self):
        if self.started:
            self.runs = [True]
            raise libvirt.libvirtError('already running')
        self.created += 1


def raise_links(world, domain):
    def link():
        raise libvirt.libvirtError('not running')

    spawn.Guest(types.SimpleNamespace(domain=domain, link=link),
                world.server).resume()


@pytest.mark.parametrize('domain', [
    Ending(False), Ending(True, True, False), Ending(False, started=True)])
def test_a_guest_that_ended_before_its_links(world, monkeypatch, domain):
    """Nova waits without end for one that does not run."""
    left = []
    monkeypatch.setattr(spawn, 'leave', left.append)
    raise_links(world, domain)
    assert domain.created == (not domain.started)
    # Nobody else is to start it once more.
    assert left == [world.server]


def test_a_guest_whose_links_cannot_be_raised(world, monkeypatch):
    monkeypatch.setattr(spawn, '_ENDING_SECONDS', .1)
    domain = Ending(True)
    with pytest.raises(libvirt.libvirtError):
        raise_links(world, domain)
    assert not domain.created


def is_fresh(world):
    return overlay.is_empty(world.path) and not \
        world.path.read_bytes().endswith(b'baked') and \
        overlay.read_backing(world.path)[1] == SIZE


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_failure_leaves_a_fresh_disk(world, notices, when):  # noqa: F811
    def fail(connection, lane, spec, prepare):
        if when == 'after':
            prepare()
        world.path.unlink()  # as its cleaning does
        raise resume.ResumeFailed('load', 'refused')

    world.resume = fail
    assert world.attempt() is None
    assert is_fresh(world)
    assert world.lane.returns == [('failed', 'load', 'refused')]
    assert notices[-1][0] == 'fallback'


@pytest.mark.parametrize('error', [
    clone.Unsuitable('huge pages'), exception.Corrupt('no XML')])
def test_refused_before_anything(world, error):
    def refuse(connection, lane, spec, prepare):
        raise error

    before = world.path.stat().st_ino
    world.resume = refuse
    assert world.attempt() is None
    assert world.path.stat().st_ino == before
    assert world.lane.returns == [('refused', 'begin', str(error))]


def test_what_nova_raises_stays_novas(world):
    """A config drive that cannot be made fails any server."""
    def fail(connection, lane, spec, prepare):
        raise KeyError('metadata')

    world.resume = fail
    with pytest.raises(KeyError):
        world.attempt()
    assert world.lane.returns[0][0] == remote.FAILED


def test_a_disk_that_was_written_to(world):
    with world.path.open('r+b') as file:
        head = file.read(48)
        file.seek(int.from_bytes(head[40:48], 'big'))
        file.write(b'\x80')
    assert world.attempt() is None
    assert not world.lane.returns


def test_no_lane(world, monkeypatch):
    """None at all: at once. One that is in use: after a while."""
    calls = []

    def take(agent, image_id, holder):
        calls.append((image_id, holder))
        raise errors[-1]

    monkeypatch.setattr(spawn.remote, 'take', take)
    CONF.set_override('resume_wait', .2, 'fastboot')
    errors = [exception.NotFound('none')]
    assert world.attempt() is None
    assert calls == [('image', world.server.uuid)]
    errors = [exception.Busy('in use')]
    assert world.attempt() is None
    assert len(calls) > 2


@pytest.mark.parametrize('specs', [
    {'fastboot:microvm': 'no'}, {'trait:HW_CPU_X86_AVX2': 'required'},
    {'trait1:HW_CPU_X86_AVX2': 'required'},
    {'trait_CPU:HW_CPU_X86_AVX2': 'required'}])
def test_flavors(world, specs):
    world.server.flavor = flavor()
    world.server.flavor.extra_specs.update(specs)
    assert world.attempt() is None
    assert not world.lane.returns


@pytest.mark.parametrize('trait, lanes', [
    ('HW_CPU_X86_AVX2', 0), ('STORAGE_DISK_SSD', 1)])
def test_images(world, trait, lanes):
    world.server.image_meta = image_meta.ImageMeta.from_dict(
        {'properties': {f'trait:{trait}': 'required'}})
    world.attempt()
    assert len(world.lane.returns) == lanes


def test_switched_off(world):
    CONF.set_override('resume', False, 'fastboot')
    assert world.attempt() is None
    assert not world.lane.returns


def test_another_bus_is_no_news(world, caplog):
    """A server that never had a µVM is not one that was not resumed."""
    caplog.set_level('INFO')
    world.xml = world.xml.replace('vda', 'sda')
    assert world.attempt() is None
    assert 'not resumed' not in caplog.text
    assert not world.lane.returns


def test_disks_that_are_novas_own(world, tmp_path):
    other = tmp_path / 'disk'
    other.write_bytes(bytes(1 << 16))
    world.xml = world.xml.replace(str(world.path), str(other))
    assert world.attempt() is None
    world.xml = microvms.saved_xml()
    assert world.attempt() is None
    assert not world.lane.returns


def test_devices_with_tags(world, notices):  # noqa: F811
    """Their metadata name places of the machine that is defined."""
    def prepare(connection, lane, spec, prepare):
        before = world.path.read_bytes()
        try:
            prepare()
        except exception.FastbootError as error:
            assert world.path.read_bytes() == before
            world.path.unlink()
            raise resume.ResumeFailed('define', str(error)) from error

    world.resume = prepare
    world.server.device_metadata = objects.InstanceDeviceMetadata(
        devices=[objects.DiskMetadata(tags=['data'])])
    assert world.attempt() is None
    assert is_fresh(world)
    # The lane is as it was, and the µVM nothing to blame for.
    (outcome, phase, reason), = world.lane.returns
    assert (outcome, phase) == ('refused', 'define') and 'tags' in reason
    assert [event for event, *_ in notices] == ['hit']


VOLUME = """<disk type='{kind}' device='disk'>
  <driver name='qemu' type='{format}'/><source {source}>{inside}</source>
  <target dev='vdb' bus='virtio'/><serial>volume</serial>
  <address type='pci' bus='{bus}'/></disk>"""


def test_a_volume_of_a_resumed_server_that_was_swapped():
    defined = VOLUME.format(kind='file', format='qcow2', bus='0x00',
                            source="file='/old'", inside='')
    live = VOLUME.format(
        kind='network', format='raw', bus='0x05',
        source="protocol='rbd' name='new' index='3'",
        inside="<host name='ceph'/>")
    found = document.parse(spawn.with_disk(
        f'<domain><memory>1024</memory><devices><disk><target dev="vda"/>'
        f'</disk>{defined}</devices></domain>',
        f'<domain><memory>512</memory><devices>{live}</devices></domain>',
        'vdb'))
    assert found.findtext('memory') == '1024'
    _, disk = found.findall('devices/disk')
    assert disk.get('type') == 'network' and disk.get('device') == 'disk'
    assert disk.find('driver').get('type') == 'raw'
    assert disk.find('source').attrib == {'protocol': 'rbd', 'name': 'new'}
    assert disk.find('source/host').get('name') == 'ceph'
    assert disk.find('address').get('bus') == '0x00'
    assert [child.tag for child in disk].count('serial') == 1
    with pytest.raises(exception.Corrupt):
        spawn.with_disk('<domain/>', '<domain/>', 'vdb')
