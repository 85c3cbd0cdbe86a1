# SPDX-License-Identifier: Apache-2.0
"""One bake, from what was baked on; with a real Glance:
tests/functional."""

import dataclasses
import threading
import types

import pytest

pytest.importorskip('taskflow')

import test_bakes
from test_bakes import HERE, ID

from fastboot_common import exception
from fastboot_glance import bakery, staging
from fastboot_glance.flows import bake


@pytest.fixture
def world(tmp_path):
    return test_bakes.World(tmp_path)


@pytest.fixture
def work(world, monkeypatch):
    """What was baked lies there."""
    monkeypatch.setattr(bakery, 'platform', lambda options: HERE)
    with staging.open_stage(world.path / 'stage', ID) as stage:
        found = bake.Work(
            image=world.image, found=world.found, stage=stage,
            cancel=threading.Event(), glance=None, registry=world.registry,
            bakes=world.bakes, publisher=world.publisher(), platform=HERE,
            options=world.conf.bakery, report=types.SimpleNamespace(
                phase=lambda name, total: None))
        stage.microvm.mkdir()
        world.artifact(found._baked)
        yield found


def test_what_was_baked_is_published(world, work):
    work.announce(work.bake())
    assert world.there == [HERE.text]


def test_others_may_see_the_image_meanwhile(world, work):
    world.repository.move(world.found, 'private', 'p')
    work.bake()
    one, = world.shelved.of(ID)
    assert one.entry.domain == 'project-p'


def test_the_image_goes_meanwhile(world, work):
    world.repository.remove(ID)
    with pytest.raises(exception.NotFound, match='not registered'):
        work.bake()
    assert world.there == []


def test_the_image_gets_another_content_meanwhile(world, work):
    world.repository.remove(ID)
    world.add(seed=2)
    with pytest.raises(exception.Busy, match='another content'):
        work.bake()
    assert world.there == []


def test_what_was_baked_of_another_content(world, work, monkeypatch):
    """It lies there since, and another attempt begins."""
    world.repository.remove(ID)
    world.add(seed=2)
    anew = bakery.Bake('refused', 'baked anew', None, {})
    monkeypatch.setattr(bake.build, 'fetch', lambda *words: None)
    monkeypatch.setattr(bake.Work, '_bake', lambda self: anew)
    later = dataclasses.replace(work, found=world.found)
    assert later.bake() == {'state': 'refused', 'reason': 'baked anew'}
    assert not work._baked.exists()


def test_a_bake_is_given_up_for_a_build(work, monkeypatch):
    monkeypatch.setattr(bake, '_LOOK', 0)
    monkeypatch.setattr(bake, '_TICK', .01)
    glance = types.SimpleNamespace(get=lambda image_id: work.image)
    waits = threading.Event()
    one = dataclasses.replace(work, glance=glance, gives_way=waits.is_set)
    with one._watched() as given_up:
        assert not given_up.wait(.2)
        waits.set()
        assert given_up.wait(10)
