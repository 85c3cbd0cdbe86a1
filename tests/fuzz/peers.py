# SPDX-License-Identifier: Apache-2.0
"""What others say to us: callers, servers, the bus, guests, uploaders."""

import contextlib
import functools
import http.client
import io
import json
import os
import pathlib
import re
import socket
import tempfile
import types
import unittest.mock
import urllib.parse

import requests
import requests.adapters
import urllib3
import webob
from api_parts import ONE, Centre
from kit import File, Parts, Target
from places import IMAGE, encode, plugin

from fastboot_common import exception, journal, localapi, qemu
from fastboot_common.store.http import HttpStore
from fastboot_glance import centre, listener, records, reports, source
from fastboot_glance.api import parts as api_parts
from fastboot_nova import client
from fastboot_nova.agent import api, bus
from fastboot_nova.microvm.remote import OUTCOMES

#: Statuses that the local API knows, and those of Python's server.
LOCAL = (200, 202, 400, 404, 405, 503, 414, 431, 501, 505)
#: What the agent knows a lane by that it lent.
LANE = '0123456789abcdef' * 2
LEASE = {'image': IMAGE, 'holder': 'nova', 'file': '/var/_base/abc_sm'}


def request(method, path, body=b'', **headers):
    words = ''.join(f'{key.replace("_", "-")}: {value}\r\n'
                    for key, value in headers.items())
    return (f'{method} {path} HTTP/1.1\r\nHost: x\r\n{words}'
            f'Content-Length: {len(body)}\r\n\r\n').encode() + body


def answer(status, body, **headers):
    words = ''.join(f'{key.replace("_", "-")}: {value}\r\n'
                    for key, value in headers.items())
    return (f'HTTP/1.1 {status} X\r\n{words}Content-Length: {len(body)}'
            f'\r\n\r\n').encode() + body


# The agent's local API

class Served:
    """An agent that believes its API."""

    def ensure(self, image_id, offset, length):
        journal.validate_image_id(image_id)
        assert 0 <= offset < 1 << 62 and 0 < length < 1 << 62

    def acquire(self, image_id, holder, file, removed):
        assert removed in (True, False)
        self.release(image_id, holder, file)
        return {'image': image_id}

    def release(self, image_id, holder, file):
        journal.validate_image_id(image_id)
        journal.validate_image_id(holder)
        os.fsencode(file)
        assert os.path.normpath(file) == file and file.startswith('/')
        assert '\0' not in file and '..' not in file.split('/')

    def prepare(self, image_id):
        journal.validate_image_id(image_id)

    def differences(self, image_id, base):
        if isinstance(base, str):
            self.prepare(base)
        else:
            self.release(image_id, 'nova', str(base))
        return [(0, 4096)]

    def sync(self):
        pass

    def images(self):
        return {'images': [{'id': IMAGE}]}

    def microvms(self):
        return {'microvms': []}

    def take(self, image_id, holder):
        journal.validate_image_id(image_id)
        journal.validate_image_id(holder)
        return {'lane': LANE}

    def dress(self, token, xml):
        assert re.fullmatch('[0-9a-f]{32}', token) and len(xml) < 1 << 20

    def give_back(self, token, outcome, phase, reason, seconds):
        self.dress(token, reason)
        assert outcome in OUTCOMES and len(phase) <= 32
        reason.encode()
        assert all(re.fullmatch('[A-Za-z_]{0,32}', name) and 0 <= value < 3600
                   for name, value in seconds.items())

    def leave(self, holder):
        journal.validate_image_id(holder)


@functools.cache
def listening():
    # It has no address: callers get the other end of a pair.
    return localapi._Listener(pathlib.Path('/nowhere'), api.routes(
        Served, lambda: {'state': 'serving'}))


def call_agent(data):
    """What comes over one connection to the agent."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        listening().finish_request(theirs, '')
        # Nothing else of the listener knows of it.
        listening().work(theirs)
        theirs.close()
        said = b''.join(iter(lambda: ours.recv(65536), b''))
    for status, body in answers(said):
        assert status in LOCAL, said
        assert isinstance(json.loads(body), dict)


def answers(said):
    """Status and body of each answer of a connection."""
    while said.startswith(b'HTTP/1.1 '):
        head, _, rest = said.partition(b'\r\n\r\n')
        length = int(head.lower().partition(b'content-length: ')[2]
                     .partition(b'\r\n')[0])
        yield int(head.split()[1]), rest[:length]
        said = rest[length:]


def agent_seeds():
    def post(verb, body):
        return request('POST', f'/v1/{verb}', encode(body))
    extent = {'image': IMAGE, 'offset': 0, 'length': 4096}
    return [
        b''.join((post('ensure', extent), post('acquire', LEASE),
                  post('release', LEASE), post('prepare', LEASE),
                  post('sync', {}), request('GET', '/v1/images'),
                  request('GET', '/v1/images/image-1'),
                  request('GET', '/v1/status'))),
        b''.join((post('microvms/take', LEASE),
                  post('microvms/dress', {'lane': LANE, 'xml': '<domain/>'}),
                  post('microvms/return', {
                      'lane': LANE, 'outcome': 'failed', 'phase': 'load',
                      'reason': 'words', 'seconds': {'load': .5}}),
                  request('GET', '/v1/microvms'),
                  post('reboots/leave', LEASE))),
        post('acquire', {**LEASE, 'file': '/../x', 'removed': True}),
        post('nothing', {}), request('GET', '/v1/sync'),
        request('POST', '/v1/ensure', b'[1]', Transfer_Encoding='chunked'),
        request('POST', '/v1/prepare', b'{"image":' + b'[' * 970 + b']' * 970
                + b'}'), b'GET /\r\n', b'X' * 2000]


# Answers of the agent: to nova-compute, and to the export

def read_answer(data):
    """The export does not care for words, nova-compute does."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        posted(data)
    found = client.Lease.parse(IMAGE, client._parse(data))
    assert found.link.backing and found.socket
    found.seconds + found.thawed + found.link.start + found.link.size


def posted(data):
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)

        def connect(agent):
            agent.sock = ours
        with unittest.mock.patch.object(plugin()._Agent, 'connect', connect):
            status, words = plugin()._post('{}', 5)
    assert isinstance(status, int) and len(words) < 1000


def answer_seeds():
    lease = {'image': IMAGE, 'volume': '/v/volume', 'size': 8 << 40,
             'start': 65536, 'virtual_size': 512, 'complete': None,
             'socket': '/run/x', 'loop': '/dev/loop0', 'thawed': 5,
             'seconds': .5}
    return [
        answer(200, encode(lease)),
        answer(200, encode({**lease, 'size': 1e999, 'volume': '/a\0b'})),
        answer(503, encode({'error': 'Busy: later'})), answer(404, b'{}'),
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n'
        b'0\r\n\r\n', answer(200, b'{"image":' + b'[' * 2000)]


# The bus

class Kept:
    """Records that keep what they would write."""

    def note_host(self, report):
        assert reports.check(report) == report
        blob = records._encode(report['images'])
        assert list(records._decode('host', blob)) == sorted(
            one['id'] for one in report['images'])
        found = records._decode_microvms(
            'host', records._encode_microvms(report['microvms']))
        assert [one.group for one in found or ()] == [
            one['class'] for one in report['microvms'] or ()]
        report['host'].encode() + report['software'].encode()


class Follower:
    """What an agent does when it is told to."""

    def announce(self, version):
        assert type(version) is int
        float(version)  # as metrics are

    def ask(self, image_id):
        assert isinstance(image_id, str)

    def everything(self):
        pass


class Desk:
    """Where ids of images are put down."""

    def put(self, image_id):
        assert len(image_id) < 99


def hear(data):
    """One message, for whoever may get it."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return
    centre.Endpoint(Kept()).report({}, message)
    agent = bus.Endpoint(Follower())
    agent.announce({}, message)
    agent.sync({}, message)
    listener.Endpoint(Desk()).info({}, 'x', 'image.update', message, {})


REPORT = {
    'host': 'h1.example', 'version': 3, 'at': 1e9, 'software': '1.0',
    'images': [{'id': 'a', 'state': 'transferring', 'progress': .5,
                'error': '', 'serial': 3}],
    'volume_bytes': 1, 'mirror_bytes': 2, 'free_bytes': 3}


def bus_seeds():
    nested = b'[' * 985 + b']' * 985
    return [
        encode(REPORT), encode(['a', 5]), b'7', b'null',
        encode({'id': ONE, 'status': 'active'}),
        b'{"host":' + nested + b'}',
        encode(REPORT).replace(b'"transferring"', nested),
        encode(REPORT).replace(b'"a"', nested)]


# The guest agent

def hear_guest(data):
    """A token, and what the guest writes; whether it answered."""
    ours, theirs = socket.socketpair()
    peer = qemu.Peer(ours)
    agent = qemu.GuestAgent(peer)
    agent._token = Parts(data).number(2)
    with theirs:
        theirs.sendall(data[2:])
        theirs.shutdown(socket.SHUT_WR)
        found = agent.ping(5)
    peer.close()
    assert not found or data.count(b'return') > 1


def guest_seeds():
    return [b'\5\0\xff{"return": 5}\n{"return": {}}\n',
            b'\5\0' + b'[' * 2000 + b'\n{"event": 1}\n{"return": [5]}\n',
            b'\5\0' + b'\0' * 1000]


# Uploaded images

@functools.cache
def image_file():
    return File()


def inspect(data):
    """A letter of the format that was claimed, and an image."""
    claimed = {b'r': 'raw', b'q': 'qcow2', b'v': 'vmdk', b'h': 'vhdx',
               b'd': 'vdi', b'i': 'iso'}.get(data[:1])
    found = source.inspect(image_file().holding(data[1:]), claimed)
    assert found in ('raw', 'qcow2', 'vmdk', 'vdi', 'vhdx')


def image_seeds():
    qcow2 = (b'QFI\xfb\0\0\0\3' + bytes(12) + b'\0\0\0\x10'
             + (1 << 20).to_bytes(8, 'big')).ljust(104, b'\0')
    text = (b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\n'
            b'parentCID=ffffffff\ncreateType="monolithicSparse"\n'
            b'RW 2048 SPARSE "x.vmdk"\n')
    vmdk = (b'KDMV\1\0\0\0\3\0\0\0' + (2048).to_bytes(8, 'little')
            + (128).to_bytes(8, 'little') + (1).to_bytes(8, 'little')
            + (2).to_bytes(8, 'little')).ljust(512, b'\0') + text.ljust(
                1024, b'\0')
    vdi = b'<<< Oracle VM VirtualBox Disk Image >>>\n'.ljust(
        64, b'\0') + b'\x7f\x10\xda\xbe' + bytes(444)
    mbr = bytes(446) + b'\x80\0\2\0\xee\0\0\0\1\0\0\0' + bytes(52) + b'U\xaa'
    return [b'q' + qcow2.ljust(600, b'\0'), b'r' + bytes(600), b'v' + vmdk,
            b'd' + vdi, b'-' + mbr, b'h' + b'vhdxfile'.ljust(600, b'\0'),
            b'-conectix' + bytes(600), b'-LUKS\xba\xbe' + bytes(600),
            b'-' + b'\xeb\x3c' + bytes(508) + b'U\xaa']


# Servers of repositories

class Canned(requests.adapters.HTTPAdapter):
    """Answers every request with the same bytes."""

    data = b''

    def send(self, request, stream=False, timeout=None, verify=True,
             cert=None, proxies=None):
        stream = io.BytesIO(self.data)
        made = http.client.HTTPResponse(types.SimpleNamespace(
            makefile=lambda mode: stream), method=request.method)
        try:
            made.begin()
        except (http.client.HTTPException, OSError) as error:
            # What urllib3 makes of it, and requests of that.
            raise requests.ConnectionError(
                urllib3.exceptions.ProtocolError('x', error)) from error
        body = urllib3.HTTPResponse(
            body=made, headers=urllib3.HTTPHeaderDict(made.msg.items()),
            status=made.status, preload_content=False,
            original_response=made, request_method=request.method)
        return self.build_response(request, body)


@functools.cache
def remote():
    session, canned = requests.Session(), Canned()
    session.trust_env = False
    for scheme in ('http://', 'https://'):
        session.mount(scheme, canned)
    return HttpStore('http://h/r', session=session, retries=0), canned


def ask_server(data):
    """Whole, a range and the size of an object, from one answer."""
    served, canned = remote()
    canned.data = data
    whole = tried(lambda: served.get('config.json', 4096))
    part = tried(lambda: served.read('config.json', 5, 7))
    size = tried(lambda: served.size('config.json'))
    assert whole is None or len(whole) <= 4096
    assert part is None or len(part) == 7
    assert size is None or size >= 0
    if part is not None and b'chunked' not in data.lower():
        assert part in data


def tried(call):
    with contextlib.suppress(exception.Corrupt, exception.NotFound,
                             exception.Unavailable):
        return call()


def server_seeds():
    body = b'0123456789abcdef'
    return [
        answer(200, body), answer(404, b'no'),
        answer(206, body[5:12], Content_Range='bytes 5-11/16'),
        answer(206, body[5:12], Content_Range='bytes 5-11/*'),
        answer(302, b'', Location='https://other/x'),
        answer(301, b'', Location='http://[x'),
        answer(503, b'', Retry_After='1e999'),
        answer(429, b'', Retry_After='Fri, 31 Dec 9999 23:59:59 GMT'),
        answer(200, body, Content_Encoding='gzip'),
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
        b'10\r\n' + body + b'\r\n0\r\n\r\n']


# Users of the centre's API

@functools.cache
def service():
    # Once for all inputs: what users may do changes little there.
    place = tempfile.TemporaryDirectory(prefix='fuzz-')
    found = Centre(pathlib.Path(place.name))
    found.report('h1', {ONE: 'thawed'})
    found.place = place
    return found


def ask_centre(data):
    """A request of somebody whom the middleware let through."""
    parsed = parse_request(data)
    if parsed is None:
        return
    found = service()
    with unittest.mock.patch.object(
            api_parts.Parts, '_board', found.board), \
            unittest.mock.patch.object(
                api_parts.Parts, '_agents', found.agents):
        response = parsed.get_response(found.app)
    assert response.status_int < 500, response.text
    if parsed.environ['PATH_INFO'] != '/healthcheck':
        assert isinstance(response.json, dict)
    found.board.posted.clear()
    found.agents.told.clear()


def parse_request(data):
    """Method, path with query, roles and body, as a WSGI server would."""
    words, _, body = data.partition(b'\n')
    method, _, rest = words.partition(b' ')
    path, _, roles = rest.partition(b' ')
    if not (method in (b'GET', b'POST') and path.startswith(b'/')):
        return None
    path, _, query = path.partition(b'?')
    return webob.Request.blank('/', {
        'REQUEST_METHOD': method.decode(),
        'PATH_INFO': urllib.parse.unquote_to_bytes(path).decode('latin-1'),
        'QUERY_STRING': query.decode('latin-1'),
        'HTTP_X_ROLES': roles.decode('latin-1'),
        'wsgi.input': io.BytesIO(body), 'CONTENT_LENGTH': str(len(body)),
        'CONTENT_TYPE': 'application/json'})


def centre_seeds():
    image = f'/v1/images/{ONE}'.encode()
    return [
        b'GET /v1/images?limit=1&marker=x&state=complete admin',
        b'GET ' + image + b' admin', b'GET /v1/hosts?limit=5 admin',
        b'GET /v1/hosts/h1 admin', b'GET /v1/images/%ff%00 reader',
        b'POST ' + image + b'/action admin\n{"build": {"force": true}}',
        b'POST ' + image + b'/action admin\n{"refresh": {}}',
        b'POST /v1/hosts/h1/sync admin\n{"images": ["' + ONE.encode()
        + b'"]}', b'POST /v1/hosts/h1/sync admin\n' + b'[' * 990 + b']' * 990,
        b'GET /v1/images?limit=1&limit=2 admin', b'GET / x']


TARGETS = (
    Target('local-api', call_agent, agent_seeds, ()),
    Target('answer', read_answer, answer_seeds,
           (exception.Unavailable, exception.NotFound, exception.Busy)),
    Target('bus', hear, bus_seeds, (), 4096),
    Target('guest-agent', hear_guest, guest_seeds, ()),
    Target('image', inspect, image_seeds, (exception.ImageRejected,)),
    Target('store', ask_server, server_seeds, ()),
    Target('centre-api', ask_centre, centre_seeds, ()),
)
