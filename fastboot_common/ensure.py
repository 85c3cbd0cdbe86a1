# SPDX-License-Identifier: Apache-2.0
"""The agent's side of a miss: HTTP over a UNIX socket, one verb.

``POST /v1/ensure`` with ``{"image": id, "offset": bytes, "length": bytes}``
answers 200 and ``{}`` once every entry of the extent is set, else ``{"error":
words}`` with 404 (no such image), 400 (makes no sense), 503 (not now: the
export asks again) or 500. The client is :mod:`fastboot_common.export`.

No general web server: who may connect is decided by the socket's group, and
callers are few and local.
"""

import contextlib
import grp
import http.server
import json
import logging
import os
import pathlib
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from fastboot_common import exception

LOG = logging.getLogger(__name__)

#: Bytes of a UNIX socket's path that the kernel takes.
PATH_LIMIT: Final = 107

_IMAGE: Final = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')
_BODY_LIMIT: Final = 4096
_THREADS: Final = 64
_IDLE_SECONDS: Final = 30.0
_CLOSE_SECONDS: Final = 10.0
_MODE: Final = 0o660

_STATUS: Final[tuple[tuple[type[Exception], int], ...]] = (
    (exception.NotFound, 404),
    (exception.Invalid, 400),
    (exception.Unavailable, 503),
    (exception.Busy, 503),
)


def vacate(path: pathlib.Path) -> None:
    """Make `path` free for a socket: remove one that nobody answers.

    :raises ConfigError: the path is too long, or something else lies there.
    :raises Busy: somebody answers there.
    """
    if len(os.fsencode(path)) > PATH_LIMIT:
        raise exception.ConfigError(
            f'{path} is longer than the {PATH_LIMIT} bytes that a UNIX '
            f'socket may have; choose a shorter directory')
    if path.exists() and not path.is_socket():
        raise exception.ConfigError(
            f'{path} is no socket; remove it or choose another path')
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # it is slow, or not for us: in any case it is there
    raise exception.Busy(f'another process serves {path}; stop it first')


def admit(path: pathlib.Path, group: str | None) -> None:
    """Let `group` connect to the socket at `path`, and no others.

    :raises ConfigError: there is no such group, or we may not give it away.
    """
    try:
        if group is not None:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        path.chmod(_MODE)
    except (KeyError, OSError) as error:
        raise exception.ConfigError(
            f'cannot give {path} to group {group}: {error}') from error


def _parse(body: bytes) -> tuple[str, int, int]:
    """Image, offset and length of a request.

    :raises Invalid: it is none.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise exception.Invalid(f'not JSON: {error}') from error
    if not isinstance(data, dict):
        raise exception.Invalid('not a JSON object')
    image, offset, length = map(data.get, ('image', 'offset', 'length'))
    if not (isinstance(image, str) and _IMAGE.fullmatch(image)):
        raise exception.Invalid('"image" is not the id of an image')
    if not (type(offset) is int and type(length) is int
            and 0 <= offset < 1 << 62 and 0 < length < 1 << 62):
        raise exception.Invalid('"offset" and "length" must be bytes')
    return image, offset, length


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_version = 'fastboot'
    sys_version = ''
    #: Seconds that a peer may be silent, in a request or between two.
    timeout = _IDLE_SECONDS
    server: '_Listener'

    def do_POST(self) -> None:  # the base class wants this name
        """The one verb. Any error is an answer."""
        length = self.headers.get('Content-Length', '')
        if (not re.fullmatch('[0-9]{1,9}', length)
                or int(length) > _BODY_LIMIT
                or 'Transfer-Encoding' in self.headers):
            # Nobody knows where the next request would begin.
            self.close_connection = True
            self.send_error(400, f'Content-Length must be given, and be at '
                                 f'most {_BODY_LIMIT} bytes')
            return
        body = self.rfile.read(int(length))
        try:
            if self.path != '/v1/ensure':
                raise exception.NotFound(f'no such path: {self.path:.100}')
            self.server.ensure(*_parse(body))
        except Exception as error:
            status = next((status for kind, status in _STATUS
                           if isinstance(error, kind)), 500)
            if status == 500:
                LOG.exception('ensure failed: %.200s', body)
            self.send_error(status, f'{type(error).__name__}: {error}')
        else:
            self._answer(200, {})

    def send_error(self, code: int, message: str | None = None,
                   explain: str | None = None) -> None:
        """Answer an error in JSON; also what the base class finds wrong."""
        if code not in {status for _, status in _STATUS} | {500}:
            self.close_connection = True
        self._answer(code, {'error': (message or 'error')[:2000]})

    def _answer(self, status: int, answer: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        if self.close_connection:
            self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug(format, *args)


class _Listener(socketserver.ThreadingUnixStreamServer):
    """Accepts connections, a thread each, so many and no more at a time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, path: pathlib.Path,
                 ensure: Callable[[str, int, int], None]) -> None:
        self.ensure = ensure
        self._room = threading.BoundedSemaphore(_THREADS)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(os.fspath(path), _Handler, bind_and_activate=False)
        # The socket's mode becomes the file's, so it never lies open.
        os.fchmod(self.socket.fileno(), _MODE)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Called by the accepting thread, which waits for room here."""
        self._room.acquire()
        with self._lock:
            self._open.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any,
                               client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away is its own business."""
        LOG.debug('a caller of ensure went away', exc_info=True)

    def drain(self, seconds: float) -> None:
        """Let calls under way end, and idle connections at once."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                if not self._open:
                    return
                for connection in self._open:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RD)
            time.sleep(0.02)
        LOG.warning('calls of ensure are still under way; not waiting more')


class EnsureServer:
    """Answers misses on a UNIX socket; a context manager.

    :param path: of the socket. One that nobody serves is replaced.
    :param ensure: called with image id, offset and length (bytes), by many
        threads at once; returns when all entries of the extent are set. May
        raise any of fastboot's errors.
    :param group: that may connect, beside our own user.
    """

    def __init__(self, path: pathlib.Path,
                 ensure: Callable[[str, int, int], None],
                 group: str | None = None) -> None:
        self._path = pathlib.Path(path)
        self._ensure = ensure
        self._group = group
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to answer.

        :raises ConfigError: the path or the group cannot work.
        :raises Busy: another process serves the path.
        """
        vacate(self._path)
        listener = _Listener(self._path, self._ensure)
        try:
            listener.server_bind()
            admit(self._path, self._group)
            listener.server_activate()
        except OSError as error:
            listener.server_close()
            raise exception.ConfigError(
                f'cannot serve {self._path}: {error}') from error
        except BaseException:
            listener.server_close()
            raise
        self._listener = listener
        self._thread = threading.Thread(
            target=listener.serve_forever, args=(0.1,), daemon=True,
            name='ensure')
        self._thread.start()

    def close(self) -> None:
        """Stop. Calls under way get some seconds to end."""
        if self._listener is None or self._thread is None:
            return
        listener, self._listener = self._listener, None
        self._path.unlink(missing_ok=True)
        listener.shutdown()
        self._thread.join()
        listener.server_close()
        listener.drain(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
