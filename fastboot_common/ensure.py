# SPDX-License-Identifier: Apache-2.0
"""The agent's answer to a guest's miss: HTTP on a UNIX socket.

``POST /v1/ensure`` with ``{"image", "offset", "length"}`` (bytes) answers
when the extent is in the volume. :mod:`fastboot_common.export` is the client.
"""

import contextlib
import http.server
import json
import logging
import os
import pathlib
import shutil
import socketserver
import threading
from collections.abc import Callable
from typing import Any, Final

from fastboot_common import exception

LOG = logging.getLogger(__name__)

#: Brings an extent (image id, offset, length in bytes) into the volume.
Ensure = Callable[[str, int, int], None]

_BODY_LIMIT: Final = 4096
_STATUS: Final = (
    (exception.NotFound, 404), (exception.Invalid, 400),
    (exception.Unavailable, 503), (exception.Busy, 503),
)


class EnsureServer:
    """Serves on a socket while its context lasts."""

    def __init__(self, path: pathlib.Path, ensure: Ensure,
                 group: str | None = None) -> None:
        """Prepare it.

        :param path: of the socket; what is there is replaced.
        :param group: that may connect.
        """
        self._path = path
        self._ensure = ensure
        self._group = group

    def __enter__(self) -> 'EnsureServer':
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        before = os.umask(0o117)
        try:
            self._server = _Server(str(self._path), _Handler)
        finally:
            os.umask(before)
        if self._group:
            shutil.chown(self._path, group=self._group)
        self._server.ensure = self._ensure
        self._thread = threading.Thread(
            target=self._server.serve_forever, daemon=True, name='ensure')
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128
    ensure: Ensure


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 30
    server: _Server

    def do_POST(self) -> None:  # noqa: N802 (the base class's name)
        """One miss."""
        status, words = self._answer()
        body = json.dumps({'error': words} if words else {}).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self) -> tuple[int, str]:
        if self.path != '/v1/ensure':
            return 404, f'no such call: {self.path[:100]}'
        try:
            length = int(self.headers.get('Content-Length', ''))
            if not 0 <= length <= _BODY_LIMIT:
                raise ValueError(f'body of {length} bytes')
            asked = json.loads(self.rfile.read(length))
            image = str(asked['image'])
            offset, count = int(asked['offset']), int(asked['length'])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.close_connection = True
            return 400, repr(error)
        try:
            self.server.ensure(image, offset, count)
        except exception.FastbootError as error:
            LOG.warning('image %s: bytes %d+%d: %s', image, offset, count,
                        error)
            return next((status for kind, status in _STATUS
                         if isinstance(error, kind)), 500), str(error)
        except Exception as error:
            LOG.exception('image %s: bytes %d+%d', image, offset, count)
            return 500, repr(error)
        return 200, ''

    def address_string(self) -> str:
        """A UNIX socket's client has none."""
        return 'local'

    def log_message(self, format: str, *args: Any) -> None:
        """Into our log, for those who look for it."""
        LOG.debug(format, *args)
