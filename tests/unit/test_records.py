# SPDX-License-Identifier: Apache-2.0
"""Records on SQLite. The same on MariaDB: tests/functional."""

import threading
import time
import zlib

import pytest
import sqlalchemy as sa
from alembic import autogenerate, command, migration

from fastboot_common import exception
from fastboot_glance import records, reports, tables


def report(host='h1', at=None, **more):
    return reports.check({
        'host': host, 'version': 3, 'at': time.time() if at is None else at,
        'software': '1', 'volume_bytes': 1, 'mirror_bytes': 2,
        'free_bytes': 3,
        'images': [{'id': 'a', 'state': 'ready', 'serial': 3}], **more})


@pytest.fixture
def url(tmp_path):
    return f'sqlite:///{tmp_path}/records.db'


@pytest.fixture
def store(url):
    found = records.Records(url)
    found.create()
    return found


def test_create_can_be_repeated(store):
    before = store.version()
    store.note_build('a', state='ready')
    store.create()
    assert store.version() == before == tables.head()
    assert store.build('a')


def test_migrations_lead_to_the_tables(store):
    with store._engine.connect() as connection:
        context = migration.MigrationContext.configure(
            connection, opts={'version_table': tables.VERSION_TABLE})
        assert autogenerate.compare_metadata(
            context, tables.METADATA) == []


def test_without_tables(url):
    empty = records.Records(url)
    assert empty.version() is None
    with pytest.raises(exception.Unavailable, match='db sync'):
        empty.builds()


def test_wrong_urls():
    for wrong in ('', 'nonsense', 'postgresql://h/d', 'oracle://x/y'):
        with pytest.raises(exception.ConfigError, match='connection'):
            records.Records(wrong)


def test_database_away_is_unavailable(tmp_path):
    away = records.Records(f'sqlite:///{tmp_path}/none/records.db')
    with pytest.raises(exception.Unavailable):
        away.builds()


def test_what_is_not_said_stays(store):
    store.note_build('a', state='building', stage='boot', progress=.5,
                     name='debian', owner='p', version=4, attempts=2,
                     builder='b1', boot_size=9)
    store.note_build('a', state='error', error='no')
    found = store.build('a')
    assert (found.name, found.owner, found.version, found.attempts,
            found.boot_size) == ('debian', 'p', 4, 2, 9)
    assert (found.state, found.stage, found.progress, found.error) == (
        'error', '', 0.0, 'no')
    store.forget_build('a')
    store.forget_build('a')
    assert store.build('a') is None


def test_unknown_state(store):
    with pytest.raises(exception.Invalid, match='flying'):
        store.note_build('a', state='flying')


def test_long_and_strange_words_are_cut(store):
    store.note_build('a', state='error', error='x' * 5000 + '\0',
                     name='\ud800' * 300, progress=float('nan'))
    found = store.build('a')
    assert len(found.error) == 1000
    assert found.name == ' ' * 255
    assert found.progress == 0.0


def test_request(store):
    store.note_request('a')
    assert store.build('a').requested
    assert store.build('a').state == 'queued'
    store.withdraw_request('a')
    assert store.build('a') is None
    store.note_build('a', state='ready', name='x')
    store.note_request('a')
    assert store.build('a').state == 'ready'
    store.withdraw_request('a')
    assert (store.build('a').requested, store.build('a').name) == (0.0, 'x')
    store.note_request('a')
    store.note_build('a', state='building')
    assert not store.build('a').requested


def test_reports(store):
    assert store.host('h1') is None
    assert store.note_host(report(at=100))
    # It was overtaken.
    assert not store.note_host(report(at=99, version=2))
    assert store.host('h1').version == 3
    assert store.note_host(report(at=100.5, version=4, images=[]))
    assert store.host('h1').version == 4
    assert store.host('h1').images == {}
    assert [host.name for host in store.hosts()] == ['h1']
    assert store.forget_host('h1')
    assert not store.forget_host('h1')
    assert store.hosts() == []


def test_clock_ahead_does_not_lock_a_host_out(store):
    store.note_host(report(at=time.time() + 10_000))
    assert store.host('h1').at <= time.time()
    assert store.note_host(report(version=5))
    assert store.host('h1').version == 5


@pytest.mark.parametrize('ahead, version', [(10_000, 5), (30, 5), (-30, 3)])
def test_our_clock_set_back(store, monkeypatch, ahead, version):
    """Found by the faults: reports were ignored until it was as late again,
    and µVMs of a new recipe were not baked for as long."""
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now + ahead)
    assert store.note_host(report(at=now + ahead))
    monkeypatch.setattr(time, 'time', lambda: now)
    assert store.note_host(report(at=now - 60, version=5)) == (version == 5)
    assert store.host('h1').version == version
    assert store.host('h1').at <= now


def test_a_hosts_clock_set_back(store):
    now = time.time()
    assert store.note_host(report(at=now))
    assert not store.note_host(report(at=now - 200, version=4))
    assert store.note_host(report(at=now - 3600, version=5))
    assert store.host('h1').version == 5
    assert store.note_host(report(at=now - 3599, version=6))
    assert store.host('h1').version == 6


def test_guests_that_need_the_export(store):
    guests = ['11111111-2222-3333-4444-555555555555']
    for said in (None, [], guests):
        store.note_host(report(lazy_guests=said))
        assert store.host('h1').lazy_guests == said
        assert store.hosts() == [store.host('h1')]


def test_microvms_of_a_host(store):
    text = 'x86_64/qemu/2/3/7.2'
    row = {'image': 'a', 'class': 'ab' * 32, 'state': 'ready', 'bytes': 5,
           'lanes': 2, 'resumed': 7, 'fallbacks': 1, 'reason': None}
    for said, kept in ((None, None), ([], []), ([row], [
            records.HostMicrovm('a', 'ab' * 32, 'ready', 5, 2, 7, 1, '')])):
        store.note_host(report(platforms=said and [text], microvms=said))
        assert store.host('h1').microvms == kept
        assert store.hosts() == [store.host('h1')]
    store.note_host(report('h2', platforms=[text, text + '1']))
    store.note_host(report('h3'))
    assert store.platforms() == {text, text + '1'}


def test_microvms(store):
    store.note_microvm('a', 'p1', state='baking', stage='boot', progress=.5)
    store.note_microvm('a', 'p2', state='refused', reason='x' * 5000,
                       basis='b')
    store.note_microvm('A', 'p1', state='none')
    store.note_microvm('a', 'p1', state='ready', group='ab', size=5,
                       seconds=1.5, baked_at=7.0)
    one, two = store.microvms('a')
    assert (one.state, one.stage, one.progress, one.group, one.bytes,
            one.seconds, one.baked_at) == ('ready', '', 0, 'ab', 5, 1.5, 7)
    assert (two.platform, two.state, two.basis, len(two.reason)) == (
        'p2', 'refused', 'b', 1000)
    assert len(store.microvms()) == 3
    store.note_microvm('a', 'p1', state='baking')
    assert store.microvms('a')[0].bytes == 5
    store.forget_microvms('a', ('refused', 'failed'))
    assert [one.platform for one in store.microvms('a')] == ['p1']
    store.forget_build('a')
    assert [one.image_id for one in store.microvms()] == ['A']
    with pytest.raises(exception.Invalid, match='flying'):
        store.note_microvm('a', 'p1', state='flying')


def test_a_host_of_the_version_before(url):
    with records.Records(url)._engine.begin() as connection:
        command.upgrade(tables._config(connection), 'r001')
        connection.execute(sa.text(
            'insert into hosts (name, at, version, software, volume_bytes, '
            'mirror_bytes, free_bytes, digest, images) '
            "values ('h1', 1, 1, '', 0, 0, 0, 'd', :images)"),
            {'images': records._encode([])})
    store = records.Records(url)
    store.create()
    found = store.host('h1')
    assert (found.lazy_guests, found.platforms, found.microvms) == (
        None, None, None)
    assert store.platforms() == set()


def test_hosts_are_told_apart_by_case(store):
    store.note_host(report('h1'))
    store.note_host(report('H1'))
    assert [host.name for host in store.hosts()] == ['H1', 'h1']


def test_all_hosts_and_one_agree_after_every_change(store):
    for number in range(5):
        for host in ('h1', 'h2', 'h3'):
            images = [] if host == 'h3' else [
                {'id': f'{n}', 'state': 'ready'} for n in range(number)]
            store.note_host(report(host, images=images))
        for host in store.hosts():
            assert host == store.host(host.name)
        # Equal reports are decoded once.
        one, two, _ = store.hosts()
        assert one.images is two.images


@pytest.mark.parametrize('member', ['images', 'microvms'])
def test_a_report_that_is_too_long(store, monkeypatch, member):
    """Not what it takes on the wire, but what it is here: an emoji has four
    bytes there, and twelve here."""
    monkeypatch.setattr(records, 'IMAGES_LIMIT', 1000)
    words = chr(0x1f600) * 90
    rows = [
        {'id': 'i', 'state': 'error', 'error': words, 'progress': 0}
        if member == 'images' else
        {'image': 'i', 'class': 'ab' * 32, 'state': 'error', 'reason': words,
         'bytes': 0, 'lanes': 0, 'resumed': 0, 'fallbacks': 0}]
    with pytest.raises(exception.Invalid, match='host h: a report of'):
        store.note_host(report('h', **{member: rows}))
    assert store.hosts() == []


@pytest.mark.parametrize('blob', [
    b'', b'not compressed', zlib.compress(b'{"i": ["rea')])
def test_a_row_that_cannot_be_read_is_its_hosts_alone(store, blob, caplog):
    store.note_host(report('bad'))
    with store._engine.begin() as connection:
        connection.execute(sa.update(tables.HOSTS).values(
            images=blob, microvms=blob, digest='ab' * 32))
    store.note_host(report('good'))
    bad, good = store.hosts()
    assert (bad.images, bad.microvms) == ({}, [])
    assert good.images['a'].state == 'ready'
    assert store.host('bad').images == {}
    said = store.host_images({'a'})
    assert said['good'] == {'a': good.images['a']}
    # It may need the image.
    assert (said['bad']['a'].state, said['bad']['a'].leases) == (
        'stale', None)
    assert 'host bad: its report cannot be read' in caplog.text


def test_too_many_hosts(store, monkeypatch):
    monkeypatch.setattr(records, 'HOSTS_LIMIT', 2)
    store.note_host(report('h1'))
    store.note_host(report('h2'))
    with pytest.raises(exception.Invalid, match='already'):
        store.note_host(report('h3'))
    assert store.note_host(report('h2'))


def in_threads(count, work):
    errors = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,))
               for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert errors == []


def test_many_writers(url, store):
    """Each has its own connection, as other processes have."""
    others = [records.Records(url) for _ in range(4)]

    def work(number):
        mine = others[number]
        for step in range(15):
            mine.note_build('shared', state='building', progress=step / 20)
            mine.note_build(f'own-{number}', state='ready', attempts=step)
            mine.note_host(report('shared'))
            mine.note_host(report(f'h{number}'))
            mine.hosts()
            mine.note_request('asked')

    in_threads(4, work)
    assert len(store.builds()) == 6
    assert len(store.hosts()) == 5
    assert all(store.build(f'own-{number}').attempts == 14
               for number in range(4))


def test_one_object_for_many_threads(store):
    def work(number):
        for _ in range(20):
            store.note_host(report(f'h{number % 3}', images=[
                {'id': f'{number}', 'state': 'ready'}]))
            assert all(host.images for host in store.hosts())

    in_threads(6, work)
    assert len(store.hosts()) == 3


def test_deadlocks_are_retried(store, monkeypatch):
    from oslo_db import exception as db_exception
    calls = []
    real = store._upsert

    def upsert(*words):
        calls.append(words)
        if len(calls) < 4:
            raise db_exception.DBDeadlock(sa.exc.OperationalError(
                '', {}, Exception('deadlock')))
        real(*words)

    monkeypatch.setattr(store, '_upsert', upsert)
    store.note_build('a', state='ready')
    assert len(calls) == 4
    assert store.build('a').state == 'ready'
