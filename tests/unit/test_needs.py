# SPDX-License-Identifier: Apache-2.0
"""Deregistered images that servers of hosts need."""

import functools
import io
import time
import types

import pytest
import sqlalchemy as sa
from disks import BLOCK, disk, make_repository, put, read_back
from oslo_config import cfg

from fastboot_common import exception, journal, repack, upkeep
from fastboot_common.cli import repo as cli
from fastboot_common.conf import opts
from fastboot_glance import (
    builder,
    needs,
    records,
    reports,
    tables,
    upgradecheck,
)

SIZE = 9 * BLOCK


def report(host, *images, at=None):
    """:param images: members of each, beside an id."""
    return reports.check({
        'host': host, 'version': 3, 'at': at or time.time(), 'software': '1',
        'volume_bytes': 1, 'mirror_bytes': 2, 'free_bytes': 3,
        'images': [{'id': 'one', 'serial': 1} | image for image in images]})


class World:
    """A repository whose image ``one`` was deregistered, and a database."""

    def __init__(self, path):
        self.repository = make_repository(path / 'repository')
        put(self.repository, path / 'work', 'one', disk(SIZE, 1))
        self.repository.remove('one')
        self.url = f'sqlite:///{path}/records.db'
        self.records = records.Records(self.url)
        self.records.create()
        self.conf = opts.register(cfg.ConfigOpts())
        self.conf([], default_config_files=[])
        self.conf.set_override('state_dir', str(path))
        self.conf.set_override('connection', self.url, 'database')
        self.conf.set_override('retention_days', 0.0, 'repository')

    def say(self, host, *images, **values):
        self.records.note_host(report(host, *images, **values))

    def collect(self):
        return upkeep.collect(self.repository, 0, 0, needed=functools.partial(
            needs.keep, self.records))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


LACKS = {'state': 'stale', 'progress': .5, 'leases': 1}


def test_kept_until_the_host_says_otherwise(world, caplog):
    world.say('h1', LACKS)
    done = world.collect()
    assert (done.images, done.kept, done.files) == (0, 1, 0)
    assert 'image one (serial 1)' in caplog.text and 'h1' in caplog.text
    gone = world.repository.state().removed['1'].image
    assert read_back(world.repository, gone) == disk(SIZE, 1)
    world.say('h1', LACKS | {'progress': 1})
    assert world.collect().images == 1
    assert not world.repository.state().packs


def test_kept_while_a_volume_or_a_report_cannot_be_read(world):
    world.say('h1', {'state': 'error', 'serial': None, 'leases': 1})
    assert world.collect().kept == 1
    world.say('h1')
    with world.records._engine.begin() as connection:
        connection.execute(sa.update(tables.HOSTS).values(images=b'spoilt'))
    assert world.collect().kept == 1
    world.say('h1')
    assert world.collect().images == 1


def test_kept_until_the_host_is_forgotten(world):
    # Its last report is older than the end of the image.
    world.say('h1', {'state': 'thawed', 'progress': .5, 'leases': 2}, at=1.0)
    assert world.collect().kept == 1
    world.records.forget_host('h1')
    assert world.collect().images == 1


@pytest.mark.parametrize('said', [
    {'state': 'complete', 'progress': 1, 'leases': 3},
    {'state': 'stale', 'progress': 1, 'leases': 3},
    {'state': 'thawed', 'progress': .5, 'leases': 0},
    {'state': 'thawed', 'progress': .5, 'leases': 1, 'serial': 2},
    {'state': 'ready', 'progress': 0, 'leases': 0},
    {'state': 'ready'}, {'state': 'absent'}, {'state': 'complete',
                                              'progress': 1},
    LACKS | {'id': 'another'}])
def test_not_needed(world, said):
    world.say('h1', said)
    assert world.collect().images == 1


@pytest.mark.parametrize('said', [
    # Just coming: the lease is first.
    {'state': 'ready', 'leases': 1},
    # The row is of what the id was registered as since.
    {'state': 'stale', 'progress': 0, 'leases': 1, 'serial': 7},
    # Of old agents, who do not tell leases.
    {'state': 'stale', 'progress': .9}, {'state': 'thawed', 'progress': .9}])
def test_needed_as_far_as_can_be_told(world, said):
    world.say('h1', {'state': 'complete', 'progress': 1, 'leases': 1})
    world.say('h2', said)
    assert needs.find(world.records, [
        world.repository.state().removed['1'].image]) == {1: ['h2']}


def test_nothing_goes_while_nobody_can_be_asked(world, tmp_path):
    world.records = records.Records(f'sqlite:///{tmp_path}/no/x.db')
    before = world.repository.state().version
    with pytest.raises(exception.Unavailable):
        world.collect()
    assert world.repository.state().version == before
    assert world.repository.state().packs


def test_young_ones_are_not_asked_for(world):
    upkeep.collect(world.repository, 3600, 0, needed=lambda images: 1 / 0)


def test_many_hosts_are_not_all_named(world):
    for number in range(7):
        world.say(f'h{number}', LACKS)
    image = world.repository.state().removed['1'].image
    assert 'h4 and 2 more need' in needs.describe(
        image, needs.find(world.records, [image])[1])


def test_builders_ask(world):
    world.say('h1', LACKS)
    service = types.SimpleNamespace(
        _conf=world.conf, _records=world.records,
        _microvms=lambda: None, _sweep=lambda: None,
        _open=lambda: world.repository, _tidy=lambda *_: None,
        _stop=types.SimpleNamespace(wait=lambda seconds: True))
    service._collect = functools.partial(builder.Builder._collect, service)
    builder.Builder._keep_up(service)
    assert '1' in world.repository.state().removed
    world.records.forget_host('h1')
    builder.Builder._keep_up(service)
    assert not world.repository.state().removed


def test_fastbootctl_asks(world, monkeypatch):
    world.say('h1', LACKS)
    app = types.SimpleNamespace(stdout=io.StringIO())
    env = types.SimpleNamespace(
        conf=world.conf, writable_repository=lambda: world.repository)
    command = cli.Gc(app, None)
    monkeypatch.setattr(cli.Gc, 'env', env)
    arguments = command.get_parser('gc').parse_args([])
    keys, values = command.take_action(arguments)
    found = dict(zip(keys, values, strict=True))
    assert (found['images'], found['kept']) == (0, 1)
    world.conf.set_override('connection', '', 'database')
    assert dict(zip(*command.take_action(arguments), strict=True))[
        'images'] == 1


@pytest.mark.parametrize('error', [
    exception.NoSpace('full'), RuntimeError('a bug')])
def test_a_full_repository_is_collected(world, monkeypatch, caplog, error):
    """Rewriting packs takes room, which collecting makes."""
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(repack, 'repack', fail)
    builder.Builder._collect(
        types.SimpleNamespace(_conf=world.conf), world.repository, 0)
    assert not world.repository.state().packs
    assert str(error) in caplog.text


def test_what_cannot_be_collected_stops_nothing_else(
        world, monkeypatch, caplog):
    called = []
    monkeypatch.setattr(repack, 'repack', lambda *_, **__: called.append(
        1) or repack.Repacked())

    def fail(*_):
        raise exception.Unavailable('away')

    service = types.SimpleNamespace(
        _conf=world.conf, _records=types.SimpleNamespace(host_images=fail),
        _microvms=lambda: None, _sweep=fail,
        _open=lambda: world.repository,
        _tidy=lambda *_: called.append(2),
        _stop=types.SimpleNamespace(wait=lambda seconds: True))
    service._collect = functools.partial(builder.Builder._collect, service)
    builder.Builder._keep_up(service)
    assert called == [1, 2]
    assert caplog.text.count('upkeep: away') == 2


def test_fastbootctl_collects_where_nothing_can_be_rewritten(
        world, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise exception.NoSpace('full')

    monkeypatch.setattr(repack, 'repack', fail)
    command = cli.Gc(types.SimpleNamespace(stdout=io.StringIO()), None)
    monkeypatch.setattr(cli.Gc, 'env', types.SimpleNamespace(
        conf=world.conf, writable_repository=lambda: world.repository))
    command.take_action(command.get_parser('gc').parse_args([]))
    assert not world.repository.state().packs
    assert 'no packs were rewritten: full' in caplog.text


def test_the_check_names_them(world):
    def words():
        return upgradecheck.deregistered(world.conf).details

    assert 'none is kept' in words()
    world.say('h1', LACKS)
    assert 'image one (serial 1)' in words() and 'host forget' in words()
    world.conf.set_override('retention_days', 7.0, 'repository')
    assert 'none is kept' in words()
    world.conf.set_override('connection', '', 'database')
    assert 'Skipped' in words()


@pytest.mark.parametrize('hours, stays', [(24, True), (0, False)])
def test_microvms_that_went_are_kept_for_their_own_time(world, hours, stays):
    world.conf.set_override('retention_hours', hours, 'bakery')
    world.conf.set_override('grace_hours', 0.0, 'repository')
    service = types.SimpleNamespace(_conf=world.conf, _records=world.records)
    service._collect = functools.partial(builder.Builder._collect, service)
    builder.Builder._tidy(service, None, types.SimpleNamespace(
        repository=lambda: world.repository, tidy=lambda *_: 0))
    found = world.repository.state()
    assert bool(found.removed) is stays
    assert bool(found.packs) is stays


def test_builders_warn_of_the_last_numbers(world, caplog, monkeypatch):
    service = types.SimpleNamespace(_conf=world.conf)
    builder.Builder._collect(service, world.repository, 3600)
    assert 'new repository' not in caplog.text
    monkeypatch.setattr(journal, 'SERIAL_WARNING', 2)
    builder.Builder._collect(service, world.repository, 3600)
    assert 'new repository' in caplog.text
