# SPDX-License-Identifier: Apache-2.0
"""QEMU's programs: ``qemu-img``, and machines to boot images in.

The one place that knows their arguments. Captures and ``vm run`` start the
same machine, so that a boot set recorded in one fits the other. Guests that
Nova runs are libvirt's business, not ours.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from fastboot_common import configdrive, exception

SYSTEM: Final = 'qemu-system-x86_64'
#: The oldest QEMU whose block layer was tried with slots.
OLDEST: Final = (7, 2)
#: Bytes of address space that TCG, threads and libraries need on top of the
#: guest's memory; the peak measured was 0.9 GiB with one vCPU.
OVERHEAD: Final = 2 << 30

_IMG: Final = 'qemu-img'
_IO: Final = 'qemu-io'
#: Bytes that it reads at once.
_IO_PIECE: Final = 4 << 20
_INFO_MEMORY: Final = 1 << 30
_INFO_SECONDS: Final = 30
_CHECK_SECONDS: Final = 600
_TRANSLATION_MIB: Final = 256
#: What a server of Nova has besides, and what its kernel and cloud-init
#: read other files for: a boot without these missed 26 MB of a Debian 12.
_NOVA: Final = (
    '-smbios', 'type=1,manufacturer=OpenStack Foundation,'
    'product=OpenStack Nova,family=Virtual Machine',
    '-device', f'virtio-net-pci,netdev=link,mac={configdrive.MAC},'
    'host_mtu=1500',
    '-device', 'virtio-balloon-pci', '-device', 'piix3-usb-uhci',
)
#: The link is up and leads nowhere.
_LINK: Final = ('-netdev', 'hubport,id=link,hubid=0')
#: The link has a DHCP server and nothing else, least of all this host.
_DHCP: Final = ('-netdev', 'user,id=link,restrict=on')
_LINE_LIMIT: Final = 64 << 10
_QUIT_SECONDS: Final = 5.0


def _run(command: Sequence[str], timeout: float,
         cwd: pathlib.Path | None = None,
         stdin: int | BinaryIO = subprocess.DEVNULL) -> bytes:
    """Run a program to its end and return what it printed.

    :raises CommandFailed: it failed or took too long.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, timeout=timeout, capture_output=True,
            stdin=stdin, check=False)
    except subprocess.TimeoutExpired as error:
        raise exception.CommandFailed(
            list(command), -9, f'not done in {timeout} seconds') from error
    if done.returncode:
        raise exception.CommandFailed(
            list(command), done.returncode,
            (done.stderr or done.stdout).decode(errors='replace'))
    return done.stdout


@functools.cache
def version(tool: str = SYSTEM) -> tuple[int, ...]:
    """The version of a program of QEMU, which must be new enough.

    :raises ConfigError: it is missing or older than :data:`OLDEST`.
    """
    try:
        words = _run([tool, '--version'], 30).decode(errors='replace')
    except OSError as error:
        raise exception.ConfigError(
            f'{tool} cannot be run; install QEMU: {error}') from error
    match = re.search(r'version (\d+)\.(\d+)\.(\d+)', words)
    found = tuple(map(int, match.groups())) if match else ()
    if found < OLDEST:
        raise exception.ConfigError(
            f'{tool} has version {found}; at least {OLDEST} is needed')
    return found


def package(tool: str = SYSTEM) -> str:
    """The version of a program of QEMU, with the distribution's own.

    Of the program that is there now: services live longer than a package.

    :raises ConfigError: it is missing, too old, or has none.
    """
    version(tool)
    try:
        found = os.stat(shutil.which(tool) or tool)
        return _package(
            tool, (found.st_dev, found.st_ino, found.st_mtime_ns))
    except OSError as error:
        raise exception.ConfigError(f'{tool}: {error}') from error


@functools.cache
def _package(tool: str, _file: tuple[int, ...]) -> str:
    words = _run([tool, '--version'], 30).decode(errors='replace')
    match = re.search(r'version ([ -~]{1,200})', words)
    if not match:
        raise exception.ConfigError(f'{tool} has no version')
    return match[1]


def image(options: Mapping[str, Any]) -> str:
    """A block node as a file name that QEMU's programs understand."""
    return 'json:' + json.dumps(options)


def info(path: str, image_format: str | None = None, *,
         prefix: Sequence[str] = (),
         cwd: pathlib.Path | None = None) -> dict[str, Any]:
    """What ``qemu-img info`` says of an image, which may be hostile.

    :param path: a file name, or what :func:`image` made.
    :param image_format: QEMU's name of the format; None only where `path`
        says it. QEMU must never guess.
    :param prefix: a command that runs it in a sandbox.
    :raises CommandFailed: QEMU cannot open the image.
    """
    version(_IMG)
    command = [
        *prefix, 'prlimit', f'--as={_INFO_MEMORY}', f'--cpu={_INFO_SECONDS}',
        _IMG, 'info', '--output=json', '--force-share',
        *(['-f', image_format] if image_format else []), path,
    ]
    result: dict[str, Any] = json.loads(_run(command, _INFO_SECONDS * 2, cwd))
    return result


def check(path: str, *, prefix: Sequence[str] = (),
          cwd: pathlib.Path | None = None) -> None:
    """Let QEMU check the tables of an image.

    :param path: what :func:`image` made.
    :param prefix: a command that runs it in a sandbox.
    :raises CommandFailed: they are damaged (its status tells how), or QEMU
        cannot open the image.
    """
    version(_IMG)
    _run([*prefix, _IMG, 'check', '-q', path], _CHECK_SECONDS, cwd)


def convert_command(source: str, target: str,
                    target_format: str = 'raw') -> list[str]:
    """The command that copies an image, leaving out 4 KiB runs of zeros.

    :param source: a file name whose format is plain, or what :func:`image`
        made.
    """
    version(_IMG)
    return [_IMG, 'convert', '-S', '4096', '-O', target_format, source,
            target]


def convert(source: str, target: str, target_format: str = 'raw', *,
            timeout: float) -> None:
    """Copy an image that is trusted.

    :param timeout: seconds.
    :raises CommandFailed: it failed or took too long.
    """
    _run(convert_command(source, target, target_format), timeout)


def same_content(one: str, other: str, *, timeout: float) -> bool:
    """Whether two images read the same.

    :param one: what :func:`image` made, like `other`.
    :param timeout: seconds.
    :raises CommandFailed: one cannot be read, or it took too long.
    """
    try:
        _run([_IMG, 'compare', '-U', '-q', one, other], timeout)
    except exception.CommandFailed as error:
        if error.status != 1:
            raise
        return False
    return True


def copy_up(path: pathlib.Path, extents: Sequence[tuple[int, int]], *,
            timeout: float) -> None:
    """Copy what an overlay reads from below into itself.

    :param path: of an overlay that nobody uses.
    :param extents: offset and length (bytes), ascending.
    :param timeout: seconds.
    :raises CommandFailed: it failed; the overlay reads as before.
    :raises Corrupt: QEMU did something else.
    """
    version(_IMG)
    disk = file_disk(str(path), 'qcow2')
    # No pipe: under eventlet, who writes to one that is gone never ends.
    with tempfile.TemporaryFile() as commands:
        commands.writelines(
            b'read -q %d %d\n' % (at, min(_IO_PIECE, offset + length - at))
            for offset, length in extents
            for at in range(offset, offset + length, _IO_PIECE))
        # It does not tell if that fails when it closes the disk.
        commands.write(b'flush\n')
        commands.seek(0)
        # What is read through this filter is written into the overlay.
        _run([_IO, image({'driver': 'copy-on-read', 'file': disk})], timeout,
             stdin=commands)
    mapped = _run([_IMG, 'map', '--output=json', image(
        {**disk, 'backing': None})], timeout)
    try:
        complete = _covers(json.loads(mapped), extents)
    except (ValueError, KeyError, TypeError) as error:
        raise exception.Corrupt(f'the map of {path}: {error!r}') from error
    if not complete:
        raise exception.Corrupt(f'{path} still lacks what was copied')


def _covers(mapped: Iterable[Mapping[str, Any]],
            extents: Iterable[tuple[int, int]]) -> bool:
    """Whether an overlay has all of these extents itself."""
    lacking = ((one['start'], one['start'] + one['length'])
               for one in mapped if not one['present'])
    begin, end = next(lacking, (None, None))
    for offset, length in extents:
        while end is not None and end <= offset:
            begin, end = next(lacking, (None, None))
        if begin is not None and begin < offset + length:
            return False
    return True


def rename_backing(path: pathlib.Path, backing: pathlib.Path,
                   backing_format: str) -> None:
    """Set an overlay that nobody uses on another backing of equal content.

    :raises CommandFailed: it failed; a guest may have it open.
    """
    _run([_IMG, 'rebase', '-q', '-u', '-f', 'qcow2', '-b', str(backing),
          '-F', backing_format, str(path)], 60)


def grow(path: pathlib.Path, size: int) -> None:
    """Make an overlay that nobody uses larger.

    :param size: bytes that the guest is to see.
    :raises CommandFailed: it failed; a guest may have it open.
    """
    _run([_IMG, 'resize', '-q', '-f', 'qcow2', str(path), str(size)], 60)


def create_overlay(path: pathlib.Path, backing: str, backing_format: str,
                   size: int) -> None:
    """Make an empty qcow2 on top of `backing`, which is not opened.

    :param size: bytes that the guest is to see.
    :raises CommandFailed: it failed.
    """
    version(_IMG)
    _run([_IMG, 'create', '-q', '-u', '-f', 'qcow2', '-b', backing,
          '-F', backing_format, str(path), str(size)], 60)


def file_disk(path: str, image_format: str) -> dict[str, Any]:
    """The block node of an image file, for :class:`Config`."""
    return {'driver': image_format,
            'file': {'driver': 'file', 'filename': path}}


@dataclasses.dataclass(frozen=True)
class Config:
    """A machine. The device model is fixed; what varies is here.

    :param disk: block node of the root disk (:func:`file_disk`). Relative
        file names start from the machine's directory.
    :param memory: MiB.
    :param accelerator: ``tcg``, or ``kvm`` (with TCG where it fails).
    :param cache: of the disk: ``none``, ``writeback`` or ``unsafe``.
    :param config_drive: an ISO image, or None.
    :param dhcp: somebody answers DHCP, as for a guest that gets its metadata
        over the network. It has the CD drive of Nova's config drives, too,
        which its kernel has drivers to read for: an empty one.
    """

    disk: Mapping[str, Any]
    memory: int = 512
    vcpus: int = 1
    accelerator: str = 'tcg'
    cache: str = 'writeback'
    config_drive: str | None = None
    dhcp: bool = False

    def command(self, monitor: int, agent: int, serial: int) -> list[str]:
        """QEMU's arguments. It gets descriptors, no names of ours.

        :param monitor: a connected socket for QMP.
        :param agent: a connected socket for the guest agent.
        :param serial: a file, open for writing, for the serial console.
        """
        command = [
            SYSTEM, '-name', 'fastboot', '-nodefaults', '-no-user-config',
            '-sandbox', 'on,obsolete=deny,elevateprivileges=deny,'
            'spawn=deny,resourcecontrol=deny',
            '-machine', 'pc', '-cpu', 'max', *self._accelerators(),
            '-m', str(self.memory), '-smp', str(self.vcpus),
            '-display', 'none', '-vga', 'std',
            *(_DHCP if self.dhcp else _LINK), *_NOVA,
            '-add-fd', f'fd={serial},set=1',
            '-chardev', 'file,id=serial,path=/dev/fdset/1',
            '-serial', 'chardev:serial',
            '-chardev', f'socket,id=monitor,fd={monitor}',
            '-mon', 'chardev=monitor,mode=control',
            '-object', 'rng-builtin,id=rng',
            '-device', 'virtio-rng-pci,rng=rng',
            '-device', 'virtio-serial-pci',
            '-chardev', f'socket,id=agent,fd={agent}',
            '-device',
            'virtserialport,chardev=agent,name=org.qemu.guest_agent.0',
            '-blockdev', json.dumps(self._root()),
            '-device', 'virtio-blk-pci,drive=root,bootindex=1',
        ]
        if self.config_drive:
            drive = {**file_disk(self.config_drive, 'raw'),
                     'node-name': 'config', 'read-only': True}
            command += ['-blockdev', json.dumps(drive),
                        '-device', 'virtio-blk-pci,drive=config']
        if self.dhcp:
            command += ['-device', 'ide-cd']
        return command

    def devices(self) -> str:
        """The device model in words, for the header of a manifest."""
        number = '.'.join(map(str, version()))
        return f'pc, virtio-blk, {self.accelerator}, QEMU {number}'

    def _accelerators(self) -> list[str]:
        tcg = ['-accel', f'tcg,thread=multi,tb-size={_TRANSLATION_MIB}']
        return ['-accel', 'kvm', *tcg] if self.accelerator == 'kvm' else tcg

    def _root(self) -> dict[str, Any]:
        return {
            **self.disk, 'node-name': 'root',
            'cache': {'direct': self.cache == 'none',
                      'no-flush': self.cache == 'unsafe'},
        }


class Peer:
    """JSON, one object a line, with a peer that may lie or be silent.

    :param channel: a connected socket; it is closed with the peer.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._rest = b''

    def send(self, message: Mapping[str, Any], lead: bytes = b'') -> None:
        """Send one object. A peer that does not read loses it."""
        with contextlib.suppress(OSError):
            self._channel.settimeout(0)
            self._channel.send(lead + json.dumps(message).encode() + b'\n')

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next object, or None at the deadline or the end.

        Lines that are no objects are skipped, and so are lines without end.

        :param deadline: on the clock of :func:`time.monotonic`.
        """
        while True:
            line, newline, rest = self._rest.partition(b'\n')
            if newline:
                self._rest = rest
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(line.strip(b'\xff'))
                    if isinstance(message, dict):
                        return message
            elif not self._fill(deadline):
                return None
            if time.monotonic() > deadline:
                return None

    def _fill(self, deadline: float) -> bool:
        if len(self._rest) > _LINE_LIMIT:
            self._rest = b''
        try:
            self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._channel.recv(4096)
        except OSError:
            return False
        self._rest += data
        return bool(data)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


class GuestAgent:
    """The guest agent, believed in nothing but that it answers.

    :param peer: the other end of the guest's virtio port.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._token = secrets.randbelow(1 << 31)

    def ping(self, seconds: float) -> bool:
        """Whether the agent answers within `seconds`.

        What the port still holds from earlier, or from before a reboot, is
        read past: only an answer that repeats our number counts.
        """
        deadline = time.monotonic() + seconds
        self._peer.send({'execute': 'guest-sync-delimited',
                         'arguments': {'id': self._token}}, b'\xff')
        if not self._answered(deadline, self._token):
            return False
        self._peer.send({'execute': 'guest-ping'})
        return self._answered(deadline, {})

    def _answered(self, deadline: float, value: Any) -> bool:
        while (message := self._peer.receive(deadline)) is not None:
            if message.get('return') == value:
                return True
        return False


class Machine:
    """A running machine; a context manager around its life.

    Its logs (``serial.log``, ``qemu.log``) are in `directory`, which is also
    its working directory. Its sockets have no names, so nobody else can
    connect. The machine dies with the thread that entered the context.

    :param config: what to run.
    :param directory: an existing directory of its own.
    :param prefix: a command that runs it in a sandbox.
    """

    def __init__(self, config: Config, directory: pathlib.Path,
                 prefix: Sequence[str] = ()) -> None:
        self._config = config
        self._directory = directory
        self._prefix = prefix
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start the machine.

        :raises ConfigError: QEMU is missing or too old.
        :raises CommandFailed: QEMU does not start.
        """
        version()
        with self._exit:
            serial, self._serial = self._open('serial.log')
            log, self._log = self._open('qemu.log')
            self._start(serial, log)
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._exit.close()

    def _open(self, name: str) -> tuple[int, BinaryIO]:
        """A new log, to write and to read.

        Both ends are opened before anything untrusted runs: a link that
        replaces the file later is not followed.
        """
        path = self._directory / name
        write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        self._exit.callback(os.close, write)
        return write, self._exit.enter_context(path.open('rb'))

    def _start(self, serial: int, log: int) -> None:
        monitor, far_monitor = socket.socketpair()
        agent, far_agent = socket.socketpair()
        self._monitor = Peer(monitor)
        self._exit.callback(self._monitor.close)
        peer = Peer(agent)
        self._exit.callback(peer.close)
        self.agent = GuestAgent(peer)
        with far_monitor, far_agent:
            inherited = (far_monitor.fileno(), far_agent.fileno(), serial)
            self._command = [
                *(self._prefix or ('setpriv', '--pdeathsig', 'KILL', '--')),
                *self._config.command(*inherited)]
            self._process = subprocess.Popen(
                self._command, cwd=self._directory, pass_fds=inherited,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                umask=0o027)
        self._exit.callback(self._stop)
        # The greeting comes when the machine is made; without it, it failed.
        if self._monitor.receive(time.monotonic() + 60) is None:
            raise exception.CommandFailed(
                self._command, self._process.poll() or 0, self.words())
        self._monitor.send({'execute': 'qmp_capabilities'})

    def _stop(self) -> None:
        """Ask QEMU to quit, then insist. Nothing is left when it returns."""
        self._monitor.send({'execute': 'quit'})
        try:
            self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            # Inside a sandbox QEMU dies a moment after it: its end of the
            # socket closes with it.
            deadline = time.monotonic() + _QUIT_SECONDS
            while self._monitor.receive(deadline):
                pass

    @property
    def pid(self) -> int:
        """The process, or the sandbox around it."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether QEMU still runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> bool:
        """Wait for the guest to power itself off; whether it did."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def console(self) -> bytes:
        """What the guest printed since the last call, 1 MiB at most."""
        return self._serial.read(1 << 20)

    def words(self) -> str:
        """The end of what QEMU itself printed."""
        self._log.seek(0, 2)
        self._log.seek(max(self._log.tell() - 4096, 0))
        return self._log.read(4096).decode(errors='replace')
