# SPDX-License-Identifier: Apache-2.0
"""The journal's fold, against a model; and entries that someone made up."""

import dataclasses
import hashlib
import json

import pytest
from hostile import survives
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import exception, journal

TIME = '2026-01-02T03:04:05+00:00'


def register(state, image_id, **changes):
    image = {'image_id': image_id, 'name': 'n', 'manifest': 'ab' * 32,
             'manifest_size': 10, 'virtual_size': 512,
             'visibility': 'public', 'owner': '', 'os_hash': {}}
    pack = hashlib.sha256(image_id.encode()).hexdigest()
    return journal.make(state, 'register', {
        'image': {**image, **changes},
        'packs': [{'digest': pack, 'size': 7}]})


def fold(entries):
    state = journal.State()
    for entry in entries:
        state = journal.apply(state, entry)
    return state


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('radpc'), st.integers(0, 4))))
def test_fold(steps):
    state, images, removed, packs, newest = journal.State(), {}, {}, {}, 0
    for kind, number in steps:
        image_id = f'image-{number}'
        serial = state.version + 1
        if kind == 'r' and image_id not in images:
            data = register(state, image_id)
            images[image_id] = [serial, 'ab' * 32]
            packs[hashlib.sha256(image_id.encode()).hexdigest()] = 7
        elif kind == 'd' and image_id in images:
            data = journal.make(state, 'deregister', {'image_id': image_id})
            gone = images.pop(image_id)
            removed[str(gone[0])] = gone
        elif kind == 'p' and image_id in images:
            images[image_id][1] = f'{serial:064d}'
            data = journal.make(state, 'repack', {'manifests': {image_id: {
                'manifest': f'{serial:064d}', 'manifest_size': 3}},
                'packs': []})
        elif kind == 'a':
            gone = sorted(packs)[:1]
            data = journal.make(state, 'drop', {
                'packs': gone, 'serials': [int(one) for one in removed]})
            removed.clear()
            packs.pop(gone[0], None) if gone else None
        else:
            data = journal.make(state, 'checkpoint', {'state': 'cd' * 32})
            newest = serial
        before = dataclasses.asdict(state)
        after = journal.apply(state, data)
        assert dataclasses.asdict(state) == before
        state = after
    assert state.version == len(steps)
    assert state.checkpoint == newest
    assert state.packs == packs
    assert {key: [one.serial, one.manifest]
            for key, one in state.images.items()} == images
    assert {key: [one.image.serial, one.image.manifest]
            for key, one in state.removed.items()} == removed
    assert all(gone.age < 3600 for gone in state.removed.values())
    assert journal.State.from_json(state.to_json(), 'x') == state
    for serial, _ in [*images.values(), *removed.values()]:
        assert state.by_serial(serial).serial == serial
    assert state.by_serial(10 ** 6) is None


def history():
    entries, state = [], journal.State()

    def add(data):
        nonlocal state
        entries.append(data)
        state = journal.apply(state, data)

    add(register(state, 'a', os_hash={'md5': 'x'}))
    add(register(state, 'b', visibility='private', owner='p'))
    add(journal.make(state, 'deregister', {'image_id': 'a'}))
    add(journal.make(state, 'repack', {'packs': [], 'manifests': {
        'b': {'manifest': 'cd' * 32, 'manifest_size': 5}}}))
    add(journal.make(state, 'checkpoint', {'state': 'ab' * 32}))
    add(journal.make(state, 'drop', {'packs': ['ab' * 32],
                                     'serials': [1]}))
    return entries


def test_entries_that_someone_made_up():
    entries = history()
    for number, entry in enumerate(entries):
        before = fold(entries[:number])
        for _, after in survives(
                lambda data, before=before: journal.apply(before, data),
                entry, count=800):
            # Whatever it took can be kept, and used.
            again = journal.State.from_json(after.to_json(), 'x')
            assert again == after
            assert all(gone.age for gone in after.removed.values())
            assert all(type(image.serial) is int
                       for image in after.images.values())


def test_states_that_someone_made_up():
    state = fold(history()[:5])
    for _, found in survives(
            lambda data: journal.State.from_json(data, 'x'),
            state.to_json(), count=2000):
        assert journal.State.from_json(found.to_json(), 'x') == found
        assert all(gone.age for gone in found.removed.values())


def changed(data, **members):
    return journal.canonical({**json.loads(data), **members})


@pytest.mark.parametrize('members', [
    {'number': True}, {'number': 1.0}, {'number': 2}, {'previous': 'x'},
    {'format': 'other'}, {'checkpoint': True}, {'checkpoint': 1},
    {'checkpoint': -1}, {'image': None}, {'packs': None},
    {'packs': [{'digest': '../..', 'size': 1}]},
    {'packs': [{'digest': 'ab' * 32, 'size': 0}]},
    {'packs': [{'digest': 'ab' * 32, 'size': True}]},
    {'packs': [{'digest': 'ab' * 32, 'size': 1 << 63}]},
])
def test_worthless_envelopes(members):
    data = changed(register(journal.State(), 'a'), **members)
    with pytest.raises(exception.Corrupt):
        journal.apply(journal.State(), data)


@pytest.mark.parametrize('members', [{'version': 2}, {'kind': 'merge'}])
def test_newer_formats(members):
    data = changed(register(journal.State(), 'a'), **members)
    with pytest.raises(exception.UnknownVersion):
        journal.apply(journal.State(), data)


@pytest.mark.parametrize('members', [
    {'image_id': '../a'}, {'image_id': '.a'}, {'image_id': 'a/b'},
    {'image_id': ''}, {'image_id': 'a' * 65}, {'image_id': 5},
    {'name': None}, {'name': '\ud800'}, {'manifest': 'AB' * 32},
    {'manifest_size': 1 << 63}, {'virtual_size': 1 << 63},
    {'manifest': 'ab'}, {'manifest_size': 0}, {'manifest_size': 1.5},
    {'virtual_size': -1}, {'virtual_size': True},
    {'virtual_size': float('inf')}, {'visibility': 'all'},
    {'owner': '../x'}, {'owner': None}, {'os_hash': {'a': 1}},
    {'os_hash': []}, {'os_hash': {'a': '\udfff'}}, {'serial': 3},
    {'unknown': 1},
])
def test_worthless_images(members):
    data = json.dumps({**json.loads(register(journal.State(), 'a')),
                       'image': {**json.loads(register(
                           journal.State(), 'a'))['image'], **members}})
    with pytest.raises(exception.Corrupt):
        journal.apply(journal.State(), data.encode())


@pytest.mark.parametrize('time', ['yesterday', 5, None,
                                  '2026-01-02T03:04:05',
                                  '2026-01-02\ud80003:04:05+00:00'])
def test_a_time_without_sense(time):
    state = fold(history()[:2])
    data = json.dumps({**json.loads(journal.make(
        state, 'deregister', {'image_id': 'a'})), 'time': time}).encode()
    with pytest.raises(exception.Corrupt):
        journal.apply(state, data)


def test_an_entry_of_another_history():
    one, two = register(journal.State(), 'a'), register(journal.State(), 'b')
    after = register(journal.apply(journal.State(), one), 'c')
    with pytest.raises(exception.Corrupt, match='rewritten'):
        journal.apply(journal.apply(journal.State(), two), after)


def test_one_id_twice():
    state = journal.apply(journal.State(), register(journal.State(), 'a'))
    with pytest.raises(exception.Corrupt):
        journal.apply(state, register(state, 'a'))


@pytest.mark.parametrize('visibility, owner, domain', [
    ('public', 'p', 'public'), ('community', 'p', 'public'),
    ('private', 'p', 'project-p'), ('private', '', 'image-i'),
    ('shared', 'p', 'image-i')])
def test_domains(visibility, owner, domain):
    image = journal.Image('i', 'n', 1, 'ab' * 32, 1, 512, visibility, owner)
    assert image.domain == domain


def test_find():
    state = fold([])
    state = journal.apply(state, register(state, 'a', name='one'))
    state = journal.apply(state, register(state, 'b', name='two'))
    state = journal.apply(state, register(state, 'c', name='two'))
    assert journal.find(state, 'a').image_id == 'a'
    assert journal.find(state, 'one').image_id == 'a'
    with pytest.raises(exception.Invalid):
        journal.find(state, 'two')
    with pytest.raises(exception.NotFound):
        journal.find(state, 'three')
