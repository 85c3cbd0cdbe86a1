# SPDX-License-Identifier: Apache-2.0
"""The local API: answers, and requests that make no sense."""

import contextlib
import http.client
import json
import math
import os
import pathlib
import socket
import tempfile
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastboot_common import exception, journal, localapi
from fastboot_nova.agent import api

TOKEN = 'ab' * 16
TAKE = {'image': 'image-1', 'holder': 'uuid'}
DRESS = {'lane': TOKEN, 'xml': '<domain/>'}
RETURN = {'lane': TOKEN, 'outcome': 'failed', 'phase': 'load',
          'reason': 'why', 'seconds': {'load': .5, 'IDENTITY': 2}}
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

    def acquire(self, image_id, holder, file, removed):
        assert removed in (True, False)
        self.release(image_id, holder, file)
        return {'image': image_id}

    def release(self, image_id, holder, file):
        journal.validate_image_id(image_id)
        journal.validate_image_id(holder)
        assert file.startswith('/') and '/..' not in file
        assert '\0' not in file and os.path.normpath(file) == file
        os.fsencode(file)
        self._note('lease', image_id, holder, file)

    def leave(self, holder):
        journal.validate_image_id(holder)
        self._note('leave', holder)

    def prepare(self, image_id):
        journal.validate_image_id(image_id)
        self._note('prepare', image_id)

    def differences(self, image_id, base):
        if isinstance(base, pathlib.Path):
            self.release(image_id, 'nova', str(base))
        else:
            journal.validate_image_id(base)
            self._note('differences', image_id, base)
        return [(0, 4096), (8192, 4096)]

    def sync(self):
        self._note('sync')

    def images(self):
        self._note('images')
        return {'images': [{'id': 'image-1'}], 'version': 3}

    def microvms(self):
        self._note('microvms')
        return {'microvms': []}

    def take(self, image_id, holder):
        journal.validate_image_id(image_id)
        journal.validate_image_id(holder)
        self._note('take', image_id, holder)
        return {'lane': TOKEN}

    def dress(self, token, xml):
        assert token == TOKEN and isinstance(xml, str)
        self._note('dress', token, xml)

    def give_back(self, token, outcome, phase, reason, seconds):
        assert token == TOKEN
        assert outcome in ('resumed', 'refused', 'failed')
        assert phase == '' or phase.isascii() and len(phase) <= 32
        assert len(reason.encode()) <= 2000
        for name, value in seconds.items():
            assert len(name) <= 32 and isinstance(value, float)
            assert 0 <= value < 3600 and math.isfinite(value)
        self._note('return', token, outcome, phase, reason, seconds)


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
            ('POST', '/v1/differences', WELL, 200),
            ('POST', '/v1/differences', {'image': 'a', 'other': 'b'}, 200),
            ('POST', '/v1/differences', {'image': 'image-1'}, 400),
            ('POST', '/v1/differences', {**WELL, 'other': 'b'}, 400),
            ('POST', '/v1/differences', {'image': 'a', 'other': 5}, 400),
            ('POST', '/v1/sync', {}, 202),
            ('GET', '/v1/images', None, 200),
            ('GET', '/v1/images/image-1', None, 200),
            ('GET', '/v1/images/another', None, 404),
            ('GET', '/v1/microvms', None, 200),
            ('POST', '/v1/microvms/take', TAKE, 200),
            ('POST', '/v1/microvms/dress', DRESS, 200),
            ('POST', '/v1/microvms/return', RETURN, 200),
            ('POST', '/v1/reboots/leave', {'holder': 'one'}, 200),
            ('POST', '/v1/reboots/leave', {'holder': '../one'}, 400),
            ('GET', '/v1/microvms/take', None, 405),
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
@given(verb=st.sampled_from(['ensure', 'acquire', 'release', 'prepare',
                             'differences']),
       body=st.fixed_dictionaries({}, optional={
           'image': ANY | st.just('image-1'), 'holder': ANY | st.just('nova'),
           'file': ANY | PATHS, 'offset': ANY, 'length': ANY, 'x': ANY,
           'other': ANY | st.just('image-2')}))
def test_any_body(path, served, verb, body):
    """Whatever it holds: what is called is sane, and all else is a 400."""
    status, answer = call(path, 'POST', f'/v1/{verb}', json.dumps(body))
    assert status in (200, 202, 400), answer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture],
          max_examples=300)
@given(verb=st.sampled_from(['take', 'dress', 'return']),
       body=st.fixed_dictionaries({}, optional={
           'image': ANY | st.just('image-1'), 'holder': ANY | st.just('i'),
           'lane': st.just(TOKEN) | ANY, 'xml': ANY, 'x': ANY,
           'outcome': st.sampled_from(['resumed', 'refused', 'failed']) | ANY,
           'phase': ANY, 'reason': ANY | st.just('\ud800' * 600),
           'seconds': ANY | st.dictionaries(
               st.sampled_from(['load', 'END', 'a' * 40, '']),
               st.floats() | st.integers() | st.booleans())}))
def test_any_body_for_a_lane(path, served, verb, body):
    status, answer = call(path, 'POST', f'/v1/microvms/{verb}',
                          json.dumps(body))
    assert status in (200, 400), answer


def test_what_a_return_may_leave_out(path, served):
    body = {'lane': TOKEN, 'outcome': 'resumed'}
    assert call(path, 'POST', '/v1/microvms/return',
                json.dumps(body))[0] == 200
    assert served.calls == [('return', TOKEN, 'resumed', '', '', {})]


@pytest.mark.parametrize('url, most', [
    ('/v1/acquire', 16 << 10), ('/v1/microvms/take', 16 << 10),
    ('/v1/microvms/dress', 256 << 10), ('/v1/nothing', 16 << 10)])
def test_bodies_have_a_limit(path, served, url, most):
    body = json.dumps({**WELL, **TAKE, **DRESS, 'x': ''})
    body = body[:-2] + 'x' * (most - len(body)) + '"}'
    assert len(body) == most
    assert call(path, 'POST', url, body)[0] == (
        404 if 'nothing' in url else 200)
    served.calls.clear()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(20)
        line.connect(os.fspath(path))
        # What is too long is not read.
        line.sendall(f'POST {url} HTTP/1.1\r\nHost: a\r\n'
                     f'Content-Length: {most + 1}\r\n\r\n'.encode())
        assert line.recv(999).startswith(b'HTTP/1.1 400')
    assert not served.calls


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


def test_many_callers_that_never_end_a_body(path, served):
    """Nor are they answered when they are sent away."""
    slow, ended = [], threading.Event()
    for _ in range(64):
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(20)
        line.connect(os.fspath(path))
        line.sendall(b'POST /v1/sync HTTP/1.1\r\nHost: a\r\n'
                     b'Content-Length: 16000\r\n\r\n')
        slow.append(line)

    def trickle():
        while not ended.wait(.05):
            for line in slow:
                with contextlib.suppress(OSError):
                    line.sendall(b' ')

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        time.sleep(.5)
        assert call(path, 'POST', '/v1/acquire', json.dumps(WELL))[0] == 200
        said = b''.join(iter(lambda: slow[0].recv(4096), b''))
        assert said.startswith(b'HTTP/1.1 400 ')
    finally:
        ended.set()
        thread.join()
        for line in slow:
            line.close()


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
