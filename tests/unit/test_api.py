# SPDX-License-Identifier: Apache-2.0
"""The HTTP API over a real repository and SQLite; the caller is anybody."""

import json
import shutil
import string

import microvms
import oslo_messaging
import pytest
from api_parts import NEW, ONE, TWO, UNREACHABLE, make_centre
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastboot_common import publish
from fastboot_common.cli import base
from fastboot_common.microvm import shelf


@pytest.fixture
def centre(tmp_path, monkeypatch):
    return make_centre(tmp_path, monkeypatch)


def images(answer):
    status, body = answer
    assert status == 200, body
    return {row['id']: row for row in body['images']}


def test_versions_need_no_token(centre):
    status, body = centre('/')
    assert status == 200
    version, = body['versions']
    assert version['status'] == 'CURRENT'
    assert version['links'][0]['href'].endswith('/v1/')
    assert centre.raw('/healthcheck').status_int == 200


def test_published_images_are_listed(centre):
    rows = images(centre('/v1/images'))
    assert list(rows) == [ONE, TWO]
    row = rows[ONE]
    assert (row['state'], row['progress'], row['version']) == (
        'ready', 1.0, 1)
    assert row['name'] == f'name of {ONE}'
    assert row['owner'] == 'p1'
    assert row['hosts'] == {}


def test_builds_show_before_the_journal_does(centre):
    centre.records.note_build(NEW, state='building', stage='boot',
                              progress=.5, name='new', owner='p3')
    row = images(centre('/v1/images'))[NEW]
    assert (row['state'], row['stage'], row['progress']) == (
        'building', 'boot', .5)
    assert row['name'] == 'new'
    assert row['version'] is None
    centre.records.note_build(NEW, state='error', error='does not boot')
    row = images(centre('/v1/images'))[NEW]
    assert (row['state'], row['error'], row['name']) == (
        'error', 'does not boot', 'new')


def test_failed_refresh_leaves_the_version(centre):
    centre.records.note_build(ONE, state='error', error='no room')
    row = images(centre('/v1/images'))[ONE]
    assert (row['state'], row['error'], row['version']) == (
        'error', 'no room', 1)


def test_ready_but_gone_is_an_error(centre):
    centre.records.note_build(NEW, state='ready', version=9)
    row = images(centre('/v1/images'))[NEW]
    assert row['state'] == 'error'
    assert 'does not have it' in row['error']


def test_every_state_on_a_host(centre):
    serial = centre.repo.state().images[TWO].serial
    centre.report('h1', {ONE: 'ready', TWO: 'transferring'})
    centre.report('h2', {ONE: 'thawed', TWO: {
        'state': 'ready', 'serial': serial - 1}})
    centre.report('h3', {ONE: 'complete', TWO: {
        'state': 'error', 'error': 'disk full', 'serial': None}})
    centre.report('h4', {ONE: 'ready', TWO: 'ready'}, age=1000)
    centre.report('h5', {}, version=1)
    rows = images(centre('/v1/images'))
    one, two = rows[ONE]['hosts'], rows[TWO]['hosts']
    assert {key: value['state'] for key, value in one.items()} == {
        'h1': 'ready', 'h2': 'ready', 'h3': 'ready', 'h4': 'stale',
        'h5': 'absent'}
    assert one['h3']['detail'] == 'complete'
    assert 'no report for' in one['h4']['error']
    assert 'was ready' in one['h4']['error']
    assert two['h1'] == {'state': 'transferring', 'progress': .25,
                         'present': 0.0,
                         'error': '', 'detail': 'transferring'}
    assert two['h2']['state'] == 'stale'
    assert f'newest is {serial}' in two['h2']['error']
    assert two['h3']['state'] == 'error'
    assert two['h3']['error'] == 'disk full'
    assert two['h5']['state'] == 'absent'
    assert 'is at version 1' in two['h5']['error']
    assert rows[ONE]['host_states'] == {'ready': 3, 'stale': 1, 'absent': 1}


def test_what_is_left_of_a_deregistered_image(centre):
    centre.report('h1', {ONE: 'ready', TWO: 'ready'})
    centre.repo.remove(ONE)
    status, body = centre('/v1/hosts/h1')
    assert status == 200
    left = body['host']['images'][ONE]
    assert left['state'] == 'stale'
    assert 'not registered' in left['error']
    assert body['host']['images'][TWO]['state'] == 'ready'
    assert body['host']['behind'] == 1
    assert ONE not in images(centre('/v1/images'))


def test_show_reads_the_boot_set(centre):
    status, body = centre(f'/v1/images/{ONE}')
    assert status == 200
    assert body['image']['boot_size'] == 3 * centre.repo.block_size
    assert body['image']['capture']['state'] == 'none'


def test_filters(centre):
    centre.records.note_build(NEW, state='error', name='new', owner='p1')
    assert list(images(centre('/v1/images?state=error'))) == [NEW]
    assert list(images(centre('/v1/images?name=new'))) == [NEW]
    assert list(images(centre('/v1/images?owner=p2'))) == [TWO]
    assert not images(centre('/v1/images?owner=p2&state=error'))
    assert 'hosts' not in images(centre('/v1/images?hosts=false'))[ONE]


def test_hosts_filter(centre):
    centre.report('h1', {ONE: 'ready'})
    centre.report('h2', {})
    row = images(centre('/v1/images?host=h1'))[ONE]
    assert list(row['hosts']) == ['h1']
    assert centre('/v1/images?host=h3')[0] == 404
    assert centre('/v1/images?host=../x')[0] == 400


def test_pages_give_every_image_once(centre):
    for number in range(7):
        centre.records.note_build(f'{number}', state='queued')
    found, path = [], '/v1/images?limit=2&hosts=false'
    while path:
        status, body = centre(path)
        assert status == 200
        assert len(body['images']) <= 2
        found += [row['id'] for row in body['images']]
        path = body.get('images_links', [{}])[0].get('href')
    assert found == sorted(found)
    assert set(found) == {ONE, TWO, *map(str, range(7))}
    assert len(found) == 9


def test_no_more_than_the_limit(centre):
    for number in range(60):
        centre.records.note_build(f'{number:03}', state='queued')
    assert len(images(centre('/v1/images'))) == 50
    assert len(images(centre('/v1/images?limit=999'))) == 50
    assert not images(centre('/v1/images?limit=0'))


@pytest.mark.parametrize('query', [
    'limit=-1', 'limit=x', 'limit=%C2%B2', 'limit=', 'limit=' + '9' * 30,
    'nonsense=1', 'limit=1&limit=2', 'hosts=maybe', 'name=%FF'])
def test_queries_without_sense(centre, query):
    status, body = centre(f'/v1/images?{query}')
    assert status == 400
    assert body['error']['request_id'].startswith('req-')


@pytest.mark.parametrize('path', [
    '/v1/nothing', '/v2/images', f'/v1/images/{NEW}', '/v1/hosts/h9',
    '/v1/images/x/y'])
def test_not_found(centre, path):
    status, body = centre(path)
    assert status == 404
    assert body['error']['title'] == 'Not Found'


@pytest.mark.parametrize('path', [
    '/v1/images/.x', '/v1/images/' + 'x' * 65, '/v1/images/%2e%2e',
    '/v1/images/a%20b', '/v1/hosts/-x', '/v1/images/%FF',
    '/v1/images/a%0a'])
def test_ids_without_sense(centre, path):
    assert centre(path)[0] == 400


def test_wrong_method(centre):
    response = centre.raw('/v1/images', 'DELETE')
    assert response.status_int == 405
    assert response.headers['Allow'] == 'GET'
    assert centre.raw(f'/v1/images/{ONE}/action').status_int == 405


def test_build_of_a_new_image(centre):
    status, body = centre(f'/v1/images/{NEW}/action', 'POST', {'build': {}})
    assert status == 202
    assert body['image']['state'] == 'queued'
    assert centre.board.posted == [(NEW, 'api', False)]
    assert images(centre('/v1/images'))[NEW]['state'] == 'queued'


def test_refresh_is_queued_until_a_builder_speaks(centre):
    status, body = centre(
        f'/v1/images/{ONE}/action', 'POST', {'refresh': None})
    assert status == 202
    assert centre.board.posted == [(ONE, 'api', True)]
    assert images(centre('/v1/images'))[ONE]['state'] == 'queued'
    centre.records.note_build(ONE, state='building', stage='fetch')
    assert images(centre('/v1/images'))[ONE]['state'] == 'building'
    centre.records.note_build(ONE, state='ready', version=7)
    assert images(centre('/v1/images'))[ONE]['state'] == 'ready'


def test_refresh_of_nothing(centre):
    status, body = centre(f'/v1/images/{NEW}/action', 'POST',
                          {'refresh': {}})
    assert status == 409
    assert not centre.board.posted
    assert centre('/v1/images/debian/action', 'POST', {'build': {}})[0] == 400


@pytest.mark.parametrize('action', ['build', 'refresh'])
def test_what_was_registered_by_hand_is_not_for_builders(
        centre, tmp_path, action):
    centre.publish(tmp_path, 'debian-12', 'p1')
    status, body = centre('/v1/images/debian-12/action', 'POST', {action: {}})
    assert status == 400
    assert "in Glance, and builders know no other: 'debian-12'" in str(body)
    assert not centre.board.posted


def test_jobboard_away(centre):
    centre.board.error = UNREACHABLE
    response = centre.raw(f'/v1/images/{NEW}/action', 'POST', {'build': {}})
    assert response.status_int == 503
    assert response.headers['Retry-After']
    assert response.json['error']['message'] == str(UNREACHABLE)
    # Nothing was asked for, so nothing may look as if it was.
    assert NEW not in images(centre('/v1/images'))
    assert centre(f'/v1/images/{ONE}/action', 'POST', {'build': {}})[0] == 503
    assert images(centre('/v1/images'))[ONE]['state'] == 'ready'


@pytest.mark.parametrize('body', [
    b'', b'{', b'[]', b'{}', b'"build"', b'{"build": 1}', b'{"Build": {}}',
    b'{"build": {}, "refresh": {}}', b'{"build": {"force": true}}',
    b'\xff\xfe', b'[' * 60000, b' ' * 70000, b'{"build": ' + b'1' * 5000])
def test_bodies_without_sense(centre, body):
    status, answer = centre(f'/v1/images/{ONE}/action', 'POST', body)
    assert status == 400
    assert not centre.board.posted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(['build', 'refresh', 'images', 'x']), inner,
        max_size=3), max_leaves=8)


@settings(max_examples=60, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(body=json_values | st.binary(max_size=200))
def test_any_body_has_a_clear_answer(centre, body):
    centre.report('h1', {})
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for path in (f'/v1/images/{ONE}/action', '/v1/hosts/h1/sync'):
        status, answer = centre(path, 'POST', data)
        assert status in (202, 400, 404)
        assert status == 202 or answer['error']['message']


@settings(max_examples=60, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(path=st.text(string.printable + 'é\0☃', max_size=40))
def test_any_path_has_a_clear_answer(centre, path):
    import urllib.parse
    for before in ('/', '/v1/images/', '/v1/images?', '/v1/hosts/'):
        response = centre.raw(before + urllib.parse.quote(path))
        assert response.status_int in (200, 400, 404, 405), response.body


def test_hosts(centre):
    centre.report('h1', {ONE: 'ready', TWO: 'transferring'})
    centre.report('h2', {}, age=1000, version=1)
    status, body = centre('/v1/hosts')
    assert status == 200
    one, two = body['hosts']
    assert (one['name'], one['state'], one['behind']) == ('h1', 'up', 0)
    assert one['image_states'] == {'ready': 1, 'transferring': 1}
    assert one['free_bytes'] == 1 << 40
    assert one['lazy_guests'] is None
    assert (two['name'], two['state'], two['behind']) == ('h2', 'stale', 1)
    assert 'no report for' in two['error']
    assert [row['name'] for row in centre(
        '/v1/hosts?state=stale')[1]['hosts']] == ['h2']
    status, body = centre('/v1/hosts?limit=1')
    assert 'marker=h1' in body['hosts_links'][0]['href']


def test_guests_that_need_the_export(centre):
    centre.report('h1', {}, lazy_guests=[NEW])
    assert centre('/v1/hosts/h1')[1]['host']['lazy_guests'] == [NEW]


def test_sync(centre):
    centre.report('h1', {})
    centre.report('h2', {}, age=1000)
    assert centre('/v1/hosts/h1/sync', 'POST') == (202, {})
    assert centre('/v1/hosts/h1/sync', 'POST', {'images': [ONE]})[0] == 202
    assert centre.agents.told == [('h1', None), ('h1', [ONE])]
    assert centre('/v1/hosts/h1/sync', 'POST', {'images': [NEW]})[0] == 404
    assert centre('/v1/hosts/h1/sync', 'POST', {'images': []})[0] == 400
    assert centre('/v1/hosts/h1/sync', 'POST', {'images': [1]})[0] == 400
    assert centre('/v1/hosts/h1/sync', 'POST', {'all': True})[0] == 400
    assert centre('/v1/hosts/h2/sync', 'POST')[0] == 409
    assert centre('/v1/hosts/h3/sync', 'POST')[0] == 404
    assert len(centre.agents.told) == 2


def test_bus_away(centre, monkeypatch):
    def fail(*words):
        raise oslo_messaging.MessagingTimeout('nobody there')

    centre.report('h1', {})
    monkeypatch.setattr(centre.agents, 'sync', fail)
    status, body = centre('/v1/hosts/h1/sync', 'POST')
    assert status == 503
    assert 'nobody there' in body['error']['message']


def test_repository_away(centre, tmp_path):
    shutil.move(tmp_path / 'repository', tmp_path / 'elsewhere')
    status, body = centre('/v1/images')
    assert status == 503
    assert 'repository' in body['error']['message']
    shutil.move(tmp_path / 'elsewhere', tmp_path / 'repository')
    assert centre('/v1/images')[0] == 200


def test_damaged_repository_is_named(centre, tmp_path):
    entry = tmp_path / 'repository/journal/0000000000000001.json'
    entry.write_bytes(b'nonsense')
    status, body = centre('/v1/images')
    assert status == 500
    assert 'journal entry 1' in body['error']['message']


def test_database_away(centre, tmp_path):
    (tmp_path / 'records.db').write_bytes(b'')
    status, body = centre('/v1/images')
    assert status == 503
    assert 'fastboot-manage db sync' in body['error']['message']
    centre.records.create()
    assert centre('/v1/images')[0] == 200


def test_unexpected_errors_tell_nothing(centre, monkeypatch):
    monkeypatch.setattr('fastboot_glance.api.overview.image_row',
                        lambda *words: 1 / 0)
    status, body = centre('/v1/images')
    assert status == 500
    assert 'division' not in json.dumps(body)
    assert body['error']['request_id'].startswith('req-')


def test_hostile_name_is_only_text(centre):
    centre.records.note_build(NEW, state='queued', name='a\0b\n\ud800😀')
    assert images(centre('/v1/images'))[NEW]['name'] == 'a b  😀'


PLATFORM = 'x86_64/qemu/2/3/7.2.22 (Debian)'


def reported(group, state, image=ONE):
    return {'image': image, 'class': group, 'state': state, 'bytes': 5,
            'lanes': 2, 'resumed': 7, 'fallbacks': 1, 'reason': None}


def with_microvm(centre, path):
    """The class of a µVM of ONE that is in the repository."""
    room = path / 'baked'
    microvms.make(room, size=20 * centre.repo.block_size)
    shelved = base.Environment(centre.conf).writable_microvms()
    return shelf.put(
        room, centre.repo.image(ONE), centre.repo, publish.Publisher(
            shelved, path / 'cache', threads=1), path / 'work').name.group


def test_microvms_of_an_image(centre, tmp_path):
    """What the repository has counts, then what the records say."""
    shown = centre(f'/v1/images/{ONE}')[1]['image']
    assert shown['microvms'] == []
    assert images(centre('/v1/images'))[ONE]['microvm'] is None
    group = with_microvm(centre, tmp_path)
    here = microvms.a_key().platform.text
    centre.report('h1', {}, platforms=[here], microvms=[
        reported(group, 'ready'), reported('cd' * 32, 'ready')])
    centre.report('h2', {}, microvms=[reported(group, 'transferring')])
    centre.report('h3', {})
    row, = centre(f'/v1/images/{ONE}')[1]['image']['microvms']
    assert (row['class'], row['platform'], row['state'], row['bytes']) == (
        group, here, 'ready', None)
    assert row['hosts'] == {'ready': 1, 'transferring': 1}
    note = centre.records.note_microvm
    note(ONE, here, state='baking', stage='x', progress=.5, size=9,
         seconds=2.5, baked_at=1_700_000_000.0)
    note(ONE, 'lost', state='ready', group='ab' * 32)
    note(ONE, 'no', state='refused', reason='no cloud-init')
    rows = {row['platform']: row for row in
            centre(f'/v1/images/{ONE}')[1]['image']['microvms']}
    # A builder that died after it had published.
    assert (rows[here]['state'], rows[here]['stage'], rows[here]['bytes'],
            rows[here]['seconds']) == ('ready', '', 9, 2.5)
    assert rows[here]['baked_at'] == '2023-11-14T22:13:20+00:00'
    assert (rows['lost']['state'], rows['lost']['class']) == ('none', '')
    assert 'not have it' in rows['lost']['reason']
    assert (rows['no']['state'], rows['no']['reason'], rows['no'][
        'hosts']) == ('refused', 'no cloud-init', {})
    note(TWO, here, state='failed')
    note(TWO, 'no', state='refused')
    listed = images(centre('/v1/images'))
    assert (listed[ONE]['microvm'], listed[TWO]['microvm']) == (
        'ready', 'failed')


def test_microvms_of_a_host(centre):
    centre.report('h1', {}, platforms=[PLATFORM],
                  microvms=[reported('ab' * 32, 'ready')])
    centre.report('h2', {})
    host = centre('/v1/hosts/h1')[1]['host']
    assert host['platforms'] == [PLATFORM]
    row, = host['microvms']
    assert row == reported('ab' * 32, 'ready') | {
        'name': f'name of {ONE}', 'reason': ''}
    host = centre('/v1/hosts/h2')[1]['host']
    assert (host['platforms'], host['microvms']) == (None, None)


def test_microvms_of_images_that_may_not_be_seen(tmp_path, monkeypatch):
    centre = make_centre(tmp_path, monkeypatch, """
fastboot:hosts:show: role:member
fastboot:images:show: project_id:%(project_id)s
""")
    centre.report('h1', {}, microvms=[
        reported('ab' * 32, 'ready'), reported('ab' * 32, 'ready', TWO)])
    found = centre('/v1/hosts/h1', X_Roles='member', X_Auth_Token='u:p2')
    assert found[0] == 200
    assert [row['image'] for row in found[1]['host']['microvms']] == [TWO]
