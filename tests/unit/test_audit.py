# SPDX-License-Identifier: Apache-2.0
"""The steward and his desk. With a real Glance: tests/functional."""

import threading
import time
import types

import pytest
from test_bakes import ID, World

from fastboot_common import exception
from fastboot_glance import audit

HOUR = 3600.0


def steward(world, again=6 * HOUR, **parts):
    """One to whom Glance shows what the world's image is."""
    glance = types.SimpleNamespace(get=lambda image_id: world.image)
    values = {
        'board': world.board, 'glance': glance,
        'policies': types.SimpleNamespace(refuse=lambda image: None),
        'store': world.records, 'register': world.registry,
        'refresher': types.SimpleNamespace(look=lambda *_: None),
        'baker': types.SimpleNamespace(look=lambda *_: None),
        'removals': 20, 'again': again} | parts
    return audit.Steward(**values)


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    found.board.post = lambda image_id, reason, among=None: (
        found.board.posted.append(image_id))
    return found


class TestErrors:
    """Builds in error, which nobody asks for again."""

    @pytest.fixture(autouse=True)
    def _failed(self, world):
        world.repository.remove(ID)
        self.world = world

    def fail(self, passing, age):
        self.world.registry.failed(self.world.image, 'words', passing)
        with self.world.records._engine.begin() as connection:
            connection.exec_driver_sql(
                'update builds set updated = ?', (time.time() - age,))

    def posted(self, **options):
        one = steward(self.world, **options)
        one.look(ID)
        return self.world.board.posted == [ID]

    def test_the_images_own_stay(self):
        self.fail(False, 1000 * HOUR)
        assert not self.posted()

    @pytest.mark.parametrize('age, again, posted', [
        (7 * HOUR, 6 * HOUR, True), (5 * HOUR, 6 * HOUR, False),
        (7 * HOUR, 0.0, False)])
    def test_others_are_tried_again_after_hours(self, age, again, posted):
        self.fail(True, age)
        assert self.posted(again=again) == posted
        assert self.world.records.build(ID).state == (
            'queued' if posted else 'error')

    def test_who_asks_does_not_wait(self):
        self.fail(False, 0)
        self.world.records.note_request(ID)
        assert self.posted()


@pytest.mark.parametrize('error', [
    exception.Corrupt, exception.NotFound, exception.Invalid,
    exception.NoSpace])
def test_one_bad_image_is_not_in_the_way_of_others(world, error):
    seen = []

    def get(image_id):
        seen.append(image_id)
        raise error('damaged')

    world.registry.gone = get
    steward(world, glance=types.SimpleNamespace(get=get)).look_at('abc')
    if error is exception.NotFound:
        seen = seen[::2]
    assert seen == ['a', 'b', 'c']


class Fake(audit.Steward):
    """Does what it is told to, and says what it did."""

    def __init__(self, audits=(), looks=None):
        self.audits = list(audits)
        self.looks = looks
        self.seen = []
        self.changed = threading.Semaphore(0)

    def look(self, image_id):
        self.seen.append(image_id)
        self.changed.release()
        if self.looks:
            raise self.looks

    def audit(self):
        self.seen.append('audit')
        self.changed.release()
        if self.audits and (error := self.audits.pop(0)):
            raise error


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr(audit, '_GATHER', .01)
    made = []

    def make(one, interval):
        found = audit.Desk(lambda: one, interval)
        made.append(found)
        found.start()
        return found

    yield make
    for found in made:
        found.stop()
        found.join(10)


def wait(one, *seen):
    for _ in seen:
        assert one.changed.acquire(timeout=20)
    assert one.seen[-len(seen):] == list(seen)


@pytest.mark.parametrize('error', [
    exception.Corrupt('damaged'), exception.Unavailable('away'),
    ValueError('unforeseen')])
def test_an_image_that_always_fails_does_not_put_off_the_audit(
        desk, monkeypatch, error):
    monkeypatch.setattr(audit, '_AGAIN', .5)
    one = Fake(looks=error)
    found = desk(one, 1.0)
    wait(one, 'audit')
    deadline = time.monotonic() + 20
    while one.seen.count('audit') < 3 and time.monotonic() < deadline:
        found.put('bad')
        time.sleep(.02)
    assert one.seen.count('audit') >= 3


def test_what_was_left_is_looked_at_soon(desk, monkeypatch):
    monkeypatch.setattr(audit, '_AGAIN', .05)
    one = Fake(looks=exception.Unavailable('away'))
    found = desk(one, HOUR)
    wait(one, 'audit')
    found.put('one')
    wait(one, 'one', 'audit')


def test_an_audit_that_failed_is_repeated_soon(desk, monkeypatch):
    monkeypatch.setattr(audit, '_AGAIN', .05)
    one = Fake([exception.Unavailable('away'), ValueError('unforeseen')])
    desk(one, HOUR)
    wait(one, 'audit', 'audit', 'audit')
    assert not one.changed.acquire(timeout=.3)


def test_a_steward_who_cannot_be_made_yet(monkeypatch):
    monkeypatch.setattr(audit, '_AGAIN', .05)
    one, calls = Fake(), []

    def make():
        calls.append(1)
        if len(calls) < 3:
            raise exception.NotFound('there is no repository yet')
        return one

    found = audit.Desk(make, HOUR)
    found.put('x')
    found.start()
    assert one.changed.acquire(timeout=20)
    found.stop()
    found.join(10)
