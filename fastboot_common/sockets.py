# SPDX-License-Identifier: Apache-2.0
"""Paths of UNIX sockets: free ones, and who may connect."""

import grp
import os
import pathlib
import socket
from typing import Final

from fastboot_common import exception

#: Bytes of a UNIX socket's path that the kernel takes.
PATH_LIMIT: Final = 107
#: Mode of every socket: its owner and its group.
MODE: Final = 0o660


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
        path.chmod(MODE)
    except (KeyError, OSError) as error:
        raise exception.ConfigError(
            f'cannot give {path} to group {group}: {error}') from error
