# SPDX-License-Identifier: Apache-2.0
"""The errors of fastboot, as a tree.

::

    FastbootError
    ├── Invalid          a caller's or an operator's mistake; nothing was done
    │   ├── ImageRejected    an image whose format or content is not allowed
    │   └── ConfigError      an option that cannot work
    ├── NotFound         an object, image or slot that is not there
    ├── Exists           a write-once name that is taken
    ├── Corrupt          bytes that are not what their digest or format says
    │   └── UnknownVersion   a format newer than this program
    ├── Unavailable      a store or service that cannot be reached now; retry
    ├── NoSpace          no room on the device or in the volume
    ├── Busy             held by another process, or leased; retry later
    └── CommandFailed    a program that we ran failed; carries its words
"""

from typing import Final


class FastbootError(Exception):
    """Root of all errors that fastboot raises on purpose."""


class Invalid(FastbootError):
    """The request makes no sense. Mend it; a retry fails again."""


class ImageRejected(Invalid):
    """The image may not be used here. It is left as it was."""


class ConfigError(Invalid):
    """A configuration option cannot work as it is set."""


class NotFound(FastbootError):
    """The named thing is not there."""


class Exists(FastbootError):
    """The write-once name is taken. Re-read, and decide anew."""


class Corrupt(FastbootError):
    """Bytes are not what they should be. They were not used.

    The message names the object. Fetch it again from another source, or
    restore it; nothing was changed.
    """


class UnknownVersion(Corrupt):
    """A format version that this program does not know. Upgrade it."""


class Unavailable(FastbootError):
    """Not reachable at the moment. The same call may succeed later."""


#: What reading an object may raise, where one must not stop all others.
UNREADABLE: Final = (NotFound, Corrupt, Unavailable)


class NoSpace(FastbootError):
    """No room left. What was there before is intact; free some and repeat."""


class Busy(FastbootError):
    """Held by another process or by a lease. Repeat later."""


class CommandFailed(FastbootError):
    """A program exited with an error.

    :param command: the program and its arguments.
    :param status: its exit status.
    :param words: what it printed on stderr.
    """

    def __init__(self, command: list[str], status: int, words: str) -> None:
        self.command = command
        self.status = status
        self.words = words.strip()
        super().__init__(
            f'{command[0]} exited with status {status}: '
            f'{plain(self.words[-2000:]) or "it printed nothing"}'
        )


def plain(words: str) -> str:
    """A stranger's words as one line for a log, a terminal and whoever sees
    an image."""
    return ''.join(one if one.isprintable() else ' ' for one in words)
