# SPDX-License-Identifier: Apache-2.0
"""Processes that outlive the command which started them.

Each is known by its id and its start time, kept in a file: an id alone may
belong to a stranger by now, for instance after a reboot.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

_ENTER = pathlib.Path(__file__).with_name('enter.py')
_LOG_LIMIT = 32 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """A process that was started.

    :ivar start: its start time, in clock ticks since the machine's boot.
    :ivar began: the same, in seconds since the epoch.
    :ivar node: whose namespaces it is in; empty: this machine's.
    :ivar fingerprint: of all that it was started with.
    :ivar log_offset: where its part of the log begins.
    """

    name: str
    pid: int
    start: int
    began: float
    node: str
    fingerprint: str
    log: str
    log_offset: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self.start != 0 and start_time(self.pid) == self.start

    def said(self) -> str:
        """What it logged since it was started."""
        with open(self.log, 'rb') as file:
            file.seek(self.log_offset)
            return file.read().decode(errors='replace')


class Records:
    """A directory with a file for each process that was started."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory

    def __iter__(self) -> Iterator[Record]:
        for file in sorted(self._directory.glob('*.json')):
            with contextlib.suppress(FileNotFoundError):
                yield _read(file)

    def get(self, name: str) -> Record | None:
        """The record of that name, of a living process or a dead one."""
        try:
            return _read(self.file(name))
        except FileNotFoundError:
            return None

    def file(self, name: str) -> pathlib.Path:
        """Where the record of that name is."""
        return self._directory / f'{name}.json'

    def forget(self, name: str) -> None:
        """Drop a record."""
        self.file(name).unlink(missing_ok=True)


def _read(file: pathlib.Path) -> Record:
    return Record(**json.loads(file.read_text()))


def start_time(pid: int) -> int:
    """A process' start time in clock ticks; 0: there is none, or a zombie."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in 'ZX' else 0


def parent(pid: int) -> int:
    """Its parent's id; 0: there is none."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    # The second field, the name, may contain anything; skip behind it.
    try:
        text = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(')')[2].split()


def rss(pid: int) -> int:
    """Resident memory in bytes, without children."""
    fields = _stat(pid)
    return int(fields[21]) * os.sysconf('SC_PAGE_SIZE') if fields else 0


def spawn(records: Records, name: str, argv: Sequence[str],
          log: pathlib.Path, *, env: Mapping[str, str], target: int = 0,
          node: str = '', fingerprint: str = '') -> Record:
    """Start a process that is nobody's child, and keep its record.

    :param target: a process whose namespaces it enters; 0: none.
    :raises OSError: it cannot be started. A program that does not exist
        shows in the log.
    """
    _rotate(log)
    file = records.file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        'name': name, 'began': time.time(), 'node': node,
        'fingerprint': fingerprint, 'log': str(log),
        'log_offset': log.stat().st_size if log.exists() else 0,
    }
    done = subprocess.run(
        [sys.executable, '-I', '-S', _ENTER, str(target), log, file,
         json.dumps(record), *argv],
        env=dict(env), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=30)
    if done.returncode:
        raise OSError(f'{name} was not started: '
                      f'{done.stderr.strip().splitlines()[-1]}')
    return _read(file)


def _rotate(log: pathlib.Path) -> None:
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        log.rename(log.with_suffix('.log.1'))


def stop(record: Record, signum: signal.Signals = signal.SIGTERM, *,
         patience: float = 10.0, group: bool = False) -> bool:
    """End a process; SIGKILL to its whole group if it takes too long.

    :param patience: seconds that it is given.
    :param group: signal its whole process group.
    :return: whether it ended by itself.
    """
    try:
        fd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return True
    try:
        # Only now that the descriptor holds it, the check stays true.
        if not record.alive:
            return True
        _signal(record.pid, fd, signum, group)
        if _ended(fd, patience):
            return True
        _signal(record.pid, fd, signal.SIGKILL, True)
        _ended(fd, 10)
        return False
    finally:
        os.close(fd)


def _signal(pid: int, fd: int, signum: signal.Signals, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(pid, signum)
        else:
            signal.pidfd_send_signal(fd, signum)


def _ended(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def namespace(pid: int) -> str:
    """Names the PID namespace of a process; empty: it is gone, or not ours."""
    try:
        return os.readlink(f'/proc/{pid}/ns/pid')
    except OSError:
        return ''


def members(space: str, prefix: str = '') -> list[int]:
    """The processes of a PID namespace whose program's name begins so."""
    found = []
    for entry in pathlib.Path('/proc').iterdir():
        if not entry.name.isdigit() or namespace(int(entry.name)) != space:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (entry / 'comm').read_text().startswith(prefix):
                found.append(int(entry.name))
    return found
