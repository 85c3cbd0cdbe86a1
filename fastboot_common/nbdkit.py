# SPDX-License-Identifier: Apache-2.0
"""Running nbdkit: the export, the shield in front of it, and the tap.

The one place that knows nbdkit's arguments. Not the plugin itself: that is
:mod:`fastboot_common.export`, which runs inside nbdkit.
"""

import collections
import contextlib
import functools
import logging
import os
import pathlib
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from fastboot_common import exception, sockets

LOG = logging.getLogger(__name__)

#: The oldest nbdkit that was tried.
OLDEST: Final = (1, 32)

_PROGRAM: Final = 'nbdkit'
PLUGIN: Final = pathlib.Path(__file__).with_name('export.py')
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 5.0
#: What is kept of stderr: the last lines, each cut to so many bytes.
_LINES: Final = 100
_LINE_LIMIT: Final = 1000
#: What an NBD server says first.
_GREETING: Final = b'NBDMAGIC'
#: Sockets come into being with mode 0660.
UMASK: Final = 0o117


def greet(path: pathlib.Path, seconds: float = 1) -> None:
    """See whether an NBD server answers at a socket.

    :raises TimeoutError: one is there, and says nothing.
    :raises OSError: none is.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(seconds)
        probe.connect(os.fspath(path))
        if probe.recv(len(_GREETING)) != _GREETING:
            raise ConnectionResetError(f'{path} is no NBD server, or hung up')


@functools.cache
def version() -> tuple[int, ...]:
    """The version of nbdkit, which must be new enough.

    :raises ConfigError: it is missing or older than :data:`OLDEST`.
    """
    try:
        words = subprocess.run(
            [_PROGRAM, '--version'], stdin=subprocess.DEVNULL, timeout=30,
            capture_output=True, text=True, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise exception.ConfigError(
            f'nbdkit cannot be run; install it: {error}') from error
    match = re.search(r'(\d+)\.(\d+)\.(\d+)', words)
    found = tuple(map(int, match.groups())) if match else ()
    if found < OLDEST:
        raise exception.ConfigError(
            f'nbdkit has version {found}; at least {OLDEST} is needed')
    return found


class Server:
    """One nbdkit, as long as the ``with`` block (or until :meth:`close`).

    It ends with our process, should that end first. A connection has one
    thread: with several, nbdkit before 1.34 aborts when a client is killed
    with requests under way (its commit 9d82aa4f), or may even answer another
    client; and one is the fastest for a plugin in Python.

    :param path: of the UNIX socket. One that nobody serves is replaced.
    :param arguments: filters, plugin and their parameters.
    :param group: that may connect, beside the owner.
    :param user: that nbdkit becomes, with `group`; only root can ask for it.
    """

    def __init__(self, path: pathlib.Path, arguments: Sequence[str], *,
                 group: str | None = None, user: str | None = None) -> None:
        self.path = pathlib.Path(path)
        self._arguments = arguments
        self._group = group
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self._words: collections.deque[str] = collections.deque(
            maxlen=_LINES)
        self._keeper: threading.Thread | None = None

    @property
    def command(self) -> list[str]:
        """The command line, as a service manager could run it too."""
        drop = []
        if self._user is not None:
            drop += ['-u', self._user]
            if self._group is not None:
                drop += ['-g', self._group]
        return [_PROGRAM, '-f', '-r', '-t', '1', '-U', os.fspath(self.path),
                *drop, *self._arguments]

    def daemon(self, pid_file: pathlib.Path) -> list[str]:
        """A command line that ends when it answers, and leaves it running.

        What it says goes to syslog then.

        :param pid_file: says which process it is.
        """
        program, _foreground, *rest = self.command
        return [program, '-P', os.fspath(pid_file), *rest]

    @property
    def pid(self) -> int | None:
        """Of the running process; None when there is none."""
        process = self._process
        if process is None or process.poll() is not None:
            return None
        return process.pid

    @property
    def words(self) -> str:
        """The last that it said on stderr."""
        return '\n'.join(self._words)

    def start(self) -> None:
        """Start it, and return when it answers.

        :raises ConfigError: nbdkit is missing or old, or the socket's path
            or group cannot work.
        :raises Busy: another process serves the socket.
        :raises CommandFailed: it ended, or does not answer.
        """
        version()
        sockets.vacate(self.path)
        command = [*self.command[:1], '--exit-with-parent',
                   *self.command[1:]]
        self._words.clear()
        spawned: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = (
            queue.SimpleQueue())
        self._keeper = threading.Thread(
            target=self._keep, args=(command, spawned), daemon=True,
            name='nbdkit')
        self._keeper.start()
        process = spawned.get()
        if isinstance(process, OSError):
            raise exception.ConfigError(
                f'nbdkit cannot be run: {process}') from process
        self._process = process
        try:
            self._await(command, process)
            sockets.admit(self.path, self._group)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it: asked, then killed. Requests under way may fail."""
        if self._process is None or self._keeper is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._keeper.join(_STOP_SECONDS)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _keep(self, command: list[str], spawned:
              'queue.SimpleQueue[subprocess.Popen[bytes] | OSError]') -> None:
        """Run it in a thread of its own, which lives as long as nbdkit.

        For Linux the thread that forks is the parent: nbdkit would go with
        it, however long our process lives.
        """
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, umask=UMASK)
        except OSError as error:
            spawned.put(error)
            return
        spawned.put(process)
        assert process.stderr is not None
        with process.stderr as stream:
            while line := stream.readline(_LINE_LIMIT):
                words = line.decode(errors='replace').rstrip()
                self._words.append(words)
                LOG.warning('%s: %s', self.path.name, words)
        process.wait()

    def _await(self, command: list[str],
               process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            status = process.poll()
            if status is not None:
                if self._keeper:
                    self._keeper.join(_STOP_SECONDS)
                raise exception.CommandFailed(command, status, self.words)
            with contextlib.suppress(OSError):
                greet(self.path)
                return
            time.sleep(0.01)
        raise exception.CommandFailed(
            command, -9, f'no answer on {self.path} for {_START_SECONDS} '
                         f'seconds: {self.words}')


class Export(Server):
    """The slots of a host, an export name an image.

    :param root: directory with ``volumes/``.
    :param path: of the socket to serve.
    :param agent: socket of the agent, which is asked for what is missing;
        None: reads of it fail.
    :param wait: seconds that a read waits for the agent.
    """

    def __init__(self, root: pathlib.Path, path: pathlib.Path, *,
                 agent: pathlib.Path | None = None, wait: float = 25,
                 group: str | None = None, user: str | None = None) -> None:
        asked = [] if agent is None else [f'agent={agent}']
        super().__init__(
            path, ['python', os.fspath(PLUGIN), f'root={root}', *asked,
                   f'wait={wait}'], group=group, user=user)


class Shield(Server):
    """Stands in front of the export while that is restarted.

    A read that finds the export gone waits until it is back, once, and at
    most `wait` seconds; then it fails. So does opening. nbdkit's retry
    filter handles one request of a connection at a time.

    :param path: of the socket to serve, the one that guests use.
    :param upstream: the export's socket.
    :param wait: whole seconds, 1 or more.
    :param log: where every request is noted; None: nowhere.
    :raises Invalid: `wait` is too short.
    """

    def __init__(self, path: pathlib.Path, upstream: pathlib.Path, *,
                 wait: int = 4, log: pathlib.Path | None = None,
                 group: str | None = None, user: str | None = None) -> None:
        if wait < 1:
            raise exception.Invalid('a shield waits 1 second or more')
        self._log = log
        noted = [] if log is None else ['--filter=log']
        into = [] if log is None else [f'logfile={log}']
        # One retry: its delay, then the plugin's own tries to connect, one
        # a second. Several would multiply what an unlucky miss waits for.
        super().__init__(
            path, [*noted, '--filter=retry', 'nbd', f'socket={upstream}',
                   'dynamic-export=true', f'retry={wait - 1}', 'retries=1',
                   'retry-delay=1', 'retry-exponential=no', *into],
            group=group, user=user)

    def start(self) -> None:
        _prepare_log(self._log)
        super().start()


class Tap(Server):
    """Serves a raw file, and notes every read for captures.

    :param raw: the file.
    :param path: of the socket to serve.
    :param log: written by nbdkit's log filter; what was there is lost. It
        grows with every read: look at its size. None: nothing is noted.
    """

    def __init__(self, raw: pathlib.Path, path: pathlib.Path,
                 log: pathlib.Path | None = None) -> None:
        self._log = log
        noted = [] if log is None else ['--filter=log']
        into = [] if log is None else [f'logfile={log}']
        super().__init__(path, [*noted, 'file', f'file={raw}', *into])

    def start(self) -> None:
        _prepare_log(self._log)
        super().start()


def _prepare_log(log: pathlib.Path | None) -> None:
    """nbdkit keeps the mode of a log that is there."""
    if log is not None:
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT, 0o640))
