# SPDX-License-Identifier: Apache-2.0
"""The driver inside Nova's own code. Needs nova, but no cloud."""

import contextlib
import os
import time
import types

import pytest

# Its tests would patch everything for eventlet else.
os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')
pytest.importorskip('nova.virt.libvirt.driver')

from lxml import etree  # noqa: E402
from nova.compute import power_state  # noqa: E402
from nova.objects import migrate_data  # noqa: E402
from nova.virt.libvirt import driver as stock  # noqa: E402
from nova.virt.libvirt import guest as libvirt_guest  # noqa: E402
from nova.virt.libvirt import migration  # noqa: E402

from fastboot_common import exception  # noqa: E402
from fastboot_common.microvm import template  # noqa: E402
from fastboot_nova import driver, notice, spawn  # noqa: E402
from fastboot_nova.microvm import resume  # noqa: E402

DOMAIN = """<domain type='qemu'><name>one</name><memory>1</memory>
<on_reboot>{}</on_reboot><devices>{}
<graphics type='vnc'><listen type='address' address='10.0.0.1'/></graphics>
</devices></domain>"""
PORT = f"<channel type='unix'><target name='{template.PORT}'/></channel>"
OWN = DOMAIN.format('restart', '')


class Domain:
    """Notes how it migrates.

    :param runs: what its running machine has.
    """

    def __init__(self, runs):
        self.runs = runs

    def XMLDesc(self, flags):
        inactive = flags & stock.libvirt.VIR_DOMAIN_XML_INACTIVE
        return OWN if inactive else self.runs

    def migrateToURI3(self, destination, params, flags):
        self.params = params


def migrated(monkeypatch, runs):
    """A guest's definitions: what runs at the destination, and what does
    after a reboot."""
    libvirt = pytest.importorskip('libvirt')
    for one in stock, libvirt_guest:
        monkeypatch.setattr(one, 'libvirt', libvirt)
    made = object.__new__(driver.FastbootLibvirtDriver)
    made._block_migration_flags = made._live_migration_flags = 0
    made._host, made._is_local = None, False
    monkeypatch.setattr(made, '_is_post_copy_enabled', lambda flags: False)
    domain = Domain(runs)
    made._live_migration_operation(
        None, types.SimpleNamespace(
            uuid='one', vm_state='active',
            flavor=types.SimpleNamespace(extra_specs={}, vcpus=1),
            image_meta=None, numa_topology=None, resources=None,
            migration_context=None),
        'h2', False, migrate_data.LibvirtLiveMigrateData(
            block_migration=False, serial_listen_addr='10.0.0.2',
            serial_listen_ports=[], bdms=[], filename='file.fastboot',
            graphics_listen_addr_vnc='10.0.0.2'),
        libvirt_guest.Guest(domain), [])
    return [etree.fromstring(domain.params[name])
            for name in ('destination_xml', 'persistent_xml')]


def test_a_resumed_server_stays_defined_as_it_is(monkeypatch):
    runs, defined = migrated(monkeypatch, DOMAIN.format('destroy', PORT))
    assert runs.findtext('on_reboot') == 'destroy'
    assert runs.find('devices/channel') is not None
    assert defined.findtext('on_reboot') == 'restart'
    assert defined.find('devices/channel') is None
    for tree in runs, defined:
        assert tree.find('devices/graphics/listen').get(
            'address') == '10.0.0.2'


def test_others_are_defined_as_they_run(monkeypatch):
    runs, defined = migrated(monkeypatch, DOMAIN.format('restart', '<rng/>'))
    for tree in runs, defined:
        assert tree.find('devices/rng') is not None


@pytest.mark.parametrize('phase, count', [
    (resume.BEGIN, 0), ('define', 1), ('wait', 1)])
def test_a_disk_that_nobody_touched_stays(monkeypatch, phase, count):
    renewed = []
    monkeypatch.setattr(notice, 'emit', lambda *words, **more: None)
    monkeypatch.setattr(spawn, 'leave', lambda instance: None)
    disk = types.SimpleNamespace(
        image_id='image', renew=lambda: renewed.append(1))
    spawn._Attempt(None, '', None, disk, None)._fall_back(
        resume.ResumeFailed(phase, 'there is a domain'))
    assert len(renewed) == count


class Ending(Domain):
    """Ends after some seconds, and nobody has started it again yet.

    :param moves: whether it migrates then.
    """

    def __init__(self, seconds, moves):
        super().__init__(DOMAIN.format('destroy', PORT))
        self.end, self.moves = time.monotonic() + seconds, moves

    def _run(self):
        if time.monotonic() > self.end:
            raise error('not running', stock.libvirt.VIR_ERR_OPERATION_INVALID)

    def isActive(self):
        return time.monotonic() <= self.end

    def XMLDesc(self, flags):
        time.sleep(.05)
        return super().XMLDesc(
            flags if self.isActive()
            else stock.libvirt.VIR_DOMAIN_XML_INACTIVE)

    def jobStats(self, flags=0):
        self._run()
        return {'type': stock.libvirt.VIR_DOMAIN_JOB_NONE}

    def migrateToURI3(self, destination, params, flags):
        if not self.moves:
            self._run()
        time.sleep(max(0, self.end - time.monotonic()))
        if not self.moves:
            raise error('guest reboots', stock.libvirt.VIR_ERR_INTERNAL_ERROR)


def error(words, code):
    made = stock.libvirt.libvirtError(words)
    made.err = (code, 0, words, 0, '', '', '', 0, 0)
    return made


@pytest.mark.parametrize('seconds, moves, lazy, end', [
    (0, False, True, 'stays'), (.03, False, True, 'stays'),
    (.08, False, True, 'stays'), (.5, False, True, 'stays'),
    (.5, True, True, 'moved'), (.5, True, False, 'moved'),
    # As Nova has it.
    (0, False, False, 'moved')])
def test_a_guest_that_ended_has_not_moved(made, monkeypatch, seconds, moves,
                                          lazy, end):
    """Nova's own monitor and operation, around a guest that reboots."""
    libvirt = pytest.importorskip('libvirt')
    for one in stock, libvirt_guest, migration:
        monkeypatch.setattr(one, 'libvirt', libvirt)
    guest = libvirt_guest.Guest(Ending(seconds, moves))
    made._block_migration_flags = made._live_migration_flags = 0
    made.active_migrations = {}
    made._host = types.SimpleNamespace(get_guest=lambda instance: guest)
    for name, value in (('_is_post_copy_enabled', False), ('_get_vpmems', []),
                        ('_live_migration_data_gb', 2),
                        ('live_migration_abort', None),
                        ('_check_not_waiting', None),
                        ('_stubs', {'disk': 'stub'} if lazy else {})):
        monkeypatch.setattr(made, name, lambda *words, value=value: value)
    data = migrate_data.LibvirtLiveMigrateData(
        block_migration=False, serial_listen_addr='10.0.0.2',
        serial_listen_ports=[], bdms=[], filename='file.fastboot',
        graphics_listen_addr_vnc='10.0.0.2')
    data._obj_migration = None
    instance = types.SimpleNamespace(
        uuid='one', vm_state='active', name='one', image_meta=None,
        flavor=types.SimpleNamespace(extra_specs={}, vcpus=1),
        numa_topology=None, resources=None, migration_context=None)
    ends = []
    with contextlib.nullcontext() if lazy or moves else pytest.raises(
            libvirt.libvirtError):
        made._live_migration(
            None, instance, 'h2', lambda *words, **more: ends.append('moved'),
            lambda *words, **more: ends.append('stays'), False, data)
    assert ends == [end]


@pytest.fixture
def made(monkeypatch):
    """The driver, and a server of it; Nova's own methods note calls."""
    made = object.__new__(driver.FastbootLibvirtDriver)
    made._resumed, made.calls, made.state = set(), [], power_state.SHUTDOWN
    made.server = types.SimpleNamespace(uuid='one')
    monkeypatch.setattr(
        stock.LibvirtDriver, 'get_info', lambda self, instance, use_cache:
        types.SimpleNamespace(state=self.state))
    monkeypatch.setattr(spawn, 'leave', lambda instance:
                        made.calls.append('leave'))
    return made


def test_a_resumed_server_did_run(made, monkeypatch):
    """Whatever it did since: Nova would wait for it without end."""
    def spawning(self, context, instance):
        assert self.get_info(instance).state == power_state.SHUTDOWN
        self._resumed.add(instance.uuid)
        assert self.get_info(instance).state == power_state.RUNNING
        self.state = power_state.CRASHED
        assert self.get_info(instance).state == power_state.CRASHED
        self.state = power_state.SHUTDOWN
        raise KeyError

    monkeypatch.setattr(stock.LibvirtDriver, 'spawn', spawning)
    with pytest.raises(KeyError):
        made.spawn(None, made.server)
    assert made.get_info(made.server).state == power_state.SHUTDOWN


@pytest.mark.parametrize('stubs, calls', [
    ({}, ['destroy']), ({'disk': 'stub'}, ['leave', 'destroy'])])
def test_the_agent_starts_nothing_that_nova_ends(made, monkeypatch, stubs,
                                                 calls):
    monkeypatch.setattr(made, '_stubs', lambda instance: stubs)
    monkeypatch.setattr(stock.LibvirtDriver, '_destroy',
                        lambda self, instance: self.calls.append('destroy'))
    made._destroy(made.server)
    assert made.calls == calls


def test_nothing_keeps_a_server_from_its_end(made, monkeypatch):
    def fail(instance):
        raise PermissionError('instances')

    monkeypatch.setattr(made, '_stubs', fail)
    monkeypatch.setattr(stock.LibvirtDriver, '_destroy',
                        lambda self, instance: self.calls.append('destroy'))
    made._destroy(made.server)
    assert made.calls == ['destroy']


@pytest.mark.parametrize('error', [None, driver.nova_exception.
                                   InvalidDiskInfo(reason='gone')])
def test_a_revert_has_its_stubs_first(made, monkeypatch, error):
    def prepare(instance, stubs):
        made.calls.append(stubs)
        if error:
            raise error

    monkeypatch.setattr(made, '_stubs', lambda instance, end: end)
    monkeypatch.setattr(made, '_prepare', prepare)
    monkeypatch.setattr(
        stock.LibvirtDriver, 'finish_revert_migration',
        lambda self, context, instance, *words: self.calls.append(words))
    made.finish_revert_migration(None, made.server, 'network', 'migration')
    assert made.calls == ['_resize', ('network', 'migration')]


@pytest.mark.parametrize('does', [True, False])
@pytest.mark.parametrize('name, words', [
    ('reboot', ('network', 'SOFT')), ('rescue', ('network', 'image')),
    ('unrescue', ())])
def test_looked_at_before_a_guest_is_stopped(made, monkeypatch, name, words,
                                             does):
    def prepare(instance, stubs):
        made.calls.append(stubs)
        if not does:
            raise driver.nova_exception.InvalidDiskInfo(reason='gone')

    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'stub'})
    monkeypatch.setattr(made, '_prepare', prepare)
    monkeypatch.setattr(made, '_renew_kept', lambda instance: None)
    monkeypatch.setattr(
        stock.LibvirtDriver, name, lambda self, context, instance, *words:
        self.calls.append(words))
    if does:
        getattr(made, name)(None, made.server, *words)
        assert made.calls == [{'disk': 'stub'}, words]
        return
    with pytest.raises(driver.nova_exception.InvalidDiskInfo):
        getattr(made, name)(None, made.server, *words)
    assert made.calls == [{'disk': 'stub'}]


@pytest.mark.parametrize('host', ['new', 'stock'])
def test_the_destination_is_that_of_this_migration(made, monkeypatch, host):
    """Another one was left under way by a crash."""
    def migration(host):
        return types.SimpleNamespace(dest_compute=host, dest_node=host)

    for name, words in (
            ('Migration', {
                'get_by_instance_and_status': lambda *words: migration(
                    {'new': 'stock', 'stock': 'new'}[host]),
                'get_by_id_and_instance': lambda context, number, uuid:
                    migration({(7, 'one'): host}[number, uuid])}),
            ('ComputeNode', {
                'get_by_host_and_nodename': lambda context, host, node:
                    types.SimpleNamespace(stats={
                        driver.MARK: 'true'} if host == 'new' else {})})):
        monkeypatch.setattr(driver.objects, name,
                            types.SimpleNamespace(**words), raising=False)
    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'stub'})
    monkeypatch.setattr(
        stock.LibvirtDriver, 'migrate_disk_and_power_off',
        lambda self, context, instance, dest: dest)
    made.server.migration_context = types.SimpleNamespace(migration_id=7)
    if host == 'new':
        assert made.migrate_disk_and_power_off(
            None, made.server, 'ip') == 'ip'
        return
    with pytest.raises(driver.nova_exception.InstanceFaultRollback,
                       match='which stock cannot'):
        made.migrate_disk_and_power_off(None, made.server, 'ip')


@pytest.mark.parametrize('is_local', [True, False])
def test_what_others_are_told_of_this_host(made, monkeypatch, tmp_path,
                                           is_local):
    """Disks on local blocks are qcow2: others cannot come here."""
    made._is_local = is_local
    (tmp_path / 'file').touch()
    monkeypatch.setattr(stock.LibvirtDriver, 'get_available_resource',
                        lambda self, node: {'stats': {'one': 1}})
    monkeypatch.setattr(
        stock.LibvirtDriver, '_create_shared_storage_test_file',
        lambda self, instance: 'file')
    assert (driver.MARK in made.get_available_resource('node')['stats']
            ) is is_local
    driver.CONF.set_override('instances_path', str(tmp_path))
    try:
        name = made._create_shared_storage_test_file(made.server)
    finally:
        driver.CONF.clear_override('instances_path')
    assert name == ('file.fastboot' if is_local else 'file')
    assert (tmp_path / name).exists()


HERE, THERE = '0' * 16, '1' * 16


def word_of(stubs):
    return 'lazy' if 'lazy' in stubs.values() else 'complete', HERE


@pytest.mark.parametrize('stubs, name', [
    ((), 'file.fastboot'), (('lazy',), f'file.fastboot.lazy-{HERE}'),
    (('whole', 'lazy'), f'file.fastboot.lazy-{HERE}'),
    (('whole', 'whole'), f'file.fastboot.complete-{HERE}')])
def test_a_destination_says_what_it_has(made, monkeypatch, stubs, name):
    """After the name of the file was used as one."""
    monkeypatch.setattr(
        stock.LibvirtDriver, 'pre_live_migration',
        lambda self, context, instance: migrate_data.LibvirtLiveMigrateData(
            filename='file.fastboot'))
    monkeypatch.setattr(made, '_stubs', lambda instance: dict(
        enumerate(stubs)))
    monkeypatch.setattr(made, '_prepare', lambda instance, stubs: None)
    monkeypatch.setattr(driver, '_word', word_of)
    assert made.pre_live_migration(None, made.server).filename == name


@pytest.mark.parametrize('name, complete', [
    ('file.fastboot', False), ('file', False),
    (f'file.fastboot.lazy-{HERE}', False),
    (f'file.fastboot.complete-{HERE}', True),
    (f'file.fastboot.complete-{HERE}x', False)])
def test_a_source_believes_what_is_like_its_own(monkeypatch, name, complete):
    monkeypatch.setattr(driver, '_word', word_of)
    assert driver._is_complete({'disk': 'lazy'}, name) is complete


@pytest.mark.parametrize('fails', ['volume', 'chain', 'waits'])
def test_a_migration_that_is_refused_leaves_the_server(
        made, monkeypatch, fails):
    """Nova would have it in ERROR if this was raised."""
    refusal = driver.nova_exception.MigrationPreCheckError(reason='no')

    def operation(self, *words):
        assert fails == 'chain'
        raise exception.Corrupt('no')

    def check(instance):
        if fails == 'waits':
            raise refusal

    monkeypatch.setattr(stock.LibvirtDriver, '_live_migration_operation',
                        operation)
    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'whole'})
    monkeypatch.setattr(made, '_check_not_waiting', check)
    monkeypatch.setattr(made, '_definition', lambda *words: None)
    monkeypatch.setattr(driver, '_word', word_of)
    place = THERE if fails == 'volume' else HERE
    error = made._live_migration_operation(
        None, made.server, 'h2', False, types.SimpleNamespace(
            filename=f'file.fastboot.complete-{place}'),
        types.SimpleNamespace(get_xml_desc=None), [])
    assert isinstance(error, {
        'chain': exception.Corrupt}.get(fails, type(refusal)))
    assert ('volume_size' in str(error)) == (fails == 'volume')


class Standing(Domain):
    """A domain that is asked to pause.

    :param states: that it has, one after the other; the last one stays.
    """

    def __init__(self, *states):
        super().__init__(OWN)
        self.marks, self.states = [], list(states)

    def state(self):
        return self.states[0] if len(self.states) == 1 \
            else self.states.pop(0)

    def isPersistent(self):  # noqa: N802
        return True

    def setMetadata(self, kind, element, key, uri, flags):
        assert flags == stock.libvirt.VIR_DOMAIN_AFFECT_LIVE | (
            0 if element else stock.libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        assert kind == stock.libvirt.VIR_DOMAIN_METADATA_ELEMENT
        self.marks.append(element)


WAITS = [stock.libvirt.VIR_DOMAIN_PAUSED,
         stock.libvirt.VIR_DOMAIN_PAUSED_IOERROR]
PAUSED = [stock.libvirt.VIR_DOMAIN_PAUSED,
          stock.libvirt.VIR_DOMAIN_PAUSED_USER]
RUNS = [stock.libvirt.VIR_DOMAIN_RUNNING, 1]


@pytest.mark.parametrize('states, marks', [
    ([PAUSED], ['pause', None]),
    ([WAITS], ['pause']),
    # The agent had looked before it was marked, and resumed it after it
    # was paused, which did nothing.
    ([RUNS, PAUSED], ['pause', 'pause', None]),
    # It was resumed, and wants the next block.
    ([RUNS, WAITS], ['pause', 'pause']),
    # The agent, who sees the mark, has the rest to do.
    ([WAITS, PAUSED], ['pause'])])
def test_paused_by_its_owner(made, monkeypatch, states, marks):
    domain = Standing(*states)
    made._host = types.SimpleNamespace(
        get_guest=lambda instance: libvirt_guest.Guest(domain))
    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'stub'})
    for name in ('pause', 'unpause'):
        monkeypatch.setattr(
            stock.LibvirtDriver, name, lambda self, instance, name=name:
            domain.marks.append(name))
    made.pause(made.server)
    assert domain.marks == ['<paused/>', *marks]
    domain.marks.clear()
    made.unpause(made.server)
    assert domain.marks == [None, 'unpause']
    # Nobody else's.
    monkeypatch.setattr(made, '_stubs', lambda instance: {})
    domain.marks.clear()
    made.pause(made.server)
    assert domain.marks == ['pause']


def test_libvirt_may_know_nothing_of_it(made, monkeypatch):
    """Pausing does not depend on it."""
    def fail(*words):
        raise error('no', stock.libvirt.VIR_ERR_NO_SUPPORT)

    domain, done = Standing(WAITS), []
    domain.setMetadata = domain.state = fail
    made._host = types.SimpleNamespace(
        get_guest=lambda instance: libvirt_guest.Guest(domain))
    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'stub'})
    monkeypatch.setattr(stock.LibvirtDriver, 'pause',
                        lambda self, instance: done.append(1))
    made.pause(made.server)
    assert done


def test_one_that_cannot_be_paused(made, monkeypatch):
    """It is not left alone by the agent."""
    def fail(self, instance):
        raise error('no', stock.libvirt.VIR_ERR_OPERATION_TIMEOUT)

    domain = Standing(WAITS)
    made._host = types.SimpleNamespace(
        get_guest=lambda instance: libvirt_guest.Guest(domain))
    monkeypatch.setattr(made, '_stubs', lambda instance: {'disk': 'stub'})
    monkeypatch.setattr(stock.LibvirtDriver, 'pause', fail)
    with pytest.raises(stock.libvirt.libvirtError):
        made.pause(made.server)
    assert domain.marks == ['<paused/>', None]


@pytest.mark.parametrize('runs', [PORT, ''])
def test_a_volume_that_is_swapped(made, monkeypatch, runs):
    """What is defined afterwards is Nova's machine, with the new volume."""
    disk = "<disk type='file'><source file='/{}'/><target dev='vdb'/></disk>"

    class Swapped(Domain):
        def UUIDString(self):  # noqa: N802
            return 'a'

        def XMLDesc(self, flags):
            if flags & stock.libvirt.VIR_DOMAIN_XML_INACTIVE:
                return DOMAIN.format('restart', disk.format('old'))
            return self.runs

    domain = Swapped(DOMAIN.format('destroy', disk.format('old') + runs))
    defined = []

    def swap(self, guest, disk_dev, conf, resize_to):
        domain.runs = domain.runs.replace('/old', '/new')
        self._host.write_instance_config(domain.runs)

    made._host = types.SimpleNamespace(write_instance_config=defined.append)
    monkeypatch.setattr(stock.LibvirtDriver, '_swap_volume', swap)
    made._swap_volume(libvirt_guest.Guest(domain), 'vdb', None, 0)
    tree = etree.fromstring(defined[-1])
    assert tree.find('devices/disk/source').get('file') == '/new'
    assert tree.findtext('on_reboot') == ('restart' if runs else 'destroy')
    assert len(defined) == (2 if runs else 1)
    # The volume is another one, whatever comes of the definition.
    def fail(*words):
        raise exception.Corrupt('no such disk')

    monkeypatch.setattr(driver.spawn, 'with_disk', fail)
    made._swap_volume(libvirt_guest.Guest(domain), 'vdb', None, 0)
    assert len(defined) == (3 if runs else 2)
