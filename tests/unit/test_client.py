# SPDX-License-Identifier: Apache-2.0
"""nova-compute's line to the agent ends in time, whatever the agent does."""

import contextlib
import json
import pathlib
import socket
import threading
import time

import microvms
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import exception
from fastboot_common.microvm import artifact, clone
from fastboot_nova import client
from fastboot_nova.microvm import definition, remote

LEASE = {'image': 'i', 'volume': '/v/volume', 'size': 8 << 40,
         'start': 65536, 'virtual_size': 1 << 30, 'complete': None,
         'socket': '/run/nbd.sock', 'loop': '/dev/loop3', 'thawed': 5,
         'seconds': .2}


def answer(status, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (f'HTTP/1.1 {status} words\r\nContent-Length: {len(data)}\r\n'
            f'Connection: close\r\n\r\n').encode() + data


@contextlib.contextmanager
def agent(path, *pieces, pause=0.0, hold=False):
    """Answers one call with pieces, a pause before each."""
    done = threading.Event()
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                line, _ = listener.accept()
                with line:
                    heard.extend(line.recv(65536))
                    for piece in pieces:
                        if done.wait(pause):
                            return
                        line.sendall(piece)
                    if hold:
                        done.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield heard
        finally:
            done.set()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'sock'


def acquire(path, seconds=5.0):
    return client.Agent(str(path), seconds).acquire(
        'i', pathlib.Path('/_base/x_sm'))


def test_a_lease(path):
    with agent(path, answer(200, LEASE)) as heard:
        lease = acquire(path)
    assert lease.link.start == 65536
    assert lease.link.complete is None
    assert lease.device == pathlib.Path('/dev/loop3')
    assert (lease.thawed, lease.seconds) == (5, .2)
    head, body = bytes(heard).split(b'\r\n\r\n')
    assert head.startswith(b'POST /v1/acquire HTTP/1.1\r\n')
    assert json.loads(body) == {'image': 'i', 'holder': 'nova',
                                'file': '/_base/x_sm', 'removed': False}


@pytest.mark.parametrize(('status', 'error'), [
    (404, exception.NotFound), (503, exception.Unavailable),
    (400, exception.Unavailable), (500, exception.Unavailable)])
def test_errors_keep_their_words(path, status, error):
    with agent(path, answer(status, {'error': 'the words'})):
        with pytest.raises(error, match='the words'):
            acquire(path)


def test_nobody_there(path):
    with pytest.raises(exception.Unavailable, match='does not answer'):
        acquire(path)
    path.touch()
    with pytest.raises(exception.Unavailable):
        acquire(path)


@pytest.mark.parametrize('how', ['silent', 'trickles', 'holds'])
def test_a_hanging_agent_is_left_in_time(path, how):
    whole = answer(200, LEASE)
    pieces = {'silent': (), 'holds': (whole[:-5],),
              'trickles': [bytes([byte]) for byte in whole]}[how]
    with agent(path, *pieces, pause=.05 if how == 'trickles' else 0,
               hold=True):
        began = time.monotonic()
        with pytest.raises(exception.Unavailable, match='timed out'):
            acquire(path, .3)
        # Not a speed: without a deadline this ends after 20 s or more.
        assert time.monotonic() - began < 10


@pytest.mark.parametrize('data', [
    b'', b'nonsense', answer(200, b'{'), answer(200, []),
    answer(200, {}), answer(200, {**LEASE, 'image': 'other'}),
    answer(200, {**LEASE, 'start': 'x'}), answer(200, b'[' * 99999),
    answer(200, {**LEASE, 'volume': None}),
    answer(200, {**LEASE, 'size': float('inf')}),
    answer(200, {**LEASE, 'thawed': float('inf')})])
def test_nonsense(path, data):
    with agent(path, data):
        with pytest.raises(exception.Unavailable):
            acquire(path)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_random_answers(data):
    with contextlib.suppress(exception.FastbootError):
        client._parse(data)


def test_image_ids(path):
    with agent(path, answer(200, {'images': [{'id': 'a'}, {'id': 'b'}]})):
        assert client.Agent(str(path), 5).image_ids() == ['a', 'b']


def test_differences(path):
    with agent(path, answer(200, {'extents': [[0, 5], [9, 1]]})) as heard:
        assert line(path).differences('i', pathlib.Path('/b')) == [
            (0, 5), (9, 1)]
    assert body_of(heard) == ('/v1/differences', {'image': 'i', 'file': '/b'})
    path.unlink()
    with agent(path, answer(200, {'extents': []})) as heard:
        assert line(path).differences('i', 'j') == []
    assert body_of(heard) == ('/v1/differences', {'image': 'i', 'other': 'j'})


@pytest.mark.parametrize('extents', [
    None, 5, [5], [[1]], [[1, 2, 3]], [['0', 1]], [[0, 0]], [[-1, 1]],
    [[0, 1.5]], [[True, 1]]])
def test_differences_without_sense(path, extents):
    with agent(path, answer(200, {'extents': extents})):
        with pytest.raises(exception.Unavailable):
            line(path).differences('i', pathlib.Path('/b'))


# µVMs

TAKEN = {'lane': 'ab' * 16, 'path': '/lanes/x', 'directory': '/artifacts/y',
         'class': 'cd' * 32}
HOLDER = 'aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee'


def body_of(heard):
    head, body = bytes(heard).split(b'\r\n\r\n')
    return head.split(b' ')[1].decode(), json.loads(body)


def line(path):
    return client.Agent(str(path), 5)


@pytest.fixture
def lane(tmp_path, path):
    """One that was taken, of an artifact that is there."""
    microvms.make(tmp_path / 'artifact')
    taken = {**TAKEN, 'directory': str(tmp_path / 'artifact')}
    with agent(path, answer(200, taken)) as heard:
        found = remote.take(line(path), 'i', HOLDER)
    path.unlink()
    assert body_of(heard) == ('/v1/microvms/take', {
        'image': 'i', 'holder': HOLDER})
    return found


def test_a_lane(lane, path, tmp_path):
    assert lane.path == pathlib.Path('/lanes/x')
    assert lane.directory == tmp_path / 'artifact'
    assert lane.group == TAKEN['class']
    assert lane.description == artifact.read(tmp_path / 'artifact')
    xml = definition.Server('n', HOLDER, pathlib.Path('/d'),
                            pathlib.Path('/c')).xml()
    with agent(path, answer(200, {})) as heard:
        lane.dress(clone.instance(xml, lane.description.machine))
    assert body_of(heard) == ('/v1/microvms/dress', {
        'lane': TAKEN['lane'], 'xml': xml})
    path.unlink()
    with agent(path, answer(200, {})) as heard:
        lane.give_back(remote.FAILED, 'load', 'w' * 999, {'load': .5})
    assert body_of(heard) == ('/v1/microvms/return', {
        'lane': TAKEN['lane'], 'outcome': 'failed', 'phase': 'load',
        'reason': 'w' * 500, 'seconds': {'load': .5}})


def test_a_guest_is_left_to_nova(path):
    with agent(path, answer(200, {})) as heard:
        client.Agent(str(path), 5).leave(HOLDER)
    assert body_of(heard) == ('/v1/reboots/leave', {'holder': HOLDER})


def test_what_is_not_heard_is_taken_back(lane, path, caplog):
    lane.give_back(remote.RESUMED)
    assert 'not given back' in caplog.text


def test_an_instance_that_is_refused(lane, path):
    xml = definition.Server('n', HOLDER, pathlib.Path('/d'),
                            pathlib.Path('/c')).xml()
    one = clone.instance(xml, lane.description.machine)
    with agent(path, answer(400, {'error': 'Invalid: why'})):
        with pytest.raises(exception.Unavailable, match='why'):
            lane.dress(one)


@pytest.mark.parametrize(('status', 'words', 'error'), [
    (404, 'NotFound: none', exception.NotFound),
    (503, 'Busy: in use', exception.Busy),
    (503, 'Unavailable: no', exception.Unavailable)])
def test_no_lane(path, status, words, error):
    with agent(path, answer(status, {'error': words})):
        with pytest.raises(error, match=words.split()[1]):
            remote.take(line(path), 'i', HOLDER)


@pytest.mark.parametrize('change', [
    {'lane': None}, {'path': 3}, {'directory': ''}, {'class': []}])
def test_a_lane_without_sense(path, change):
    with agent(path, answer(200, {**TAKEN, **change})):
        with pytest.raises(exception.Unavailable, match='nonsense'):
            remote.take(line(path), 'i', HOLDER)


def test_an_artifact_that_cannot_be_read(path, monkeypatch):
    back = []
    monkeypatch.setattr(client.Agent, 'give_back',
                        lambda self, *words: back.append(words[:3]))
    with agent(path, answer(200, TAKEN)):
        with pytest.raises(exception.NotFound, match='no µVM'):
            remote.take(line(path), 'i', HOLDER)
    path.unlink()

    def refuse(directory):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(artifact, 'read', refuse)
    with agent(path, answer(200, TAKEN)):
        with pytest.raises(exception.Unavailable, match='denied'):
            remote.take(line(path), 'i', HOLDER)
    assert back == [(TAKEN['lane'], 'failed', 'take')] * 2


def test_what_is_held(path):
    told = {'path': '/h', 'volume_bytes': 5, 'mirror_bytes': 6}
    for more, count in (({}, 11), ({'microvm_bytes': 7}, 18)):
        with agent(path, answer(200, {**told, **more})):
            assert line(path).held() == (pathlib.Path('/h'), count)
        path.unlink()
