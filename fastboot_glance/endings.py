# SPDX-License-Identifier: Apache-2.0
"""What tells that a boot is over: small drivers, each with one question.

They look at a :class:`View` several times a second and believe nothing: a
guest that lies about being up has a poor boot set, and harms nobody else.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final, Protocol

from fastboot_common import exception, qemu

#: Bytes of the console that are kept to search in.
CONSOLE: Final = 4096
_PING_EVERY: Final = 1.0
_PING_SECONDS: Final = 0.2


@dataclasses.dataclass
class View:
    """What can be seen of a guest now.

    :param seconds: since the machine was started.
    :param agent: the guest agent.
    :param console: the end of what the guest printed.
    :param unique: bytes of different blocks read.
    :param idle: seconds since the last new block, or since the start.
    """

    seconds: float
    agent: qemu.GuestAgent
    console: bytes
    unique: int
    idle: float


class Ending(Protocol):
    """A driver; made anew for each boot from the options of ``[capture]``."""

    def over(self, view: View) -> bool:
        """Whether the boot is over. Returns within half a second."""


class Agent:
    """The guest agent answers."""

    def __init__(self, options: Any) -> None:
        self._next = 0.0

    def over(self, view: View) -> bool:
        """Ask the agent once a second."""
        if view.seconds < self._next:
            return False
        self._next = view.seconds + _PING_EVERY
        return view.agent.ping(_PING_SECONDS)


class Console:
    """The serial console shows a pattern.

    :raises ConfigError: the pattern is no regular expression.
    """

    def __init__(self, options: Any) -> None:
        try:
            self._pattern = re.compile(options.console_pattern.encode())
        except re.error as error:
            raise exception.ConfigError(
                f'[capture] console_pattern: {error}') from error

    def over(self, view: View) -> bool:
        """Search what is new, and a little before it."""
        return self._pattern.search(view.console) is not None


class Quiet:
    """The guest has read something and reads nothing new any more."""

    def __init__(self, options: Any) -> None:
        self._seconds: int = options.quiet_seconds
        self._bytes: int = options.quiet_mib << 20

    def over(self, view: View) -> bool:
        """Compare with the two limits."""
        return view.unique >= self._bytes and view.idle >= self._seconds


DRIVERS: Final[dict[str, Callable[[Any], Ending]]] = {
    'agent': Agent, 'console': Console, 'quiet': Quiet,
}


def load(options: Any) -> dict[str, Ending]:
    """The drivers that ``[capture] end`` names, by name.

    :raises ConfigError: there is no such driver, or none at all.
    """
    unknown = set(options.end) - set(DRIVERS)
    if unknown or not options.end:
        raise exception.ConfigError(
            f'[capture] end: {options.end!r}; use some of {list(DRIVERS)}')
    return {name: DRIVERS[name](options) for name in options.end}
