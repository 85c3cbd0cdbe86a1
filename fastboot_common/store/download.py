# SPDX-License-Identifier: Apache-2.0
"""Bringing one object to a file: continued, checked, synced, then named.

The same for every store; where the bytes come from is the store's part.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Final

from fastboot_common import exception
from fastboot_common.store import Progress, files

LOG: Final = logging.getLogger(__name__)

#: The bytes of an object from an offset to its end, in pieces. An offset
#: behind the end gives none.
Source = Callable[[int], Iterator[bytes]]

_PIECE: Final = 1 << 20


def download(name: str, path: pathlib.Path, digest: str, size: int,
             source: Source, progress: Progress | None = None) -> None:
    """See :meth:`fastboot_common.store.ReadStore.fetch`.

    :param name: the object, for messages.
    :raises Busy: another call is fetching to the same `path`.
    :raises Invalid: the directory of `path` is not there or not writable.
    """
    part = path.with_name(f'{path.name}.part')
    with (files.explained(f'{part} for {name}', exception.Invalid),
          _locked(part) as file):
        try:
            _complete(name, file, digest, size, source, progress)
        except (exception.NotFound, exception.Corrupt):
            os.unlink(part)
            raise
        _publish(file, part, path)


def _complete(name: str, file: int, digest: str, size: int, source: Source,
              progress: Progress | None) -> None:
    """Fill `file` from `source`.

    :raises Corrupt: it has not the right content then.
    """
    hasher = hashlib.sha256()
    if os.fstat(file).st_size > size:
        os.ftruncate(file, size)
    kept = _hash(name, file, hasher)
    if kept and hasher.hexdigest() == digest:
        return
    _append(file, hasher, _bounded(name, source(kept), size - kept), progress)
    if kept and hasher.hexdigest() != digest:
        # The part was not synced: a crash of the host may have damaged it,
        # which is not the store's fault.
        LOG.info('%s: the part left by an earlier call was of no use; '
                 'fetching all of it', name)
        os.lseek(file, 0, os.SEEK_SET)
        os.ftruncate(file, 0)
        hasher = hashlib.sha256()
        _append(file, hasher, _bounded(name, source(0), size), progress)
    if hasher.hexdigest() != digest:
        raise exception.Corrupt(
            f'{name}: the bytes do not have the digest {digest}; restore the '
            f'object or use another source')


@contextlib.contextmanager
def _locked(part: pathlib.Path) -> Iterator[int]:
    """Open `part` for us alone."""
    while True:
        file = os.open(
            part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            files.MODE)
        try:
            _lock(file, part)
            # Else who had it published or removed it between our open and
            # our lock.
            if _is_at(file, part):
                yield file
                return
        finally:
            os.close(file)


def _lock(file: int, part: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise exception.Busy(f'{part} is being fetched already') from error


def _is_at(file: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _hash(name: str, file: int, hasher: 'hashlib._Hash') -> int:
    """Hash `file` from its start to its end and return its length.

    :raises Corrupt: the disk cannot read it any more.
    """
    length = 0
    try:
        while data := os.read(file, _PIECE):
            hasher.update(data)
            length += len(data)
    except OSError as error:
        raise exception.Corrupt(
            f'{name}: what came of it earlier cannot be read: '
            f'{error.strerror}; all of it is fetched again') from error
    return length


def _bounded(name: str, pieces: Iterator[bytes],
             room: int) -> Iterator[bytes]:
    """`pieces`, which a store that never ends would fill the disk with.

    :raises Corrupt: they have more than `room` bytes.
    """
    for data in pieces:
        room -= len(data)
        if room < 0:
            raise exception.Corrupt(
                f'{name} is longer than it must be; restore the object or '
                f'use another source')
        yield data


def _append(file: int, hasher: 'hashlib._Hash', pieces: Iterator[bytes],
            progress: Progress | None) -> None:
    for data in pieces:
        files.write(file, data)
        hasher.update(data)
        if progress is not None:
            progress(len(data))


def _publish(file: int, part: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.fsync(file)
    except OSError:
        # What the page cache says after a failed sync is not what the disk
        # has, and the next sync would report success.
        os.unlink(part)
        raise
    os.rename(part, path)
    files.sync_directory(path.parent)
