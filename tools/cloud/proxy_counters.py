# SPDX-License-Identifier: Apache-2.0
"""How much a host read from each API, and from the repository."""

import csv
import pathlib
import socket


def read(path: pathlib.Path) -> dict[str, int]:
    """Ask a forwarder, at its statistics socket.

    :return: bytes that callers received, by service, since it started.
    :raises OSError: it does not run.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b'show stat\n')
        text = b''
        while part := connection.recv(1 << 16):
            text += part
    return parse(text.decode())


def parse(text: str) -> dict[str, int]:
    """Of HAProxy's table, the bytes out of each listener."""
    rows = csv.DictReader(text.strip().removeprefix('# ').splitlines())
    return {row['pxname']: int(row['bout']) for row in rows
            if row['svname'] == 'FRONTEND'}
