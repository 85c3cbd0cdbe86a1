# SPDX-License-Identifier: Apache-2.0
"""Boots an image in the sandbox and records what it reads.

The image is served read-only by nbdkit, which logs every read; the guest
writes to an overlay that is thrown away. An image that does not boot is a
result like any other, not an error.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy

from fastboot_common import configdrive, exception, files, nbdkit, qemu, trace
from fastboot_glance import endings, guest

#: Called now and then with the number of the boot (from 0), its seconds so
#: far, and the bytes of different blocks that it read.
Progress = Callable[[int, float, int], None]

#: Seconds without a new block after which a guest that has hardly read
#: anything is given up.
STALL: Final = 180
#: Times "settle_seconds" after which a guest that always reads is stopped.
_SETTLES: Final = 6
_TICK: Final = 0.1
_GRAIN: Final = 64 << 10
#: What a guest may write, on its disk and its console, before it is stopped;
#: and what no file can exceed, however fast it comes (bytes).
_WRITTEN: Final = 3 << 30
_LONGEST: Final = 4 << 30
_SOCKET: Final = 'nbd.sock'
_DISK: Final = 'root.qcow2'
_CONFIG_DRIVE: Final = 'config.iso'


@dataclasses.dataclass(frozen=True)
class Capture:
    """A trace and how it came to be.

    :param trace: the reads of all boots that came to their end.
    :param state: ``booted``, ``failed`` or ``none`` (cancelled).
    :param reason: why there is no trace, or fewer boots than asked for.
    :param end: what ended the first boot.
    :param seconds: of each boot, from start to end.
    """

    trace: trace.Trace
    state: str
    reason: str | None
    end: str | None
    seconds: list[float]
    devices: str

    def header(self) -> dict[str, Any]:
        """``capture`` of the manifest's header."""
        return {
            'state': self.state, 'reason': self.reason, 'end': self.end,
            'seconds': [round(value, 1) for value in self.seconds],
            'last_read': self._last_reads(),
            'boots': len(self.seconds), 'devices': self.devices,
        }

    def _last_reads(self) -> list[float]:
        """When each boot read for the last time (seconds)."""
        return [round(float(found.max(initial=0)) / 1e6, 1)
                for number in range(len(self.seconds))
                for found in [self.trace['time'][
                    self.trace['boot'] == number]]]


@dataclasses.dataclass(frozen=True)
class _Boot:
    """One boot that came to its end, after some seconds."""

    trace: trace.Trace
    end: str
    seconds: float


class _Cancelled(Exception):
    """The caller has had enough."""


class _NotBooted(Exception):
    """The guest did not come to the end of its boot."""


def capture(raw_path: pathlib.Path, virtual_size: int,
            workdir: pathlib.Path, options: Any, *,
            progress: Progress | None = None,
            cancel: threading.Event | None = None) -> Capture:
    """Boot an image several times and merge what it read.

    :param raw_path: the image as raw bytes (:mod:`fastboot_glance.source`).
    :param virtual_size: bytes.
    :param workdir: a directory for overlays and logs; nothing stays there.
    :param options: the group ``[capture]``.
    :param progress: see :data:`Progress`.
    :param cancel: when set, the boot is stopped and the state is ``none``.
    :raises ConfigError: an option cannot work, or QEMU is missing.
    :raises NoSpace: what guests write leaves too little room in `workdir`.
    """
    cancel = cancel or threading.Event()
    boots = _Boots(raw_path, virtual_size, workdir, options,
                   progress or _ignore, cancel)
    with concurrent.futures.ThreadPoolExecutor(
            min(options.parallel, options.boots), 'boot') as pool:
        futures = [pool.submit(boots.run, number)
                   for number in range(options.boots)]
        try:
            concurrent.futures.wait(futures)
        except BaseException:  # who is interrupted wants no guests
            cancel.set()
            raise
    return _merge(futures, boots.devices)


def _merge(futures: Sequence['concurrent.futures.Future[_Boot]'],
           devices: str) -> Capture:
    """One capture of what all boots came to."""
    done, reason = [], None
    for number, future in enumerate(futures, 1):
        try:
            done.append(future.result())
        except _Cancelled:
            return Capture(trace.empty(), 'none', 'cancelled', None, [],
                           devices)
        except _NotBooted as error:
            reason = reason or f'boot {number} of {len(futures)}: {error}'
    return Capture(
        trace.merge([boot.trace for boot in done]),
        'booted' if done else 'failed', reason,
        done[0].end if done else None, [boot.seconds for boot in done],
        devices)


def _ignore(number: int, seconds: float, unique: int) -> None:
    """No progress is wanted."""


class _Meter:
    """Counts the different blocks that a log tells of."""

    def __init__(self, log: pathlib.Path, virtual_size: int) -> None:
        self._reader = trace.LogReader(log)
        self._size = virtual_size
        self._seen = numpy.zeros(-(-virtual_size // _GRAIN), bool)
        self.unique = 0
        self.changed = time.monotonic()

    def update(self) -> None:
        """Look at what came since.

        :raises Corrupt: the log makes no sense, or is too long.
        """
        blocks = trace.boot_set(self._reader.read(), _GRAIN, self._size)
        self._seen[blocks] = True
        unique = int(self._seen.sum()) * _GRAIN if len(blocks) else 0
        if unique > self.unique:
            self.unique = unique
            self.changed = time.monotonic()


class _Boots:
    """Boots of one image."""

    def __init__(self, raw_path: pathlib.Path, virtual_size: int,
                 workdir: pathlib.Path, options: Any, progress: Progress,
                 cancel: threading.Event) -> None:
        self._raw_path = raw_path
        self._size = virtual_size
        self._workdir = workdir
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._failed = threading.Event()
        self._sandbox = guest.Sandbox(options.user)
        self.devices = self._config(0).devices()

    def run(self, number: int) -> _Boot:
        """One boot; none after one that failed.

        :raises _NotBooted: it did not come to its end.
        :raises _Cancelled: the caller wants no more.
        """
        if self._failed.is_set():
            raise _NotBooted('not begun')
        try:
            return self._run(number)
        except _NotBooted:
            self._failed.set()
            raise

    def _run(self, number: int) -> _Boot:
        drivers = endings.load(self._options)
        try:
            with self._served() as (room, log):
                config = self._config(number)
                self._furnish(room, self._disk_size(number), config)
                with qemu.Machine(config, room, self._prefix()) as machine:
                    watch = _Watch(machine, _Meter(log, self._size), room,
                                   drivers, self._options, self._cancel)
                    end, seconds = watch.run(
                        lambda *seen: self._progress(number, *seen))
                return _Boot(trace.parse_log(log), end, seconds)
        except (exception.CommandFailed, exception.Corrupt) as error:
            raise _NotBooted(str(error)) from error

    @contextlib.contextmanager
    def _served(self) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
        """A directory for one boot, with the image behind a socket in it.

        The log of the reads is out of the sandbox's reach, one level up.
        """
        with tempfile.TemporaryDirectory(
                dir=self._workdir, prefix='boot-') as name:
            log = pathlib.Path(name, 'reads.log')
            room = pathlib.Path(name, 'guest')
            room.mkdir(0o700)
            with nbdkit.Tap(self._raw_path, room / _SOCKET, log):
                yield room, log

    def _disk_size(self, number: int) -> int:
        """Bytes of the disk in a boot: every second one has a larger disk.

        Most instances have one. Their guests grow partition and file system
        at the first start, and so read what the others never read.
        """
        grown: int = self._options.grow << 30
        return self._size + (grown if number % 2 else 0)

    def _config(self, number: int) -> qemu.Config:
        """The machine of a boot: every second one has no config drive.

        Nova's is a CD, which cloud-init finds or not by a race with the
        kernel's driver, and clouds with a metadata service have none. Such
        a guest reads its DHCP client and other data sources of cloud-init:
        3 MB of a Debian 12 that a boot with the drive does not read.

        QEMU answers DHCP only where it has a network of its own: what breaks
        out of it would else be in the host's.
        """
        drive = self._options.config_drive and number % 2 == 0
        return qemu.Config(
            disk=qemu.file_disk(_DISK, 'qcow2'),
            memory=self._options.memory, vcpus=self._options.vcpus,
            accelerator=self._options.accelerator, cache='unsafe',
            config_drive=_CONFIG_DRIVE if drive else None,
            dhcp=not drive and self._sandbox.isolated)

    def _furnish(self, room: pathlib.Path, size: int,
                 config: qemu.Config) -> None:
        """Make what the machine needs, and give it to the sandbox."""
        files.touch(room / _DISK)
        qemu.create_overlay(room / _DISK, f'nbd+unix:///?socket={_SOCKET}',
                            'raw', size)
        if config.config_drive:
            files.touch(room / config.config_drive)
            configdrive.build(room / config.config_drive)
        self._sandbox.own(room)

    def _prefix(self) -> list[str]:
        options = self._options
        limits = guest.Limits(
            memory=(options.memory << 20) + qemu.OVERHEAD,
            file_size=_LONGEST,
            cpu_seconds=(options.timeout + 60) * (options.vcpus + 1))
        return self._sandbox.prefix(
            limits, kvm=options.accelerator == 'kvm')


class _Watch:
    """Looks at one guest until its boot is over."""

    def __init__(self, machine: qemu.Machine, meter: _Meter,
                 room: pathlib.Path, drivers: dict[str, endings.Ending],
                 options: Any, cancel: threading.Event) -> None:
        self._machine = machine
        self._meter = meter
        self._room = room
        self._drivers = drivers
        self._options = options
        self._cancel = cancel
        self._start = time.monotonic()

    def run(self, progress: Callable[[float, int], None]
            ) -> tuple[str, float]:
        """Wait for the end, then for the reads behind it.

        :returns: the driver's name, and the seconds until it spoke.
        """
        console = b''
        while True:
            console = console[-endings.CONSOLE:] + self._machine.console()
            view = self._look(console)
            progress(view.seconds, view.unique)
            for name, driver in self._drivers.items():
                if driver.over(view):
                    self._settle(view.seconds, progress)
                    return name, view.seconds
            self._check(view)
            self._wait(_TICK)

    def _settle(self, end: float,
                progress: Callable[[float, int], None]) -> None:
        """Wait until the guest reads nothing new.

        A number of seconds alone would cut off the slower guests: under load
        the last blocks of a Debian 12 came 20 seconds after its agent's
        first answer, else 13.
        """
        seconds = self._options.settle_seconds
        while True:
            view = self._look(b'')
            progress(view.seconds, view.unique)
            since = view.seconds - end
            if (min(since, view.idle) >= seconds
                    or since >= _SETTLES * seconds):
                return
            self._wait(_TICK)

    def _look(self, console: bytes) -> endings.View:
        self._meter.update()
        now = time.monotonic()
        return endings.View(now - self._start, self._machine.agent, console,
                            self._meter.unique, now - self._meter.changed)

    def _check(self, view: endings.View) -> None:
        if not self._machine.alive():
            words = exception.plain(self._machine.words().strip())
            raise _NotBooted(f'the machine stopped: {words}')
        if view.seconds > self._options.timeout:
            raise _NotBooted(
                f'no end in {self._options.timeout} seconds')
        if (view.unique < self._options.quiet_mib << 20
                and view.idle > STALL):
            raise _NotBooted(
                f'it read {view.unique} bytes, then nothing for {STALL} '
                f'seconds; is there a boot loader for BIOS?')
        if guest.disk_usage(self._room) > _WRITTEN:
            raise _NotBooted(f'it wrote more than {_WRITTEN} bytes')
        guest.check_room(self._room)

    def _wait(self, seconds: float) -> None:
        if self._cancel.wait(seconds):
            raise _Cancelled
