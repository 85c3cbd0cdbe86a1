# SPDX-License-Identifier: Apache-2.0
"""What hosts say that guests read: checked, bounded, added to boot sets."""

import base64
import dataclasses
import hashlib
import random
import time
from unittest import mock

import numpy as np
import pytest
import zstandard
from disks import BLOCK, data_blocks, disk, make_repository, put, read_back
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import exception, manifest, observation, trace
from fastboot_glance import centre, images, observations, records, registry

SIZE = 600 * BLOCK
DATA = disk(SIZE, 1)
WITH_DATA = data_blocks(DATA)
GLANCE_IMAGE = images.Image(
    'image', 'name', 'active', None, None, 'raw', 'bare', 'owner', 'public',
    '', '', {})


def reads(numbers, start=0):
    """One read a block, a second each."""
    found = np.zeros(len(numbers), trace.DTYPE)
    found['time'] = (np.arange(len(numbers)) + start) * 1_000_000
    found['offset'] = np.array(numbers, np.uint64) * BLOCK
    found['length'] = BLOCK
    return found


def told(numbers=range(100), host='h1', **more):
    return {'host': host, 'image': 'image', 'serial': 1,
            'reads': observation.encode(reads(list(numbers))), **more}


def packed(data):
    return base64.b64encode(zstandard.compress(data)).decode()


# The text

@given(rows=st.lists(st.tuples(
    st.integers(0, 1000), st.integers(0, SIZE - 1), st.integers(1, 99999)),
    min_size=1, max_size=50))
def test_reads_come_back(rows):
    found = np.zeros(len(rows), trace.DTYPE)
    for name, values in zip(('time', 'offset', 'length'),
                            zip(*sorted(rows), strict=True), strict=True):
        found[name] = values
    text = observation.encode(found)
    assert (observation.decode(text, SIZE + 99999) == found).all()


def test_the_longest_observation_is_within_the_limit():
    found = np.frombuffer(random.Random(1).randbytes(
        observation.READS * trace.DTYPE.itemsize), trace.DTYPE)
    assert len(observation.encode(found)) <= observation.LIMIT


def changed(**columns):
    found = reads(list(range(9)))
    for name, value in columns.items():
        found[name][4:] = value
    return observation.encode(found)


HOSTILE = [
    None, 7, b'x', [], {}, '', 'x', '\udc80', 'AAAA', 'Ü' * 4,
    'A' * (observation.LIMIT + 4),
    packed(b''), packed(b'x'), packed(bytes(24 * (observation.READS + 1))),
    packed(bytes(24)), base64.b64encode(bytes(24)).decode(),
    # A frame that says it is small, and one that is cut.
    base64.b64encode(zstandard.compress(bytes(48))[:-3]).decode(),
    changed(length=0), changed(length=trace.LONGEST + 1),
    changed(offset=1 << 63), changed(offset=(1 << 64) - 1),
    changed(time=(1 << 64) - 1), changed(time=0), changed(boot=1),
    # More than the window may hold: 17 reads of 32 MiB.
    observation.encode(np.array([
        (0, 0, trace.LONGEST, 0)] * 17, trace.DTYPE)),
]


@pytest.mark.parametrize('text', HOSTILE)
def test_reads_without_sense(text):
    with pytest.raises(exception.Corrupt) as caught:
        observation.decode(text, 1 << 62)
    assert len(str(caught.value)) < 500
    with pytest.raises(exception.Invalid):
        observations.check(told(reads=text))


def test_reads_behind_the_end():
    text = told([599, 600])['reads']
    assert len(observation.decode(text, SIZE + BLOCK)) == 2
    with pytest.raises(exception.Corrupt, match='behind the end'):
        observation.decode(text, SIZE)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_reads(data):
    for text in (base64.b64encode(data).decode(), packed(data)):
        try:
            found = observation.decode(text, SIZE)
        except exception.Corrupt:
            continue
        assert (found['offset'] + found['length'] <= SIZE).all()


# What comes over the bus

@pytest.mark.parametrize('wrong', [
    None, [], 'x', {}, told(host='../x'), told(host=None),
    told(image='../x'), told(image=7), told(image=None), told(serial=0),
    told(serial=True), told(serial='1'), told(serial=1 << 20),
    told(serial=None), told(reads=None)])
def test_observations_without_sense(wrong):
    with pytest.raises(exception.Invalid) as caught:
        observations.check(wrong)
    assert len(str(caught.value)) < 500


def test_unknown_members_are_dropped():
    assert observations.check(told(news=1)) == told()


values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(
    st.integers(), max_size=2)


@given(wrong=values | st.fixed_dictionaries({
    'host': st.just('h1') | values, 'image': st.just('image') | values,
    'serial': st.just(1) | values,
    'reads': st.sampled_from(HOSTILE) | values}))
def test_the_endpoint_never_raises(place, wrong):
    centre.Endpoint(place.store, place.seen.append).observe({}, wrong)
    assert place.store.observations('image') == []
    assert place.seen == []


class Place:
    """A repository with an image, records, and a Glance of no account."""

    def __init__(self, path):
        self.repository = make_repository(path / 'repo')
        self.path = path
        self.store = records.Records(f'sqlite:///{path}/records.db')
        self.store.create()
        self.glance, self.herald = mock.Mock(), mock.Mock()
        self.registry = registry.Registry(
            self.repository, self.store, self.glance, self.herald, None)
        self.seen = []

    def publish(self, boot=(), **capture):
        image = put(self.repository, self.path / 'work', 'image', DATA,
                    boot).image
        if capture:
            def change(old):
                old.capture = capture
                return old
            self.registry.rewrite('image', change)
        self.store.note_build('image', state='ready', version=1,
                              boot_size=len(boot) * BLOCK, error='no boot')
        return image

    @property
    def image(self):
        return self.repository.state().images['image']

    @property
    def manifest(self):
        return self.repository.read_manifest(self.image.manifest)

    def observe(self, numbers, host='h1', **more):
        centre.Endpoint(self.store, self.seen.append).observe(
            {}, told(numbers, host, **more))

    def look(self, policy='always', hosts=2):
        observations.Refresher(
            self.store, self.registry, policy, hosts).look(
                GLANCE_IMAGE, self.image)
        return self.manifest


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp('place'))


@pytest.fixture
def own(tmp_path):
    return Place(tmp_path)


def test_a_manifest_that_would_be_too_large_is_not_made(own, monkeypatch):
    before = own.publish(range(5))
    monkeypatch.setattr(manifest, 'LIMIT', before.manifest_size)
    after = own.registry.rewrite('image', lambda old: dataclasses.replace(
        old, name='scattered' * 10))
    assert after == before == own.image


def test_only_what_is_ready_is_observed(own):
    own.observe(range(100))
    own.publish()
    for state in ('queued', 'building', 'error'):
        own.store.note_build('image', state=state)
        own.observe(range(100))
    own.store.note_build('image', state='ready')
    own.observe(range(100), serial=2)
    assert own.store.observations('image') == own.seen == []
    own.observe(range(100))
    [one] = own.store.observations('image')
    assert (one.host, one.serial, own.seen) == ('h1', 1, ['image'])
    # Where nobody wants to know, nothing is kept.
    own.store.forget_observations('image', [one])
    centre.Endpoint(own.store).observe({}, told())
    assert own.store.observations('image') == []


def test_what_waits_is_bounded(own, monkeypatch):
    own.publish()
    for number in range(20):
        own.observe(range(9), f'h{number}')
    # The newest.
    assert [one.host for one in own.store.observations('image')] == [
        f'h{number}' for number in range(4, 20)]
    own.observe(range(5), 'h7')
    found = own.store.observations('image')
    assert (len(found), found[-1].host) == (16, 'h7')
    monkeypatch.setattr(records, 'ALL_OBSERVATIONS', 16)
    own.store.note_build('second', state='ready', version=1)
    own.observe(range(5), image='second')
    assert own.store.observations('second') == []
    # None waits for ever.
    monkeypatch.setattr(records, '_WAIT', -1.0)
    own.observe(range(5), 'h99')
    assert [one.host for one in own.store.observations('image')] == ['h99']
    own.store.forget_build('image')
    assert own.store.observations('image') == []


def test_the_database_is_away(own, tmp_path):
    away = records.Records(f'sqlite:///{tmp_path}/none/x.db')
    centre.Endpoint(away, own.seen.append).observe({}, told())
    assert own.seen == []


# What becomes of boot sets

def test_an_image_without_boot_set_gets_one(own):
    before = own.publish(state='failed', reason='no login')
    numbers = list(range(300))
    random.Random(3).shuffle(numbers)
    own.observe(numbers)
    made = own.look()
    wanted = [number for number in numbers if number in set(WITH_DATA)]
    assert made.boot.tolist() == wanted
    assert made.capture == {
        'state': 'observed', 'reason': 'no login', 'observed': {
            'times': 1, 'bytes': len(wanted) * BLOCK, 'hosts': 1}}
    assert (made.trace['offset'] // BLOCK).tolist() == wanted
    assert own.image.serial == before.serial
    assert read_back(own.repository, own.image) == DATA
    assert registry.problem_of(made) == ''
    build = own.store.build('image')
    assert (build.state, build.error) == ('ready', '')
    assert build.boot_size == len(wanted) * BLOCK
    assert own.store.observations('image') == []
    own.glance.tell.assert_called_with('image', {
        'fastboot_boot_size': str(len(wanted) * BLOCK),
        'fastboot_error': None})
    [call] = own.herald.notify.call_args_list
    assert call.args[0] == 'refreshed'
    # And that is that.
    version = own.repository.state().version
    own.look()
    assert own.repository.state().version == version


def test_died_before_it_was_said(own):
    own.publish(state='failed', reason='x')
    own.observe(range(300))
    own.glance.tell.side_effect = RuntimeError
    with pytest.raises(RuntimeError):
        own.look()
    version = own.repository.state().version
    own.glance.tell.side_effect = None
    made = own.look()
    assert own.repository.state().version == version
    assert own.store.build('image').boot_size == len(made.boot) * BLOCK
    assert own.store.observations('image') == []


def test_one_host_does_not_change_what_booted(own):
    boot = WITH_DATA[:100]
    own.publish(boot, state='booted', reason=None)
    own.observe(range(600), 'h1')
    assert len(own.look().boot) == 100
    assert own.store.observations('image')
    own.observe(WITH_DATA[:300], 'h2')
    made = own.look()
    assert made.boot.tolist() == WITH_DATA[:300]
    assert made.capture['state'] == 'booted'
    assert made.capture['observed']['hosts'] == 2
    # The same host is no second one.
    own.observe(range(600), 'h1')
    own.observe(range(600), 'h1')
    assert len(own.look().boot) == 300


def test_policies(own):
    own.publish(WITH_DATA[:100], state='booted', reason=None)
    own.observe(range(600))
    for policy, hosts in (('never', 1), ('failed', 1), ('always', 2)):
        assert len(own.look(policy, hosts).boot) == 100
    assert len(own.look('always', 1).boot) == len(WITH_DATA)


@pytest.mark.parametrize('policy', ['never', 'failed'])
def test_policy_of_those_that_failed(own, policy):
    own.publish(state='failed', reason='x')
    own.observe(range(600))
    assert bool(len(own.look(policy).boot)) == (policy == 'failed')


def test_growth_is_bounded(own, monkeypatch):
    monkeypatch.setattr(observations, '_GROWTH', 80 * BLOCK)
    monkeypatch.setattr(observations, '_FIRST', 120 * BLOCK)
    own.publish(state='failed', reason='x')
    sizes = []
    for _ in range(7):
        # A host that lies: it wants all of the image everywhere.
        own.observe(range(600), 'h1')
        own.observe(range(600), 'h2')
        sizes.append(len(own.look().boot))
    assert sizes == [120, 200, 280, 360, 360, 360, 360]
    made = own.manifest
    assert made.boot.tolist() == WITH_DATA[:360]
    assert made.capture['observed'] == {
        'times': 4, 'bytes': 360 * BLOCK, 'hosts': 2}
    # As long as each of them was used first.
    assert len(made.trace) == 360
    # A new capture begins anew.
    own.registry.rewrite('image', lambda old: old.__class__(**{
        **vars(old), 'capture': {'state': 'booted', 'reason': None}}))
    own.observe(range(600), 'h1')
    own.observe(range(600), 'h2')
    assert len(own.look().boot) > 360


def test_growth_ends_where_a_manifest_could_not_be_read(own, monkeypatch):
    monkeypatch.setattr(manifest, 'BOOT_LIMIT', 350)
    own.publish(WITH_DATA[:50], state='booted', reason=None)
    own.observe(range(600))
    assert len(own.look(hosts=1).boot) == 350


def test_a_quarter_may_be_more(own, monkeypatch):
    monkeypatch.setattr(observations, '_GROWTH', 1)
    boot = WITH_DATA[:300]
    own.publish(boot, state='booted', reason=None)
    own.observe(range(600))
    assert len(own.look(hosts=1).boot) == 375


def test_noise_is_no_reason(own):
    own.publish(WITH_DATA[:100], state='booted', reason=None)
    own.observe(WITH_DATA[:163])
    assert len(own.look(hosts=1).boot) == 100
    own.observe(WITH_DATA[:164])
    assert len(own.look(hosts=1).boot) == 164


def test_what_lies_is_forgotten(own):
    """Right by form, wrong for this image."""
    own.publish(state='failed', reason='x')
    own.observe([599, 600], 'behind')
    own.observe([1 << 40], 'far')
    own.observe(range(200), 'h1')
    own.store.note_build('image', state='ready', version=7)
    own.observe(range(200, 400), 'other', serial=7)
    assert len(own.store.observations('image')) == 4
    made = own.look()
    assert made.boot.tolist() == [one for one in WITH_DATA if one < 200]
    assert own.store.observations('image') == []


def test_zeros_are_no_part_of_a_boot_set(own):
    own.publish(state='failed', reason='x')
    zeros = sorted(set(range(600)) - set(WITH_DATA))
    own.observe(zeros)
    assert len(own.look().boot) == 0


def test_an_image_that_is_built_anew_is_left_alone(own):
    own.publish(state='failed', reason='x')
    own.observe(range(300))
    own.store.note_build('image', state='building')
    assert len(own.look().boot) == 0
    own.store.note_build('image', state='ready')
    assert len(own.look().boot)


def test_two_builders_at_once(own):
    """Who looks second adds nothing twice."""
    own.publish(state='failed', reason='x')
    own.observe(range(300))
    waiting = own.store.observations('image')
    own.look()
    version = own.repository.state().version
    with mock.patch.object(own.store, 'observations',
                           lambda image_id: waiting):
        own.look()
    assert own.repository.state().version == version


@given(seen=st.lists(st.lists(st.tuples(
    st.integers(0, SIZE - 1), st.integers(1, 300000)), min_size=1,
    max_size=30), min_size=1, max_size=4), needed=st.integers(1, 3))
def test_extend_by_anything(place, seen, needed):
    if not place.repository.state().images:
        place.publish()
    old = place.manifest
    traces = []
    for rows in seen:
        found = np.zeros(len(rows), trace.DTYPE)
        found['offset'], length = np.array(rows, np.uint64).T
        found['length'] = np.minimum(length, SIZE - found['offset'])
        traces.append(found)
    with mock.patch.object(observation, 'LEAST', 1):
        made = observations.extend(old, traces, needed)
    read = {int(block) for one in traces for block
            in trace.boot_set(one, BLOCK, SIZE)}
    want = read & set(WITH_DATA)
    assert (made is None) == (not want)
    if made:
        assert set(made.boot.tolist()) == want
        assert len(made.boot) == len(want)
        kept = trace.boot_set(made.trace, BLOCK, SIZE)
        assert want <= set(kept.tolist())
        assert len(made.trace) <= len(want)
        data = made.pack()
        assert type(made).unpack(data, hashlib.sha256(
            data).hexdigest()).capture == made.capture


def test_the_largest_lie_costs_little(own):
    """As much as the form allows, from as many hosts as are kept."""
    own.publish(state='failed', reason='x')
    found = np.zeros(observation.READS, trace.DTYPE)
    found['length'] = 16_000
    found['offset'] = np.arange(len(found)) % 500 * BLOCK
    text = observation.encode(found)
    for number in range(16):
        own.observe([], f'h{number}', reads=text)
    assert len(own.store.observations('image')) == 16
    begun = time.process_time()
    assert len(own.look().boot)
    assert time.process_time() - begun < 20
