# SPDX-License-Identifier: Apache-2.0
"""Bakes µVMs: boots an image once, and saves the guest that came of it.

The guest runs in a process of its own (:mod:`fastboot_glance.oven`) inside
the sandbox. What that process says and leaves is looked at as bytes of a
stranger, who may have broken out of the guest. An image that cannot be baked
is a result like any other, with a reason.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import selectors
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

from fastboot_common import (
    configdrive,
    exception,
    files,
    nbdkit,
    overlay,
    qcow2,
    qemu,
)
from fastboot_common.microvm import (
    activation,
    artifact,
    identity,
    key,
    saved,
    savefile,
    template,
)
from fastboot_glance import guest

#: Called when a phase begins: its name.
Progress = Callable[[str], None]

_SOCKET: Final = 'nbd.sock'
_DISK: Final = 'root.qcow2'
_DRIVE: Final = 'config.iso'
_CONSOLE: Final = 'console.log'
_PORT: Final = 'port.sock'
_SAVE: Final = 'save'
_HOME: Final = pathlib.Path('/run')
_PHASES: Final = ('libvirt', 'boot', 'unplug', 'quiesce', 'save')
#: Seconds behind the guest's own time: libvirt asks QEMU what it can do,
#: and the guest is brought to rest and saved.
_AROUND: Final = 300
_STOP_SECONDS: Final = 10
_TICK: Final = 0.2
_LINE_LIMIT: Final = 64 << 10
#: Bytes that no file may exceed, and that all may have together.
_LONGEST: Final = 8 << 30
_WRITTEN: Final = 4 << 30
#: Bytes that its first boot may have written to its disk: each server that
#: is resumed gets a copy, within its deadline. Debian's writes 30 MiB.
_DELTA: Final = 256 << 20
#: How long a path of a UNIX socket can be.
_PATH_LIMIT: Final = 107
_NO_NAME_SPACES: Final = ('this host permits no name spaces; a guest with '
                          'libvirt is not baked without')
#: Where the version and the incompatible features of a qcow2 are.
_FEATURES: Final = slice(72, 80)


@dataclasses.dataclass(frozen=True)
class Bake:
    """What came of an image.

    :ivar state: ``baked``, ``refused`` (the image's doing: it would be so
        again), ``failed`` (ours) or ``none`` (cancelled).
    :ivar reason: why there is no µVM.
    :ivar description: of the µVM.
    :ivar seconds: of each phase.
    """

    state: str
    reason: str | None
    description: artifact.Description | None
    seconds: dict[str, float]


class _Cancelled(Exception):
    """The caller has had enough."""


class _NotBaked(Exception):
    """There is no µVM of this image; why."""


class _Refused(_NotBaked):
    """The image is the reason."""


def bake(raw_path: pathlib.Path, virtual_size: int, directory: pathlib.Path,
         workdir: pathlib.Path, options: Any, *,
         backing: tuple[pathlib.Path, str] | None = None,
         progress: Progress | None = None,
         cancel: threading.Event | None = None) -> Bake:
    """Boot an image and save the guest.

    :param raw_path: the image as raw bytes (:mod:`fastboot_glance.source`).
    :param virtual_size: bytes.
    :param directory: what is to become the artifact: empty, or not there.
    :param workdir: for what is thrown away; its name should be short.
    :param options: the group ``[bakery]``.
    :param backing: the image's file and format, as the disk in the result
        names it; None: the raw bytes.
    :param progress: see :data:`Progress`.
    :param cancel: when set, the guest is stopped and the state is ``none``.
    :raises ConfigError: an option cannot work, or a program is missing.
    :raises Exists: the directory has files.
    :raises NoSpace: what is written leaves too little room.
    """
    files.make_directory(directory)
    if any(directory.iterdir()):
        raise exception.Exists(f'{directory} is not empty')
    one = _Bakery(raw_path, virtual_size, workdir, options,
                  backing or (raw_path.absolute(), 'raw'),
                  progress or (lambda phase: None),
                  cancel or threading.Event())
    try:
        found = one.run(directory)
    except (_NotBaked, exception.CommandFailed, exception.Corrupt) as error:
        _empty(directory)
        state = 'refused' if isinstance(error, _Refused) else 'failed'
        return Bake(state, str(error), None, one.seconds)
    except _Cancelled:
        _empty(directory)
        return Bake('none', 'cancelled', None, one.seconds)
    except BaseException:
        _empty(directory)
        raise
    return Bake('baked', None, found, one.seconds)


def config(options: Any) -> template.Config:
    """The template that the options describe."""
    return template.Config(
        virt_type=options.virt_type, machine=options.machine,
        cpu=options.cpu, memory=options.memory, vcpus=options.max_vcpus,
        max_memory=options.max_memory, slots=options.slots)


def platform(options: Any) -> key.Platform:
    """That of the µVMs which are baked here.

    :raises ConfigError: none can be baked here.
    """
    if importlib.util.find_spec('libvirt') is None:
        raise exception.ConfigError('libvirt\'s Python module is missing')
    if not guest.Sandbox(options.user).isolated:
        raise exception.ConfigError(_NO_NAME_SPACES)
    found = config(options)
    return key.Platform(found.arch, found.virt_type, qemu.package(),
                        savefile.VERSION, activation.RECIPE)


def _empty(directory: pathlib.Path) -> None:
    for name in (artifact.DESCRIPTION, artifact.MEMORY, artifact.DISK):
        (directory / name).unlink(missing_ok=True)


class _Bakery:
    """One bake."""

    def __init__(self, raw_path: pathlib.Path, virtual_size: int,
                 workdir: pathlib.Path, options: Any,
                 backing: tuple[pathlib.Path, str], progress: Progress,
                 cancel: threading.Event) -> None:
        self._raw_path = raw_path
        self._final_backing = backing
        self._size = virtual_size
        self._workdir = workdir.absolute()
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._sandbox = guest.Sandbox(options.user)
        self._config = config(options)
        self._uuid = uuid.uuid4()
        #: That the guest's kernel can have, by its own word.
        self._vcpus = 1
        self._phase: tuple[str, float] | None = None
        self.seconds: dict[str, float] = {}

    def run(self, directory: pathlib.Path) -> artifact.Description:
        """All of it; the directory has the artifact then.

        :raises _NotBaked: there is none.
        """
        if not self._sandbox.isolated:
            raise exception.ConfigError(_NO_NAME_SPACES)
        with self._served() as room:
            places = self._furnish(room)
            self._bake(room, places)
            self._enter('keep')
            found = self._keep(room, directory)
        self._enter(None)
        return found

    def _enter(self, phase: str | None) -> None:
        """A phase ends, and another begins."""
        now = time.monotonic()
        if self._phase:
            name, begun = self._phase
            self.seconds[name] = round(now - begun, 2)
        self._phase = phase and (phase, now) or None
        if phase:
            self._progress(phase)

    @contextlib.contextmanager
    def _served(self) -> Iterator[pathlib.Path]:
        """A directory for the guest, with the image behind a socket in it."""
        with tempfile.TemporaryDirectory(
                dir=self._workdir, prefix='bake-') as name:
            room = pathlib.Path(name, 'guest')
            room.mkdir(0o700)
            # libvirt makes its monitor's below, with a name of its own.
            if len(str(self._home(room))) + 50 > _PATH_LIMIT:
                raise exception.ConfigError(
                    f'{room}: too long for names of sockets; bake in a '
                    f'directory with a shorter name')
            # No log of the reads: nobody would look how long it gets.
            with nbdkit.Tap(self._raw_path, room / _SOCKET):
                yield room

    def _furnish(self, room: pathlib.Path) -> template.Places:
        files.touch(room / _DISK)
        home = self._home(room)
        qemu.create_overlay(room / _DISK, self._backing(home), 'raw',
                            self._size)
        files.touch(room / _DRIVE)
        configdrive.build(room / _DRIVE, 'baking', activation.user_data(),
                          plain=True)
        files.touch(room / _CONSOLE)
        self._sandbox.own(room)
        return template.Places(home / _DISK, home / _SOCKET, home / _DRIVE,
                               home / _CONSOLE, home / _PORT)

    @staticmethod
    def _home(room: pathlib.Path) -> pathlib.Path:
        """The room as the sandbox names it.

        Its user may not pass the directories above, and libvirt wants
        absolute names; so root mounts it where it hides what else talks
        to the host.
        """
        return _HOME if os.geteuid() == 0 else room

    @staticmethod
    def _backing(home: pathlib.Path) -> str:
        return f'nbd+unix:///?socket={home / _SOCKET}'

    def _bake(self, room: pathlib.Path, places: template.Places) -> None:
        """Run the process to its end.

        :raises _NotBaked: it says so, or is not done in time.
        """
        uid, gid = self._sandbox.ids
        request = json.dumps({
            'room': str(room), 'home': str(self._home(room)),
            'mounts': os.stat('/proc/self/ns/mnt').st_ino,
            'uid': uid, 'gid': gid, 'port': _PORT, 'save': _SAVE,
            'timeout': self._options.timeout,
            'xml': template.build(self._config, 'baking', str(self._uuid),
                                  places)}).encode() + b'\n'
        with (room.parent / 'oven.log').open('wb') as log:
            process = subprocess.Popen(
                [*self._sandbox.enclosure(self._limits()), sys.executable,
                 '-P', '-m', 'fastboot_glance.oven'],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            try:
                assert process.stdin and process.stdout
                process.stdin.write(request)
                process.stdin.close()
                self._follow(process.stdout.fileno(), room)
            except BrokenPipeError:
                pass
            finally:
                process.kill()
                process.wait(_STOP_SECONDS)
                assert process.stdout
                process.stdout.close()
        if self._phase is None or self._phase[0] != 'done':
            raise _NotBaked('the process that bakes died: '
                            + _tail(room.parent / 'oven.log'))

    def _limits(self) -> guest.Limits:
        return guest.Limits(
            memory=(self._config.memory << 20) + qemu.OVERHEAD,
            file_size=_LONGEST,
            cpu_seconds=(self._options.timeout + _AROUND) * 2)

    def _follow(self, stdout: int, room: pathlib.Path) -> None:
        """Read what the process says until it has said all.

        :raises _NotBaked: there will be no µVM.
        """
        deadline = time.monotonic() + self._options.timeout + _AROUND
        rest = b''
        os.set_blocking(stdout, False)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                if self._cancel.is_set():
                    raise _Cancelled
                if time.monotonic() > deadline:
                    raise _NotBaked('it was not done in time')
                # With the log of the process, one level up.
                if guest.disk_usage(room.parent) > _WRITTEN:
                    raise _Refused(f'it wrote more than {_WRITTEN} bytes')
                guest.check_room(room)
                if not selector.select(_TICK):
                    continue
                data = os.read(stdout, 4096)
                *lines, rest = (rest + data).split(b'\n')
                if len(rest) > _LINE_LIMIT:
                    raise _NotBaked('the process that bakes says nonsense')
                if any(self._heard(line) for line in lines) or not data:
                    return

    def _heard(self, line: bytes) -> bool:
        """Whether this line was the last.

        :raises _NotBaked: it says why there is no µVM.
        """
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(message, dict):
            return False
        if message.get('phase') in _PHASES:
            self._enter(message['phase'])
        if type(message.get('vcpus')) is int:
            self._vcpus = min(max(message['vcpus'], 1), self._config.vcpus)
        if 'refused' in message:
            raise _Refused(f'the guest: {_plain(str(message["refused"]))}')
        if 'failed' in message:
            raise _NotBaked(_plain(str(message['failed'])))
        if message.get('done') is True:
            self._enter('done')
            return True
        return False

    def _keep(self, room: pathlib.Path, directory: pathlib.Path
              ) -> artifact.Description:
        """Take over what the guest left; nobody writes to it any more."""
        memory = _take(room / _SAVE, directory / artifact.MEMORY)
        _take(room / _DISK, directory / artifact.DISK)
        _check_disk(directory / artifact.DISK,
                    self._backing(self._home(room)), self._size)
        qemu.rename_backing(directory / artifact.DISK, *self._final_backing)
        disk = _part(directory / artifact.DISK)
        with (directory / artifact.MEMORY).open('rb') as file:
            head = savefile.SaveFile.read(file.fileno())
            found = artifact.Description(
                self._key(head), dataclasses.replace(
                    artifact.Machine.of(self._config), vcpus=self._vcpus),
                identity.find(file.fileno(), head.stream, self._uuid),
                self._size, {artifact.MEMORY: memory, artifact.DISK: disk},
                int(time.time()))
        artifact.write(directory, found)
        return found

    def _key(self, head: savefile.SaveFile) -> key.Key:
        if saved.parse(head.xml).findtext('uuid') != str(self._uuid):
            raise _NotBaked('what was saved is another guest')
        return key.Key(
            self._config.arch, self._config.virt_type, self._config.machine,
            qemu.package(), savefile.VERSION, key.cpu_of(head.cookie),
            template.digest(self._config), activation.RECIPE)


def _take(path: pathlib.Path, target: pathlib.Path) -> artifact.Part:
    """Copy a file of the sandbox, if it is one.

    :raises _NotBaked: it is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _NotBaked(f'{path.name}: {error.strerror}') from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _NotBaked(f'{path.name} is no file')
        return artifact.copy(fd, target, _LONGEST)
    finally:
        os.close(fd)


def _part(path: pathlib.Path) -> artifact.Part:
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        return artifact.Part(os.fstat(file.fileno()).st_size, digest)


def _check_disk(path: pathlib.Path, backing: str, size: int) -> None:
    """See that a qcow2 is what it was: QEMU will open what it names.

    :raises _NotBaked: it is not, or it is too large to be copied.
    """
    written = path.stat().st_size
    if written > _DELTA:
        raise _Refused(f'its first boot wrote {written >> 20} MiB to its '
                       f'disk; {_DELTA >> 20} are the most')
    if overlay.read_backing(path) != (backing, size):
        raise _NotBaked('its disk has another backing file or size')
    with path.open('rb') as file:
        head = file.read(_FEATURES.stop)
    if int.from_bytes(head[:4], 'big') != qcow2.MAGIC or any(
            head[_FEATURES]) or int.from_bytes(head[4:8], 'big') != 3:
        raise _NotBaked('its disk has features that were not asked for')


def _tail(path: pathlib.Path) -> str:
    """The last line of a log, which may be long."""
    with path.open('rb') as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _LINE_LIMIT, 0))
        words = file.read(_LINE_LIMIT).decode(errors='replace').strip()
    return _plain(words.rpartition('\n')[2]) or 'silently'


def _plain(words: str) -> str:
    """A stranger's words, not too many."""
    return exception.plain(words[:500])
