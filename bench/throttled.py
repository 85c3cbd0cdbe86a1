# SPDX-License-Identifier: Apache-2.0
"""A web server with a narrow link: ``DIRECTORY RATE DELAY``.

Prints its port. Bytes a second are for all connections together; the delay
(seconds) is before each answer, as of a round trip.
"""

import http.server
import pathlib
import sys
import time

from fastboot_common.store import throttle

PIECE = 32 << 10


def main() -> None:
    """Serve until killed."""
    root, rate, delay = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
    limit = throttle.Throttle(int(rate))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def do_GET(self) -> None:
            time.sleep(delay)
            path = root / self.path.lstrip('/')
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            words = self.headers.get('Range', 'bytes=0-')
            first, last = words.removeprefix('bytes=').split('-')
            start, end = int(first), min(int(last or size - 1), size - 1) + 1
            self.send_response(206)
            self.send_header('Content-Length', str(end - start))
            self.send_header('Content-Range',
                             f'bytes {start}-{end - 1}/{size}')
            self.end_headers()
            if self.command == 'HEAD':
                return
            with path.open('rb') as file:
                file.seek(start)
                while start < end:
                    data = file.read(min(PIECE, end - start))
                    limit.take(len(data))
                    self.wfile.write(data)
                    start += len(data)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == '__main__':
    main()
