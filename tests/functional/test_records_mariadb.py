# SPDX-License-Identifier: Apache-2.0
"""Records in a real MariaDB, as test_records has them in SQLite."""

import threading
import time

import identity
import pytest
import sqlalchemy as sa
from alembic import autogenerate, migration

from fastboot_common import exception
from fastboot_glance import logbooks, records, reports, tables


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with identity.mariadb(tmp_path_factory.mktemp('mariadb')) as found:
        records.Records(found.url).create()
        yield found


@pytest.fixture
def store(server):
    found = records.Records(server.url)
    yield found
    with found._engine.begin() as connection:
        for table in tables.METADATA.tables.values():
            connection.execute(sa.delete(table))


def report(host='h1', **more):
    return reports.check({
        'host': host, 'version': 3, 'at': time.time(), 'software': '1',
        'volume_bytes': 1, 'mirror_bytes': 2, 'free_bytes': 3,
        'images': [{'id': 'a', 'state': 'ready', 'serial': 3}], **more})


def test_tables(store, server):
    # Beside TaskFlow's, whose versions are Alembic's, too.
    logbooks.Logbooks(server.url).create()
    store.create()
    logbooks.Logbooks(server.url).create()
    assert store.version() == tables.head()
    with store._engine.connect() as connection:
        context = migration.MigrationContext.configure(
            connection, opts={
                'version_table': tables.VERSION_TABLE,
                'include_object': lambda found, name, kind, *_:
                kind != 'table' or name in tables.METADATA.tables})
        assert autogenerate.compare_metadata(
            context, tables.METADATA) == []


def test_observations(store):
    def told(host, reads='x'):
        return {'image': 'a', 'host': host, 'serial': 3, 'reads': reads}

    for host in ('h1', 'H1', 'h1'):
        store.note_observation(told(host, 'x' * (1 << 20)))
    found = store.observations('a')
    assert [one.host for one in found] == ['H1', 'h1']
    assert found[0].reads == 'x' * (1 << 20)
    store.note_observation(told('h1', 'newer'))
    # What came since stays.
    store.forget_observations('a', found)
    assert [one.reads for one in store.observations('a')] == ['newer']
    store.forget_observations('a', store.observations('a'))
    assert store.observations('a') == []
    for number in range(20):
        store.note_observation(told(f'h{number}'))
    assert [one.host for one in store.observations('a')] == [
        f'h{number}' for number in range(4, 20)]
    store.note_build('a', state='ready')
    store.forget_build('a')
    assert store.observations('a') == []


def test_any_name_and_case(store):
    store.note_build('a', state='ready', name='Ünï 😀')
    store.note_build('A', state='error', error='é' * 2000)
    assert store.build('a').name == 'Ünï 😀'
    assert store.build('A').error == 'é' * 1000
    store.note_host(report('h1'))
    store.note_host(report('H1'))
    assert len(store.hosts()) == 2


def test_reports(store):
    assert store.note_host(report(at=100))
    assert not store.note_host(report(at=99, version=2))
    assert store.note_host(report(at=100, version=4))
    assert store.host('h1').version == 4
    many = [{'id': f'{number:064}', 'state': 'error',
             'error': f'{number} {"x" * 400}'} for number in range(20_000)]
    assert store.note_host(report(images=many))
    assert len(store.hosts()[0].images) == 20_000
    for number in range(60):
        store.note_host(report(f'many{number}', images=[
            {'id': 'a', 'state': 'thawed', 'leases': number}]))
    found = store.host_images({'a', many[7]['id']})
    assert found.pop('h1').keys() == {many[7]['id']}
    assert {host: images['a'].leases for host, images in found.items()} == {
        f'many{number}': number for number in range(60)}


def test_many_writers(store, server):
    errors = []

    def work(number):
        try:
            mine = records.Records(server.url)
            for step in range(60):
                mine.note_build('shared', state='building', attempts=step)
                mine.note_build(f'own-{number}', state='ready',
                                attempts=step)
                mine.note_request('asked')
                mine.note_host(report('shared'))
                mine.note_host(report(f'h{number}-{step % 5}'))
                mine.hosts()
                if step % 7 == 0:
                    mine.forget_build('shared')
                    mine.withdraw_request('asked')
                    mine.forget_host('shared')
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,))
               for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    assert errors == []
    assert [store.build(f'own-{number}').attempts
            for number in range(8)] == [59] * 8
    assert len(store.hosts()) == 8 * 5 + 1


def test_a_restart_of_the_server(store, server):
    """Connections of the pool are dead then; nobody notices."""
    store.note_build('a', state='ready')
    server.stop()
    with pytest.raises(exception.Unavailable):
        store.note_build('a', state='error')
    server.start()
    deadline = time.monotonic() + 60
    while True:
        try:
            store.note_build('a', state='building')
            break
        except exception.Unavailable:
            assert time.monotonic() < deadline
    assert store.build('a').state == 'building'
