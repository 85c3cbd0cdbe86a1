# SPDX-License-Identifier: Apache-2.0
"""What is to be baked, and what is said of µVMs. The flow with a real
Glance: tests/functional."""

import dataclasses
import io
import time
import types

import pytest
from disks import BLOCK, disk, make_repository, open_repository, put
from microvms import a_key, make
from oslo_config import cfg
from test_eligibility import IMAGE

from fastboot_common import exception, journal, publish, store, upkeep
from fastboot_common.cli import base
from fastboot_common.conf import opts
from fastboot_common.microvm import shelf
from fastboot_glance import (
    bakes,
    eligibility,
    microvms,
    records,
    registry,
)
from fastboot_glance.cli import microvm as cli

ID = '11111111-1111-4111-8111-111111111111'
SIZE = 20 * BLOCK
HERE = a_key().platform
OTHER = a_key(qemu='10').platform


class Board:
    """Has what was posted."""

    def __init__(self):
        self.posted = []

    def post(self, image_id, reason, among=None, platform=''):
        self.posted.append((image_id, platform))


class Glance:
    """Has the properties that were set."""

    def __init__(self):
        self.told = {}

    def tell(self, image_id, values):
        self.told.setdefault(image_id, {}).update(values)

    def get(self, image_id):
        raise exception.NotFound(image_id)


class World:
    """A registered image, and what looks after its µVMs."""

    def __init__(self, path, platform=HERE, add=True):
        """:param add: make it; else it is there."""
        self.path = path
        self.repository = make_repository(path / 'repository') if add \
            else open_repository(path / 'repository')
        conf = opts.register(cfg.ConfigOpts())
        conf([], default_config_files=[])
        conf.set_override('state_dir', str(path))
        self.conf = conf
        self.records = records.Records(f'sqlite:///{path}/records.db')
        if add:
            self.records.create()
        self.board, self.glance = Board(), Glance()
        self.said = []
        herald = types.SimpleNamespace(
            announce=lambda version: None,
            notify=lambda event, payload: self.said.append(event))
        self.shelved = microvms.Microvms(base.Environment(conf))
        self.registry = registry.Registry(
            self.repository, self.records, self.glance, herald, self.shelved)
        self.bakes = bakes.Bakes(
            conf, self.board, eligibility.Policies(conf), self.records,
            self.registry, platform)
        self.image = dataclasses.replace(
            IMAGE, image_id=ID, visibility='public',
            properties={'fastboot': 'microvm'})
        if add:
            self.add()

    def add(self, seed=1):
        put(self.repository, self.path / 'work', ID, disk(SIZE, seed),
            boot=(1, 2), visibility='public')
        self.registry.rewrite(ID, lambda old: dataclasses.replace(
            old, source=old.source | {'origin': 'glance'}))

    @property
    def found(self):
        return self.registry.find(ID)

    def look(self, **changes):
        image = dataclasses.replace(self.image, **changes)
        return self.bakes.look(image, self.found)

    def artifact(self, room, **key):
        """What a bake of the image leaves."""
        before = make.__globals__['a_key']
        make.__globals__['a_key'] = lambda: a_key(**key)
        try:
            make(room, size=SIZE)
        finally:
            make.__globals__['a_key'] = before

    def publisher(self):
        return publish.Publisher(
            self.shelved.writable(), self.path / 'cache', threads=1)

    def bake(self, origin='glance', **key):
        """Publish a µVM of the image."""
        room = self.path / 'baked'
        self.artifact(room, **key)
        return shelf.put(room, self.found, self.repository, self.publisher(),
                         self.path / 'work', origin=origin)

    @property
    def there(self):
        return [one.platform for one in self.shelved.of(ID)]

    @property
    def record(self):
        return next(one for one in self.records.microvms(ID)
                    if one.platform == HERE.text)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def host(world, name, *platforms):
    world.records.note_host({
        'host': name, 'version': 1, 'at': 1, 'software': '',
        'volume_bytes': 0, 'mirror_bytes': 0, 'free_bytes': 0, 'images': [],
        'lazy_guests': None, 'microvms': None,
        'platforms': [one.text for one in platforms] or None})


def test_one_that_is_missing_is_posted(world):
    assert world.look()
    assert world.board.posted == [(ID, HERE.text)]
    assert world.record.state == 'none'
    assert world.glance.told[ID]['fastboot_microvm'] == 'none'


def test_no_wish_no_bake(world):
    for properties in ({}, {'fastboot': 'cache'}):
        assert not world.look(properties=properties)
    assert not (world.board.posted or world.glance.told)
    world.conf.set_override('default', 'microvm', 'eligibility')
    other = bakes.Bakes(
        world.conf, world.board, eligibility.Policies(world.conf),
        world.records, world.registry, HERE)
    image = dataclasses.replace(world.image, properties={})
    assert other.look(image, world.found)


def test_the_repository_is_not_made_for_nothing(world):
    world.look()
    assert not (world.path / 'repository' / 'microvms').exists()


def test_images_of_others(world):
    world.registry.rewrite(ID, lambda old: dataclasses.replace(
        old, source={}))
    assert not world.look()


@pytest.mark.parametrize('reported, wanted', [
    ([], True), ([()], True), ([(OTHER,)], False), ([(OTHER, HERE)], True),
    ([(OTHER,), (HERE,)], True), ([(), (OTHER,)], False)])
def test_platforms_in_use(world, reported, wanted):
    for number, platforms in enumerate(reported):
        host(world, f'h{number}', *platforms)
    assert world.look() == wanted
    assert bool(world.board.posted) == wanted


def test_a_builder_that_bakes_nothing(tmp_path):
    world = World(tmp_path, None)
    assert not world.look()
    world.bake()
    assert not world.look()
    assert world.glance.told[ID]['fastboot_microvm'] == 'ready'


def test_one_that_is_there(world):
    world.bake()
    assert not world.look()
    assert world.record.state == 'ready'
    assert world.record.group == a_key().digest
    assert world.glance.told[ID] == {
        'fastboot_microvm': 'ready', 'fastboot_microvm_error': None}


def test_one_of_another_platform_does_not_do(world):
    world.bake(qemu='10')
    assert world.look()
    assert world.there == [OTHER.text]
    assert world.glance.told[ID]['fastboot_microvm'] == 'ready'


def test_one_of_a_platform_that_nobody_has_any_more(world):
    """Upkeep removed it: recipes before ours."""
    world.bake(qemu='10')
    assert world.look()
    one, = world.shelved.of(ID)
    world.shelved.remove(one)
    assert world.look()
    assert {row.platform: (row.state, row.group)
            for row in world.records.microvms(ID)} == {
        HERE.text: ('none', ''), OTHER.text: ('none', '')}


@pytest.mark.parametrize('state', ['refused', 'failed'])
def test_what_was_refused_is_remembered(world, state):
    world.bakes.ended(world.image, state, world.bakes.root(world.found),
                      'no cloud-init')
    assert world.glance.told[ID] == {
        'fastboot_microvm': 'error',
        'fastboot_microvm_error': 'no cloud-init'}
    assert world.said == ['not_baked']
    assert not world.look()
    assert world.record.reason == 'no cloud-init'
    # Until something is another.
    world.conf.set_override('memory', 1024, 'bakery')
    assert world.look()
    world.conf.clear_override('memory', 'bakery')
    world.bakes.ended(world.image, state, 'of another content', '')
    assert world.look()
    world.bakes.ended(world.image, state, world.bakes.root(world.found), '')
    assert not world.look()
    world.bakes.again(world.image)
    assert world.look()


def test_what_failed_for_a_passing_reason(world, monkeypatch):
    root = world.bakes.root(world.found)
    world.bakes.ended(world.image, 'failed', root, 'Glance was away', True)
    assert not world.look()
    later = time.time() + 6 * 3600
    monkeypatch.setattr(bakes, 'time', types.SimpleNamespace(
        time=lambda: later))
    assert world.look()
    assert world.record.state == 'none'
    # It is the image's fault by now.
    world.bakes.ended(world.image, 'failed', root, 'it does not boot')
    later += 3600 * 24
    assert not world.look()


def test_one_of_another_content_goes(world):
    world.bake()
    world.repository.remove(ID)
    world.add(seed=2)
    assert world.look()
    assert world.there == []


def test_who_may_see_it(world):
    first = world.bake().published.image
    world.repository.move(world.found, 'private', 'p')
    assert not world.look(visibility='private', owner='p')
    moved = world.shelved.of(ID)[0].entry
    assert (moved.domain, moved.manifest) == ('project-p', first.manifest)
    assert not list(upkeep.check(world.shelved.repository(), deep=True))


def test_moves_of_an_image_are_apart(world, monkeypatch):
    """Its owner may change his mind as often as he likes."""
    world.bake()

    def settle(visibility):
        image = dataclasses.replace(
            world.image, visibility=visibility, owner='p')
        world.registry.settle(image, world.found)
        world.bakes.look(image, world.found)
        return world.found.visibility, world.shelved.of(ID)[0].entry.domain

    private = 'private', 'project-p'
    assert settle('private') == private
    version = world.repository.state().version
    for visibility in ('public', 'private') * 3 + ('public',):
        assert settle(visibility) == private
    assert world.repository.state().version == version
    # The audit comes later.
    monkeypatch.setattr(journal.Removed, 'age', 301.0)
    assert settle('public') == ('public', 'public')


def test_wishes_change(world):
    world.bake()
    world.look()
    world.bake(origin=None, qemu='10')
    for _ in range(2):
        assert not world.look(properties={'fastboot': 'cache',
                                          'fastboot_microvm': 'ready'})
        # Somebody put it there by hand.
        assert world.there == [OTHER.text]
        assert not world.records.microvms(ID)
        assert world.glance.told[ID]['fastboot_microvm'] is None


def test_gone_with_its_image(world):
    world.bake()
    world.bake(origin=None, qemu='10')
    world.registry.gone(ID)
    assert (world.found, world.there) == (None, [])


def test_died_between_the_two(world):
    """The image is gone, its µVM is not yet."""
    world.bake()
    world.repository.remove(ID)
    world.registry.refuse(world.image, eligibility.Refusal('no'))
    assert world.there == []


def test_gone_though_the_microvms_are_damaged(world):
    """The next audit looks again at what is still known."""
    world.bake()
    world.registry.note(world.image, 'ready')
    head = world.path / 'repository' / 'microvms' / 'head.json'
    whole = head.read_bytes()
    head.write_bytes(b'?')
    with pytest.raises(exception.Corrupt):
        world.registry.gone(ID)
    assert world.found is None
    assert world.records.build(ID)
    head.write_bytes(whole)
    world.registry.gone(ID)
    assert (world.there, world.records.build(ID)) == ([], None)


def test_another_of_the_same_name_stays(world):
    world.bake()
    old, = world.shelved.of(ID)
    world.shelved.remove(old)
    world.bake()
    assert not world.shelved.remove(old)
    assert world.there == [HERE.text]


class TestTidy:
    """Upkeep of the repository of µVMs."""

    def tidy(self, world, *used):
        return world.shelved.tidy(world.repository,
                                  {one.text for one in used})

    def test_without_a_repository(self, world):
        assert self.tidy(world) == 0

    def test_what_is_of_use_stays(self, world):
        world.bake()
        assert self.tidy(world, OTHER) == 0

    def test_without_an_image(self, world, monkeypatch):
        world.bake()
        world.repository.remove(ID)
        # It may be moving.
        assert self.tidy(world) == 0
        monkeypatch.setattr(microvms, '_MOVES', -1)
        assert self.tidy(world) == 1
        assert world.there == []

    def test_without_an_image_by_a_clock_that_is_ahead(
            self, world, monkeypatch):
        world.bake()
        world.repository.remove(ID)
        monkeypatch.setattr(journal, 'age', lambda time: -1e8)
        assert self.tidy(world) == 1

    def test_of_an_image_that_cannot_be_read(self, world, caplog):
        world.bake()
        root = world.repository.store._root
        digest = world.found.manifest
        (root / store.object_name('manifests', digest)).unlink()
        world.repository = open_repository(root)
        assert self.tidy(world) == 0
        assert world.there == [HERE.text]
        assert f'the µVM of image {ID} stays' in caplog.text

    def test_of_another_content(self, world):
        world.bake()
        world.repository.remove(ID)
        world.add(seed=2)
        assert self.tidy(world) == 1

    def test_of_an_older_recipe(self, world):
        old = a_key(recipe=1)
        assert old.recipe < HERE.recipe
        world.bake(recipe=1)
        world.bake(recipe=HERE.recipe + 1)
        assert self.tidy(world, old.platform) == 0
        assert self.tidy(world, HERE) == 1
        assert world.there == [a_key(recipe=HERE.recipe + 1).platform.text]

    def test_one_that_is_none_hides_no_other(self, world):
        world.bake()
        put(world.shelved.writable(), world.path / 'work', 'stray',
            b'x' * BLOCK)
        assert self.tidy(world) == 0
        assert world.there == [HERE.text]
        state = world.shelved.repository().state()
        assert shelf.find(state, ID).image_id in state.images


class TestCommands:
    """``fastbootctl microvm list|remove``."""

    def run(self, world, kind, *words):
        app = types.SimpleNamespace(conf=world.conf, stdout=io.StringIO())
        command = kind(app, None)
        command.app = app
        found = command.take_action(
            command.get_parser('x').parse_args(words))
        return [*found[1]] if found else app.stdout.getvalue()

    def test_list(self, world):
        assert self.run(world, cli.List) == []
        world.bake()
        world.bake(origin=None, qemu='10')
        one, two = self.run(world, cli.List)
        assert one[:3] == (ID, a_key().digest, HERE.text)
        assert (one[-1], two[-1]) == ('glance', '')

    def test_remove(self, world):
        world.bake()
        world.bake(qemu='10')
        group = a_key().digest
        with pytest.raises(exception.NotFound, match='class'):
            self.run(world, cli.Remove, ID, '--class', 'x')
        assert group in self.run(world, cli.Remove, f'name of {ID}',
                                 '--class', group[:9])
        assert world.there == [OTHER.text]
        # Also of one that is not registered any more.
        world.repository.remove(ID)
        self.run(world, cli.Remove, ID)
        assert world.there == []
        with pytest.raises(exception.NotFound):
            self.run(world, cli.Remove, ID)


def test_repacked_meanwhile(world):
    """What is remembered of it is not its old manifest."""
    world.bake()
    before, = world.shelved.of(ID)
    repository = world.shelved.writable()
    made = repository.read_manifest(before.entry.manifest)
    made.capture = {'state': 'another'}
    digest = repository.keep_manifest(made.pack())
    repository.append('repack', lambda state: {'packs': [], 'manifests': {
        before.entry.image_id: {'manifest': digest,
                                'manifest_size': len(made.pack())}}})
    after, = world.shelved.of(ID)
    assert after.entry.manifest == digest
