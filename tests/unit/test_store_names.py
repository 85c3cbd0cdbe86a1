# SPDX-License-Identifier: Apache-2.0
"""Names of objects: a closed set; and where stores may be."""

import posixpath
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastboot_common import exception, store
from fastboot_common.store import http, local

KINDS = ('packs', 'manifests', 'states')
DIGESTS = st.text('0123456789abcdef', min_size=64, max_size=64)
VALID = st.one_of(
    st.sampled_from(['config.json', 'head.json']),
    st.integers(1, 10 ** 16 - 1).map(store.entry_name),
    st.builds(store.object_name, st.sampled_from(KINDS), DIGESTS),
)


@given(st.sampled_from(KINDS), DIGESTS)
def test_name_of_a_digest(kind, digest):
    name = store.object_name(kind, digest)
    assert name == f'{kind}/{digest[:2]}/{digest}'
    assert store.validate_name(name) == name


@given(st.integers(1, 10 ** 16 - 1))
def test_entries_sort_as_their_numbers(number):
    name = store.entry_name(number)
    assert store.validate_name(name) == name
    assert int(name[8:-5]) == number
    if number > 1:
        assert store.entry_name(number - 1) < name


@pytest.mark.parametrize('number', [-1, 10 ** 16])
def test_numbers_that_no_entry_has(number):
    with pytest.raises(exception.Invalid):
        store.entry_name(number)


@given(st.text())
@example('')
@example('.')
@example('/config.json')
@example('./config.json')
@example('config.json\n')
@example('config.json/')
@example('tmp/x')
@example('journal/../config.json')
@example('journal/000000000000000١.json')  # a digit, but not ours
@example('packs/ab/' + 'cd' * 32)  # another's directory
@example('packs/ab/' + 'AB' * 32)
@example('packs/../' + 'ab' * 32)
@example('packs/' + 'ab' * 32)
@example('packs/ab/' + 'ab' * 32 + '.part')
def test_other_words_are_no_names(word):
    with pytest.raises(exception.Invalid):
        store.validate_name(word)


@given(VALID, st.integers(0), st.characters())
def test_one_more_character_spoils_a_name(name, position, character):
    position %= len(name) + 1
    longer = name[:position] + character + name[position:]
    with pytest.raises(exception.Invalid):
        store.validate_name(longer)


@given(VALID)
def test_names_stay_below_the_store(name):
    assert posixpath.normpath(name) == name
    assert not name.startswith(('/', '.'))
    assert re.fullmatch(r'[a-z0-9./]+', name)


@given(st.text(), st.text())
@example('packs', 'ab' * 31)
@example('packs', 'AB' * 32)
@example('packs', 'ab' * 32 + '\n')
@example('journal', 'ab' * 32)
@example('../packs', 'ab' * 32)
def test_other_words_make_no_object_name(kind, digest):
    with pytest.raises(exception.Invalid):
        store.object_name(kind, digest)


@pytest.mark.parametrize('location', [
    '/srv/store', 'file:///srv/store', 'file://localhost/srv/store',
    'file:///srv/%73tore'])
def test_directories(location):
    opened = store.open_store(location, timeout=3.0)
    assert isinstance(opened, local.LocalStore)
    assert repr(opened) == "LocalStore('/srv/store')"


@pytest.mark.parametrize('location', [
    'http://server/store/', 'https://user:secret@server:8443/store'])
def test_urls(location):
    opened = store.open_store(location, timeout=3.0)
    assert isinstance(opened, http.HttpStore)
    assert 'secret' not in repr(opened)


@pytest.mark.parametrize('location', [
    '', 's3://bucket:secret@x/', 'file://elsewhere/srv', 'file://', '\0',
    'http://', 'http:///x', 'http://server:port/', 'http://server:0/',
    'http://server/?secret', 'http://u:secret@server/#x', 'http://[::1/'])
def test_locations_that_are_none(location):
    with pytest.raises(exception.ConfigError) as raised:
        store.open_store(location)
    assert 'secret@' not in str(raised.value)


@pytest.mark.parametrize('options', [
    {'ca_file': '/nonexistent'}, {'timeout': 0}, {'retries': -1}])
def test_options_that_cannot_work(options):
    with pytest.raises(exception.ConfigError):
        store.open_store('http://server/', **options)


@pytest.mark.parametrize(('offset', 'length'), [(-1, 2), (0, -1)])
def test_ranges_that_are_none(offset, length):
    with pytest.raises(exception.Invalid):
        store.validate_range(offset, length)


def test_a_directory_does_not_cost_an_http_client():
    code = ('import sys; from fastboot_common import store; '
            'store.open_store("/"); print("requests" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], check=True,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == 'False'
