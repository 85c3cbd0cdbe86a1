# SPDX-License-Identifier: Apache-2.0
"""Reports of hosts, which may be hostile."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import exception
from fastboot_glance import centre, records, reports

GOOD = {
    'host': 'h1.example', 'version': 3, 'at': 1e9, 'software': '1.0',
    'images': [{'id': 'a', 'state': 'transferring', 'progress': .5,
                'error': '', 'serial': 3, 'leases': 1}],
    'volume_bytes': 1, 'mirror_bytes': 2, 'free_bytes': 3,
    'lazy_guests': ['11111111-2222-3333-4444-555555555555'],
    'platforms': ['x86_64/qemu/2/3/7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'],
    'microvms': [{'image': 'a', 'class': 'ab' * 32, 'state': 'ready',
                  'bytes': 5, 'lanes': 2, 'resumed': 7, 'fallbacks': 1,
                  'reason': ''}],
}
#: What older agents do not say.
NEWER = ('lazy_guests', 'platforms', 'microvms')


def change(**members):
    return GOOD | members


def image(**members):
    return change(images=[GOOD['images'][0] | members])


def microvm(**members):
    return change(microvms=[GOOD['microvms'][0] | members])


def test_good_report_is_kept_as_it_is():
    assert reports.check(GOOD) == GOOD


def test_versions_behind_the_last_serial(store):
    report = change(version=1 << 20, at=time.time(), host='ahead')
    centre.Endpoint(store).report({}, report)
    assert store.host('ahead').version == 1 << 20
    store.forget_host('ahead')
    with pytest.raises(exception.Invalid, match='serial'):
        reports.check(image(serial=1 << 20))


@pytest.mark.parametrize('name', NEWER)
def test_older_agents_say_less(name):
    old = {key: value for key, value in GOOD.items() if key != name}
    assert reports.check(old) == change(**{name: None})


def test_a_reason_need_not_be():
    assert reports.check(microvm(reason=None)) == GOOD
    assert len(reports.check(microvm(reason='x' * 9000))[
        'microvms'][0]['reason']) == 500


def test_members_of_newer_agents_are_dropped():
    assert reports.check(change(news=1)) == GOOD
    assert reports.check(image(news=1)) == GOOD
    assert reports.check(microvm(news=1)) == GOOD


def test_what_an_image_need_not_have():
    found = reports.check(change(images=[
        {'id': 'a', 'state': 'absent', 'error': None, 'serial': None}]))
    assert found['images'] == [{'id': 'a', 'state': 'absent',
                                'progress': 0.0, 'error': '',
                                'serial': None, 'leases': None}]


@pytest.mark.parametrize('report', [
    None, [], 'x', {}, change(host=None), change(host='../x'),
    change(host='x' * 256), change(host=''), change(host='a b'),
    change(host='a\n'), change(version=-1), change(version=True),
    change(version=1 << 31), change(version='3'), change(version=3.0),
    change(at=float('nan')), change(at=float('inf')), change(at=-1),
    change(at=None), change(at=10 ** 400), change(software=1),
    change(images={}), change(images=[None]), change(images=['a']),
    change(images=[{}] * 20_001), change(volume_bytes=1 << 63),
    change(lazy_guests='x'), change(lazy_guests=[1]),
    change(lazy_guests=['a']), change(lazy_guests=GOOD['lazy_guests'] * 1001),
    change(platforms='x'), change(platforms=['x']), change(platforms=[1]),
    change(platforms=GOOD['platforms'] * 17),
    change(platforms=['x86_64/qemu/0/3/7.2']),
    change(platforms=['x86_64/qemu/2/3/7.2\n']),
    change(platforms=['x86_64/qemu/2/3/' + '7' * 300]),
    change(microvms={}), change(microvms=[None]), change(microvms=['a']),
    change(microvms=GOOD['microvms'] * 2), change(microvms=[{}] * 20_001),
    microvm(image='../x'), microvm(image=1), microvm(**{'class': 'x'}),
    microvm(**{'class': 'AB' * 32}), microvm(**{'class': None}),
    microvm(**{'class': 'ab' * 32 + '\n'}), microvm(state='flying'),
    microvm(state=['ready']), microvm(bytes=-1), microvm(bytes=1 << 63),
    microvm(lanes=True), microvm(resumed='1'), microvm(fallbacks=1.0),
    microvm(reason=5),
    change(microvms=[{key: value for key, value in
                      GOOD['microvms'][0].items() if key != 'lanes'}]),
    change(free_bytes=-1), change(images=GOOD['images'] * 2),
    image(id='../x'), image(id=1), image(id=['a']), image(state='flying'),
    image(state=None), image(state=['ready']), image(progress=1.1),
    image(progress=float('nan')), image(progress='1'), image(error=5),
    image(serial='3'), image(serial=-1), image(serial=True),
    image(leases=-1), image(leases='1'), image(leases=1 << 31)])
def test_reports_without_sense(report):
    with pytest.raises(exception.Invalid) as caught:
        reports.check(report)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize('name', sorted(GOOD.keys() - set(NEWER)))
def test_missing_members(name):
    with pytest.raises(exception.Invalid, match=name):
        reports.check({
            key: value for key, value in GOOD.items() if key != name})


def test_words_are_cut_and_cleaned():
    found = reports.check(image(error='\x1b[31m' + 'x' * 9000))
    assert len(found['images'][0]['error']) == 500
    assert '\x1b' not in found['images'][0]['error']


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=5), inner, max_size=3), max_leaves=6)
images = st.lists(st.fixed_dictionaries({
    'id': st.sampled_from(['a', 'b', 'c']) | values,
    'state': st.sampled_from(reports.STATES) | values,
}, optional={
    'progress': st.floats(0, 1) | values, 'error': values,
    'serial': st.integers() | values}), max_size=3)


microvms = st.lists(st.fixed_dictionaries({
    'image': st.sampled_from(['a', 'b']) | values,
    'class': st.sampled_from(['ab' * 32, 'cd' * 32]) | values,
    'state': st.sampled_from(reports.MICROVM_STATES) | values,
    'bytes': st.integers(0) | values, 'lanes': st.integers(0) | values,
    'resumed': st.integers(0) | values,
    'fallbacks': st.integers(0) | values,
}, optional={'reason': values}), max_size=3)
platforms = st.lists(st.sampled_from(GOOD['platforms']) | st.from_regex(
    r'\A\w+/\w+/[0-9]+/[0-9]+/[ -~]*\Z', fullmatch=True) | values, max_size=3)


@given(report=values | st.fixed_dictionaries({
    'host': st.sampled_from(['h1', 'h2']) | values,
    'version': st.integers(0, 5) | values, 'at': st.floats(0, 1e9) | values,
    'software': st.text() | values, 'images': images | values,
    'volume_bytes': st.integers(0) | values,
    'mirror_bytes': st.integers(0) | values,
    'lazy_guests': st.lists(st.uuids().map(str)) | values,
    'platforms': platforms | values, 'microvms': microvms | values,
    'free_bytes': st.integers(0) | values}))
def test_any_report_is_refused_or_can_be_kept(store, report):
    try:
        checked = reports.check(report)
    except exception.Invalid:
        checked = None
    # The endpoint never raises: the bus would deliver it again.
    centre.Endpoint(store).report({}, report)
    if checked:
        json.dumps(checked, allow_nan=False)
        found = store.host(checked['host'])
        assert set(found.images) <= {'a', 'b', 'c'} | {
            one['id'] for one in checked['images']}
        assert found.platforms == checked['platforms']
        assert store.platforms() == set(checked['platforms'] or ())
        assert [one.image_id for one in found.microvms or ()] == [
            one['image'] for one in checked['microvms'] or ()]
        store.forget_host(checked['host'])


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('centre')
    found = records.Records(f'sqlite:///{path}/records.db')
    found.create()
    return found


def test_report_arrives(store):
    centre.Endpoint(store).report({}, change(at=time.time()))
    assert store.host('h1.example').images['a'].progress == .5


def test_database_away_loses_only_the_report(tmp_path, caplog):
    away = records.Records(f'sqlite:///{tmp_path}/none/x.db')
    centre.Endpoint(away).report({}, GOOD)
    assert 'h1.example' in caplog.text
