# SPDX-License-Identifier: Apache-2.0
"""The sandbox around every program that meets an uploaded image.

No network, no privileges, another user, a process tree of its own that dies
with its parent, and limits on memory, files and time. It hides no files: the
user sees what everybody on the host sees. Programs get their working
directory open, so the directories above it may be closed to that user.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import pwd
import stat
import subprocess
from collections.abc import Sequence
from typing import Final

from fastboot_common import exception

LOG: Final = logging.getLogger(__name__)

#: Room that conversions and guests leave on the file system, in bytes.
RESERVE: Final = 1 << 30
_OPEN_FILES: Final = 256


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use at most.

    :param memory: bytes of address space.
    :param file_size: bytes that any file it writes may have.
    :param cpu_seconds: seconds on all its processors together.
    """

    memory: int
    file_size: int
    cpu_seconds: int

    def command(self) -> list[str]:
        """The limits as a command in front of another."""
        return [
            'prlimit', f'--as={self.memory}', f'--fsize={self.file_size}',
            f'--cpu={self.cpu_seconds}', f'--nofile={_OPEN_FILES}',
            '--core=0', '--',
        ]


class Sandbox:
    """Runs programs as `user`, if we may; as ourselves if not.

    :param user: name of an account; used only if we are root.
    :raises ConfigError: there is no such account, or it is root's.
    """

    def __init__(self, user: str = 'nobody') -> None:
        self._root = os.geteuid() == 0
        if not self._root:
            return
        try:
            self._account = pwd.getpwnam(user)
        except KeyError:
            raise exception.ConfigError(
                f'no account {user!r}; create it or set [capture] user'
            ) from None
        if self._account.pw_uid == 0:
            raise exception.ConfigError(
                '[capture] user must not be root: uploaded images run as it')

    @property
    def isolated(self) -> bool:
        """Whether programs have a network of their own, with nobody in it."""
        return bool(_namespaces(self._root))

    def prefix(self, limits: Limits, *, kvm: bool = False) -> list[str]:
        """The command to put in front of a program's.

        :param kvm: the program needs ``/dev/kvm``.
        """
        return [
            'setpriv', '--pdeathsig', 'KILL', '--',
            *_namespaces(self._root),
            # Again, because a change of user forgets it.
            'setpriv', '--pdeathsig', 'KILL', '--no-new-privs',
            *(self._user(kvm) if self._root else ()), '--',
            *limits.command(),
        ]

    def enclosure(self, limits: Limits) -> list[str]:
        """As :meth:`prefix`, for our own programs: they come as who we are,
        and become :attr:`ids` when they have loaded what they need.
        """
        return ['setpriv', '--pdeathsig', 'KILL', '--',
                *_namespaces(self._root), *limits.command()]

    @property
    def ids(self) -> tuple[int, int]:
        """Numbers of the user and the group that programs run as."""
        if not self._root:
            return os.geteuid(), os.getegid()
        return self._account.pw_uid, self._account.pw_gid

    def _user(self, kvm: bool) -> list[str]:
        group = _kvm_group() if kvm else None
        return [
            f'--reuid={self._account.pw_uid}',
            f'--regid={self._account.pw_gid}',
            f'--groups={group}' if group else '--clear-groups',
            '--bounding-set=-all', '--inh-caps=-all',
        ]

    def own(self, path: pathlib.Path) -> None:
        """Give a file, or a directory and what is in it, to the user."""
        if not self._root:
            return
        ids = (self._account.pw_uid, self._account.pw_gid)
        for directory, _, files in os.walk(path):
            for name in files:
                os.lchown(os.path.join(directory, name), *ids)
            os.lchown(directory, *ids)
        if not path.is_dir():
            os.lchown(path, *ids)


def check_room(directory: pathlib.Path) -> None:
    """See that what an image makes us write does not fill the disk.

    :raises NoSpace: hardly any room is left where `directory` is.
    """
    space = os.statvfs(directory)
    if space.f_bavail * space.f_frsize < RESERVE:
        raise exception.NoSpace(
            f'{directory}: less than {RESERVE} bytes would be left; make '
            f'room, or give builders a larger disk')


def disk_size(directory: pathlib.Path) -> int:
    """Bytes of the file system where a directory is."""
    space = os.statvfs(directory)
    return space.f_blocks * space.f_frsize


def disk_usage(directory: pathlib.Path) -> int:
    """Bytes on disk of all below a directory, which may come and go."""
    total = 0
    for path, directories, names in os.walk(directory):
        for name in (*directories, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


@functools.cache
def _namespaces(root: bool) -> Sequence[str]:
    """``unshare`` with all the namespaces that this host permits.

    A service that is not root has namespaces only where the kernel lets
    users make their own.
    """
    spaces = ['--net', '--pid', '--ipc', '--uts', '--fork', '--kill-child']
    user = () if root else ('--map-current-user',)
    # Through the host's /proc others of the same account are in reach: their
    # directories, and so the images that they boot. Containers may forbid
    # one of our own.
    for proc in (['--mount-proc'], []):
        command = ['unshare', *user, *spaces, *proc, '--']
        done = subprocess.run([*command, 'true'], capture_output=True,
                              check=False, timeout=30)
        if done.returncode == 0:
            return command
    LOG.warning('This host permits no namespaces; uploaded images run with '
                'limits only, and without DHCP: %s',
                done.stderr.decode(errors='replace'))
    return []


def _kvm_group() -> int | None:
    """The group that may open ``/dev/kvm``, if it is not root's."""
    with contextlib.suppress(OSError):
        status = os.stat('/dev/kvm')
        if status.st_mode & stat.S_IWGRP and status.st_gid:
            return status.st_gid
    return None
