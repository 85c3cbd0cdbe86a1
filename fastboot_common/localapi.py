# SPDX-License-Identifier: Apache-2.0
"""HTTP over a UNIX socket, for callers on the same host: a table of routes.

Bodies are JSON objects, both ways. An error is ``{"error": words}`` with 404
(no such thing), 400 (makes no sense), 405 (not that method), 503 (not now;
repeat) or 500.

No general web server: who may connect is decided by the socket's group, and
callers are few and local. They may still be hostile or hang: bodies, threads
and silence are bounded, and so are the calls of one route, so that slow ones
leave room for the others.
"""

import contextlib
import dataclasses
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
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from fastboot_common import exception, sockets

LOG = logging.getLogger(__name__)

#: Bytes of a request's body, unless its route takes more.
_BODY_LIMIT: Final = 16384
_THREADS: Final = 64
_IDLE_SECONDS: Final = 30.0
_CLOSE_SECONDS: Final = 10.0


class MethodError(Exception):
    """The path is there, and knows other methods."""


_STATUS: Final[tuple[tuple[type[Exception], int], ...]] = (
    (exception.NotFound, 404),
    (MethodError, 405),
    (exception.Invalid, 400),
    (exception.Unavailable, 503),
    (exception.Busy, 503),
    (exception.NoSpace, 503),
)
#: After these the connection goes on.
_KEEP: Final = (400, 404, 405, 500, 503)

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Route:
    """A verb.

    :ivar path: a regular expression; its groups are handed on.
    :ivar call: gets the body (of a GET: an empty one) and the path's groups;
        many threads at once. May raise any of fastboot's errors.
    :ivar status: of an answer that is no error.
    :ivar limit: calls at a time; more are answered with 503.
    :ivar body: bytes that a request may have.
    """

    method: str
    path: str
    call: Callable[..., Body]
    status: int = 200
    limit: int = _THREADS
    body: int = _BODY_LIMIT

    @property
    def name(self) -> str:
        """What people read."""
        return f'{self.method} {self.path}'


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_version = 'fastboot'
    sys_version = ''
    #: Seconds that a peer may be silent, in a request or between two.
    timeout = _IDLE_SECONDS
    server: '_Listener'

    def handle_one_request(self) -> None:
        """Wait for a request, and answer it."""
        self.server.rest(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:  # the base class wants these names
        """Look at something."""
        self._serve('0')

    def do_POST(self) -> None:
        """Do something."""
        self._serve('')

    def _serve(self, default: str) -> None:
        """Any error is an answer."""
        length = self.headers.get('Content-Length', default)
        limit = self._body_limit()
        if (not re.fullmatch('[0-9]{1,9}', length)
                or int(length) > limit
                or 'Transfer-Encoding' in self.headers):
            # Nobody knows where the next request would begin.
            self.close_connection = True
            self.send_error(400, f'Content-Length must be given, and be at '
                                 f'most {limit} bytes')
            return
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            self.close_connection = True
            self.send_error(400, f'{len(raw)} of {length} bytes came')
            return
        self.server.work(self.connection)
        try:
            route, groups = self._find()
            body = _parse(raw) if self.command == 'POST' else {}
            with self.server.place(route):
                answer = route.call(body, *groups)
        except Exception as error:
            status = next((status for kind, status in _STATUS
                           if isinstance(error, kind)), 500)
            if status == 500:
                LOG.exception('%s %.100s failed: %.200s', self.command,
                              self.path, raw)
            self.send_error(status, f'{type(error).__name__}: {error}')
        else:
            self._answer(route.status, answer)

    def _body_limit(self) -> int:
        try:
            return self._find()[0].body
        except (exception.NotFound, MethodError):
            # Which is answered when it was read.
            return _BODY_LIMIT

    def _find(self) -> tuple[Route, tuple[str, ...]]:
        others = False
        for route in self.server.routes:
            match = re.fullmatch(route.path, self.path)
            if match and route.method == self.command:
                return route, match.groups()
            others |= bool(match)
        if others:
            raise MethodError(f'{self.path:.100} has no {self.command}')
        raise exception.NotFound(f'no such path: {self.path:.100}')

    def send_error(self, code: int, message: str | None = None,
                   explain: str | None = None) -> None:
        """Answer an error in JSON; also what the base class finds wrong."""
        if code not in _KEEP:
            self.close_connection = True
        self._answer(code, {'error': (message or 'error')[:2000]})

    def _answer(self, status: int, answer: Body) -> None:
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


def _parse(raw: bytes) -> Body:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise exception.Invalid(f'not JSON: {error}') from error
    if not isinstance(data, dict):
        raise exception.Invalid('not a JSON object')
    return data


class _Listener(socketserver.ThreadingUnixStreamServer):
    """Accepts connections, a thread each, so many and no more at a time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, path: pathlib.Path, routes: Sequence[Route]) -> None:
        self.routes = routes
        self._places = {id(route): threading.BoundedSemaphore(route.limit)
                        for route in routes}
        self._room = threading.BoundedSemaphore(_THREADS)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._resting: set[socket.socket] = set()
        super().__init__(os.fspath(path), _Handler, bind_and_activate=False)
        # The socket's mode becomes the file's, so it never lies open.
        os.fchmod(self.socket.fileno(), sockets.MODE)

    @contextlib.contextmanager
    def place(self, route: Route) -> Any:
        """A place among the calls of a route.

        :raises Busy: all are taken.
        """
        places = self._places[id(route)]
        if not places.acquire(blocking=False):
            raise exception.Busy(
                f'{route.limit} calls of {route.name} are under way; repeat')
        try:
            yield
        finally:
            places.release()

    def rest(self, connection: socket.socket) -> None:
        """A connection waits for its next request, or for the rest of it."""
        with self._lock:
            self._resting.add(connection)

    def work(self, connection: socket.socket) -> None:
        """A request came, all of it."""
        with self._lock:
            self._resting.discard(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Called by the accepting thread, which waits for room here."""
        if not self._room.acquire(blocking=False):
            # Who says nothing makes room for who does.
            self._hang_up(self._resting)
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
            self._resting.discard(request)
        self._room.release()

    def _hang_up(self, connections: set[socket.socket]) -> None:
        with self._lock:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away is its own business."""
        LOG.debug('a caller went away', exc_info=True)

    def drain(self, seconds: float) -> None:
        """Let calls under way end, and idle connections at once."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                if not self._open:
                    return
            self._hang_up(self._open)
            time.sleep(0.02)
        LOG.warning('calls are still under way; not waiting more')


class Server:
    """Answers on a UNIX socket; a context manager.

    :param path: of the socket. One that nobody serves is replaced.
    :param routes: what is answered.
    :param group: that may connect, beside our own user.
    """

    def __init__(self, path: pathlib.Path, routes: Sequence[Route],
                 group: str | None = None) -> None:
        self._path = pathlib.Path(path)
        self._routes = routes
        self._group = group
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to answer.

        :raises ConfigError: the path or the group cannot work.
        :raises Busy: another process serves the path.
        """
        sockets.vacate(self._path)
        listener = _Listener(self._path, self._routes)
        try:
            listener.server_bind()
            sockets.admit(self._path, self._group)
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
            name='localapi')
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
