# SPDX-License-Identifier: Apache-2.0
"""Builders in a whole centre: real Glance, RabbitMQ, redis, SQL and QEMU."""

import os
import subprocess
import sys

import agents
import brokers
import centre_stack
import pytest

pytest.importorskip('glance')
pytest.importorskip('taskflow')

from fastboot_common import overlay, rpc
from fastboot_common.cli import base
from fastboot_common.microvm import activation, artifact, shelf
from fastboot_glance import reports


@pytest.fixture(scope='module')
def bus(tmp_path_factory):
    with brokers.rabbitmq(tmp_path_factory.mktemp('rabbit')) as found:
        yield found


@pytest.fixture(scope='module')
def sql(tmp_path_factory):
    with brokers.mariadb(tmp_path_factory.mktemp('sql')) as found:
        yield found


@pytest.fixture(scope='module')
def glance(tmp_path_factory, sql, bus):
    with brokers.glance(tmp_path_factory.mktemp('glance'), sql, bus.url,
                        match='false') as found:
        yield found


@pytest.fixture(scope='module')
def redis(tmp_path_factory):
    with brokers.redis(tmp_path_factory.mktemp('redis')) as found:
        yield found


@pytest.fixture
def centre(tmp_path_factory, glance, sql, redis, bus):
    """A centre with nothing in it; Glance's images are removed after."""
    # UNIX sockets below it: no long names.
    path = tmp_path_factory.mktemp('c')
    found = centre_stack.Centre(
        path, glance, sql.database(f'fastboot_{path.name}'), redis.url,
        bus.url)
    try:
        yield found
    finally:
        found.stop()
        for image in glance.call('GET', '?limit=500').json()['images']:
            glance.delete(image['id'])


def test_upload_becomes_ready(centre, tmp_path):
    centre.start()
    disk = centre_stack.bootable(tmp_path / 'disk')
    image_id = centre.glance.make('tiny', disk)
    found = centre.wait_state(image_id, 'ready', 'error')
    assert (found.state, found.error, found.attempts) == ('ready', '', 1)
    assert found.version == centre.state.images[image_id].serial
    shown = centre.glance.show(image_id)
    assert shown['fastboot_state'] == 'ready'
    assert shown['fastboot_version'] == str(found.version)
    assert int(shown['fastboot_boot_size']) == found.boot_size > 0
    assert int(shown['fastboot_size']) > 0
    assert 'fastboot_error' not in shown
    made = centre.manifest(image_id)
    assert made.capture['state'] == 'booted'
    assert made.source['origin'] == 'glance'
    assert made.os_hash['sha512'] == shown['os_hash_value']
    centre.wait_idle()


def test_a_snapshot_is_not_ready_because_its_base_is(centre, tmp_path):
    """Nova copies the properties of a server's image to its snapshots."""
    inherited = {'fastboot_state': 'ready', 'fastboot_version': '7',
                 'fastboot_boot_size': '4096', 'fastboot_size': '4096',
                 'fastboot_microvm': 'ready'}
    disk = centre_stack.bootable(tmp_path / 'disk')
    image_id = centre.glance.make('snapshot', disk, **inherited)
    cut = tmp_path / 'cut'
    cut.write_bytes(b'QFI\xfb\0\0\0\3')
    broken = centre.glance.smuggle('broken', cut, disk_format='qcow2',
                                   **inherited)
    centre.start()
    found = centre.wait_state(image_id, 'ready', 'error')
    assert found.state == 'ready'
    shown = centre.glance.show(image_id)
    assert shown['fastboot_version'] == str(found.version)
    assert 'fastboot_microvm' not in shown
    assert centre.wait_state(broken, 'ready', 'error').state == 'error'
    shown = centre.glance.show(broken)
    assert shown['fastboot_state'] == 'error'
    assert {name for name in shown if name.startswith('fastboot_')} == {
        'fastboot_state', 'fastboot_error'}
    centre.wait_idle()


def test_each_image_gets_its_end(centre, tmp_path):
    """Built, not built, hostile: users see which and why."""
    centre.start(capture={'timeout': 10}, eligibility={'max_size': 1})
    disk = centre_stack.bootable(tmp_path / 'disk')
    huge = tmp_path / 'huge'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', huge, '2G'],
                   check=True, timeout=60)
    qcow2 = tmp_path / 'qcow2'
    subprocess.run(['qemu-img', 'convert', '-O', 'qcow2', disk, qcow2],
                   check=True, timeout=60)
    backed = tmp_path / 'backed'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw',
                    '-b', '/etc/passwd', backed, '1M'], check=True,
                   timeout=60)
    cut = tmp_path / 'cut'
    cut.write_bytes(qcow2.read_bytes()[:70000])
    silent = tmp_path / 'silent'
    silent.write_bytes(os.urandom(1 << 20))
    glance = centre.glance
    made = {
        'qcow2': glance.make('qcow2', qcow2, disk_format='qcow2'),
        'lies': glance.smuggle('lies', qcow2, disk_format='vmdk'),
        'backed': glance.smuggle('backed', backed, disk_format='qcow2'),
        'cut': glance.smuggle('cut', cut, disk_format='qcow2'),
        # Glance does not know how large it is.
        'huge': glance.smuggle('huge', huge, disk_format='qcow2'),
        'off': glance.make('off', disk, fastboot='off'),
        'typo': glance.make('typo', disk, fastboot='on'),
        'kernel': glance.make('kernel', disk, kernel_id='x'),
        'iso': glance.make('iso', disk, disk_format='iso'),
        'silent': glance.make('silent', silent),
    }
    states = {name: centre.wait_state(
        image_id, 'ready', 'error', 'skipped', 'off')
        for name, image_id in made.items()}
    assert {name: one.state for name, one in states.items()} == {
        'qcow2': 'ready', 'lies': 'error', 'backed': 'error', 'cut': 'error',
        'huge': 'error', 'off': 'off', 'typo': 'skipped', 'kernel': 'skipped',
        'iso': 'skipped', 'silent': 'ready'}
    words = {
        'lies': 'said to be vmdk, but is qcow2', 'backed': 'backing',
        'cut': 'end of the file', 'huge': 'at most 1073741824',
        'typo': "fastboot='on'", 'kernel': 'kernel', 'iso': 'iso',
        'silent': 'no boot set'}
    for name, word in words.items():
        shown = glance.show(made[name])
        assert word in shown['fastboot_error'], name
        assert shown['fastboot_state'] == states[name].state
    assert 'fastboot_state' not in glance.show(made['off'])
    # What can never succeed is tried once.
    assert [states[name].attempts for name in ('lies', 'backed', 'cut')] == [
        1, 1, 1]
    assert set(centre.state.images) == {made['qcow2'], made['silent']}
    centre.wait_idle()


@agents.needs_nbdkit
def test_a_boot_set_from_a_first_boot(centre, tmp_path):
    """An image that does not boot here, and a guest that reads it there."""
    centre.start(capture={'timeout': 5})
    silent = tmp_path / 'silent'
    silent.write_bytes(os.urandom(4 << 20))
    image_id = centre.glance.make('silent', silent)
    found = centre.wait_state(image_id, 'ready')
    assert (found.boot_size, 'no boot set' in found.error) == (0, True)
    host = agents.Agent(centre.path / 'h', centre.path / 'repository', **{
        'DEFAULT': {'transport_url': centre.bus},
        'agent': {'messaging': True, 'host': 'h1', 'observe': 3}})
    try:
        host.start()
        host.await_state(image_id, 'ready')
        assert host.acquire(image_id, tmp_path / 'stub')[0] == 200
        subprocess.run(
            ['qemu-io', '-r', '-f', 'raw',
             f'nbd+unix:///{image_id}?socket={host.nbd}'], check=True,
            text=True, timeout=60, stdout=subprocess.DEVNULL, input=''.join(
                f'read -q {number * 32 << 10} 512\n'
                for number in range(100, 60, -1)))
        brokers.wait_for(
            lambda: 'fastboot_error' not in centre.glance.show(image_id),
            'a boot set')
    finally:
        host.clean()
    made = centre.manifest(image_id)
    assert made.boot.tolist() == [
        2 * number for number in range(100, 60, -1)]
    assert made.capture['state'] == 'observed'
    assert made.capture['reason']
    found = centre.wait_state(image_id, 'ready')
    assert (found.version, found.error, found.boot_size) == (
        centre.state.images[image_id].serial, '', 40 * centre_stack.BLOCK)
    assert centre.glance.show(image_id)['fastboot_boot_size'] == str(
        found.boot_size)
    # Nobody builds it again for that.
    centre.wait_idle()


def kill(centre, process):
    """Kill a builder; nothing that it started may stay."""
    below = centre_stack.descendants(process.process.pid)
    process.kill()
    brokers.wait_for(lambda: not centre_stack.alive(below),
                     f'no orphans of {below}', 20)


#: How the first builder is made slow at a stage, and what it runs then.
STAGES = {
    'fetching': ({'glance': {'limit_rate': 4 << 20}}, set()),
    'booting': ({'capture': {'settle_seconds': 60}},
                {'qemu-system-x86', 'nbdkit'}),
    'publishing': ({'repository': {'compression_level': 19}}, set()),
}


@pytest.mark.parametrize('stage', STAGES)
def test_killed_builder_is_replaced(centre, tmp_path, stage):
    slow, programs = STAGES[stage]
    first = centre.start('first', **slow)
    image_id = centre.glance.make('tiny', centre_stack.bootable(
        tmp_path / 'disk', 128 << 20, fill=64 << 20))
    centre.wait_stage(image_id, stage)
    if stage == 'fetching':
        part = centre.path / 'work' / 'staging' / image_id / 'image.part'
        brokers.wait_for(lambda: part.exists() and part.stat().st_size
                         > 4 << 20, 'a part of the image')
    brokers.wait_for(lambda: programs <= {
        name for _, _, name in centre_stack.descendants(
            first.process.pid)}, f'{programs} run')
    kill(centre, first)
    assert image_id not in centre.state.images
    # A second boot would fail: the trace must be the first builder's.
    boot = {'timeout': 1, 'console_pattern': 'never'} \
        if stage == 'publishing' else {}
    centre.start('second', capture=boot)
    found = centre.wait_state(image_id, 'ready', 'error')
    assert (found.state, found.error, found.attempts) == ('ready', '', 2)
    assert centre.manifest(image_id).capture['state'] == 'booted'
    assert ('goes on at byte' in centre.log('second')) == (
        stage == 'fetching')
    centre.wait_idle()
    left = {path.name for path in (centre.path / 'work').iterdir()}
    assert left <= {'staging'}


def test_an_image_that_kills_builders_is_given_up(centre, tmp_path):
    image_id = None
    for number in range(2):
        one = centre.start(f'victim{number}', builder={'attempts': 2},
                           capture={'settle_seconds': 60})
        image_id = image_id or centre.glance.make(
            'deadly', centre_stack.bootable(tmp_path / 'disk'))
        brokers.wait_for(
            lambda: (found := centre.records.build(image_id))
            and found.stage == 'booting' and found.attempts == number + 1,
            f'attempt {number + 1}')
        kill(centre, one)
    centre.start(builder={'attempts': 2})
    found = centre.wait_state(image_id, 'ready', 'error')
    assert found.state == 'error'
    assert 'builders died' in found.error
    assert 'builders died' in centre.glance.show(image_id)['fastboot_error']
    centre.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize('group', [False, True])
def test_stopped_builder_gives_its_job_back(centre, tmp_path, group):
    """Whether its guests get the signal, too, or not."""
    first = centre.start('first', capture={'settle_seconds': 60})
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_stage(image_id, 'booting')
    below = centre_stack.descendants(first.process.pid)
    first.stop(group=group)
    assert first.process.returncode == 0
    assert not centre_stack.alive(below)
    assert centre.records.build(image_id).state == 'queued'
    centre.start('second', jobboard={'claim_seconds': 600})
    found = centre.wait_state(image_id, 'ready', 'error')
    assert (found.state, found.attempts) == ('ready', 1)


def test_deleted_images_are_deregistered(centre, tmp_path):
    """Told by a notification, found by the audit, and during the build."""
    one = centre.start('one')
    disk = centre_stack.bootable(tmp_path / 'disk')
    told, found, by_hand = (
        centre.glance.make(name, disk) for name in ('told', 'found', 'hand'))
    for image_id in (told, found, by_hand):
        centre.wait_state(image_id, 'ready')
    centre.glance.delete(told)
    brokers.wait_for(lambda: told not in centre.state.images, 'deregistered')
    brokers.wait_for(lambda: centre.records.build(told) is None, 'forgotten')
    one.stop()
    centre.glance.delete(found)
    centre.start('two', listener={'topics': ''})
    brokers.wait_for(lambda: found not in centre.state.images, 'audited')
    assert by_hand in centre.state.images


def test_deleted_while_it_is_built(centre, tmp_path):
    centre.start(capture={'settle_seconds': 4})
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_stage(image_id, 'booting')
    centre.glance.delete(image_id)
    centre.wait_idle()
    assert image_id not in centre.state.images
    assert centre.records.build(image_id) is None


def test_audit_finds_what_nobody_told(centre, tmp_path):
    disk = centre_stack.bootable(tmp_path / 'disk')
    before = centre.glance.make('before', disk)
    centre.start(listener={'topics': ''}, builder={'audit_interval': 1})
    centre.wait_state(before, 'ready')
    after = centre.glance.make('after', disk)
    centre.wait_state(after, 'ready')
    centre.glance.patch(after, {
        'op': 'add', 'path': '/fastboot', 'value': 'off'})
    centre.wait_state(after, 'off')
    assert set(centre.state.images) == {before}


@pytest.mark.slow
def test_many_missing_images_are_not_believed(centre, tmp_path):
    one = centre.start('one')
    disk = centre_stack.bootable(tmp_path / 'disk')
    made = [centre.glance.make(f'tiny{number}', disk) for number in range(3)]
    for image_id in made:
        centre.wait_state(image_id, 'ready')
    one.stop()
    for image_id in made:
        centre.glance.delete(image_id)
    two = centre.start('two', listener={'topics': ''},
                       builder={'audit_removals': 2})
    brokers.wait_for(lambda: 'None is deregistered' in centre.log('two'),
                     'the audit')
    two.stop()
    assert set(centre.state.images) == set(made)
    centre.start('three', listener={'topics': ''})
    brokers.wait_for(lambda: not centre.state.images, 'audited')


def test_images_that_others_registered_are_left_alone(centre, tmp_path):
    disk = centre_stack.bootable(tmp_path / 'disk')
    subprocess.run(
        [sys.executable, '-c', 'from fastboot_common.cli.main import main; '
         'raise SystemExit(main())', '--config-file', centre.write_conf(),
         'image', 'add', '--no-boot', '--id', 'by-hand',
         disk], check=True, timeout=60, cwd=centre_stack.ROOT,
        capture_output=True)
    centre.start()
    brokers.wait_for(lambda: 'audit: 0 images in Glance, 1 registered'
                     in centre.log(), 'the audit')
    assert set(centre.state.images) == {'by-hand'}


def test_visibility_decides_the_volume(centre, tmp_path):
    centre.start()
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_state(image_id, 'ready')
    before = centre.state.images[image_id]
    assert before.domain == 'public'
    centre.glance.patch(image_id, {
        'op': 'replace', 'path': '/visibility', 'value': 'private'})
    brokers.wait_for(lambda: (now := centre.state.images.get(image_id))
                     and now.domain != 'public', 'moved')
    after = centre.state.images[image_id]
    assert (after.visibility, after.manifest) == ('private', before.manifest)
    brokers.wait_for(lambda: centre.glance.show(image_id)[
        'fastboot_version'] == str(after.serial), 'told')


def test_refresh_keeps_the_serial(centre, tmp_path):
    centre.start()
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_state(image_id, 'ready')
    before, old = centre.state.images[image_id], centre.manifest(image_id)
    assert centre.board.post(image_id, 'test', force=True)
    brokers.wait_for(lambda: centre.state.images[image_id].manifest
                     != before.manifest, 'a new manifest')
    new = centre.manifest(image_id)
    assert centre.state.images[image_id].serial == before.serial
    assert (new.root, new.packs) == (old.root, old.packs)
    assert set(new.boot) == set(old.boot)
    centre.wait_idle()
    centre.wait_state(image_id, 'ready')


@pytest.mark.slow
def test_twenty_images_and_a_killed_builder(centre, tmp_path):
    """Every image ends ready, none twice, and nothing is left."""
    first = centre.start('first')
    centre.start('second', builder={'workers': 2})
    disk = tmp_path / 'disk'
    made = []
    for number in range(20):
        centre_stack.bootable(disk, seed=str(number).encode())
        made.append(centre.glance.make(f'tiny{number}', disk))
    brokers.wait_for(lambda: len(centre.state.images) >= 5, 'five images')
    brokers.wait_for(lambda: 'qemu-system-x86' in {
        name for _, _, name in centre_stack.descendants(
            first.process.pid)}, 'a boot')
    kill(centre, first)
    for image_id in made:
        found = centre.wait_state(image_id, 'ready', 'error', seconds=120)
        assert (found.state, found.error) == ('ready', '')
    # Serials are journal entries: twenty, if none was built twice.
    state = centre.state
    assert set(state.images) == set(made)
    assert state.version == 20
    centre.wait_idle()
    scratch = list((centre.path / 'repository' / 'tmp').glob('*'))
    assert len(scratch) <= 2


#: Of the fake bakery.
QEMU = '7.2.22 (Debian)'


def tiny(centre, tmp_path, **values):
    return centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'), **values)


def test_an_image_gets_its_microvm(centre, tmp_path):
    """Ready before it is baked; the file is fetched once."""
    centre.plan(seconds=3)
    centre.start(plan='plan')
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    plain = tiny(centre, tmp_path)
    found = centre.wait_state(image_id, 'ready', 'error')
    one = centre.microvm(image_id, 'baking')
    assert one.stage in ('beginning', 'inspecting', 'baking: boot')
    assert centre.glance.show(image_id)['fastboot_microvm'] == 'none'
    one = centre.microvm(image_id, 'ready')
    centre.wait_idle()
    assert centre.microvms == [(image_id, one.group)]
    assert one.bytes > 1 << 20
    assert (one.seconds, one.baked_at) == (1.5, 1_700_000_000)
    assert one.platform.endswith(f'/{QEMU}')
    shown = centre.glance.show(image_id)
    assert shown['fastboot_microvm'] == 'ready'
    assert 'fastboot_microvm_error' not in shown
    assert 'fastboot_microvm' not in centre.glance.show(plain)
    # No name of this machine is in what hosts get.
    assert centre.bakes() == [f'{16 << 20} {16 << 20} image raw']
    assert centre.records.build(image_id).updated == found.updated
    assert 'fetching' not in centre.log().partition('bake posted')[2]


@pytest.mark.parametrize('state', ['refused', 'failed'])
def test_an_image_that_is_not_baked(centre, tmp_path, state):
    """It is ready all the same, and not tried again but by request."""
    centre.plan(state=state, reason='because')
    one = centre.start('one', plan='plan', builder={
        'audit_interval': 1, 'attempts': 2})
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    centre.wait_state(image_id, 'ready', 'error')
    found = centre.microvm(image_id, state)
    assert 'because' in found.reason
    centre.wait_idle()
    tries = 1 if state == 'refused' else 2
    audits = centre.log('one').count('audit: ')
    brokers.wait_for(lambda: centre.log('one').count('audit: ')
                     > audits + 2, 'three audits')
    assert len(centre.bakes()) == tries
    shown = centre.glance.show(image_id)
    assert (shown['fastboot_state'], shown['fastboot_microvm']) == (
        'ready', 'error')
    assert 'because' in shown['fastboot_microvm_error']
    assert centre.records.build(image_id).state == 'ready'
    # Another option, and it may be otherwise.
    one.stop()
    centre.plan()
    centre.start('two', plan='plan', bakery={'timeout': 601})
    assert centre.microvm(image_id, 'ready').reason == ''
    brokers.wait_for(lambda: 'fastboot_microvm_error' not in
                     centre.glance.show(image_id), 'told')
    assert len(centre.bakes()) == tries + 1


def test_a_refresh_tries_again(centre, tmp_path):
    centre.plan(state='refused', reason='because')
    centre.start(plan='plan')
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    centre.microvm(image_id, 'refused')
    centre.wait_idle()
    centre.plan()
    assert centre.board.post(image_id, 'test', force=True)
    centre.microvm(image_id, 'ready')
    assert len(centre.bakes()) == 2


def test_killed_while_it_bakes(centre, tmp_path):
    """What happens at each step after that: test_crash."""
    centre.plan(seconds=600)
    first = centre.start('first', plan='plan')
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    brokers.wait_for(centre.bakes, 'a bake')
    kill(centre, first)
    assert not centre.microvms
    assert centre.records.build(image_id).state == 'ready'
    # From the file that the first had.
    assert (centre.path / 'work' / 'staging' / image_id / 'image').exists()
    centre.plan()
    centre.start('second', plan='plan', glance={'limit_rate': 1})
    centre.microvm(image_id, 'ready')
    centre.wait_idle()
    assert len(centre.microvms) == 1


def test_stopped_while_it_bakes(centre, tmp_path):
    centre.plan(seconds=600)
    first = centre.start('first', plan='plan')
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    brokers.wait_for(centre.bakes, 'a bake')
    first.stop(group=False)
    assert first.process.returncode == 0
    assert centre.records.microvms(image_id)[0].state == 'none'
    centre.plan()
    centre.start('second', plan='plan')
    centre.microvm(image_id, 'ready')


@pytest.mark.parametrize('how', ['deleted', 'unwanted'])
def test_not_wanted_any_more_while_it_bakes(centre, tmp_path, how):
    centre.plan(seconds=600)
    centre.start(plan='plan')
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    brokers.wait_for(centre.bakes, 'a bake')
    if how == 'deleted':
        centre.glance.delete(image_id)
    else:
        centre.glance.patch(image_id, {
            'op': 'replace', 'path': '/fastboot', 'value': 'cache'})
    centre.wait_idle()
    assert not centre.microvms
    assert not centre.records.microvms(image_id)
    assert (image_id in centre.state.images) == (how == 'unwanted')


def test_builds_do_not_wait_for_bakes(centre, tmp_path):
    centre.plan(seconds=600)
    centre.start(plan='plan')
    tiny(centre, tmp_path, fastboot='microvm')
    brokers.wait_for(centre.bakes, 'a bake')
    centre.wait_state(tiny(centre, tmp_path), 'ready')


def test_microvms_go_with_their_images(centre, tmp_path):
    centre.plan()
    centre.start(plan='plan', builder={'audit_interval': 1})
    deleted, unwanted, moved = (
        tiny(centre, tmp_path, fastboot='microvm') for _ in range(3))
    for image_id in (deleted, unwanted, moved):
        centre.microvm(image_id, 'ready')
    centre.glance.delete(deleted)
    centre.glance.patch(unwanted, {
        'op': 'replace', 'path': '/fastboot', 'value': 'cache'})
    brokers.wait_for(lambda: [image_id for image_id, _ in centre.microvms]
                     == [moved], 'removed')
    brokers.wait_for(lambda: 'fastboot_microvm' not in
                     centre.glance.show(unwanted), 'told')
    assert unwanted in centre.state.images
    centre.glance.patch(moved, {
        'op': 'replace', 'path': '/visibility', 'value': 'private'})
    found = microvms_repository(centre)
    brokers.wait_for(lambda: {one.visibility for one in
                              found.state().images.values()} == {'private'},
                     'moved')
    assert len(centre.bakes()) == 3


def microvms_repository(centre):
    return base.Environment(centre.conf()).open_microvms()


def test_each_builder_bakes_for_its_own_platform(centre, tmp_path):
    """And only if hosts have it."""
    texts = {}
    for name, qemu in (('old', QEMU), ('new', '10.0.2 (Debian)')):
        centre.plan(name, qemu=qemu)
        texts[name] = f'x86_64/qemu/2/{activation.RECIPE}/{qemu}'
    report = {'host': 'h1', 'version': 0, 'at': 1.0, 'software': 'test',
              'images': [], 'volume_bytes': 1, 'mirror_bytes': 2,
              'free_bytes': 3, 'microvms': []}
    centre.records.note_host(reports.check(
        report | {'platforms': [texts['new']]}))
    centre.start('old', plan='old', builder={'audit_interval': 1})
    image_id = tiny(centre, tmp_path, fastboot='microvm')
    centre.wait_state(image_id, 'ready')
    centre.wait_idle()
    assert not centre.bakes('old')
    assert centre.glance.show(image_id)['fastboot_microvm'] == 'none'
    centre.start('new', plan='new', builder={'audit_interval': 1})
    assert centre.microvm(image_id, 'ready').platform == texts['new']
    assert not centre.bakes('old')
    centre.records.note_host(reports.check(
        report | {'platforms': list(texts.values()), 'at': 2.0}))
    brokers.wait_for(lambda: len(centre.microvms) == 2, 'both')
    centre.wait_idle()
    assert (len(centre.bakes('old')), len(centre.bakes('new'))) == (1, 1)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(os.geteuid() != 0, reason='building needs root')
def test_a_real_debian(centre, tmp_path_factory):
    """From its upload to a µVM that is what was baked."""
    pytest.importorskip('libvirt')
    path = tmp_path_factory.mktemp('d')
    disk = path / 'image.qcow2'
    tool = centre_stack.ROOT / 'tools' / 'guest-image'
    subprocess.run([tool, 'build', disk, '--suite', 'bookworm'], check=True,
                   timeout=900)
    centre.start(
        capture={'timeout': 900, 'memory': 512, 'end': 'agent,console',
                 'config_drive': True}, bakery={'timeout': 900})
    image_id = centre.glance.make('debian', disk, disk_format='qcow2',
                                  fastboot='microvm')
    ready = centre.wait_state(image_id, 'ready', 'error', seconds=600)
    assert ready.state == 'ready', ready.error
    assert centre.glance.show(image_id)['fastboot_microvm'] == 'none'
    one = centre.microvm(image_id, 'ready', 'refused', 'failed', seconds=1200)
    assert one.state == 'ready', one.reason
    centre.wait_idle()
    found = microvms_repository(centre)
    entry = shelf.find(found.state(), image_id)
    target = path / 'taken'
    target.mkdir()
    images = base.Environment(centre.conf()).open_repository()
    description = shelf.take(
        entry, found, images.image(image_id), images, target)
    assert description.key.platform.text == one.platform
    # Nothing of this machine is in it.
    assert overlay.read_backing(target / artifact.DISK) == (
        'image', description.virtual_size)
    for part in (artifact.DISK, artifact.DESCRIPTION):
        assert str(centre.path).encode() not in (target / part).read_bytes()
    assert subprocess.run(
        ['grep', '-qaF', str(centre.path), target / artifact.MEMORY],
        timeout=60).returncode == 1
    print(f'baked in {one.seconds:.0f} s, {one.bytes / 2**20:.1f} MiB')


class Agent:
    """What agents hear."""

    def __init__(self):
        self.versions = []

    @rpc.oslo_messaging.expose
    def announce(self, context, version):
        self.versions.append(version)


class Notes:
    """What listeners of our notifications hear."""

    def __init__(self):
        self.events = []

    def info(self, context, publisher, event, payload, metadata):
        self.events.append((event, payload))

    error = info


def test_what_builders_say_and_hear(centre, tmp_path):
    """Announcements, notifications, and the reports of agents."""
    conf = centre.conf()
    messaging = rpc.oslo_messaging
    agent, notes = Agent(), Notes()
    bus = rpc.transport(conf)
    topic = centre.namespace
    servers = [
        rpc.serve(bus, rpc.AGENTS, 'h1', agent),
        messaging.get_notification_listener(
            messaging.get_notification_transport(conf),
            [messaging.Target(topic=topic)], [notes], executor='threading')]
    servers[1].start()
    try:
        centre.start(oslo_messaging_notifications={
            'driver': 'messagingv2', 'topics': topic})
        image_id = centre.glance.make(
            'tiny', centre_stack.bootable(tmp_path / 'disk'))
        version = centre.wait_state(image_id, 'ready').version
        brokers.wait_for(lambda: version in agent.versions, 'announced')
        brokers.wait_for(lambda: [
            payload['version'] for event, payload in notes.events
            if (event, payload['image_id']) == (
                'fastboot.image.ready', image_id)] == [version], 'notified')
        rpc.Centre(bus).report({
            'host': 'h1', 'version': version, 'at': 1.0, 'software': 'test',
            'images': [], 'volume_bytes': 1, 'mirror_bytes': 2,
            'free_bytes': 3})
        brokers.wait_for(lambda: centre.records.host('h1'), 'the report')
    finally:
        for server in servers:
            server.stop()
            server.wait()


@pytest.mark.slow
def test_builder_outlives_its_neighbours(centre, redis, tmp_path):
    """Redis hangs for longer than a claim lasts: the build begins again."""
    centre.start(capture={'settle_seconds': 8})
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_stage(image_id, 'booting')
    redis.freeze()
    try:
        brokers.wait_for(lambda: 'is lost' in centre.log(), 'a lost claim')
    finally:
        redis.thaw()
    found = centre.wait_state(image_id, 'ready', 'error')
    assert found.state == 'ready'
    assert centre.state.version == 1
    centre.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize('who', ['bus', 'redis', 'glance', 'sql'])
def test_stops_while_a_neighbour_hangs(centre, redis, bus, sql, tmp_path,
                                       who):
    neighbour = {'bus': bus, 'redis': redis, 'sql': sql,
                 'glance': centre.glance.process}[who]
    one = centre.start(capture={'settle_seconds': 60})
    image_id = centre.glance.make(
        'tiny', centre_stack.bootable(tmp_path / 'disk'))
    centre.wait_stage(image_id, 'booting')
    below = centre_stack.descendants(one.process.pid)
    neighbour.freeze()
    try:
        one.stop(group=False, seconds=100)
        assert one.process.returncode == 0
    finally:
        neighbour.thaw()
    assert not centre_stack.alive(below)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['etcd', 'zookeeper'])
def test_other_jobboards(centre, tmp_path_factory, tmp_path, name):
    """A builder is killed while it boots, the next one finishes."""
    with getattr(brokers, name)(tmp_path_factory.mktemp(name)) as server:
        centre.board_url = server.url
        first = centre.start('first', capture={'settle_seconds': 60})
        image_id = centre.glance.make(
            'tiny', centre_stack.bootable(tmp_path / 'disk'))
        centre.wait_stage(image_id, 'booting')
        kill(centre, first)
        centre.start('second')
        found = centre.wait_state(image_id, 'ready', 'error')
        assert (found.state, found.attempts) == ('ready', 2)
        centre.wait_idle()
        centre.stop()
