# SPDX-License-Identifier: Apache-2.0
"""Talking to what waits in a baked guest; see reference/microvm.

Two directions, a line each: what the host wants, and the stages that the
guest comes to. A guest is not believed: its lines have a bound, a word that
is not known is nothing, and of a known one only numbers are kept.
"""

import dataclasses
import pathlib
import re
import secrets
from typing import Final

from fastboot_common import exception

VERSION: Final = 2
#: Raised whenever guests are prepared in another way: what was baked before
#: is baked anew.
RECIPE: Final = 11
#: Bytes that the guest's generator of random numbers gets.
ENTROPY: Final = 64

READY: Final = 'READY'
QUIET: Final = 'QUIET'
FAILED: Final = 'FAILED'
REFUSED: Final = 'REFUSED'
#: The stages behind ACTIVATE, in their order.
STAGES: Final = ('RANDOM', 'CLOCK', 'PLUGGED', 'IDENTITY', 'LINKED',
                 'LOCAL', 'NETWORK', 'SERVICES', 'DONE')
#: With this one the guest is somebody.
IDENTITY: Final = 'IDENTITY'
DONE: Final = 'DONE'
_WORDS: Final = frozenset((READY, QUIET, FAILED, REFUSED, *STAGES))

QUIESCE: Final = b'QUIESCE\n'

_LINE: Final = re.compile(
    rb'([A-Z]{2,16}) (\d{1,9})(?:\.\d{1,9})?(?: (\d{1,9}))?\r?')
_LINE_LIMIT: Final = 128
_HOSTNAME: Final = re.compile(
    r'(?=.{1,64}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?'
    r'(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*')
_UUID: Final = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')
_HERE: Final = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Line:
    """What the guest said.

    :ivar word: one that is known.
    :ivar number: with it; None: none.
    """

    word: str
    number: int | None = None


class Lines:
    """Takes lines out of what comes from a guest."""

    def __init__(self) -> None:
        self._rest = b''
        self._skipping = False

    def feed(self, data: bytes) -> list[Line]:
        """The known lines that end in these bytes."""
        found = []
        *ended, rest = (self._rest + data).split(b'\n')
        for line in ended:
            # The end of a line whose beginning was too long is no line.
            if not self._skipping and (one := parse(line)) is not None:
                found.append(one)
            self._skipping = False
        if len(rest) > _LINE_LIMIT:
            self._skipping = True
        self._rest = b'' if self._skipping else rest
        return found


def parse(line: bytes) -> Line | None:
    """A line of the guest; None: nothing that is known."""
    match = _LINE.fullmatch(line) if len(line) <= _LINE_LIMIT else None
    if match is None or (word := match[1].decode()) not in _WORDS:
        return None
    return Line(word, None if match[3] is None else int(match[3]))


def request(uuid: str, hostname: str, clock: float, *, vcpus: int = 1,
            memory: int = 0, interfaces: int = 0,
            entropy: bytes | None = None) -> bytes:
    """The line that makes a copy a server.

    :param uuid: of the server.
    :param hostname: until cloud-init sets one.
    :param clock: seconds since 1970.
    :param vcpus: that the guest is to switch on, all together.
    :param memory: MiB that were plugged.
    :param interfaces: whose links it is to wait for before cloud-init.
    :param entropy: for the guest's generator; None: new; empty: none, with
        which copies are alike, as only a test may want them.
    :raises Invalid: the guest could take it for something else.
    """
    if not _UUID.fullmatch(uuid):
        raise exception.Invalid(f'not a UUID: {uuid!r}')
    if not _HOSTNAME.fullmatch(hostname):
        raise exception.Invalid(f'not a host name: {hostname!r}')
    if entropy is None:
        entropy = secrets.token_bytes(ENTROPY)
    return (f'ACTIVATE {VERSION} {uuid} {hostname} {clock:.3f} {vcpus:d} '
            f'{memory:d} {interfaces:d} {entropy.hex() or "-"}\n'
            ).encode('ascii')


def hostname(name: str) -> str:
    """A host name that resembles a name."""
    found = re.sub(r'[^A-Za-z0-9-]+', '-', name)[:63].strip('-')
    return found or 'server'


def user_data() -> bytes:
    """What cloud-init runs in the guest that is baked."""
    script = (_HERE / 'bakery.sh').read_text()
    for name in ('activator.py', 'activator.sh'):
        script = script.replace(f'@{name}@', (_HERE / name).read_text())
    return script.encode()
