# SPDX-License-Identifier: Apache-2.0
"""Small files and holes, written so that a crash leaves the old or the new."""

import contextlib
import ctypes
import errno
import mmap
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Final

from fastboot_common import exception

#: Seconds after which a temporary is not being written any more.
_ABANDONED: Final = 3600
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [
    ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def make_directory(path: pathlib.Path) -> None:
    """Make a directory and its parents, unless they are there.

    Mode 0750 each, whatever the umask: ``Path.mkdir`` asks for it only for
    the last of them.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True, mode=0o750)


def touch(path: pathlib.Path) -> None:
    """Make an empty file of mode 0640 at most, unless there is a file.

    For what libraries and programs write: they would let everybody read it.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640))


def sync_directory(path: pathlib.Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """Make a file's bytes durable.

    :raises NoSpace: the device turns out to be full only now.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise exception.NoSpace(f'fsync: {error.strerror}') from error
        raise


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Make or replace a small file: temporary, sync, rename, sync.

    :raises NoSpace: the device is full; the old file is intact.
    """
    make_directory(path.parent)
    # Threads may write the same file at the same time.
    temporary = path.with_name(
        f'.{path.name}.{threading.get_native_id()}.tmp')
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        try:
            with open(fd, 'wb', closefd=False) as file:
                file.write(data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise exception.NoSpace(f'{path}: {error.strerror}') from error
        raise
    sync_directory(path.parent)


def listed(directory: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """The files that match, for one who deletes what is not wanted.

    Of the temporaries of :func:`write_atomically`, only those that a crash
    left: another thread still wants to give its own their true name.
    """
    return [path for path in sorted(directory.glob(pattern))
            if not path.name.startswith('.') or _abandoned(path)]


def _abandoned(path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _ABANDONED
    return False


def remove(path: pathlib.Path) -> None:
    """Remove a file durably; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def disk_used(directory: pathlib.Path) -> int:
    """Bytes of the disk that the files in and below a directory take."""
    total = 0
    for path, _directories, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512
    return total


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole in a file; its size stays.

    :raises OSError: the file system cannot (EOPNOTSUPP).
    """
    while _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, f'punching a hole: {os.strerror(number)}')


def store_words(fd: int, offset: int, words: bytes) -> None:
    """Write words of 8 bytes so that no reader sees half of one.

    A write() is no single store to whoever reads the page meanwhile, and an
    entry of a table that is half old would name a wrong place. Each word
    here is one aligned store through a mapping. Syncs nothing.

    :param offset: a multiple of 8; the file has data there already.
    """
    skew = offset % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(fd, skew + len(words), mmap.MAP_SHARED,
                   mmap.PROT_READ | mmap.PROT_WRITE,
                   offset=offset - skew) as mapping, \
            memoryview(mapping) as view, view.cast('Q') as target:
        for at, word in enumerate(memoryview(words).cast('Q'), skew // 8):
            target[at] = word


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end (bytes) of what is not a hole between two offsets."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= end:
            return
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, stop
        start = stop
