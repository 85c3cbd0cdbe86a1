# SPDX-License-Identifier: Apache-2.0
"""Files as stores write them: whole, synced, and with errors explained.

Nothing here knows of repositories.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import Final

from fastboot_common import exception

MODE: Final = 0o640
DIRECTORY_MODE: Final = 0o750

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FILE: Final = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY,
                   errno.ENAMETOOLONG)


@contextlib.contextmanager
def explained(
    what: str,
    missing: type[exception.FastbootError] = exception.NotFound,
) -> Iterator[None]:
    """Turn the operating system's errors into ours.

    :param what: what was worked on, for the message.
    :param missing: what a missing file means here.
    :raises NoSpace: device, quota or file size limit is exhausted.
    :raises Invalid: owner, modes or mount options forbid it, or it is no
        regular file.
    :raises Unavailable: anything else that the device or a network file
        system reports.
    """
    try:
        yield
    except OSError as error:
        raise _translated(what, error, missing) from error


def _translated(
    what: str, error: OSError, missing: type[exception.FastbootError],
) -> exception.FastbootError:
    words = f'{what}: {error.strerror or error}'
    if error.errno in _FULL:
        return exception.NoSpace(f'{words}; free some room and repeat')
    if error.errno in _FORBIDDEN:
        return exception.Invalid(
            f'{words}; check owner, modes and mount options')
    if error.errno in _NO_FILE:
        return exception.Invalid(f'{words}; something else is in the way')
    if error.errno == errno.ENOENT:
        return missing(words)
    return exception.Unavailable(words)


def write(file: int, data: bytes) -> None:
    """All of `data` to the descriptor `file`, at its position.

    Unbuffered, so that a full device is noticed here and not at the close.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest):]


def sync_directory(path: pathlib.Path) -> None:
    """Make the names in the directory `path` lasting."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
