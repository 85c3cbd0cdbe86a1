# SPDX-License-Identifier: Apache-2.0
"""The local API: answers, and requests that make no sense."""

import http.client
import json
import os
import pathlib
import socket
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastboot_common import exception, journal, localapi
from fastboot_nova.agent import api

WELL = {'image': 'image-1', 'holder': 'nova', 'file': '/var/_base/abc_sm'}


class Served:
    """Notes what comes through, and believes that it is sane."""

    def __init__(self):
        self.calls = []
        self.error = None

    def _note(self, *call):
        if self.error:
            raise self.error
        self.calls.append(call)

    def ensure(self, image_id, offset, length):
        journal.validate_image_id(image_id)
        assert 0 <= offset < 1 << 62 and 0 < length < 1 << 62
        self._note('ensure', image_id, offset, length)

    def acquire(self, image_id, holder, file):
        self.release(image_id, holder, file)
        return {'image': image_id}

    def release(self, image_id, holder, file):
        journal.validate_image_id(image_id)
        journal.validate_image_id(holder)
        assert file.startswith('/') and '/..' not in file
        assert '\0' not in file and os.path.normpath(file) == file
        os.fsencode(file)
        self._note('lease', image_id, holder, file)

    def prepare(self, image_id):
        journal.validate_image_id(image_id)
        self._note('prepare', image_id)

    def sync(self):
        self._note('sync')

    def images(self):
        self._note('images')
        return {'images': [{'id': 'image-1'}], 'version': 3}


@pytest.fixture(scope='module')
def served():
    return Served()


@pytest.fixture(scope='module')
def path(served):
    with tempfile.TemporaryDirectory(prefix='fb') as name:
        found = pathlib.Path(name, 'a')
        with localapi.Server(found, api.routes(
                lambda: served, lambda: {'state': 'serving'})):
            yield found


@pytest.fixture(autouse=True)
def clean(served):
    served.calls.clear()
    served.error = None


def call(path, method, url, body=None):
    line = http.client.HTTPConnection('localhost')
    line.sock = socket.socket(socket.AF_UNIX)
    line.sock.settimeout(20)
    line.sock.connect(os.fspath(path))
    try:
        line.request(method, url, body)
        answer = line.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        line.close()


def test_verbs(path, served):
    for method, url, body, status in (
            ('POST', '/v1/acquire', WELL, 200),
            ('POST', '/v1/release', WELL, 200),
            ('POST', '/v1/prepare', {'image': 'image-1'}, 202),
            ('POST', '/v1/sync', {}, 202),
            ('GET', '/v1/images', None, 200),
            ('GET', '/v1/images/image-1', None, 200),
            ('GET', '/v1/images/another', None, 404),
            ('GET', '/v1/status', None, 200),
            ('POST', '/v1/status', {}, 405),
            ('GET', '/v1/sync', None, 405),
            ('GET', '/v1/images/', None, 404),
            ('GET', '/v1/images/../x', None, 404),
            ('GET', '/', None, 404)):
        answer = call(path, method, url, body and json.dumps(body)
                      if body != {} else '{}')
        assert answer[0] == status, (url, answer)
        assert (status >= 400) == ('error' in answer[1])


@pytest.mark.parametrize('error, status', [
    (exception.NotFound('w'), 404), (exception.Invalid('w'), 400),
    (exception.Busy('w'), 503), (exception.NoSpace('w'), 503),
    (exception.Unavailable('w'), 503), (exception.Corrupt('w'), 500),
    (KeyError('w'), 500)])
def test_errors(path, served, error, status):
    served.error = error
    answer, body = call(path, 'POST', '/v1/acquire', json.dumps(WELL))
    assert answer == status
    assert 'w' in body['error']


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
PATHS = st.one_of(
    st.text(), st.text().map(lambda text: f'/{text}'),
    st.lists(st.sampled_from(['a', '.', '..', '', '\0', '\ud800', 'ä']),
             max_size=5).map('/'.join).map(lambda text: f'/{text}'))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture],
          max_examples=300)
@given(verb=st.sampled_from(['ensure', 'acquire', 'release', 'prepare']),
       body=st.fixed_dictionaries({}, optional={
           'image': ANY | st.just('image-1'), 'holder': ANY | st.just('nova'),
           'file': ANY | PATHS, 'offset': ANY, 'length': ANY, 'x': ANY}))
def test_any_body(path, served, verb, body):
    """Whatever it holds: what is called is sane, and all else is a 400."""
    status, answer = call(path, 'POST', f'/v1/{verb}', json.dumps(body))
    assert status in (200, 202, 400), answer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture],
          max_examples=100)
@given(data=st.binary(max_size=300))
def test_any_bytes(path, served, data):
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(20)
        line.connect(os.fspath(path))
        try:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            while line.recv(65536):
                pass
        except OSError:
            pass
    assert not served.calls
    assert call(path, 'GET', '/v1/status') == (200, {'state': 'serving'})
    status, _ = call(path, 'POST', '/v1/acquire', data)
    assert status == 400


def test_many_callers_that_say_nothing(path, served):
    """They make room for one that speaks."""
    silent = []
    for _ in range(100):
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(20)
        line.connect(os.fspath(path))
        silent.append(line)
    assert call(path, 'POST', '/v1/acquire', json.dumps(WELL))[0] == 200
    for line in silent:
        line.close()
