# SPDX-License-Identifier: Apache-2.0
"""The builders' access to a real Glance: download, list, properties."""

import contextlib
import os
import socket
import threading
import time

import brokers
import pytest
from keystoneauth1 import _fair_semaphore
from oslo_config import cfg

pytest.importorskip('glance')

from fastboot_common import exception
from fastboot_common.conf import glance as options
from fastboot_glance import images

SIZE = 8 << 20


@pytest.fixture(scope='module')
def glance(tmp_path_factory):
    with brokers.mariadb(tmp_path_factory.mktemp('sql')) as sql:
        with brokers.glance(tmp_path_factory.mktemp('glance'), sql) as found:
            yield found


@pytest.fixture(scope='module')
def data():
    return os.urandom(SIZE)


@pytest.fixture
def image_id(glance, data, tmp_path):
    (tmp_path / 'data').write_bytes(data)
    return glance.make('noise', tmp_path / 'data')


def client(url, **values):
    conf = cfg.ConfigOpts()
    conf.register_opts(options.OPTS, group=options.GROUP)
    conf([], default_config_files=[])
    for name, value in {'auth_type': 'none', 'endpoint_override': url,
                        'retries': 3, 'timeout': 5, **values}.items():
        conf.set_override(name, value, group=options.GROUP)
    return images.Images(conf)


class Cutter:
    """A proxy that cuts connections after some bytes of the answer.

    :param limits: bytes for the first connections; more are let through.
    """

    def __init__(self, url, limits):
        self._upstream = int(url.rpartition(':')[2])
        self._limits = list(limits)
        self.requests = []
        self._server = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self._server.getsockname()[1]}'
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(near,),
                                 daemon=True).start()

    def _serve(self, near):
        with near, socket.create_connection(
                ('127.0.0.1', self._upstream)) as far:
            request = near.recv(65536)
            self.requests.append(request)
            # One request a connection, so that each meets its limit.
            far.sendall(request.replace(b'keep-alive', b'close'))
            body = b'/file ' in request.splitlines()[0]
            left = self._limits.pop(0) if body and self._limits else 1 << 60
            while left > 0:
                piece = far.recv(min(left, 65536))
                if not piece:
                    return
                near.sendall(piece)
                left -= len(piece)

    def close(self):
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.fixture
def cutter(glance):
    made = []

    def make(*limits):
        made.append(Cutter(glance.url, limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fetch(found, image_id, path, cancel=None, seen=None):
    image = found.get(image_id)
    found.fetch(image, path, cancel or threading.Event(),
                seen.append if seen is not None else lambda done: None)


def ranges(proxy):
    return [line for request in proxy.requests
            for line in request.splitlines() if line.startswith(b'Range:')]


def test_whole(glance, image_id, data, tmp_path):
    seen = []
    fetch(client(glance.url), image_id, tmp_path / 'image', seen=seen)
    assert (tmp_path / 'image').read_bytes() == data
    assert seen == sorted(seen) and seen[-1] == SIZE
    assert not (tmp_path / 'image.part').exists()
    assert (tmp_path / 'image').stat().st_mode & 0o777 == 0o640


def test_goes_on_where_it_was_cut(cutter, image_id, data, tmp_path):
    proxy = cutter(3 << 20, 1 << 20, 1 << 20, 1 << 20)
    fetch(client(proxy.url), image_id, tmp_path / 'image')
    assert (tmp_path / 'image').read_bytes() == data
    starts = [int(line.partition(b'=')[2].rstrip(b'-'))
              for line in ranges(proxy)]
    assert len(starts) == 4 and starts == sorted(starts)
    assert starts[0] > 2 << 20


def test_gives_up_when_nothing_comes(cutter, image_id, tmp_path):
    proxy = cutter(3 << 20, *[100] * 50)
    with pytest.raises(exception.Unavailable):
        fetch(client(proxy.url, retries=2), image_id, tmp_path / 'image')
    # What came is kept for the next attempt.
    part = tmp_path / 'image.part'
    assert 2 << 20 < part.stat().st_size < 3 << 20
    assert len(ranges(proxy)) == 3


def test_goes_on_after_a_crash(cutter, image_id, data, tmp_path):
    (tmp_path / 'image.part').write_bytes(data[:5 << 20])
    proxy = cutter()
    fetch(client(proxy.url), image_id, tmp_path / 'image')
    assert (tmp_path / 'image').read_bytes() == data
    assert ranges(proxy) == [b'Range: bytes=%d-' % (5 << 20)]


def test_a_part_of_something_else_is_not_used(glance, image_id, data,
                                              tmp_path):
    (tmp_path / 'image.part').write_bytes(os.urandom(5 << 20))
    found = client(glance.url)
    with pytest.raises(exception.Corrupt, match='sha512'):
        fetch(found, image_id, tmp_path / 'image')
    assert list(tmp_path.glob('image*')) == []
    fetch(found, image_id, tmp_path / 'image')
    assert (tmp_path / 'image').read_bytes() == data


@pytest.mark.parametrize('extra', [0, 1])
def test_a_part_that_is_too_long_or_whole(glance, image_id, data, tmp_path,
                                          extra):
    (tmp_path / 'image.part').write_bytes(data + bytes(extra))
    fetch(client(glance.url), image_id, tmp_path / 'image')
    assert (tmp_path / 'image').read_bytes() == data


def test_store_with_other_bytes(glance, image_id, data, tmp_path):
    glance.data_file(image_id).write_bytes(data[:-1] + b'?')
    with pytest.raises(exception.Corrupt, match=image_id):
        fetch(client(glance.url), image_id, tmp_path / 'image')
    assert list(tmp_path.glob('image*')) == []


def test_store_without_the_bytes(glance, image_id, tmp_path):
    glance.data_file(image_id).write_bytes(b'short')
    with pytest.raises(exception.Unavailable, match=image_id):
        fetch(client(glance.url, retries=1), image_id, tmp_path / 'image')


def test_cancelled(glance, image_id, tmp_path):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(exception.Busy):
        fetch(client(glance.url), image_id, tmp_path / 'image', cancel)


def test_deleted(glance, image_id, tmp_path):
    found = client(glance.url)
    image = found.get(image_id)
    glance.delete(image_id)
    with pytest.raises(exception.NotFound, match=image_id):
        found.fetch(image, tmp_path / 'image', threading.Event(),
                    lambda done: None)
    with pytest.raises(exception.NotFound):
        found.get(image_id)
    with pytest.raises(exception.NotFound):
        found.tell(image_id, {'fastboot_state': 'ready'})


def test_no_room(glance, image_id, tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'RESERVE', 1 << 60)
    with pytest.raises(exception.NoSpace):
        fetch(client(glance.url), image_id, tmp_path / 'image')


def test_properties(glance, image_id):
    found = client(glance.url)
    assert found.tell(image_id, {'fastboot_state': 'error',
                                 'fastboot_error': 'two\nlines' * 100})
    shown = glance.show(image_id)
    assert shown['fastboot_state'] == 'error'
    assert shown['fastboot_error'].startswith('two linestwo lines')
    assert found.get(image_id).properties['fastboot_state'] == 'error'
    assert found.tell(image_id, {'fastboot_state': 'ready',
                                 'fastboot_error': None,
                                 'fastboot_size': None})
    shown = glance.show(image_id)
    assert shown['fastboot_state'] == 'ready'
    assert 'fastboot_error' not in shown
    before = shown['updated_at']
    assert found.tell(image_id, {'fastboot_state': 'ready'})
    assert glance.show(image_id)['updated_at'] == before


def test_protected_properties(glance, image_id):
    """Operators may keep what builders say to themselves."""
    assert client(glance.url).tell(image_id, {'fastboot_state': 'ready'})
    assert glance.show(image_id)['fastboot_state'] == 'ready'
    member = {'X-Roles': 'member'}
    shown = glance.call('GET', f'/{image_id}', headers=member).json()
    assert 'fastboot_state' not in shown
    patch = {**member, 'Content-Type':
             'application/openstack-images-v2.1-json-patch'}
    for change in ({'op': 'remove'}, {'op': 'replace', 'value': 'error'}):
        with pytest.raises(AssertionError, match='40[39]'):
            glance.call('PATCH', f'/{image_id}', headers=patch, json=[
                {**change, 'path': '/fastboot_state'}])
    assert glance.show(image_id)['fastboot_state'] == 'ready'
    # Those that users set are theirs.
    glance.call('PATCH', f'/{image_id}', headers=patch, json=[
        {'op': 'add', 'path': '/fastboot', 'value': 'off'},
        {'op': 'add', 'path': '/fastboot:lazy', 'value': 'no'}])


def test_list_is_complete(glance, monkeypatch):
    monkeypatch.setattr(images, '_PAGE', 2)
    made = {glance.create(f'image{number}', os_hidden=number % 2 == 0)
            for number in range(7)}
    found = client(glance.url)
    assert made <= {image.image_id for image in found.list()}


def test_list_that_breaks_off(glance, cutter, monkeypatch):
    monkeypatch.setattr(images, '_PAGE', 1)
    glance.create('one')
    glance.create('two')
    proxy = cutter()
    listing = client(proxy.url).list()
    next(listing)
    proxy.close()
    with pytest.raises(exception.Unavailable):
        list(listing)


def test_a_clock_that_was_ahead(glance, image_id, monkeypatch):
    with monkeypatch.context() as patch:
        now = time.time
        patch.setattr(time, 'time', lambda: now() + 3600)
        found = client(glance.url)
    monkeypatch.setattr(_fair_semaphore.time, 'sleep', pytest.fail)
    assert found.get(image_id).image_id == image_id


def test_nobody_there():
    found = client(f'http://127.0.0.1:{brokers.free_port()}')
    with pytest.raises(exception.Unavailable, match='Glance'):
        found.get('image')
    with pytest.raises(exception.Unavailable, match='Glance'):
        list(found.list())


def test_no_authentication_configured():
    with pytest.raises(exception.ConfigError, match='glance'):
        client('http://127.0.0.1:1', auth_type='no-such-type')
