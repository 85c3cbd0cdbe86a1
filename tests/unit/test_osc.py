# SPDX-License-Identifier: Apache-2.0
"""``openstack fastboot …`` against the API itself; no network between."""

import argparse
import dataclasses
import io
import json
import threading
import time
import types

import pytest
import requests_mock
import webob
from api_parts import NEW, ONE, TWO, make_centre
from keystoneauth1 import exceptions as ksa_exceptions
from keystoneauth1 import noauth, session
from osc_lib import exceptions

from fastboot_common.osc import client, columns, host, image, plugin
from fastboot_glance import registry

URL = 'http://fastboot.invalid:9190'


@pytest.fixture
def centre(tmp_path, monkeypatch):
    monkeypatch.setattr(image, '_POLL_SECONDS', .01)
    monkeypatch.setattr(image.wait, '__defaults__', (.01,))
    made = make_centre(tmp_path, monkeypatch)
    made.notes = []

    def sleep(seconds):
        time.sleep(seconds)
        if made.notes:
            made.records.note_build(ONE, **made.notes.pop(0))

    monkeypatch.setattr(image, 'time', types.SimpleNamespace(
        sleep=sleep, monotonic=time.monotonic))
    return made


@pytest.fixture
def run(centre):
    """Runs a command as cliff does, and gives its output as JSON."""
    def answer(request, context):
        found = webob.Request.blank(
            request.url, method=request.method,
            body=(request.text or '').encode())
        response = found.get_response(centre.app)
        context.status_code = response.status_int
        context.headers.update(response.headers)
        return response.body

    api = client.Client(session.Session(
        noauth.NoAuth(endpoint=URL)), None, 'public')
    glance = types.SimpleNamespace(find_image=find_in_glance)
    app = types.SimpleNamespace(
        client_manager=types.SimpleNamespace(fastboot=api, image=glance),
        stdout=io.StringIO(), options=argparse.Namespace())

    def run(kind, *words, output='json'):
        app.stdout = io.StringIO()
        command = kind(app, argparse.Namespace())
        formats = ['-f', output] if hasattr(
            command, 'formatter_namespace') else []
        arguments = command.get_parser('openstack').parse_args(
            [*words, *formats])
        command.run(arguments)
        text = app.stdout.getvalue()
        return json.loads(text) if text and output == 'json' else text

    with requests_mock.Mocker() as mocker:
        mocker.register_uri(requests_mock.ANY, requests_mock.ANY,
                            content=answer)
        yield run


def find_in_glance(reference, ignore_missing):
    if reference != 'fresh':
        raise ksa_exceptions.NotFound('no such image')
    return types.SimpleNamespace(id=NEW)


def test_image_list(centre, run):
    centre.report('h1', {ONE: 'ready', TWO: 'transferring'})
    centre.report('h2', {ONE: 'thawed'})
    one, two = run(image.List)
    assert one == {
        'ID': ONE, 'Name': f'name of {ONE}', 'State': 'ready', 'Version': 1,
        'Boot Set': None, 'Hosts Ready': {'ready': 2}, 'µVM': '',
        'Error': ''}
    assert two['Hosts Ready'] == {'transferring': 1, 'absent': 1}
    words = run(image.List, output='table')
    assert '2/2' in words
    assert '0/2 (1 transferring)' in words


def test_image_list_long_and_filtered(centre, run):
    centre.records.note_build(NEW, state='building', stage='boot',
                              progress=.4, attempts=2, boot_size=5 << 20)
    row, = run(image.List, '--long', '--state', 'building')
    assert (row['Stage'], row['Progress'], row['Attempts']) == (
        'boot', .4, 2)
    assert '40%' in run(image.List, '--long', output='table')
    assert run(image.List, '--name', 'nobody') == []
    assert [row['ID'] for row in run(image.List, '--owner', 'p2')] == [TWO]


def test_image_list_on_a_host(centre, run):
    centre.report('h1', {ONE: 'complete', TWO: {
        'state': 'error', 'error': 'disk full'}})
    one, two = run(image.List, '--host', 'h1')
    assert one['On Host'] == 'ready (complete)'
    assert (two['On Host'], two['Reason']) == ('error', 'disk full')
    with pytest.raises(ksa_exceptions.NotFound, match='h9 has never'):
        run(image.List, '--host', 'h9')


def test_all_pages(centre, run):
    for number in range(120):
        centre.records.note_build(f'{number:03}', state='queued')
    assert len(run(image.List)) == 122


def test_image_show_by_name_and_id(centre, run):
    centre.report('h1', {ONE: 'ready'})
    centre.report('h2', {ONE: {'state': 'error', 'error': 'no room'}})
    by_id = run(image.Show, ONE)
    assert by_id == run(image.Show, f'name of {ONE}')
    assert by_id['hosts']['h2']['error'] == 'no room'
    assert by_id['boot_size'] == 12288
    words = run(image.Show, ONE, output='table')
    assert '12.0 KiB' in words
    assert 'no room' in words


def test_image_show_says_what_was_observed(centre, run):
    made = {'times': 1, 'bytes': 12288, 'hosts': 1}
    register = registry.Registry(
        centre.repo, centre.records, None, None, None)
    register.rewrite(ONE, lambda old: dataclasses.replace(
        old, capture=old.capture | {'state': 'observed', 'observed': made}))
    assert run(image.Show, ONE)['capture'] == {
        'state': 'observed', 'reason': None, 'observed': made}
    assert 'observed' in run(image.Show, ONE, output='table')


def test_names_that_do_not_do(centre, run, tmp_path):
    centre.records.note_build('x', state='queued', name='twice')
    centre.records.note_build('y', state='queued', name='twice')
    with pytest.raises(exceptions.CommandError, match='2 images'):
        run(image.Show, 'twice')
    with pytest.raises(exceptions.CommandError, match='no image'):
        run(image.Show, '../../etc')
    with pytest.raises(exceptions.CommandError, match='nor does Glance'):
        run(image.Build, 'nothing')
    assert not centre.board.posted


def test_build_by_the_name_in_glance(centre, run):
    row, = run(image.Build, 'fresh')
    assert (row['ID'], row['State']) == (NEW, 'queued')
    assert centre.board.posted == [(NEW, 'api', False)]


def test_refresh(centre, run):
    run(image.Refresh, ONE, f'name of {TWO}')
    assert centre.board.posted == [(ONE, 'api', True), (TWO, 'api', True)]
    with pytest.raises(exceptions.CommandError, match='no image fresh'):
        run(image.Refresh, 'fresh')


def builder(centre, *notes):
    """A builder that says these things, one between two looks each."""
    centre.notes.extend(notes)


def test_wait(centre, run, capsys):
    builder(centre, {'state': 'building', 'stage': 'fetch'},
            {'state': 'building', 'stage': 'boot'},
            {'state': 'ready', 'version': 1})
    row, = run(image.Refresh, ONE, '--wait')
    assert row['State'] == 'ready'
    said = capsys.readouterr().err
    assert f'{ONE}: building fetch' in said
    assert f'{ONE}: building boot' in said


def test_wait_on_a_terminal(centre, run, monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True)
    builder(
        centre, {'state': 'building', 'stage': 'boot', 'progress': .5},
        {'state': 'ready'})
    run(image.Refresh, ONE, '--wait')
    said = capsys.readouterr().err
    assert 'boot 50%' in said
    assert said.endswith('\r\x1b[K')


def test_wait_for_a_failure(centre, run):
    builder(centre, {'state': 'error', 'error': 'does not boot'})
    with pytest.raises(exceptions.CommandError, match='does not boot'):
        run(image.Refresh, ONE, '--wait')


def test_wait_has_an_end(centre, run):
    with pytest.raises(exceptions.CommandError, match='not ready yet'):
        run(image.Refresh, ONE, '--wait', '--timeout', '0.1')


def test_wait_outlives_a_restart_of_the_api(centre, run, tmp_path):
    """The database being away is an answer that passes."""
    path = tmp_path / 'records.db'
    aside = tmp_path / 'aside.db'

    def work():
        while not centre.board.posted:
            time.sleep(.01)
        time.sleep(.1)
        path.rename(aside)
        path.mkdir()
        time.sleep(.1)
        path.rmdir()
        aside.rename(path)
        centre.records.note_build(ONE, state='ready')

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    row, = run(image.Refresh, ONE, '--wait', '--timeout', '60')
    thread.join()
    assert row['State'] == 'ready'


def test_wait_for_an_image_that_goes(centre, run):
    centre.records.note_build(NEW, state='queued')
    run(image.Build, NEW)
    thread = threading.Thread(
        target=lambda: (time.sleep(.1), centre.records.forget_build(NEW)))
    thread.start()
    with pytest.raises(exceptions.CommandError, match='is gone'):
        run(image.Build, NEW, '--wait')
    thread.join()


def test_hosts(centre, run):
    centre.report('h1', {ONE: 'ready', TWO: 'ready'})
    centre.report('h2', {}, age=1000)
    one, two = run(host.List)
    assert (one['State'], one['Images Ready']) == ('up', {'ready': 2})
    assert two['State'] == 'stale'
    assert 'no report for' in two['Error']
    assert [row['Name'] for row in run(host.List, '--state', 'up')] == ['h1']
    assert '1.0 TiB' in run(host.List, '--long', output='table')
    found = run(host.Show, 'h1')
    assert found['images'][ONE]['state'] == 'ready'
    assert f'name of {ONE}' in run(host.Show, 'h1', output='table')


def test_how_much_of_an_image_is_there(centre, run):
    centre.report('h1', {ONE: {'state': 'thawed', 'progress': .37,
                               'serial': 1}, TWO: 'complete'})
    places = run(host.Show, 'h1')['images']
    assert places[ONE]['present'] == .37
    assert 'ready (thawed) 37%' in ' '.join(
        run(host.Show, 'h1', output='table').split())


def test_guests_that_need_the_export(centre, run):
    centre.report('h1', {}, lazy_guests=[NEW, TWO])
    centre.report('h2', {})
    assert run(host.Show, 'h1')['lazy_guests'] == [NEW, TWO]
    words = run(host.Show, 'h1', output='table')
    assert NEW in words and TWO in words
    assert 'unknown' in run(host.Show, 'h2', output='table')
    assert [row['Lazy Guests'] for row in run(host.List, '--long')] == [
        [NEW, TWO], None]


def test_host_sync(centre, run):
    centre.report('h1', {})
    centre.report('h2', {})
    run(host.Sync, 'h1', 'h2')
    run(host.Sync, 'h1', '--image', f'name of {ONE}')
    assert centre.agents.told == [('h1', None), ('h2', None), ('h1', [ONE])]
    with pytest.raises(ksa_exceptions.NotFound):
        run(host.Sync, 'h9')


@pytest.mark.parametrize('value, words', [
    (None, ''), (0, '0 B'), (1023, '1023 B'), (1024, '1.0 KiB'),
    (73 << 20, '73.0 MiB'), (3 << 40, '3.0 TiB'), (3 << 50, '3072.0 TiB')])
def test_sizes(value, words):
    assert columns.Size(value).human_readable() == words


def test_plugin():
    parser = plugin.build_option_parser(argparse.ArgumentParser())
    assert parser.parse_args([]).os_fastboot_api_version == '1'
    made = plugin.make_client(types.SimpleNamespace(
        session=None, region_name='r', interface='internal'))
    assert isinstance(made, client.Client)


def test_microvms(centre, run):
    centre.records.note_microvm(
        ONE, 'x86_64/qemu/2/3/7', state='baking', stage='baking: boot')
    centre.records.note_microvm(
        ONE, 'x86_64/qemu/2/3/8', state='refused', reason='no cloud-init')
    centre.report('h1', {}, platforms=['x86_64/qemu/2/3/7'], microvms=[{
        'image': ONE, 'class': 'ab' * 32, 'state': 'error', 'bytes': 5 << 20,
        'lanes': 2, 'resumed': 7, 'fallbacks': 0, 'reason': 'no room'}])
    words = run(image.Show, ONE, output='table')
    assert 'x86_64/qemu/2/3/7  baking  boot' in words
    assert 'x86_64/qemu/2/3/8  refused: no cloud-init' in words
    assert run(image.Show, ONE)['microvms'][0]['stage'] == 'baking: boot'
    assert run(image.List)[0]['µVM'] == 'baking'
    words = run(host.Show, 'h1', output='table')
    assert (f'name of {ONE} ({ONE})  abababababab  error  5.0 MiB  2 lanes  '
            f'7 resumed: no room') in words
    centre.report('h1', {})
    assert run(host.Show, 'h1')['microvms'] is None
    run(host.Show, 'h1', output='table')
