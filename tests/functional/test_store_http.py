# SPDX-License-Identifier: Apache-2.0
"""The store over HTTP: conformance behind nginx, and hostile servers."""

import contextlib
import http.server
import logging
import os
import shutil
import socket
import threading
import traceback

import pytest
from conftest import free_port
from store_conformance import (
    ABSENT,
    CONTENT,
    PACK,
    WHOLE,
    ReadTests,
    digest_of,
    part_of,
)

from fastboot_common import exception
from fastboot_common.store import http as store_http
from fastboot_common.store import throttle
from fastboot_common.store.http import HttpStore

SIZE = len(CONTENT)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.delenv('REQUESTS_CA_BUNDLE', raising=False)
    monkeypatch.delenv('CURL_CA_BUNDLE', raising=False)


@pytest.fixture
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('store')


def put_file(root, name, data):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Behind nginx


def directives(certificate):
    return (f'ssl_certificate {certificate[0]};'
            f'ssl_certificate_key {certificate[1]};')


@pytest.fixture(scope='class')
def opened(class_nginx, tmp_path_factory, extra):
    root = tmp_path_factory.mktemp('store')
    return HttpStore(class_nginx(root, extra=extra).url), root


@pytest.fixture(scope='class')
def opened_tls(class_nginx, tmp_path_factory, certificate):
    root = tmp_path_factory.mktemp('store')
    url = class_nginx(root, directives(certificate)).url
    return HttpStore(url, ca_file=str(certificate[0])), root


def emptied(subject, root):
    """One server serves a class; each test begins with an empty store."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return subject, lambda name, data: put_file(root, name, data)


@pytest.mark.parametrize('extra', [
    '',
    'max_ranges 0;',  # ignores Range
    'gzip on; gzip_types *; gzip_min_length 1;',
    'keepalive_timeout 0;',
], ids=['plain', 'no ranges', 'gzip', 'no keepalive'], scope='class')
class TestNginx(ReadTests):

    @pytest.fixture
    def readable(self, opened):
        return emptied(*opened)


class TestNginxTls(ReadTests):

    @pytest.fixture
    def readable(self, opened_tls):
        return emptied(*opened_tls)


def test_below_a_path(nginx, tmp_path):
    put_file(tmp_path, f'a/b/{PACK}', CONTENT)
    url = nginx(tmp_path).url
    assert HttpStore(f'{url}/a/b/').size(PACK) == SIZE
    with pytest.raises(exception.NotFound):
        HttpStore(url).size(PACK)


def test_a_certificate_that_nobody_vouches_for(nginx, root, certificate):
    put_file(root, PACK, CONTENT)
    subject = HttpStore(
        nginx(root, directives(certificate)).url, retries=0)
    with pytest.raises(exception.Unavailable, match='certificate verify'):
        subject.get(PACK)


def test_the_environment_does_not_replace_the_ca_file(
        nginx, root, certificate, monkeypatch):
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/etc/hostname')
    put_file(root, PACK, CONTENT)
    subject = HttpStore(nginx(root, directives(certificate)).url,
                        ca_file=str(certificate[0]))
    assert subject.get(PACK) == CONTENT


def test_a_certificate_for_another_host(nginx, root, certificate):
    put_file(root, PACK, CONTENT)
    url = nginx(root, directives(certificate)).url
    subject = HttpStore(url.replace('127.0.0.1', 'localhost'), retries=0,
                        ca_file=str(certificate[0]))
    with pytest.raises(exception.Unavailable, match='certificate verify'):
        subject.get(PACK)


def test_a_server_that_goes_and_comes_back(nginx, root, tmp_path):
    server = nginx(root)
    subject = HttpStore(server.url, retries=1, backoff=.01)
    path = tmp_path / 'f'
    put_file(root, PACK, CONTENT * 20)
    whole = digest_of(CONTENT * 20), 20 * SIZE
    with pytest.raises(exception.Unavailable, match=PACK):
        subject.fetch(PACK, path, *whole, lambda count: stop_hard(server))
    kept = part_of(path).stat().st_size
    assert 0 < kept < 20 * SIZE
    with pytest.raises(exception.Unavailable, match='Connection refused'):
        subject.get(PACK)
    server.start()
    steps = []
    subject.fetch(PACK, path, *whole, steps.append)
    assert sum(steps) == 20 * SIZE - kept
    assert path.read_bytes() == CONTENT * 20


def stop_hard(server):
    """SIGTERM is nginx's fast shutdown: it drops its connections."""
    if server.process.poll() is None:
        server.stop()


def test_an_object_that_the_server_may_not_read(nginx, root):
    put_file(root, PACK, CONTENT)
    server = nginx(root, extra='location /packs { deny all; }')
    with pytest.raises(exception.Unavailable, match='403'):
        HttpStore(server.url).get(PACK)


# Hostile servers


class Hostile:
    """A server whose every answer is a function of ours.

    :ivar script: functions of the handler, one for each request; the last
        one for all further requests.
    :ivar seen: (method, path, headers, client's port) of each request.
    """

    def __init__(self):
        hostile = self
        self.script, self.seen, self.done = [], [], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            timeout = 30

            def do_GET(self):
                hostile.seen.append((self.command, self.path, self.headers,
                                     self.client_address[1]))
                script = hostile.script
                act = script.pop(0) if len(script) > 1 else script[0]
                with contextlib.suppress(OSError):
                    act(self)

            do_HEAD = do_GET

            def handle(self):
                with contextlib.suppress(OSError):
                    super().handle()

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.server.hostile = self
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.thread = threading.Thread(
            target=self.server.serve_forever, args=(.02,))
        self.thread.start()

    def stop(self):
        self.done.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(20)


@pytest.fixture
def hostile():
    servers = []

    def start(*script):
        servers.append(Hostile())
        servers[-1].script = list(script)
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def asked(handler):
    """First and last byte that the client wants, and whether it said so."""
    words = handler.headers.get('Range')
    if words is None:
        return 0, SIZE - 1, False
    first, last = words.removeprefix('bytes=').split('-')
    return int(first), min(int(last or SIZE - 1), SIZE - 1), True


def send(handler, status, headers, body=b'', close=False):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != 'HEAD':
        handler.wfile.write(body)
    handler.close_connection = close


def honest(handler, data=CONTENT, cut=None, **headers):
    """As a good server, but closing after `cut` bytes of the body."""
    first, last, ranged = asked(handler)
    last = min(last, len(data) - 1)
    body = data[first:last + 1]
    headers = {'Content-Length': len(body)} | {
        name.replace('_', '-'): value for name, value in headers.items()}
    if ranged:
        headers.setdefault(
            'Content-Range', f'bytes {first}-{last}/{len(data)}')
    send(handler, 206 if ranged else 200, headers, body[:cut],
         close=cut is not None)


def cut_after(count):
    return lambda handler: honest(handler, cut=count)


def status(number, **headers):
    headers = {'Content-Length': 0} | {
        name.replace('_', '-'): value for name, value in headers.items()}
    return lambda handler: send(handler, number, headers)


def whole(handler, cut=None):
    """Ignores Range."""
    send(handler, 200, {'Content-Length': SIZE}, CONTENT[:cut],
         close=cut is not None)


def unframed(handler):
    """Neither length nor chunks: the connection's end is the body's."""
    send(handler, 200, {}, CONTENT, close=True)


def chunked(handler):
    send(handler, 200, {'Transfer-Encoding': 'chunked'},
         b'%x\r\n%s\r\n0\r\n\r\n' % (SIZE, CONTENT))


def endless(number, **headers):
    """Headers as given, then bytes as long as the client reads them."""
    def act(handler):
        send(handler, number, {
            name.replace('_', '-'): value for name, value in headers.items()})
        while not handler.server.hostile.done.is_set():
            handler.wfile.write(bytes(1 << 16))
    return act


def endless_chunks(handler):
    send(handler, 200, {'Transfer-Encoding': 'chunked'})
    while not handler.server.hostile.done.is_set():
        handler.wfile.write(b'10000\r\n%s\r\n' % bytes(1 << 16))


def drip(handler):
    """A byte now and then, each just before the client loses patience."""
    send(handler, 200, {'Content-Length': SIZE})
    while not handler.server.hostile.done.wait(.05):
        handler.wfile.write(b'x')


def silence(handler):
    handler.server.hostile.done.wait(60)


def hang_up(handler):
    handler.close_connection = True


def babble(handler):
    handler.wfile.write(b'\0\xff this is not HTTP\r\n' * 1000)
    handler.close_connection = True


def long_headers(handler):
    handler.wfile.write(b'HTTP/1.1 200 OK\r\n')
    while not handler.server.hostile.done.is_set():
        handler.wfile.write(b'X-Y: %s\r\n' % (b'z' * 1000))


def impatient(server, **options):
    return HttpStore(server.url, **(
        {'retries': 2, 'backoff': .01, 'timeout': 5} | options))


def operations(subject, tmp_path):
    """Each way to read PACK; all must give CONTENT or raise."""
    path = tmp_path / 'f'

    def fetch():
        subject.fetch(PACK, path, *WHOLE)
        return path.read_bytes()

    def fetch_rest():
        part_of(path).write_bytes(CONTENT[:1000])
        return fetch()

    return {'get': lambda: subject.get(PACK),
            'read': lambda: CONTENT[:1000] + subject.read(
                PACK, 1000, SIZE - 1000),
            'fetch': fetch, 'fetch rest': fetch_rest}


@pytest.fixture(params=['get', 'read', 'fetch', 'fetch rest'])
def read_all(request, tmp_path):
    """A function of a store that reads PACK in one of the ways."""
    return lambda subject: operations(subject, tmp_path)[request.param]()


@pytest.mark.parametrize('script', [
    [hang_up, hang_up, honest],
    [babble, honest],
    [cut_after(0), cut_after(10), honest],
    [cut_after(SIZE // 2), honest],
    [status(500), status(503), honest],
    [status(429), status(502), honest],
    [status(504), status(408), honest],
    [whole],
    [cut_after(SIZE // 2), whole],
    [lambda handler: honest(handler, Connection='close')],
    [lambda handler: honest(handler, Content_Encoding='identity')],
])
def test_it_recovers(hostile, read_all, script):
    assert read_all(impatient(hostile(*script))) == CONTENT


@pytest.mark.parametrize('way', ['read', 'fetch', 'fetch rest'])
def test_a_server_that_always_stops_midway(hostile, tmp_path, way):
    """Every connection brings some of it; none is a failure."""
    server = hostile(cut_after(100_000))
    subject = impatient(server)
    assert operations(subject, tmp_path)[way]() == CONTENT
    assert len(server.seen) == -(-SIZE // 100_000)


@pytest.mark.parametrize('way', ['read', 'fetch', 'fetch rest'])
def test_a_server_that_gives_less_than_asked(hostile, tmp_path, way):
    def some(handler):
        first, last, _ranged = asked(handler)
        last = min(last, first + 99_999)
        send(handler, 206, {
            'Content-Length': last + 1 - first,
            'Content-Range': f'bytes {first}-{last}/{SIZE}',
        }, CONTENT[first:last + 1])

    subject = impatient(hostile(some))
    assert operations(subject, tmp_path)[way]() == CONTENT


@pytest.mark.parametrize('act', [
    hang_up, babble, long_headers, cut_after(0), cut_after(1000),
    status(500), status(429), status(503),
    lambda handler: whole(handler, cut=500),
])
def test_it_gives_up(hostile, read_all, act):
    server = hostile(act)
    with pytest.raises(exception.Unavailable, match=PACK) as raised:
        read_all(impatient(server))
    assert '3 failures in a row' in str(raised.value)
    assert len(server.seen) == 3


@pytest.mark.parametrize('act', [silence, drip])
def test_it_does_not_wait_for_ever(hostile, read_all, act):
    server = hostile(act)
    with pytest.raises(exception.Unavailable, match=PACK):
        read_all(impatient(server, timeout=.3))
    assert len(server.seen) == 3


@pytest.mark.parametrize('number', [201, 204, 301, 304, 400, 401, 403, 405,
                                    418, 501])
def test_refusals_are_not_repeated(hostile, read_all, number):
    server = hostile(status(number))
    with pytest.raises(exception.Unavailable, match=str(number)):
        read_all(impatient(server))
    assert len(server.seen) == 1


@pytest.mark.parametrize('number', [404, 410])
def test_not_found(hostile, read_all, number):
    server = hostile(status(number))
    with pytest.raises(exception.NotFound, match=PACK):
        read_all(impatient(server))
    assert len(server.seen) == 1


@pytest.mark.parametrize('words', [
    '', 'bytes', 'bytes 1000-1999', f'bytes 0-{SIZE - 1}/{SIZE}',
    f'bytes 1001-{SIZE - 1}/{SIZE}', f'bytes 1000-999/{SIZE}',
    f'bytes 1000-{SIZE}/{SIZE}', f'bytes 1000-{SIZE + 5}/{SIZE + 6}',
    f'items 1000-{SIZE - 1}/{SIZE}', f'bytes 1000-{SIZE - 1}/{SIZE} x',
    f'bytes 1000-{SIZE - 2}/{SIZE}', f'bytes 1000-1{"0" * 30}/{SIZE}',
    'bytes -1--1/-1', f'bytes */{SIZE}', 'bytes ١٠٠٠-١٩٩٩/٢٠٠٠'])
@pytest.mark.parametrize('way', ['read', 'fetch rest'])
def test_garbage_content_range(hostile, tmp_path, way, words):
    server = hostile(lambda handler: honest(
        handler, Content_Range=words.encode().decode('latin-1')))
    subject = impatient(server)
    with pytest.raises(exception.Unavailable, match='answers 206'):
        operations(subject, tmp_path)[way]()
    assert len(server.seen) == 1


@pytest.mark.parametrize(('first', 'last', 'total'), [
    (0, SIZE - 1, SIZE), (999, SIZE - 1, SIZE), (1001, SIZE, SIZE + 1),
    (1000, SIZE, SIZE + 1), (1000, SIZE - 1, SIZE - 1)])
def test_a_range_that_was_not_asked_for(hostile, first, last, total):
    """All in itself consistent, and the wrong bytes."""
    server = hostile(lambda handler: send(handler, 206, {
        'Content-Length': last + 1 - first,
        'Content-Range': f'bytes {first}-{last}/{total}',
    }, bytes(last + 1 - first)))
    with pytest.raises(exception.Unavailable, match='answers 206'):
        impatient(server).read(PACK, 1000, SIZE - 1000)


def test_a_part_where_the_whole_was_asked_for(hostile):
    server = hostile(lambda handler: send(handler, 206, {
        'Content-Length': 1000, 'Content-Range': f'bytes 0-999/{SIZE}',
    }, CONTENT[:1000]))
    with pytest.raises(exception.Unavailable, match='only 1000'):
        impatient(server).get(PACK)


@pytest.mark.parametrize('words', ['', 'x', '-5', '1e3', '0x10', '5, 5',
                                   '9' * 40])
def test_garbage_content_length(hostile, read_all, words):
    server = hostile(lambda handler: send(
        handler, 200, {'Content-Length': words}, CONTENT, close=True))
    with pytest.raises(exception.Unavailable, match='gives the length'):
        read_all(impatient(server))
    with pytest.raises(exception.Unavailable, match='gives the length'):
        impatient(server).size(PACK)


def test_a_length_that_is_too_long(hostile, read_all):
    """It never delivers the rest, or admits that there is none."""
    def lie(handler):
        send(handler, 200, {'Content-Length': SIZE + 100}, CONTENT,
             close=True)

    with pytest.raises(exception.Unavailable, match='failures in a row'):
        # 'read' asks for what is there, and gets it
        if read_all(impatient(hostile(lie))) == CONTENT:
            raise exception.Unavailable('failures in a row')


@pytest.mark.parametrize('way', ['fetch', 'fetch rest'])
def test_a_length_that_is_too_long_then_the_truth(hostile, tmp_path, way):
    def lie(handler):
        send(handler, 200, {'Content-Length': SIZE + 100}, CONTENT,
             close=True)

    for truth in (status(416), lambda handler: honest(
            handler, Content_Range=f'bytes {SIZE}-{SIZE}/{SIZE}')):
        subject = impatient(hostile(lie, truth))
        with pytest.raises((exception.Corrupt, exception.Unavailable)):
            operations(subject, tmp_path)[way]()
        assert not (tmp_path / 'f').exists()
        part_of(tmp_path / 'f').unlink(missing_ok=True)


@pytest.mark.parametrize('way', ['fetch', 'fetch rest'])
def test_a_length_that_is_too_short(hostile, tmp_path, way):
    server = hostile(lambda handler: send(
        handler, 200, {'Content-Length': SIZE - 100}, CONTENT, close=True))
    with pytest.raises(exception.Corrupt, match=PACK):
        operations(impatient(server), tmp_path)[way]()
    assert os.listdir(tmp_path) == []


def test_read_of_an_object_that_is_too_short(hostile):
    short = CONTENT[:5000]
    server = hostile(lambda handler: honest(handler, short))
    with pytest.raises(exception.Corrupt, match='ends at 5000'):
        impatient(server).read(PACK, 1000, 5000)


def test_an_object_that_shrinks_midway(hostile, tmp_path):
    server = hostile(cut_after(2000),
                     lambda handler: honest(handler, CONTENT[:3000]))
    with pytest.raises(exception.Corrupt, match='ends at 3000'):
        impatient(server).fetch(PACK, tmp_path / 'f', *WHOLE)
    assert not (tmp_path / 'f').exists()


def test_a_416_without_reason(hostile, tmp_path):
    subject = impatient(hostile(status(416)))
    with pytest.raises(exception.Corrupt, match=PACK):
        subject.read(PACK, 0, 100)
    with pytest.raises(exception.Corrupt, match=PACK):
        subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    with pytest.raises(exception.Unavailable, match='416'):
        subject.get(PACK)
    with pytest.raises(exception.Unavailable, match='416'):
        subject.size(PACK)


@pytest.mark.parametrize('act', [chunked, unframed])
def test_a_body_of_unknown_length(hostile, tmp_path, act):
    server = hostile(act)
    subject = impatient(server)
    ways = operations(subject, tmp_path)
    assert ways['get']() == CONTENT
    assert ways['read']() == CONTENT
    for way in ('fetch', 'fetch rest'):
        with pytest.raises(exception.Unavailable, match='how long'):
            ways[way]()
    with pytest.raises(exception.Unavailable, match='how long'):
        subject.size(PACK)


@pytest.mark.parametrize('act', [
    endless(200), endless_chunks, endless(200, Content_Length=1 << 50)],
    ids=['to the close', 'chunks', 'length'])
def test_an_endless_body(hostile, tmp_path, act):
    subject = impatient(hostile(act))
    with pytest.raises(exception.Corrupt, match='more than the 1000000'):
        subject.get(PACK, 1_000_000)
    assert subject.read(PACK, 1000, 1_000_000) == bytes(1_000_000)


@pytest.mark.parametrize('act', [endless(200), endless_chunks],
                         ids=['to the close', 'chunks'])
def test_fetch_of_an_endless_body(hostile, tmp_path, act):
    subject = impatient(hostile(act))
    with pytest.raises(exception.Unavailable, match='how long'):
        subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    assert part_of(tmp_path / 'f').stat().st_size == 0


def test_fetch_of_a_body_that_is_said_to_be_huge(hostile, tmp_path):
    subject = impatient(hostile(endless(200, Content_Length=10 ** 15)))
    steps = []

    def tell(count):
        steps.append(count)
        assert sum(steps) <= SIZE

    with pytest.raises(exception.Corrupt, match=PACK):
        subject.fetch(PACK, tmp_path / 'f', *WHOLE, tell)
    assert os.listdir(tmp_path) == []


def test_an_endless_range(hostile):
    subject = impatient(hostile(endless(
        206, Content_Range='bytes 1000-1999/5000')))
    assert subject.read(PACK, 1000, 1000) == bytes(1000)


@pytest.mark.parametrize('way', ['fetch', 'fetch rest'])
def test_a_flipped_bit(hostile, tmp_path, way):
    data = bytearray(CONTENT)
    data[SIZE // 2] ^= 1
    server = hostile(lambda handler: honest(handler, bytes(data)))
    with pytest.raises(exception.Corrupt, match=PACK):
        operations(impatient(server), tmp_path)[way]()
    assert os.listdir(tmp_path) == []


def test_a_compressing_server(hostile, read_all):
    server = hostile(lambda handler: honest(handler, Content_Encoding='gzip'))
    with pytest.raises(exception.Unavailable, match='encodes'):
        read_all(impatient(server))
    assert server.seen[0][2]['Accept-Encoding'] == 'identity'


def test_head_json_is_not_patched_together(hostile):
    """It may change between two tries: continuing would mix two states."""
    server = hostile(
        lambda handler: send(handler, 200, {'Content-Length': 14},
                             b'{"number"', close=True),
        lambda handler: send(handler, 200, {'Content-Length': 14},
                             b'{"number": 12}'))
    assert impatient(server).get('head.json') == b'{"number": 12}'
    assert 'Range' not in server.seen[1][2]


# Waiting


class Clock:
    """Takes the place of ``time``: only sleeping moves it."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


@pytest.mark.parametrize(('words', 'wait'), [
    ('3', 3), ('0', 0), ('86400', 10), ('9' * 18, 10)])
def test_retry_after(hostile, monkeypatch, words, wait):
    clock = Clock()
    monkeypatch.setattr(store_http, 'time', clock)
    server = hostile(status(503, Retry_After=words), honest)
    assert impatient(server).get(PACK) == CONTENT
    assert clock.slept == [wait]


def test_waits_grow(hostile, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(store_http, 'time', clock)
    server = hostile(status(503, Retry_After='soon'))
    with pytest.raises(exception.Unavailable):
        impatient(server, retries=9, backoff=.2).get(PACK)
    assert len(clock.slept) == 9
    for number, wait in enumerate(clock.slept):
        longest = min(10, .4 * 2 ** number)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize('way', ['get', 'read', 'fetch'])
def test_rate_limit(hostile, monkeypatch, tmp_path, way):
    clock = Clock()
    monkeypatch.setattr(throttle, 'time', clock)
    subject = impatient(hostile(honest),
                        throttle=throttle.Throttle(100_000))
    assert operations(subject, tmp_path)[way]() == CONTENT
    assert sum(clock.slept) == pytest.approx(SIZE / 100_000, rel=.01)


# Redirects


def redirect(target, **headers):
    return status(302, Location=target, **headers)


def test_redirects_are_followed(hostile, read_all):
    server = hostile(redirect('/elsewhere'), redirect('again'), honest)
    assert read_all(impatient(server)) == CONTENT
    assert [path for _method, path, *_rest in server.seen[:3]] == [
        f'/{PACK}', '/elsewhere', '/again']


def test_a_redirect_loop(hostile, read_all):
    server = hostile(redirect('/loop'))
    with pytest.raises(exception.Unavailable, match='redirects more than 5'):
        read_all(impatient(server))
    assert len(server.seen) == 6


def test_a_redirect_with_an_endless_body(hostile):
    server = hostile(endless(302, Location='/elsewhere'), honest)
    assert impatient(server).get(PACK) == CONTENT


@pytest.mark.parametrize('target', [
    'file:///etc/passwd', 'ftp://127.0.0.1/x', 'http://[::1', '\xff\xfe'])
def test_redirects_to_nowhere(hostile, read_all, target):
    server = hostile(redirect(target), status(403))
    with pytest.raises(exception.Unavailable, match='redirects|403'):
        read_all(impatient(server))


def test_no_way_back_from_https(nginx, root, certificate, hostile):
    server = hostile(honest)
    url = nginx(root, directives(certificate),
                f'return 302 {server.url}/x;').url
    subject = HttpStore(url, ca_file=str(certificate[0]))
    with pytest.raises(exception.Unavailable, match='from https to'):
        subject.get(PACK)
    assert server.seen == []


# Secrets


def with_secret(server):
    return server.url.replace('//', '//user:s%40cret@')


def test_credentials_are_sent_to_their_server_only(hostile):
    other = hostile(honest)
    server = hostile(redirect('/next'), redirect(f'{other.url}/x'))
    subject = HttpStore(with_secret(server))
    assert subject.get(PACK) == CONTENT
    assert [seen[2]['Authorization'] for seen in server.seen] == [
        'Basic dXNlcjpzQGNyZXQ='] * 2
    assert other.seen[0][2]['Authorization'] is None


def test_secrets_of_a_session_stay_too(hostile, monkeypatch):
    requests = store_http.requests
    other = hostile(honest)
    server = hostile(redirect(f'{other.url}/x'))
    session = requests.Session()
    session.headers['Authorization'] = 'Bearer secret'
    session.headers['Cookie'] = 'secret'
    subject = HttpStore(server.url, session=session)
    assert subject.get(PACK) == CONTENT
    assert server.seen[0][2]['Authorization'] == 'Bearer secret'
    assert other.seen[0][2]['Authorization'] is None
    assert other.seen[0][2]['Cookie'] is None
    session.close()


@pytest.mark.parametrize('act', [
    hang_up, status(403), status(404), status(500), cut_after(5),
    redirect('http://127.0.0.1:1/x?s@cret'), redirect('/loop?s@cret'),
    redirect('http://127.0.0.1:99999/x?s@cret'),
    redirect('ftp://s@cret')])
def test_no_secret_is_told(hostile, read_all, caplog, act):
    caplog.set_level(logging.INFO)
    subject = HttpStore(with_secret(hostile(act)), retries=1, backoff=.01)
    with pytest.raises(exception.FastbootError) as raised:
        read_all(subject)
    told = ''.join(traceback.format_exception(raised.value)) + caplog.text
    assert 'cret' not in told.replace('test_no_secret_is_told', '').replace(
        'with_secret', '')


def test_cookies_are_not_kept(hostile):
    server = hostile(lambda handler: honest(handler, Set_Cookie='a=b'))
    subject = impatient(server)
    subject.get(PACK)
    subject.get(PACK)
    assert server.seen[1][2]['Cookie'] is None


# Connections


def test_connections_are_reused(hostile, tmp_path):
    server = hostile(status(404, Content_Length=0), status(416), status(503),
                     honest)
    subject = impatient(server)
    with pytest.raises(exception.NotFound):
        subject.get(PACK)
    with pytest.raises(exception.Corrupt):
        subject.read(PACK, 0, 10)
    for offset in range(0, 500_000, 50_000):
        subject.read(PACK, offset, 5000)
    subject.get(PACK)
    subject.size(PACK)
    subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    assert len({seen[3] for seen in server.seen}) == 1


def test_nobody_listens(read_all):
    subject = HttpStore(f'http://127.0.0.1:{free_port()}', retries=1,
                        backoff=.01)
    with pytest.raises(exception.Unavailable, match='Connection refused'):
        read_all(subject)


def test_an_unknown_host():
    subject = HttpStore('http://host.invalid', retries=0)
    with pytest.raises(exception.Unavailable, match='host.invalid'):
        subject.get(PACK)


def test_a_server_that_accepts_and_says_nothing(read_all):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        subject = HttpStore(
            f'http://127.0.0.1:{listener.getsockname()[1]}', retries=0,
            timeout=.2)
        with pytest.raises(exception.Unavailable, match=PACK):
            read_all(subject)


def test_absent_leaves_no_part(hostile, tmp_path):
    part_of(tmp_path / 'f').write_bytes(b'useless')
    with pytest.raises(exception.NotFound, match=ABSENT):
        impatient(hostile(status(404))).fetch(
            ABSENT, tmp_path / 'f', 'ab' * 32, 9)
    assert os.listdir(tmp_path) == []
