# SPDX-License-Identifier: Apache-2.0
"""The image backend inside Nova's own code, with real volumes and qemu-img.

Needs nova, but no cloud.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socketserver
import struct
import subprocess
import sys
import threading
import time
import types
import uuid

import pytest

# Its tests would patch everything for eventlet else.
os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')
pytest.importorskip('nova.virt.libvirt.imagebackend')
sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / 'functional'),
                str(pathlib.Path(__file__).parents[1] / 'unit')]

import embedded  # noqa: E402
import nova.privsep  # noqa: E402
from images import World, fast_directory  # noqa: E402
from lxml import etree  # noqa: E402
from nova import exception as nova_exception  # noqa: E402
from nova.compute import task_states  # noqa: E402
from nova.virt.libvirt import imagebackend, imagecache  # noqa: E402
from oslo_concurrency import lockutils  # noqa: E402

from fastboot_common import exception, overlay  # noqa: E402
from fastboot_nova import backend, notice  # noqa: E402

CONF = backend.CONF
# No sudo, no helper: what Nova does as root, this process does.
nova.privsep.sys_admin_pctxt.set_client_mode(False)
GIB = 1 << 30


class Agent(socketserver.ThreadingUnixStreamServer):
    """The agent's part of the contract over a real host, or its failures."""

    daemon_threads = True

    def __init__(self, path, host, export):
        self.host = host
        self.export = export
        self.fails = None
        self.status = {}
        self.calls = []
        super().__init__(str(path), Handler)
        threading.Thread(target=self.serve_forever, args=(.05,),
                         daemon=True).start()

    def prepare(self, body):
        threading.Thread(target=self.host.hydrate,
                         args=(body['image'],)).start()

    def acquire(self, body):
        image = body['image']
        link = self.host.acquire(image, 'nova')
        return {'image': image, 'volume': str(link.volume),
                'size': link.size, 'start': link.start,
                'virtual_size': link.virtual_size, 'loop': None,
                'complete': str(link.complete) if link.complete else None,
                'socket': str(self.export), 'thawed': 0, 'seconds': 0}


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        method, path, _ = self.rfile.readline().decode().split()
        length = 0
        while line := self.rfile.readline().strip():
            if line.lower().startswith(b'content-length:'):
                length = int(line.split(b':')[1])
        body = json.loads(self.rfile.read(length) or 'null')
        agent = self.server
        agent.calls.append((path, body))
        if agent.fails == 'hang':
            time.sleep(5)
            return
        status, answer = 200, {}
        if agent.fails:
            status, answer = agent.fails
        elif path == '/v1/images':
            answer = {'images': [{'id': one}
                                 for one in agent.host.mirror.state.images]}
        elif path == '/v1/status':
            answer = agent.status
        elif path == '/v1/prepare':
            agent.prepare(body)
        elif path == '/v1/differences':
            answer = {'extents': agent.host.differences(
                body['image'], body.get('other') or pathlib.Path(
                    body['file']))}
        else:
            try:
                answer = agent.acquire(body)
            except exception.NotFound as error:
                status, answer = 404, {'error': str(error)}
        data = json.dumps(answer).encode()
        self.wfile.write(b'HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%b'
                         % (status, len(data), data))


@pytest.fixture
def notices(monkeypatch):
    found = []
    monkeypatch.setattr(
        notice, 'emit', lambda event, image, instance, **more:
        found.append((event, image, more.get('reason', ''))))
    return found


@pytest.fixture
def place(notices):
    """A world with image ``image`` on a host, its agent, and Nova on it."""
    with fast_directory() as path, contextlib.ExitStack() as stack:
        world = World(path, block_size=16384)
        world.publish('image', os.urandom(1 << 20), boot=range(8))
        host = stack.enter_context(world.host())
        host.sync()
        stack.enter_context(world.export())
        agent = Agent(path / 'agent', host, world.socket)
        stack.callback(agent.server_close)
        stack.callback(agent.shutdown)
        instances = path / 'instances'
        (instances / 'one').mkdir(parents=True)
        CONF([], project='nova', default_config_files=[])
        for name, value, group in (
                ('instances_path', str(instances), None),
                ('images_type', 'qcow2', 'libvirt'),
                ('agent_socket', str(path / 'agent'), 'fastboot'),
                ('export_socket', str(world.socket), 'fastboot'),
                ('timeout', 1.0, 'fastboot'),
                ('patience', 1.0, 'fastboot')):
            CONF.set_override(name, value, group)
        lockutils.set_defaults(str(path / 'locks'))
        backend._waits.answered()
        yield types.SimpleNamespace(
            world=world, host=host, agent=agent, instances=instances,
            base=instances / '_base', raw=world.data['image'],
            export=world.socket)
        CONF.reset()
        CONF.clear_override('instances_path')


def instance(**more):
    return types.SimpleNamespace(**{
        'uuid': str(uuid.uuid4()), 'kernel_id': '', 'ramdisk_id': '',
        'flavor': flavor(), 'system_metadata': {}, 'task_state': None,
        'device_metadata': None,
        'image_meta': types.SimpleNamespace(properties={}),
        **more})


def flavor(**specs):
    return types.SimpleNamespace(extra_specs={
        f'fastboot:{name}': value for name, value in specs.items()})


def image_of(place, server=None, kind=backend.FastbootQcow2, name='disk'):
    server = server or instance()
    directory = place.instances / server.uuid
    directory.mkdir(exist_ok=True)
    mapping = {'bus': 'virtio', 'dev': 'vda', 'type': 'disk'}
    return kind(server, name, disk_info_mapping=mapping)


def fetch(place, fetched):
    """Nova's download: the image, raw, in the place of the base."""
    def fetch_image(target, **_):
        fetched.append(target)
        pathlib.Path(target).write_bytes(place.raw)
    return fetch_image


def spawn(place, image, image_id='image', size=2 << 20, **kwargs):
    """What Nova's driver does for a disk; returns what was downloaded."""
    fetched = []
    image.cache(fetch_func=fetch(place, fetched), context=None,
                filename=imagecache.get_cache_fname(image_id),
                image_id=image_id, size=size,
                trusted_certs=kwargs.pop('trusted_certs', None), **kwargs)
    return fetched


def content(path):
    """What QEMU reads of a disk."""
    done = subprocess.run(
        ['qemu-img', 'dd', '-U', '-f', 'qcow2', '-O', 'raw', f'if={path}',
         f'of={path}.raw', 'bs=1M'], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return pathlib.Path(f'{path}.raw').read_bytes()


def stub(place):
    return place.base / (overlay.base_name('image') + '_sm')


def test_hit(place, notices):
    image = image_of(place)
    assert spawn(place, image) == []
    assert content(image.path)[:1 << 20] == place.raw
    assert overlay.read_backing(pathlib.Path(image.path)) == (
        str(stub(place)), 2 << 20)
    assert not (place.base / overlay.base_name('image')).exists()
    assert [event for event, *_ in notices] == ['hit']
    # A second server uses the same stub.
    before = stub(place).stat().st_ino
    other = image_of(place)
    assert spawn(place, other) == []
    assert stub(place).stat().st_ino == before
    assert content(other.path)[:1 << 20] == place.raw


def test_same_as_stock(place):
    ours, stock = image_of(place), image_of(place, kind=imagebackend.Qcow2)
    spawn(place, ours)
    assert len(spawn(place, stock)) == 1
    done = subprocess.run(['qemu-img', 'compare', '-U', ours.path,
                           stock.path], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout


def switch_off(place):
    CONF.set_override('enabled', False, 'fastboot')


def kill_agent(place):
    place.agent.shutdown()
    place.agent.server_close()


def hang(place):
    place.agent.fails = 'hang'


def no_space(place):
    place.agent.fails = (503, {'error': 'no space'})


def garbage(place):
    place.agent.fails = (200, {'image': 7})


def no_export(place):
    CONF.set_override('export_socket', '/nonexistent', 'fastboot')
    place.agent.export = '/nonexistent'


def signatures(place):
    CONF.set_override('verify_glance_signatures', True, 'glance')


@pytest.mark.parametrize(('spoil', 'words'), [
    (switch_off, 'enabled is off'), (kill_agent, 'does not answer'),
    (hang, 'timed out'), (no_space, 'no space'), (garbage, 'nonsense'),
    (no_export, 'export does not answer'),
    (signatures, 'verify_glance_signatures')])
def test_every_reason_falls_back(place, notices, spoil, words):
    spoil(place)
    image = image_of(place)
    assert len(spawn(place, image)) == 1
    assert content(image.path)[:1 << 20] == place.raw
    assert overlay.read_backing(pathlib.Path(image.path))[0] == str(
        place.base / overlay.base_name('image'))
    (event, _, reason), = notices
    assert event == 'miss'
    assert words in reason


BUSY = (503, {'error': 'Busy: still being thawed'})


def test_a_thaw_is_waited_for_where_stock_would_download(place, notices):
    place.agent.fails = BUSY

    def done():
        time.sleep(.5)
        place.agent.fails = None

    threading.Thread(target=done).start()
    assert spawn(place, image_of(place)) == []
    assert [event for event, *_ in notices] == ['hit']


def test_a_thaw_is_not_waited_for_for_ever(place, notices):
    CONF.set_override('thaw_timeout', .3, 'fastboot')
    place.agent.fails = BUSY
    assert len(spawn(place, image_of(place))) == 1
    # Now there is a stock base: one question, no more.
    CONF.set_override('thaw_timeout', 1000.0, 'fastboot')
    place.agent.calls.clear()
    assert spawn(place, image_of(place)) == []
    assert len(place.agent.calls) == 1
    assert [event for event, *_ in notices] == ['miss', 'miss']


@pytest.mark.parametrize(('server', 'kwargs', 'words'), [
    ({'kernel_id': 'k'}, {}, 'kernel'),
    ({'ramdisk_id': 'r'}, {}, 'ramdisk'),
    ({}, {'trusted_certs': ['c']}, 'trusted')])
def test_unusual_servers_are_novas(place, notices, server, kwargs, words):
    image = image_of(place, instance(**server))
    assert len(spawn(place, image, **kwargs)) == 1
    assert words in notices[0][2]


def test_an_unknown_image(place, notices):
    image = image_of(place)
    assert len(spawn(place, image, 'other')) == 1
    assert notices[0][0] == 'miss'


def test_a_flavor_that_is_too_small(place):
    image = image_of(place)
    with pytest.raises(nova_exception.FlavorDiskSmallerThanImage):
        spawn(place, image, size=65536)
    assert not image.exists()


def test_size_none_is_the_images(place):
    image = image_of(place, name='disk.rescue')
    assert spawn(place, image, size=None) == []
    assert overlay.read_backing(pathlib.Path(image.path))[1] == 1 << 20


def test_other_bases_are_novas(place):
    image = image_of(place, name='disk.eph0')

    def ephemeral(target, **_):
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'raw', target,
                        '1M'], check=True, timeout=20)
    image.cache(fetch_func=ephemeral, filename='ephemeral_1_0706d66',
                size=1 << 20, safe=True)
    assert place.agent.calls == []
    assert image.exists()


def test_a_stock_disk_stays_stock(place):
    """A hard reboot of a server from before fastboot came."""
    server = instance()
    spawn(place, image_of(place, server, imagebackend.Qcow2))
    assert spawn(place, image_of(place, server)) == []
    assert not stub(place).exists()
    assert place.agent.calls == []


def backing_of(place, image, mode='writeback'):
    info = image.libvirt_info(mode, {})
    return etree.tostring(info.format_dom(), encoding='unicode')


def test_the_chain_is_explicit(place):
    image = image_of(place)
    spawn(place, image)
    xml = etree.fromstring(backing_of(place, image))
    layers = xml.findall('.//backingStore')
    assert [layer.get('type') for layer in layers] == [
        'file', 'file', 'network', None]
    slice_ = xml.find('.//slice')
    assert int(slice_.get('offset')) == 65536
    assert xml.find('.//backingStore/source/host').get('socket') == str(
        place.export)
    for policy in ('error_policy', 'rerror_policy'):
        assert xml.find('driver').get(policy) == 'stop'
    stock = image_of(place, kind=imagebackend.Qcow2)
    spawn(place, stock)
    assert 'backingStore' not in backing_of(place, stock)


def test_a_device_of_an_image_that_was_removed(place):
    image = image_of(place)
    spawn(place, image)
    place.agent.calls.clear()
    backing_of(place, image, 'none')
    [(path, body)] = place.agent.calls
    assert path == '/v1/acquire'
    assert body['removed']


def test_complete_images_need_no_export(place):
    spawn(place, image_of(place))
    place.host.hydrate('image')
    no_export(place)
    image = image_of(place)
    assert spawn(place, image) == []
    xml = backing_of(place, image)
    assert '/complete/image' in xml
    assert 'nbd' not in xml
    assert 'rerror_policy' not in xml
    # The stub was made anew: it opens without an export, too.
    place.export.unlink(missing_ok=True)
    assert content(image.path)[:1 << 20] == place.raw
    backend.check_chain(image.path)


@pytest.mark.parametrize('more', [
    {'flavor': flavor(lazy='no')},
    {'system_metadata': {'image_fastboot:lazy': 'false'}}])
def test_a_server_that_wants_its_image_whole(place, notices, more):
    spawn(place, image_of(place))
    image = image_of(place, instance(**more))
    assert spawn(place, image) == []
    assert '/complete/image' in backing_of(place, image)
    assert [event for event, *_ in notices] == ['hit', 'hit']


def test_an_image_that_is_not_whole_in_time(place, notices):
    CONF.set_override('complete_timeout', .3, 'fastboot')
    place.agent.prepare = lambda body: None
    image = image_of(place, instance(flavor=flavor(lazy='no')))
    assert len(spawn(place, image)) == 1
    assert 'fastboot:lazy' in notices[0][2]
    # The flavor's word counts more than the image's.
    image = image_of(place, instance(
        flavor=flavor(lazy='yes'),
        system_metadata={'image_fastboot:lazy': 'no'}))
    assert spawn(place, image) == []
    assert notices[1][0] == 'hit'


def test_what_leaves_the_host_is_lazy(place):
    spawn(place, image_of(place))
    place.host.hydrate('image')
    image = image_of(place)
    spawn(place, image)
    domain = f'<domain><devices>{backing_of(place, image)}</devices></domain>'
    xml = backend.portable(domain)
    assert '/complete/' not in xml
    assert 'rerror_policy="stop"' in xml
    assert etree.fromstring(xml).findall('.//source[@protocol="nbd"]')
    # Others are left as they are.
    other = '<domain><devices><disk><backingStore><source file="/x_sm"/>' \
            '</backingStore></disk></devices></domain>'
    assert '/x_sm' in backend.portable(other)


def test_what_goes_where_all_is(place):
    """It needs no export there, whatever it has here."""
    image = image_of(place)
    spawn(place, image)
    here = backing_of(place, image)
    assert 'nbd' in here and 'rerror_policy="stop"' in here
    xml = backend.portable(f'<domain><devices>{here}</devices></domain>',
                           complete=True)
    assert '/complete/image' in xml
    assert 'nbd' not in xml and 'error_policy' not in xml


def test_what_a_destination_vouches_for(place, monkeypatch):
    """All that the chain says of places, and no more."""
    from fastboot_nova import driver
    spawn(place, image_of(place))
    stubs = {'disk': stub(place)}
    state, digest = driver._word(stubs)
    assert state == 'lazy'
    place.host.hydrate('image')
    assert driver._word(stubs) == ('complete', digest)
    link = overlay.follow(stub(place))
    for change in ({'start': link.start + 65536}, {'size': link.size + 1},
                   {'virtual_size': 5 << 20}, {'image_id': 'another'},
                   {'volume': link.volume.with_name('x')}):
        monkeypatch.setattr(overlay, 'follow', lambda path, change=change:
                            dataclasses.replace(link, **change))
        assert driver._word(stubs)[1] != digest, change


def test_a_stub_that_nothing_keeps(place):
    """Another host made it, where they share them."""
    image = image_of(place)
    spawn(place, image)
    place.agent.fails = (503, {'error': 'x'})
    assert image.restore(stub(place)) == stub(place)
    place.host.release('image', 'nova')
    with pytest.raises(nova_exception.InvalidDiskInfo):
        image.restore(stub(place))


def test_a_lost_stub_is_made_again(place):
    """Start after the stub was removed; Nova passes the backing's name."""
    server = instance()
    image = image_of(place, server)
    spawn(place, image)
    stub(place).unlink()
    again = image_of(place, server)
    again.cache(fetch_func=fetch(place, []), context=None,
                filename=stub(place).name, image_id='image', size=2 << 20,
                trusted_certs=None)
    assert content(again.path)[:1 << 20] == place.raw


def test_a_migrations_destination(place):
    """No disk, no stub, and Nova asks for the stub by name."""
    image = image_of(place)
    image.cache(fetch_func=fetch(place, []), context=None,
                filename=stub(place).name, image_id='image', size=2 << 20,
                trusted_certs=None)
    assert overlay.read_backing(pathlib.Path(image.path)) == (
        str(stub(place)), 2 << 20)


def test_a_migrations_destination_where_nova_left_a_base(place):
    """Of a time with its own driver; the stub would have that name."""
    place.base.mkdir()
    stub(place).write_bytes(place.raw)
    image = image_of(place)
    image.cache(fetch_func=fetch(place, []), context=None,
                filename=stub(place).name, image_id='image', size=2 << 20,
                trusted_certs=None)
    assert overlay.read_stub(stub(place))
    assert overlay.backing_format(pathlib.Path(image.path)) == 'qcow2'
    assert content(image.path)[:1 << 20] == place.raw


def test_a_stock_servers_live_migration(place):
    """It comes with its chain: the base must be the one that it names."""
    image = image_of(place, instance(task_state=task_states.MIGRATING))
    assert spawn(place, image)
    assert overlay.read_backing(pathlib.Path(image.path))[0] == str(
        place.base / overlay.base_name('image'))
    assert content(image.path)[:1 << 20] == place.raw


def test_a_rescue_disks_stub_is_found_by_its_name(place):
    """The server's image is another than the disk's."""
    image = image_of(place)
    image.cache(fetch_func=fetch(place, []), context=None,
                filename=stub(place).name, image_id='other', size=2 << 20,
                trusted_certs=None)
    assert image.exists()


def test_a_disk_that_needs_what_is_gone(place):
    server = instance()
    spawn(place, image_of(place, server))
    stub(place).unlink()
    kill_agent(place)
    fetched = []
    with pytest.raises(nova_exception.InvalidDiskInfo, match='cannot be'):
        image_of(place, server).cache(
            fetch_func=fetch(place, fetched), context=None,
            filename=stub(place).name, image_id='image', size=2 << 20,
            trusted_certs=None)
    # Never a raw image where a stub belongs.
    assert fetched == []
    assert not stub(place).exists()
    with pytest.raises(nova_exception.InvalidDiskInfo):
        backing_of(place, image_of(place, server))


def test_an_agent_that_is_away_does_not_stop_old_servers(place):
    server = instance()
    spawn(place, image_of(place, server))
    kill_agent(place)
    assert backend.stub_of(image_of(place, server).path) == stub(place)
    image_of(place, server).restore(stub(place), 'image')
    backend.check_chain(image_of(place, server).path)


def test_look_before_you_destroy(place):
    image = image_of(place)
    spawn(place, image)
    backend.check_chain(image.path)
    no_export(place)
    with pytest.raises(nova_exception.InvalidDiskInfo, match='fastboot-age'):
        backend.check_chain(image.path)


def driver_of(**more):
    """The driver, without its host."""
    from fastboot_nova import driver
    made = object.__new__(driver.FastbootLibvirtDriver)
    made.image_backend = types.SimpleNamespace(
        by_libvirt_path=lambda instance, path: backend.FastbootQcow2(
            instance, path=path))
    made.__dict__.update(_is_local=True, **more)
    return made


def prepare(place, server):
    """What the driver does before a guest is stopped or started."""
    path = image_of(place, server).path
    driver_of()._prepare(server, {path: backend.stub_of(path)})


def test_the_export_is_waited_for(place):
    """Both come back while nova-compute starts: the agent and its export."""
    server = instance(image_ref='image')
    spawn(place, image_of(place, server))
    place.agent.fails = (503, {'error': 'the export does not answer'})
    away = place.export.rename(place.export.with_name('away'))
    CONF.set_override('patience', 20.0, 'fastboot')
    threading.Timer(1.5, away.rename, (place.export,)).start()
    prepare(place, server)
    no_export(place)
    CONF.set_override('patience', 1.0, 'fastboot')
    with pytest.raises(nova_exception.InvalidDiskInfo, match='nobody'):
        prepare(place, server)


def asks(place, monkeypatch, server):
    """How often a start asks that is in vain: the agent, and the export."""
    asked = []
    real = backend.export_answers
    with monkeypatch.context() as patch:
        patch.setattr(backend, 'export_answers', lambda *args:
                      asked.append(args) or real(*args))
        place.agent.calls.clear()
        with pytest.raises(nova_exception.InvalidDiskInfo):
            prepare(place, server)
    return len(place.agent.calls), len(asked)


def test_an_export_that_stays_away_is_waited_for_once(place, monkeypatch):
    """Nova starts one server of a host that was booted after the other."""
    one, two = (instance(image_ref='image') for _ in range(2))
    for server in one, two:
        spawn(place, image_of(place, server))
    away = place.export.with_name('away')
    for _ in range(2):
        place.export.rename(away)
        # A look is no wait.
        with pytest.raises(nova_exception.InvalidDiskInfo):
            backend.check_chain(image_of(place, one).path)
        assert asks(place, monkeypatch, one)[1] > 1
        assert asks(place, monkeypatch, two) == (1, 1)
        away.rename(place.export)
        # It answers, so it is waited for again.
        prepare(place, two)
    monkeypatch.setattr(backend, '_VAIN_SECONDS', .1)
    place.export.rename(away)
    for server in one, two:
        assert asks(place, monkeypatch, server)[1] > 1
        time.sleep(.1)


def test_an_agent_that_stays_away_is_waited_for_once(place, monkeypatch):
    one, two = (instance(image_ref='image') for _ in range(2))
    for server in one, two:
        spawn(place, image_of(place, server))
    stub(place).unlink()
    place.agent.fails = (404, {'error': 'NotHereError'})
    for _ in range(2):
        # It answers: another image may be here.
        assert asks(place, monkeypatch, one)[0] > 1
    place.agent.fails = (503, {'error': 'the export does not answer'})
    assert asks(place, monkeypatch, one)[0] > 1
    assert asks(place, monkeypatch, two) == (1, 0)


GUEST = """<domain type='qemu'><name>guest</name><uuid>{}</uuid>
<memory unit='MiB'>32</memory><os><type arch='x86_64' machine='pc'>hvm</type>
</os><devices><controller type='usb' model='none'/><memballoon model='none'/>
<graphics type='vnc' socket='/{}/vnc' passwd='secret'/>{}</devices></domain>
"""


def suspend_and_resume(room, settings, uuid, disk):
    """The export comes back elsewhere, as it may after an upgrade."""
    import libvirt
    from nova.virt.libvirt import driver as stock
    from nova.virt.libvirt import guest
    CONF([], project='nova', default_config_files=[])
    for words in settings:
        CONF.set_override(*words)
    stock.libvirt = guest.libvirt = libvirt
    domain = embedded.opened(room)[1].defineXML(GUEST.format(
        uuid, room, disk))
    domain.create()
    domain.managedSave()
    assert backend.renewed(domain.managedSaveGetXMLDesc()) is None
    made = driver_of(_host=types.SimpleNamespace(
        get_guest=lambda instance: guest.Guest(domain)))
    stock.LibvirtDriver.resume = lambda *words: domain.create()
    server = instance(uuid=uuid, image_ref='image')
    export = pathlib.Path(CONF.fastboot.export_socket)
    elsewhere = export.rename(export.with_name('elsewhere'))
    with pytest.raises(nova_exception.InstanceFaultRollback) as caught:
        made.resume(None, server)
    assert isinstance(caught.value.inner_exception,
                      nova_exception.InvalidDiskInfo)
    assert domain.hasManagedSaveImage()
    CONF.set_override('export_socket', str(elsewhere), 'fastboot')
    made.resume(None, server)
    assert not domain.hasManagedSaveImage()
    assert str(elsewhere) in domain.XMLDesc()
    # All else is as it was, secrets, too.
    assert 'secret' in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    domain.destroy()


def test_a_resume_keeps_what_is_saved(place):
    """libvirt's own driver; Nova drops the memory if a start fails."""
    pytest.importorskip('libvirt')
    server = instance()
    image = image_of(place, server)
    spawn(place, image)
    embedded.run(suspend_and_resume, [
        (name, getattr(CONF[group] if group else CONF, name), group)
        for name, group in (
            ('instances_path', None), ('agent_socket', 'fastboot'),
            ('export_socket', 'fastboot'), ('patience', 'fastboot'))],
        server.uuid, backing_of(place, image))


def test_what_is_saved_names_the_chain_as_it_is(place, monkeypatch):
    image = image_of(place)
    spawn(place, image)
    domain = '<domain><devices>{}</devices></domain>'
    lazy = domain.format(backing_of(place, image))
    assert backend.renewed(lazy) is None
    assert backend.renewed(domain.format('<disk/>')) is None
    moved = lazy.replace('offset="65536"', 'offset="131072"')
    assert 'offset="65536"' in backend.renewed(moved)
    acquire = place.agent.acquire
    monkeypatch.setattr(place.agent, 'acquire', lambda body: {
        **acquire(body), 'loop': '/dev/loop0'})
    monkeypatch.setattr(pathlib.Path, 'is_block_device', lambda path: True)
    device = domain.format(backing_of(place, image, 'none'))
    assert '/dev/loop0' in device
    assert backend.renewed(device) is None
    monkeypatch.setattr(place.agent, 'acquire', lambda body: {
        **acquire(body), 'loop': '/dev/loop7'})
    assert '/dev/loop7' in backend.renewed(device)
    # Without an agent, from the volume itself.
    monkeypatch.setattr(place.agent, 'acquire', acquire)
    assert '/dev/loop' not in backend.renewed(device)
    place.host.hydrate('image')
    whole = backend.renewed(lazy)
    assert '/complete/image' in whole
    assert 'nbd' not in whole
    assert backend.renewed(whole) is None


def test_what_a_rescued_server_is_defined_as(place, monkeypatch):
    """Nova's file has the chain of then. The rescue's own is not needed."""
    from nova.virt.libvirt import driver as stock
    server = instance(image_ref='image')
    image = image_of(place, server)
    spawn(place, image)
    kept = pathlib.Path(image.path).with_name('unrescue.xml')
    kept.write_text(
        f'<domain><devices>{backing_of(place, image)}</devices></domain>')
    image_of(place, server, name='disk.rescue')
    subprocess.run(
        ['qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b',
         place.base / f'{overlay.base_name("other")}_sm',
         kept.with_name('disk.rescue'), '1M'], check=True, timeout=20)
    place.host.hydrate('image')
    no_export(place)
    found = []
    monkeypatch.setattr(
        stock.LibvirtDriver, 'unrescue',
        lambda self, context, instance: found.append(kept.read_text()))
    driver_of().unrescue(None, server)
    assert '/complete/image' in found[0]
    assert 'nbd' not in found[0]


def test_what_nova_made_at_a_stubs_name(place, notices):
    """With its own driver, for a disk of ours; it is raw."""
    server = instance(image_ref='image')
    image = image_of(place, server)
    spawn(place, image)
    stub(place).write_bytes(place.raw)
    assert backend.stub_of(image.path) == stub(place)
    prepare(place, server)
    assert content(image.path)[:1 << 20] == place.raw
    assert stub(place).with_name(
        overlay.base_name('image') + '_raw').read_bytes() == place.raw


def test_an_old_base_at_a_stubs_name_stays(place, notices):
    place.base.mkdir()
    stub(place).write_bytes(place.raw)
    old = image_of(place)
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b',
                    stub(place), '-F', 'raw', old.path], check=True,
                   timeout=20)
    assert len(spawn(place, image_of(place))) == 1
    assert stub(place).read_bytes() == place.raw
    assert 'is no stub' in notices[0][2]


def not_qcow2(place):
    return False


@pytest.mark.parametrize('spoil', [
    None, switch_off, signatures, kill_agent, not_qcow2])
def test_an_image_is_cached_where_servers_look(place, monkeypatch, spoil):
    from nova.virt.libvirt import driver as stock
    found = []
    monkeypatch.setattr(stock.LibvirtDriver, 'cache_image',
                        lambda self, context, image: found.append(image))
    made = driver_of()
    if spoil:
        made._is_local = spoil(place) is not False
    assert made.cache_image(None, 'image') is (spoil is None)
    assert found == (['image'] if spoil else [])
    prepared = [path for path, _ in place.agent.calls]
    assert prepared == ([] if spoil else ['/v1/prepare'])


def test_an_old_resized_base_is_no_stub(place):
    """Nova before Folsom left <sha1>_sm files."""
    place.base.mkdir()
    stub(place).write_bytes(place.raw)
    image = image_of(place)
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b',
                    stub(place), '-F', 'raw', image.path], check=True,
                   timeout=20)
    assert backend.stub_of(image.path) is None
    assert 'backingStore' not in backing_of(place, image)
    image.cache(fetch_func=fetch(place, []), context=None,
                filename=stub(place).name, image_id='image', size=2 << 20,
                trusted_certs=None)
    assert stub(place).read_bytes() == place.raw


@pytest.mark.parametrize('cached', [False, True])
@pytest.mark.parametrize('failure', [None, 'hang', (503, {'error': 'x'})])
def test_unshelve(place, monkeypatch, cached, failure):
    """The first call makes the disk on a snapshot; the second asks for the
    base of the first image, to rebase the disk onto it. Of that, nothing
    is read that is not here; unless the agent cannot say what differs."""
    from fastboot_nova import driver
    monkeypatch.setattr(driver, '_COMPARE_SECONDS', 2)
    originals = place.world.path / 'originals'
    changed = bytearray(place.raw) + os.urandom(51200)
    changed[300000:400000] = os.urandom(50000) + bytes(50000)
    place.raw = bytes(changed)
    if cached:
        place.world.publish('snapshot', place.raw, boot=range(8))
        (originals / 'snapshot').write_bytes(place.raw)
        place.host.sync()
    server = instance()
    image = image_of(place, server)
    assert len(spawn(place, image, 'snapshot')) == (not cached)
    again = image_of(place, server)
    assert spawn(place, again, 'image', size=None) == []
    assert stub(place).exists()
    place.agent.fails = failure
    if not failure:
        (originals / 'image').rename(originals / 'away')
    driver.FastbootLibvirtDriver._rebase_with_qemu_img(
        image.path, str(place.base / overlay.base_name('image')))
    if not failure:
        (originals / 'away').rename(originals / 'image')
    assert backend.stub_of(image.path) == stub(place)
    assert content(image.path) == place.raw.ljust(2 << 20, b'\0')
    # The snapshot goes; nothing is read of it any more.
    assert overlay.base_name('snapshot') not in subprocess.run(
        ['qemu-img', 'info', '-U', '--backing-chain', image.path],
        capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize('kind, asked', [
    ('raw', 1), ('qcow2', 0), ('vdi', 0), ('vmdk', 0)])
def test_unshelve_of_other_formats(place, tmp_path, kind, asked):
    """Nova leaves them as they are without force_raw_images: their bytes are
    not what the guest wrote."""
    from fastboot_nova import driver
    changed = bytearray(place.raw) + bytes(7 << 20)
    changed[5 << 20:6 << 20] = os.urandom(1 << 20)
    (tmp_path / 'raw').write_bytes(changed)

    def download(target, **_):
        subprocess.run(['qemu-img', 'convert', '-f', 'raw', '-O', kind,
                        tmp_path / 'raw', target], check=True)

    server = instance()
    image = image_of(place, server)
    image.cache(fetch_func=download, context=None, image_id='snapshot',
                filename=imagecache.get_cache_fname('snapshot'),
                size=16 << 20, trusted_certs=None)
    assert overlay.backing_format(pathlib.Path(image.path)) == kind
    spawn(place, image_of(place, server), 'image', size=None)
    place.agent.calls.clear()
    driver.FastbootLibvirtDriver._rebase_with_qemu_img(
        image.path, str(place.base / overlay.base_name('image')))
    assert backend.stub_of(image.path) == stub(place)
    assert content(image.path) == changed.ljust(16 << 20, b'\0')
    assert len(place.agent.calls) == asked


def test_a_rebase_that_ends_in_the_middle(place, monkeypatch):
    """The disk reads the same, whatever it lies on."""
    from fastboot_common import qemu
    from fastboot_nova import driver
    place.raw, server = os.urandom(1 << 20), instance()
    image = image_of(place, server)
    spawn(place, image, 'snapshot')
    spawn(place, image_of(place, server), 'image', size=None)
    base = str(place.base / overlay.base_name('image'))
    for name in 'rename_backing', 'copy_up':
        with monkeypatch.context() as patched:
            patched.setattr(qemu, name, killed)
            with pytest.raises(KeyboardInterrupt):
                driver.FastbootLibvirtDriver._rebase_with_qemu_img(
                    image.path, base)
        assert backend.stub_of(image.path) is None
        assert content(image.path)[:1 << 20] == place.raw
    driver.FastbootLibvirtDriver._rebase_with_qemu_img(image.path, base)
    assert backend.stub_of(image.path) == stub(place)
    assert content(image.path)[:1 << 20] == place.raw


def killed(*words, **more):
    raise KeyboardInterrupt


def test_servers_at_once(place):
    images = [image_of(place) for _ in range(8)]
    threads = [threading.Thread(target=spawn, args=(place, image))
               for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for image in images:
        assert content(image.path)[:1 << 20] == place.raw


def hostile(base):
    """Files that only look like overlays, and what they name."""
    head = struct.pack('>4sIQIIQ', b'QFI\xfb', 3, 32, 0, 16, 1 << 20)
    name = str(base / f'{"0" * 40}_sm').encode()
    yield head[:16] + struct.pack('>I', 2000) + head[20:] + bytes(4096)
    yield head[:16] + struct.pack('>I', 2) + head[20:] + b'\xff\xff'
    yield head[:16] + struct.pack('>I', len(name)) + head[20:] + name


@pytest.mark.parametrize('number', range(3))
def test_what_a_guest_writes_is_no_overlay(place, number):
    server = instance()
    spawn(place, image_of(place, server))
    directory = place.instances / server.uuid
    made, data = driver_of(), [*hostile(place.base)][number]
    (directory / 'disk.config').write_bytes(data)
    (directory / 'disk.rescue').mkdir()
    disk = {str(directory / 'disk'): stub(place)}
    assert made._stubs(server) == disk
    # All disks may be, where Nova makes no overlays.
    (directory / 'disk').write_bytes(data)
    made._is_local = False
    assert made._stubs(server) == {}
    if number < 2:
        assert backend.stub_of(str(directory / 'disk')) is None


NODE = 'host-1'


@pytest.fixture
def disk_gb(place, monkeypatch):
    """Runs Nova's own update of the inventory, and gives that of DISK_GB."""
    from nova.compute import provider_tree
    from nova.virt.libvirt import driver as stock

    from fastboot_nova import driver

    made = object.__new__(driver.FastbootLibvirtDriver)
    made._held, made._is_local = 0, True
    made._host = types.SimpleNamespace(get_memory_mb_total=lambda: 1024)
    monkeypatch.setattr(stock.LibvirtDriver, 'static_traits', {})
    for name, value in (
            ('_get_local_gb_info', {'total': 100}),
            ('_get_vcpu_available', [0, 1]), ('_get_pcpu_available', [])):
        monkeypatch.setattr(made, name, lambda value=value: value)
    for name in dir(stock.LibvirtDriver):
        if name.startswith('_update_provider_tree_for_'):
            monkeypatch.setattr(made, name, lambda *words, **more: None)
    tree = provider_tree.ProviderTree()
    tree.new_root(NODE, str(uuid.uuid4()))

    def update():
        made.update_provider_tree(tree, NODE)
        inventory = tree.data(NODE).inventory
        assert inventory['MEMORY_MB']['total'] == 1024
        return inventory['DISK_GB']

    update.driver = made
    return update


def holds(place, volumes, mirror=0, path=None):
    place.agent.status = {
        'path': str(path or place.world.path), 'volume_bytes': volumes,
        'mirror_bytes': mirror}


def test_what_is_held_is_reserved(place, disk_gb):
    assert disk_gb() == {
        'total': 100, 'min_unit': 1, 'max_unit': 100, 'step_size': 1,
        'allocation_ratio': disk_gb()['allocation_ratio'], 'reserved': 0}
    for volumes, mirror, reserved in (
            (0, 0, 0), (1, 0, 1), (GIB, 0, 1), (GIB, 1, 2),
            (3 * GIB, 4 * GIB, 7), (GIB, 0, 1), (500 * GIB, 0, 100)):
        holds(place, volumes, mirror)
        assert disk_gb()['reserved'] == reserved, (volumes, mirror)
    # Beside what the operator reserves.
    CONF.set_override('reserved_host_disk_mb', 5 * 1024)
    try:
        holds(place, 2 * GIB)
        assert disk_gb()['reserved'] == 7
    finally:
        CONF.clear_override('reserved_host_disk_mb')


def test_what_is_held_elsewhere_is_not_reserved(place, disk_gb):
    holds(place, 2 * GIB, path='/proc')
    assert disk_gb()['reserved'] == 0
    holds(place, 2 * GIB)
    assert disk_gb()['reserved'] == 2
    disk_gb.driver._is_local = False
    assert disk_gb()['reserved'] == 0


def test_disk_is_not_reserved_if_so_configured(place, disk_gb):
    holds(place, 2 * GIB)
    CONF.set_override('reserve_disk', False, 'fastboot')
    assert disk_gb()['reserved'] == 0


@pytest.mark.parametrize('failure', [
    'hang', (503, {'error': 'x'}), (200, {}),
    (200, {'path': None, 'volume_bytes': None, 'mirror_bytes': None}),
    (200, {'path': '/nowhere', 'volume_bytes': 1, 'mirror_bytes': 1})])
def test_an_agent_that_is_away_changes_nothing(place, disk_gb, failure):
    place.agent.fails = failure
    assert disk_gb()['reserved'] == 0
    place.agent.fails = None
    holds(place, 2 * GIB)
    assert disk_gb()['reserved'] == 2
    place.agent.fails = failure
    assert disk_gb()['reserved'] == 2
