# SPDX-License-Identifier: Apache-2.0
"""Uploaded images: inspected, then seen as raw bytes.

An image is hostile until shown otherwise. Its format is told from its bytes
by ``oslo_utils.imageutils``, as Glance and Nova do it; QEMU then reads it
in the sandbox, through an NBD socket, as that one format and with no backing
file. Nothing but the image's own bytes can end up in the raw view.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from oslo_utils.imageutils import format_inspector

from fastboot_common import exception, nbdkit, qemu
from fastboot_glance import guest

#: The largest disk that is looked at, in bytes.
LARGEST: Final = 4 << 40

#: The inspector's name of a format, and QEMU's.
_FORMATS: Final = {'raw': 'raw', 'gpt': 'raw', 'qcow2': 'qcow2',
                   'vmdk': 'vmdk', 'vdi': 'vdi', 'vhdx': 'vhdx'}
_VMDK_TYPES: Final = ('monolithicSparse', 'streamOptimized')
#: Incompatible features of qcow2 that may be set: dirty, corrupt,
#: compression type, extended L2. The inspector does not know the last one.
_QCOW2_FEATURES: Final = 0b11011
#: Where fields of its header lie.
_QCOW2_VERSION: Final = slice(4, 8)
_QCOW2_CRYPT: Final = slice(32, 36)
_QCOW2_INCOMPATIBLE: Final = slice(72, 80)
_CHECKED: Final = (0, 3, 63)  # sound; leaks only; the format has no check
_MEMORY: Final = 2 << 30
_SOCKET: Final = 'source.sock'
_RAW: Final = 'disk.raw'


class CopyTooLarge(exception.ImageRejected):
    """An image's raw copy takes more than `copy_limit`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """An image as raw bytes.

    :param raw_path: the bytes; read-only, and gone after the context unless
        the image itself is raw.
    :param virtual_size: bytes, a multiple of 512. A raw file may end up to
        511 bytes before; what lacks is zeros.
    :param format: QEMU's name of the image's format.
    :param size: bytes of the image's file.
    :param os_hash: algorithm and hexadecimal digest of the image's file.
    """

    raw_path: pathlib.Path
    virtual_size: int
    format: str
    size: int
    os_hash: dict[str, str]


def inspect(path: pathlib.Path, claimed_format: str | None = None) -> str:
    """QEMU's name of the image's format, if the image may be used.

    :param claimed_format: what the uploader calls it (Glance's
        ``disk_format``); None: unknown.
    :raises ImageRejected: it may not, and why.
    """
    try:
        inspector = format_inspector.detect_file_format(str(path))
        found = str(inspector)
        if found not in _FORMATS:
            raise exception.ImageRejected(
                f'{path.name}: images of format {found} are not used')
        if claimed_format and _FORMATS.get(claimed_format) != _FORMATS[found]:
            raise exception.ImageRejected(
                f'{path.name}: said to be {claimed_format}, but is {found}')
        # Partition tables are for the guest to judge: QEMU reads none.
        if found != 'gpt':
            _check_safety(inspector, path.name)
    except (exception.FastbootError, OSError, MemoryError):
        raise
    except Exception as error:
        # Beside its own errors, hostile headers bring out others:
        # AttributeError of a cut VMDK in oslo.utils 10.2.
        raise exception.ImageRejected(f'{path.name}: {error}') from error
    return _FORMATS[found]


def _check_safety(inspector: Any, name: str) -> None:
    """The inspector's own checks, with newer qcow2 features let through."""
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        reasons = {key: str(value) for key, value in error.failures.items()}
        if str(inspector) == 'qcow2' and _known_features(inspector):
            reasons.pop('unknown_features', None)
        if reasons:
            raise exception.ImageRejected(
                f'{name}: {"; ".join(reasons.values())}') from error
    if str(inspector) == 'qcow2' and any(_header(inspector)[_QCOW2_CRYPT]):
        raise exception.ImageRejected(f'{name}: the image is encrypted')


def _header(inspector: Any) -> bytes:
    return bytes(inspector.region('header').data)


def _known_features(inspector: Any) -> bool:
    header = _header(inspector)
    features = int.from_bytes(header[_QCOW2_INCOMPATIBLE], 'big')
    return (int.from_bytes(header[_QCOW2_VERSION], 'big') == 3
            and not features & ~_QCOW2_FEATURES)


@contextlib.contextmanager
def open_source(path: pathlib.Path, workdir: pathlib.Path, *,
                claimed_format: str | None = None, user: str = 'nobody',
                hashes: Sequence[str] = (), timeout: float = 3600,
                cancel: threading.Event | None = None,
                largest: int = LARGEST,
                copy_limit: int | None = None) -> Iterator[Source]:
    """An uploaded image as raw bytes.

    :param path: the image; it is only read.
    :param workdir: a directory with room for the raw copy.
    :param claimed_format: see :func:`inspect`.
    :param user: the account that QEMU runs as, if we are root.
    :param hashes: digests of the file to compute, such as ``sha512``.
    :param timeout: seconds for the conversion.
    :param cancel: when set, the conversion is given up.
    :param largest: bytes that the disk may have, whoever said what it has.
    :param copy_limit: bytes on disk that its raw copy may take; None: any.
    :raises ImageRejected: the image may not be used, or is damaged.
    :raises CopyTooLarge: its raw copy takes more than `copy_limit`.
    :raises NoSpace: no room for the raw copy.
    :raises Busy: cancelled.
    :raises CommandFailed: the conversion took too long.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise exception.ImageRejected(f'{path.name}: empty, or no file')
    image_format = inspect(path, claimed_format)
    os_hash = {name: _digest(path, name) for name in hashes}
    if image_format == 'raw':
        size = -(-status.st_size // 512) * 512
        _check_size(size, path.name, largest)
        yield Source(path, size, 'raw', status.st_size, os_hash)
        return
    with tempfile.TemporaryDirectory(dir=workdir, prefix='source-') as name:
        room = pathlib.Path(name)
        copy = _Copy(path, image_format, room, guest.Sandbox(user),
                     copy_limit)
        with copy.serve():
            size = copy.examine(largest)
            copy.convert(size, timeout, cancel or threading.Event())
        yield Source(copy.take(size), size, image_format, status.st_size,
                     os_hash)


def _digest(path: pathlib.Path, algorithm: str) -> str:
    with path.open('rb') as image:
        return hashlib.file_digest(image, algorithm).hexdigest()


def _check_size(size: int, name: str, largest: int) -> None:
    if not 0 < size <= largest:
        raise exception.ImageRejected(
            f'{name}: a disk of {size} bytes; at most {largest} are allowed')


class _Copy:
    """The conversion of one image, in a directory of its own.

    What runs in the sandbox may write to ``<room>/guest`` only, and reads
    the image through a socket there.
    """

    def __init__(self, path: pathlib.Path, image_format: str,
                 room: pathlib.Path, sandbox: guest.Sandbox,
                 limit: int | None) -> None:
        self._path = path
        self._limit = limit
        self._format = image_format
        self._room = room
        self._guest = room / 'guest'
        self._sandbox = sandbox
        self._guest.mkdir(0o700)
        self._image = qemu.image({
            'driver': image_format, 'backing': None, 'read-only': True,
            'file': {'driver': 'nbd', 'read-only': True,
                     'server': {'type': 'unix', 'path': _SOCKET}},
        })

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Offer the image's file on the socket."""
        with nbdkit.Tap(self._path, self._guest / _SOCKET):
            self._sandbox.own(self._guest)
            yield

    def examine(self, largest: int) -> int:
        """The disk's size in bytes, if QEMU too finds the image sound.

        :raises ImageRejected: it does not.
        """
        try:
            found = qemu.info(self._image, prefix=self._prefix(0, 60),
                              cwd=self._guest)
        except exception.CommandFailed as error:
            raise self._rejected(str(error)) from error
        details = found.get('format-specific', {}).get('data', {})
        if 'backing-filename' in found:
            raise self._rejected('the image has a backing file')
        if 'data-file' in details:
            raise self._rejected('the image has a data file')
        if found.get('encrypted'):
            raise self._rejected('the image is encrypted')
        if (self._format == 'vmdk'
                and details.get('create-type') not in _VMDK_TYPES):
            raise self._rejected('this kind of vmdk is not used')
        self._check()
        size = int(found['virtual-size'])
        _check_size(size, self._path.name, largest)
        return size

    def _check(self) -> None:
        """Let QEMU check its tables: a file cut short reads as zeros."""
        try:
            qemu.check(self._image, prefix=self._prefix(0, 600),
                       cwd=self._guest)
        except exception.CommandFailed as error:
            if error.status not in _CHECKED:
                raise self._rejected(str(error)) from error

    def convert(self, size: int, timeout: float,
                cancel: threading.Event) -> None:
        """Write the raw copy.

        :raises ImageRejected: QEMU cannot read the image to its end.
        :raises CopyTooLarge: what it holds is too much.
        :raises NoSpace: no room for it.
        :raises Busy: cancelled.
        :raises CommandFailed: it took too long.
        """
        command = [*self._prefix(size, int(timeout)),
                   *qemu.convert_command(self._image, _RAW)]
        with tempfile.TemporaryFile(dir=self._room) as words:
            process = subprocess.Popen(
                command, cwd=self._guest, stdin=subprocess.DEVNULL,
                stdout=words, stderr=words, umask=0o027)
            try:
                self._wait(process, command, timeout, cancel)
            finally:
                process.kill()
                process.wait()
            words.seek(0)
            said = words.read(4096).decode(errors='replace')
        self._check_limit()
        if 'No space left' in said:
            raise exception.NoSpace(f'{self._room}: no room for a raw copy')
        if process.returncode:
            raise self._rejected(str(exception.CommandFailed(
                command, process.returncode, said)))

    def _wait(self, process: 'subprocess.Popen[bytes]', command: list[str],
              timeout: float, cancel: threading.Event) -> None:
        deadline = time.monotonic() + timeout
        while process.poll() is None:
            if cancel.wait(0.1):
                raise exception.Busy(f'{self._path.name}: cancelled')
            if time.monotonic() > deadline:
                raise exception.CommandFailed(
                    command, -9, f'not done in {timeout} seconds')
            # A small file may stand for a huge disk full of data.
            self._check_limit()
            guest.check_room(self._room)

    def _check_limit(self) -> None:
        if self._limit is not None and guest.disk_usage(
                self._guest) > self._limit:
            raise CopyTooLarge(self._words(
                f'its data are more than {self._limit} bytes, which [builder] '
                f'copy_limit, or a share of the disk of [builder] workdir, '
                f'allows'))

    def take(self, size: int) -> pathlib.Path:
        """Take the copy out of the sandbox's reach, and return its path."""
        made = self._guest / _RAW
        status = made.lstat()
        if (not stat.S_ISREG(status.st_mode) or status.st_nlink != 1
                or status.st_size != size):
            raise self._rejected('the conversion left something else')
        raw = self._room / _RAW
        made.rename(raw)
        os.chown(raw, os.geteuid(), os.getegid())
        raw.chmod(0o440)
        return raw

    def _prefix(self, file_size: int, cpu_seconds: int) -> list[str]:
        return self._sandbox.prefix(
            guest.Limits(_MEMORY, file_size, cpu_seconds))

    def _rejected(self, reason: str) -> exception.ImageRejected:
        return exception.ImageRejected(self._words(reason))

    def _words(self, reason: str) -> str:
        return f'{self._path.name} ({self._format}): {reason.strip()}'
