# SPDX-License-Identifier: Apache-2.0
"""nova-compute's line to the agent: one call, one connection, one deadline.

Every call ends within its seconds, whatever the agent does: it may be gone,
hang, or trickle. Plain threads and the standard library only, as nova-compute
imports this.
"""

import dataclasses
import http.client
import io
import json
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any, Final, Self, cast

from fastboot_common import chain, exception

_ANSWER_LIMIT: Final = 1 << 20
_WORDS: Final = 500


@dataclasses.dataclass(frozen=True)
class Lease:
    """What the agent gives for an image (bytes, seconds).

    :ivar socket: where guests reach the export.
    :ivar device: a block device with the volume's bytes, if there is one.
    :ivar thawed: bytes that were put into the volume for this call.
    :ivar seconds: that the agent took.
    """

    link: chain.Link
    socket: pathlib.Path
    device: pathlib.Path | None
    thawed: int
    seconds: float

    @classmethod
    def parse(cls, image_id: str, raw: dict[str, Any]) -> Self:
        """Read the answer of acquire.

        :raises Unavailable: it makes no sense.
        """
        def path(name: str) -> pathlib.Path | None:
            return pathlib.Path(raw[name]) if raw.get(name) else None

        try:
            if raw['image'] != image_id:
                raise ValueError(f'asked for {image_id}')
            volume = pathlib.Path(raw['volume'])
            link = chain.Link(image_id, volume, int(raw['size']),
                              int(raw['start']), int(raw['virtual_size']),
                              path('complete'))
            return cls(link, pathlib.Path(raw['socket']), path('loop'),
                       int(raw.get('thawed', 0)),
                       float(raw.get('seconds', 0)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise exception.Unavailable(
                f'the agent answers nonsense: {error!r}') from error


@dataclasses.dataclass(frozen=True)
class Taken:
    """A lane that the agent gave: a µVM for one instance.

    :ivar token: what the agent knows it by.
    :ivar path: of the file that libvirt restores.
    :ivar directory: of the artifact.
    :ivar group: name of the class of hosts.
    """

    token: str
    path: pathlib.Path
    directory: pathlib.Path
    group: str

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        """Read the answer of take.

        :raises Unavailable: it makes no sense.
        """
        try:
            words = [raw[name] for name in
                     ('lane', 'path', 'directory', 'class')]
            if not all(isinstance(word, str) and word for word in words):
                raise ValueError('no words')
        except (KeyError, ValueError) as error:
            raise exception.Unavailable(
                f'the agent answers nonsense: {error!r}') from error
        token, path, directory, group = words
        return cls(token, pathlib.Path(path), pathlib.Path(directory), group)


class Agent:
    """The agent of this host.

    :param path: of its socket.
    :param seconds: that a call may take.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self._path = path
        self._seconds = seconds

    def acquire(self, image_id: str, stub: pathlib.Path,
                removed: bool = False) -> Lease:
        """Lease an image for as long as a stub exists.

        :param removed: one that was deregistered will do: disks need it.
        :raises NotFound: the image is not ours, or not on this host yet.
        :raises Busy: it is being made ready; a repeat may find it so.
        :raises Unavailable: the agent does not answer, or cannot now.
        """
        return Lease.parse(image_id, self._call(
            'POST', '/v1/acquire', {'image': image_id, 'holder': 'nova',
                                    'file': str(stub),
                                    'removed': removed}))

    def prepare(self, image_id: str) -> None:
        """Bring the whole image here, in the background.

        :raises NotFound: the image is not ours.
        :raises Unavailable: the agent does not answer, or cannot now.
        """
        self._call('POST', '/v1/prepare', {'image': image_id})

    def differences(self, image_id: str, base: pathlib.Path | str,
                    ) -> list[tuple[int, int]]:
        """Extents (bytes) in which something else is not an image.

        :param base: a file of raw bytes, or the id of another image.
        :raises NotFound: an image is not ours, or the file is not there.
        :raises Busy: others ask the same; repeat.
        :raises Unavailable: the agent does not answer, or cannot tell.
        """
        kind = 'other' if isinstance(base, str) else 'file'
        answer = self._call('POST', '/v1/differences', {
            'image': image_id, kind: str(base)})
        try:
            found = [(offset, length) for offset, length in
                     answer['extents']]
            if not all(type(offset) is type(length) is int
                       and offset >= 0 < length for offset, length in found):
                raise ValueError('no extents')
        except (KeyError, TypeError, ValueError) as error:
            raise exception.Unavailable(
                f'the agent answers nonsense: {error!r}') from error
        return found

    def image_ids(self) -> list[str]:
        """The images that this host knows.

        :raises Unavailable: the agent does not answer, or cannot now.
        """
        try:
            return [str(image['id']) for image in
                    self._call('GET', '/v1/images', None)['images']]
        except (KeyError, TypeError) as error:
            raise exception.Unavailable(
                f'the agent answers nonsense: {error!r}') from error

    def held(self) -> tuple[pathlib.Path, int]:
        """Where mirror, volumes and µVMs are, and the bytes that they take.

        :raises Unavailable: the agent does not answer, or does not know yet.
        """
        status = self._call('GET', '/v1/status', None)
        try:
            return pathlib.Path(status['path']), (
                int(status['volume_bytes']) + int(status['mirror_bytes'])
                + int(status.get('microvm_bytes') or 0))
        except (KeyError, TypeError, ValueError) as error:
            raise exception.Unavailable(
                f'the agent does not know yet what it holds: '
                f'{error!r}') from error

    def take(self, image_id: str, holder: str) -> Taken:
        """Have a µVM of an image for an instance.

        :param holder: the instance's UUID.
        :raises NotFound: this host has none of it, and why.
        :raises Busy: all are in use; a repeat may find one.
        :raises Unavailable: the agent does not answer, or cannot now.
        """
        return Taken.parse(self._call(
            'POST', '/v1/microvms/take',
            {'image': image_id, 'holder': holder}))

    def dress(self, token: str, xml: str) -> None:
        """Make what was taken the instance's.

        :param xml: the instance's definition.
        :raises Unavailable: the agent does not, and why.
        """
        self._call('POST', '/v1/microvms/dress', {'lane': token, 'xml': xml})

    def give_back(self, token: str, outcome: str, phase: str = '',
                  reason: str = '',
                  seconds: Mapping[str, float] | None = None) -> None:
        """Be done with what was taken.

        :param outcome: ``resumed``, ``refused`` or ``failed``.
        :param phase: that it failed in.
        :param reason: in words.
        :param seconds: at the end of each phase, since the beginning.
        :raises Unavailable: the agent does not hear it; it takes it back
            by itself.
        """
        self._call('POST', '/v1/microvms/return', {
            'lane': token, 'outcome': outcome, 'phase': phase,
            'reason': reason[:_WORDS], 'seconds': dict(seconds or {})})

    def leave(self, holder: str) -> None:
        """Have a guest not started that reboots just now.

        :param holder: the instance's UUID.
        :raises Unavailable: the agent does not answer.
        """
        self._call('POST', '/v1/reboots/leave', {'holder': holder})

    def _call(self, method: str, path: str,
              body: dict[str, Any] | None) -> dict[str, Any]:
        deadline = time.monotonic() + self._seconds
        data = json.dumps(body).encode() if body is not None else b''
        request = (f'{method} {path} HTTP/1.1\r\nHost: agent\r\n'
                   f'Connection: close\r\n'
                   f'Content-Type: application/json\r\n'
                   f'Content-Length: {len(data)}\r\n\r\n').encode() + data
        try:
            answer = self._exchange(request, deadline)
        except OSError as error:
            raise exception.Unavailable(
                f'the agent does not answer at {self._path}: '
                f'{error}') from error
        return _parse(answer)

    def _exchange(self, request: bytes, deadline: float) -> bytes:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(_left(deadline))
            line.connect(self._path)
            line.sendall(request)
            answer = bytearray()
            while len(answer) <= _ANSWER_LIMIT:
                line.settimeout(_left(deadline))
                piece = line.recv(65536)
                if not piece:
                    break
                answer += piece
            return bytes(answer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError('timed out')
    return left


def _parse(answer: bytes) -> dict[str, Any]:
    try:
        response = http.client.HTTPResponse(
            cast(socket.socket, _Received(answer)))
        response.begin()
        if response.chunked:
            # No agent does that, and http.client believes any length.
            raise ValueError('in chunks')
        content = json.loads(response.read(_ANSWER_LIMIT) or b'{}')
        if not isinstance(content, dict):
            raise ValueError('not a JSON object')
    except (http.client.HTTPException, ValueError, RecursionError) as error:
        raise exception.Unavailable(
            f'the agent answers nonsense: {error!r}') from error
    if response.status in (200, 202):
        return content
    words = str(content.get('error', response.reason))[:_WORDS]
    if response.status == 404:
        raise exception.NotFound(words)
    if words.startswith(exception.Busy.__name__):
        raise exception.Busy(words)
    raise exception.Unavailable(f'{words} ({response.status})')


class _Received:
    """An answer that came, for http.client to parse."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        """What HTTPResponse asks of a socket."""
        return io.BytesIO(self._data)
