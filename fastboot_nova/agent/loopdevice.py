# SPDX-License-Identifier: Apache-2.0
"""Volumes as read-only loop devices without direct I/O.

A guest whose disk has cache mode "none" opens its whole chain O_DIRECT. On
such a device that bypasses the device's cache only: the volume beneath is
read through the page cache, which all guests share.

For direct I/O only. A device has a page cache of its own, which does not hear
when the volume changes beneath: who reads it buffered may get what was there
before an eviction.

The kernel holds the state: devices are found again by the file behind them.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import threading
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception

LOG = logging.getLogger(__name__)

_TIMEOUT: Final = 10.0
_MODE: Final = 0o640


class LoopDevices:
    """One device a volume, made when it is needed.

    :param gid: the group that may read them: QEMU's.
    """

    def __init__(self, gid: int) -> None:
        self._gid = gid
        self._lock = threading.Lock()
        self._known: dict[pathlib.Path, pathlib.Path] = {}

    def attach(self, file: pathlib.Path) -> pathlib.Path:
        """The device of a volume.

        :raises Unavailable: none can be had.
        """
        with self._lock:
            device = self._known.get(file)
            if device is None or not _is_of(device, file):
                device = _find(file) or _make(file)
                self._known[file] = device
                LOG.info('%s is %s', device, file)
            self._admit(device)
            return device

    def detach(self, file: pathlib.Path) -> None:
        """Remove a volume's device, now or once its last user closes it."""
        with self._lock:
            self._known.pop(file, None)
            device = _find(file)
            if device:
                _losetup('--detach', str(device))
                LOG.info('%s is not needed any more', device)

    def _admit(self, device: pathlib.Path) -> None:
        """udev may have its own idea of the owner; ours is needed."""
        found = device.stat()
        if (found.st_gid, found.st_mode & 0o777) != (self._gid, _MODE):
            os.chown(device, 0, self._gid)
            device.chmod(_MODE)


def _is_of(device: pathlib.Path, file: pathlib.Path) -> bool:
    """By what the kernel says of the device, without a program."""
    loop = pathlib.Path('/sys/block', device.name, 'loop')
    with contextlib.suppress(OSError):
        return ((loop / 'backing_file').read_text().rstrip('\n') == str(file)
                and (loop / 'dio').read_text().strip() == '0'
                and (loop / 'offset').read_text().strip() == '0')
    return False


def _find(file: pathlib.Path) -> pathlib.Path | None:
    words = _losetup('--associated', str(file), '--noheadings', '--output',
                     'NAME,RO')
    for name, read_only in map(str.split, words.splitlines()):
        if read_only == '1' and _is_of(pathlib.Path(name), file):
            return pathlib.Path(name)
    return None


def _make(file: pathlib.Path) -> pathlib.Path:
    device = pathlib.Path(_losetup(
        '--find', '--show', '--read-only', '--direct-io=off',
        str(file)).strip())
    if shutil.which('udevadm'):
        # It sets owner and mode when it hears of the device: before us.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(['udevadm', 'settle', '--timeout=2'],
                           timeout=_TIMEOUT, check=False,
                           stdin=subprocess.DEVNULL, capture_output=True)
    return device


def _losetup(*arguments: str) -> str:
    command: list[Any] = ['losetup', *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise exception.Unavailable(
            f'no loop device: {error}') from error
    if done.returncode:
        raise exception.Unavailable(
            f'{" ".join(command)}: {done.stderr.strip()}')
    return done.stdout
