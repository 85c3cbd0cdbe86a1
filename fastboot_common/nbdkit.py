# SPDX-License-Identifier: Apache-2.0
"""nbdkit as a child process: the export, its shield, and the tap."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from typing import Final, Self

from fastboot_common import exception

PROGRAM: Final = 'nbdkit'
#: Retry filter, Python plugin of API 2, exports of any name through nbd.
_OLDEST: Final = (1, 32)
_START_SECONDS: Final = 20
_STOP_SECONDS: Final = 10
_SOCKET_LIMIT: Final = 107
_PLUGIN: Final = pathlib.Path(__file__).with_name('export.py')


@functools.cache
def version() -> tuple[int, ...]:
    """nbdkit's version.

    :raises ConfigError: it is missing or too old.
    """
    try:
        said = subprocess.run(
            [PROGRAM, '--version'], capture_output=True, text=True,
            check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise exception.ConfigError(
            f'{PROGRAM} is not usable ({error}); install the packages '
            f'nbdkit and nbdkit-plugin-python') from error
    found = tuple(map(int, re.findall(r'\d+', said)))[:3]
    if found < _OLDEST:
        raise exception.ConfigError(
            f'{said.strip()} is too old; '
            f'{".".join(map(str, _OLDEST))} is needed')
    return found


class Server:
    """A running nbdkit; a context manager around its life.

    It dies with the process that started it.
    """

    def __init__(self, listen: pathlib.Path, arguments: list[str], *,
                 group: str | None = None) -> None:
        """Prepare it.

        :param listen: path of its socket; what is there is replaced.
        :param group: that may connect.
        :raises Invalid: the path is too long for a socket.
        """
        if len(str(listen)) > _SOCKET_LIMIT:
            raise exception.Invalid(
                f'{listen}: a socket may have {_SOCKET_LIMIT} characters; '
                f'use a shorter state directory')
        self._listen = listen
        self._group = group
        self._log = listen.with_suffix('.log')
        self._command = [
            PROGRAM, '--foreground', '--readonly', '--exit-with-parent',
            '--unix', str(listen), *arguments]

    def __enter__(self) -> Self:
        """Start it, and wait until it answers.

        :raises ConfigError: nbdkit is missing or too old.
        :raises CommandFailed: it does not start.
        """
        version()
        with contextlib.suppress(FileNotFoundError):
            self._listen.unlink()
        with self._log.open('wb') as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, umask=0o007)
        try:
            self._wait()
            self._listen.chmod(0o660)
            if self._group:
                shutil.chown(self._listen, group=self._group)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self._listen))
                    return
                except OSError:
                    time.sleep(0.01)
        raise exception.CommandFailed(
            self._command, self._process.poll() or 0, self.words())

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(FileNotFoundError):
            self._listen.unlink()

    def words(self) -> str:
        """The end of what it printed."""
        with self._log.open('rb') as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            return log.read().decode(errors='replace')


class Export(Server):
    """The slots of all volumes of a host as exports."""

    def __init__(self, root: pathlib.Path, listen: pathlib.Path, *,
                 agent: pathlib.Path | None = None, wait: int = 25,
                 group: str | None = None) -> None:
        """Prepare it.

        :param root: the host's directory, with ``volumes``.
        :param agent: socket of :class:`fastboot_common.ensure.EnsureServer`.
        :param wait: seconds that a miss waits for the agent.
        """
        arguments = ['python', str(_PLUGIN), f'root={root}', f'wait={wait}']
        if agent:
            arguments.append(f'agent={agent}')
        super().__init__(listen, arguments, group=group)


class Shield(Server):
    """Stands before the export, so that it can be restarted under guests."""

    def __init__(self, listen: pathlib.Path, upstream: pathlib.Path, *,
                 wait: int = 4, log: pathlib.Path | None = None,
                 group: str | None = None) -> None:
        """Prepare it.

        :param upstream: the export's socket.
        :param wait: seconds that it tries to reach the export.
        :param log: where every request is noted.
        """
        filters = ['--filter=log'] if log else []
        arguments = [
            *filters, '--filter=retry', 'nbd', f'socket={upstream}',
            'dynamic-export=true', f'retry={wait}', f'retries={wait}',
            'retry-delay=1', 'retry-exponential=no']
        if log:
            arguments.append(f'logfile={log}')
        super().__init__(listen, arguments, group=group)


class Tap(Server):
    """Serves a raw file and notes every read: what captures record."""

    def __init__(self, raw: pathlib.Path, listen: pathlib.Path,
                 log: pathlib.Path) -> None:
        """Prepare it.

        :param log: see :mod:`fastboot_common.trace`.
        """
        super().__init__(listen, ['--filter=log', 'file', str(raw),
                                  f'logfile={log}'])
