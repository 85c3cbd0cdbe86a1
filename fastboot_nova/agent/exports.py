# SPDX-License-Identifier: Apache-2.0
"""The export and its shield: kept running, also while we are not.

They hold no state, and guests are connected to them. So they are children
that outlive us; at the next start those that still run are found by their
sockets and left alone. Only one that was started with other arguments, or is
older than the plugin on disk, is replaced: a guest's read then waits in the
shield (or, if it is the shield, the guest pauses and is resumed).
"""

import contextlib
import os
import pathlib
import select
import signal
import subprocess
import threading
import time
from typing import Final

from oslo_log import log as logging

from fastboot_common import exception, files, nbdkit, sockets

LOG = logging.getLogger(__name__)

_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 5.0
#: Checks in a row at which it says nothing before it counts as hung.
_PATIENCE: Final = 10


class Keeper:
    """One nbdkit that outlives us.

    It runs as a daemon: in the foreground it would end with the thread that
    started it. Its process is known by the file ``<socket>.pid`` beside the
    socket, and trusted to be ours only while its arguments say so.

    :param server: what to run.
    :param group: that may connect.
    :param source: a file that it must not be older than.
    """

    def __init__(self, server: nbdkit.Server, group: str | None,
                 source: pathlib.Path | None = None) -> None:
        self.path = server.path
        self.pid_file = server.path.with_suffix('.pid')
        self.command = server.daemon(self.pid_file)
        self._group = group
        self._source = source
        self._known = 0
        self._silent = 0

    def check(self) -> None:
        """Make sure that it runs.

        :raises FastbootError: it does not.
        """
        try:
            nbdkit.greet(self.path)
        except TimeoutError:
            self._silent += 1
            if self._silent < _PATIENCE:
                raise exception.Unavailable(
                    f'{self.path} says nothing') from None
            LOG.error('%s has said nothing for long; restarting nbdkit',
                      self.path)
            self.stop()
        except OSError:
            pass
        else:
            self._silent = 0
            pid = self._pid()
            if pid and pid == self._known:
                return
            reason = self._misfit(pid)
            if not reason:
                LOG.info('nbdkit %d serves %s: it goes on', pid, self.path)
                self._known = pid
                return
            LOG.warning('nbdkit %d at %s %s: replacing it', pid, self.path,
                        reason)
            self.stop()
        self._start()

    def stop(self) -> None:
        """End the one that runs.

        :raises Busy: the process is not known.
        """
        pid = self._pid()
        try:
            handle = os.pidfd_open(pid) if pid else -1
        except ProcessLookupError:
            return
        # Looked at again: another may have got the number meanwhile.
        if not pid or self._pid() != pid:
            raise exception.Busy(
                f'{self.path} is served by a process that is not the one of '
                f'{self.pid_file}; stop it')
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
                if select.select([handle], [], [], _STOP_SECONDS)[0]:
                    return
        finally:
            os.close(handle)

    def _pid(self) -> int:
        """The nbdkit of our socket; 0: none that we know."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return 0
        command = _command(pid)
        ours = (command[:1] == self.command[:1]
                and os.fspath(self.path) in command)
        return pid if ours else 0

    def _misfit(self, pid: int) -> str:
        """Why a running one is not what we want; '': it is."""
        if _command(pid) != self.command:
            return 'has other arguments'
        if self._source and (_started(pid)
                             < self._source.stat().st_ctime - 1):
            return f'is older than {self._source}'
        return ''

    def _start(self) -> None:
        nbdkit.version()
        sockets.vacate(self.path)
        # nbdkit has an umask of its own, and keeps the mode of what is there.
        files.touch(self.pid_file)
        self.pid_file.chmod(0o640)
        try:
            done = subprocess.run(
                self.command, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, umask=nbdkit.UMASK, start_new_session=True,
                timeout=_START_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise exception.ConfigError(
                f'nbdkit cannot be run: {error}') from error
        if done.returncode:
            raise exception.CommandFailed(self.command, done.returncode,
                                          done.stderr)
        sockets.admit(self.path, self._group)
        self._known = self._pid()
        LOG.info('nbdkit %d serves %s', self._known, self.path)


def _command(pid: int) -> list[str]:
    """The arguments of a process; none if it is not there."""
    try:
        raw = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return []
    return raw.decode(errors='surrogateescape').split('\0')[:-1]


def _started(pid: int) -> float:
    """When a process began (seconds since the epoch)."""
    words = pathlib.Path(f'/proc/{pid}/stat').read_text()
    ticks = int(words.rpartition(')')[2].split()[19])
    uptime = float(pathlib.Path('/proc/uptime').read_text().split()[0])
    return (time.time() - uptime
            + ticks / os.sysconf(os.sysconf_names['SC_CLK_TCK']))


class Exports:
    """The way of a guest's miss: shield, then export.

    :param keepers: in the order in which they must run.
    :param manage: false: only look at them.
    """

    def __init__(self, keepers: list[Keeper], manage: bool) -> None:
        self._keepers = keepers
        self._manage = manage
        self._lock = threading.Lock()
        #: Whether all answered when they were last looked at.
        self.healthy = False

    def check(self) -> None:
        """Look at all, and start what is gone.

        :raises FastbootError: one does not answer.
        """
        with self._lock:
            try:
                for keeper in self._keepers:
                    if self._manage:
                        keeper.check()
                    else:
                        _greet(keeper.path)
            except BaseException:
                self.healthy = False
                raise
            self.healthy = True


def _greet(path: pathlib.Path) -> None:
    try:
        nbdkit.greet(path)
    except OSError as error:
        raise exception.Unavailable(
            f'no NBD server answers at {path}: {error}') from error
