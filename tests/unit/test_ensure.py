# SPDX-License-Identifier: Apache-2.0
"""The agent's side of a miss: answers, and callers that misbehave."""

import grp
import http.client
import json
import os
import pathlib
import random
import socket
import tempfile
import threading

import pytest

from fastboot_common import ensure, exception, localapi

GOOD = {'image': 'image-1', 'offset': 4096, 'length': 512}


@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(prefix='fb') as name:
        yield pathlib.Path(name, 'a')


def serve(path, calls, group=None):
    return localapi.Server(path, [ensure.route(calls)], group)


class Calls(list):
    """Notes calls, then does `action`."""

    action = staticmethod(lambda: None)

    def __call__(self, *call):
        self.append(call)
        self.action()


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def server(path, calls):
    with serve(path, calls) as made:
        yield made


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__('localhost', timeout=20)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(os.fspath(self.path))


def post(connection, body, url='/v1/ensure', method='POST', headers=None):
    if not isinstance(body, (bytes, str, type(None))):
        body = json.dumps(body)
    connection.request(method, url, body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def raw(path, data):
    """Everything that the server says to `data`, until it hangs up."""
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(20)
        one.connect(os.fspath(path))
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it hung up before the end
        words = b''
        try:
            while more := one.recv(65536):
                words += more
        except ConnectionResetError:
            pass
        return words


def test_answer(path, server, calls):
    assert post(Connection(path), GOOD) == (200, {})
    assert calls == [('image-1', 4096, 512)]


def test_connection_is_kept(path, server, calls):
    connection = Connection(path)
    assert post(connection, GOOD) == (200, {})
    first = connection.sock
    calls.action = lambda: (_ for _ in ()).throw(exception.NotFound('x'))
    assert post(connection, GOOD)[0] == 404
    assert post(connection, '{')[0] == 400
    calls.action = lambda: None
    assert post(connection, GOOD) == (200, {})
    assert connection.sock is first


@pytest.mark.parametrize('error, status', [
    (exception.NotFound('w'), 404), (exception.Invalid('w'), 400),
    (exception.ImageRejected('w'), 400), (exception.Unavailable('w'), 503),
    (exception.Busy('w'), 503), (exception.Corrupt('w'), 500),
    (exception.NoSpace('w'), 503), (OSError('w'), 500),
    (ZeroDivisionError('w'), 500)])
def test_errors(path, server, calls, error, status):
    def action():
        raise error

    calls.action = action
    answer, body = post(Connection(path), GOOD)
    assert answer == status
    assert body == {'error': f'{type(error).__name__}: w'}


@pytest.mark.parametrize('body', [
    '', '{', 'null', '[]', '"x"', '{}', '[' * 4000, '\0\xff',
    {**GOOD, 'image': ''}, {**GOOD, 'image': '../x'},
    {**GOOD, 'image': 'x' * 65}, {**GOOD, 'image': 'x\n'},
    {**GOOD, 'image': 7}, {**GOOD, 'image': None},
    {**GOOD, 'offset': -1}, {**GOOD, 'offset': 1.0},
    {**GOOD, 'offset': True}, {**GOOD, 'offset': '1'},
    {**GOOD, 'offset': 1 << 62}, {**GOOD, 'length': 0},
    {**GOOD, 'length': None}, {'image': 'x'}])
def test_bodies_that_make_no_sense(path, server, calls, body):
    status, answer = post(Connection(path), body)
    assert status == 400
    assert answer['error']
    assert not calls
    assert post(Connection(path), GOOD) == (200, {})


def test_other_paths_and_methods(path, server, calls):
    assert post(Connection(path), GOOD, '/')[0] == 404
    assert post(Connection(path), GOOD, '/v1/ensure/')[0] == 404
    for method in ('GET', 'PUT', 'DELETE', 'HEAD', 'NONE'):
        with socket.socket(socket.AF_UNIX):
            assert (b' 405 ' if method == 'GET' else b' 501 ') in raw(
                path, f'{method} /v1/ensure HTTP/1.1\r\nHost: x\r\n\r\n'
                .encode())
    assert not calls


def head(length):
    return (f'POST /v1/ensure HTTP/1.1\r\nHost: x\r\n'
            f'Content-Length: {length}\r\n\r\n').encode()


@pytest.mark.parametrize('length', [
    '16385', '-1', '1e3', '0x10', '999999999999', '٣', ''])
def test_lengths(path, server, calls, length):
    words = raw(path, f'POST /v1/ensure HTTP/1.1\r\nHost: x\r\n'
                      f'Content-Length: {length}\r\n\r\n{{}}'.encode())
    assert b' 400 ' in words
    assert not calls


def test_what_follows_an_unknown_length_is_no_request(path, server, calls):
    body = json.dumps(GOOD).encode()
    words = raw(path, head(9999) + head(len(body)) + body)
    assert words.count(b'HTTP/1.1') == 1
    chunked = (b'POST /v1/ensure HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n'
               b'Transfer-Encoding: chunked\r\n\r\n')
    words = raw(path, chunked + head(len(body)) + body)
    assert words.count(b'HTTP/1.1') == 1
    assert not calls


def test_garbage(path, server, calls):
    rng = random.Random(5)
    for size in (0, 1, 10, 1000, 100000):
        raw(path, rng.randbytes(size))
        raw(path, rng.randbytes(size) + b'\r\n\r\n')
        raw(path, b'POST /v1/ensure HTTP/1.1\r\n' + rng.randbytes(size))
    raw(path, b'POST ' + b'x' * 70000 + b' HTTP/1.1\r\n\r\n')
    raw(path, b'POST / HTTP/1.1\r\n' + b'a: b\r\n' * 500 + b'\r\n')
    raw(path, head(100) + b'{"image"')
    assert not calls
    assert post(Connection(path), GOOD) == (200, {})


def test_no_more_threads_than_there_is_room_for(path, calls, monkeypatch):
    monkeypatch.setattr(localapi, '_THREADS', 3)
    gate = threading.Event()
    most = []
    inside = threading.Semaphore(0)

    def action():
        inside.release()
        most.append(sum(thread.name.startswith('Thread')
                        and 'process_request' in thread.name
                        for thread in threading.enumerate()))
        gate.wait(20)

    calls.action = action
    with serve(path, calls):
        callers = [threading.Thread(target=lambda: answers.append(
            post(Connection(path), GOOD, headers={'Connection': 'close'})))
            for _ in range(10)]
        answers = []
        for caller in callers:
            caller.start()
        for _ in range(3):
            assert inside.acquire(timeout=20)
        assert not inside.acquire(timeout=0.2)
        gate.set()
        for caller in callers:
            caller.join(20)
    assert answers == [(200, {})] * 10
    assert max(most) <= 3


def test_idle_callers_are_sent_away(path, calls, monkeypatch):
    monkeypatch.setattr(localapi._Handler, 'timeout', 0.1)
    with serve(path, calls):
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(20)
            one.connect(os.fspath(path))
            assert one.recv(1) == b''
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(20)
            one.connect(os.fspath(path))
            one.sendall(head(100) + b'{')
            assert one.recv(1) == b''
    assert not calls


def test_close_lets_calls_end(path, calls):
    entered, gate = threading.Event(), threading.Event()

    def action():
        entered.set()
        assert gate.wait(20)

    calls.action = action
    server = serve(path, calls)
    server.start()
    idle = Connection(path)
    idle.connect()
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(post(Connection(path), GOOD)))
    caller.start()
    assert entered.wait(20)
    closer = threading.Thread(target=server.close)
    closer.start()
    gate.set()
    closer.join(20)
    caller.join(20)
    assert answers == [(200, {})]
    assert not path.exists()
    server.close()
    with serve(path, calls):
        assert post(Connection(path), GOOD) == (200, {})


def test_socket_is_for_the_group(path, calls):
    group = grp.getgrgid(os.getgid()).gr_name
    before = os.umask(0)
    try:
        with serve(path, calls, group):
            assert path.stat().st_mode & 0o7777 == 0o660
            assert path.stat().st_gid == os.getgid()
    finally:
        os.umask(before)
    with pytest.raises(exception.ConfigError, match='no-such-group'):
        serve(path, calls, 'no-such-group').start()


def test_paths(path, calls, server):
    with pytest.raises(exception.Busy):
        serve(path, calls).start()
    assert post(Connection(path), GOOD) == (200, {})
    with pytest.raises(exception.ConfigError, match='107'):
        serve(path.with_name('x' * 107), calls).start()
    with pytest.raises(exception.ConfigError, match='nowhere'):
        serve(path.parent / 'nowhere' / 'a', calls).start()
    file = path.with_name('file')
    file.write_text('mine')
    with pytest.raises(exception.ConfigError, match='no socket'):
        serve(file, calls).start()
    assert file.read_text() == 'mine'


def test_stale_socket_is_replaced(path, calls):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with serve(path, calls):
        assert post(Connection(path), GOOD) == (200, {})
