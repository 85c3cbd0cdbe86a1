# SPDX-License-Identifier: Apache-2.0
"""When a service counts as started. A check is polled until it is true."""

import http.client
import pathlib
import re
import socket
import time
from collections.abc import Callable

from cloud.process import Record
from cloud.rest import Rest, RestError, moment

Check = Callable[[Record], bool]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket, which crosses network namespaces."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__('localhost', timeout=5)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(path: pathlib.Path, resource: str = '/') -> Check:
    """An HTTP server on a UNIX socket gives an answer without error."""
    def check(record: Record) -> bool:
        connection = _UnixConnection(path)
        try:
            connection.request('GET', resource)
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
    return check


def listens(path: pathlib.Path) -> Check:
    """Something accepts connections on a UNIX socket."""
    def check(record: Record) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            try:
                return probe.connect_ex(str(path)) == 0
            except OSError:
                return False
    return check


def listens_inside(path: str) -> Check:
    """The same, with the name that the socket has on the service's node."""
    def check(record: Record) -> bool:
        return listens(pathlib.Path(
            f'/proc/{record.pid}/root{path}'))(record)
    return check


def listens_at(port: int) -> Check:
    """Something accepts connections on a port of this machine."""
    def check(record: Record) -> bool:
        with socket.socket() as probe:
            probe.settimeout(5)
            return probe.connect_ex(('127.0.0.1', port)) == 0
    return check


def says(pattern: str) -> Check:
    """Its log has a line that matches."""
    expression = re.compile(pattern)

    def check(record: Record) -> bool:
        return expression.search(record.said()) is not None
    return check


def lives(seconds: float) -> Check:
    """It has not ended after that time: for want of a better sign."""
    def check(record: Record) -> bool:
        return time.time() - record.began > seconds
    return check


def compute_beats(rest: Rest, host: str) -> Check:
    """Nova has heard of a host's nova-compute since it was started.

    Its record alone says "up" for a minute after it has gone; and a server
    made for a nova-compute that only starts ends in an error.
    """
    def check(record: Record) -> bool:
        try:
            answer = rest.listed('nova', '/os-services?binary=nova-compute')
        except RestError:
            return False
        return any(service['host'] == host and service['state'] == 'up'
                   and moment(service['updated_at']) > record.began
                   for service in answer['services'])
    return check


def agent_beats(rest: Rest, binary: str, host: str) -> Check:
    """Neutron has heard of an agent since it was started."""
    def check(record: Record) -> bool:
        try:
            answer = rest.listed('neutron', '/agents')
        except RestError:
            return False
        return any(agent['host'] == host and agent['binary'] == binary
                   and agent['alive']
                   and moment(agent['heartbeat_timestamp']) > record.began
                   for agent in answer['agents'])
    return check
