# SPDX-License-Identifier: Apache-2.0
"""A store in a directory, on a local or a network file system.

Files are 0640 and directories 0750 (less what the umask forbids): who serves
them over HTTP does so as a member of the directory's group; set the group-id
bit on the store's directory to hand the group down. The file system must have
hard links, which make ``create`` exclusive.
"""

import builtins
import contextlib
import errno
import os
import pathlib
import stat
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, Final

from fastboot_common import exception
from fastboot_common.store import (
    Check,
    Progress,
    files,
    proven,
    validate_name,
    validate_range,
)
from fastboot_common.store.download import download

#: Kinds whose names are the digests of their content.
_CONTENT: Final = ('packs', 'manifests', 'states')
_KINDS: Final = (*_CONTENT, 'journal')
_PIECE: Final = 1 << 20
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """A :class:`~fastboot_common.store.PruneStore`.

    :param path: the directory. It must exist: an unmounted store must not
        look like an empty one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root = pathlib.Path(path).absolute()

    def __repr__(self) -> str:
        return f'LocalStore({str(self._root)!r})'

    # Reading

    def get(self, name: str, limit: int = 64 << 20,
            check: Check | None = None) -> bytes:
        with self._open(name) as (file, size):
            if size > limit:
                raise exception.Corrupt(
                    f'{self._what(name)} has {size} bytes; at most {limit} '
                    f'are allowed')
            return proven(file.read(size), check)

    def read(self, name: str, offset: int, length: int,
             check: Check | None = None) -> bytes:
        validate_range(offset, length)
        with self._open(name) as (file, size):
            if offset + length > size:
                raise exception.Corrupt(
                    f'{self._what(name)} ends at {size}, before '
                    f'{offset + length}')
            file.seek(offset)
            return proven(file.read(length), check)

    def size(self, name: str) -> int:
        with self._open(name) as (_file, size):
            return size

    def fetch(self, name: str, path: pathlib.Path, digest: str, size: int,
              progress: Progress | None = None) -> None:
        download(self._what(validate_name(name)), path, digest, size,
                 lambda offset: self._pieces(name, offset), progress)

    def _pieces(self, name: str, offset: int) -> Iterator[bytes]:
        with self._open(name) as (file, _size):
            file.seek(offset)
            while data := file.read(_PIECE):
                yield data

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """An object's file and its length in bytes."""
        path = self._path(name)
        with self._explained(name), open(path, 'rb', opener=_opener) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise exception.Invalid(
                    f'{self._what(name)} is no regular file')
            yield file, status.st_size

    # Writing

    def create(self, name: str, data: bytes) -> None:
        target = self._path(name)
        with self._explained(name), self._unfinished([data]) as temporary:
            self._make_directory(target.parent)
            self._link(name, temporary, target)
            self._settle(target)

    def put(self, name: str, path: pathlib.Path,
            anew: bool = False) -> None:
        """See :class:`~fastboot_common.store.WriteStore`.

        :raises Invalid: `path` is no regular file that we may read, or the
            name does not say its content.
        """
        target = self._path(name)
        if target.parts[-3] not in _CONTENT:
            raise exception.Invalid(f'{name} does not say its content')
        with self._explained(name):
            self._make_directory(target.parent)
            if anew or not os.path.lexists(target):
                self._move(name, path, target)
            else:
                # Young again: gc spares what someone is about to name.
                os.utime(target)
            # Also for a name that is taken: who took it may have died just
            # before this.
            self._settle(target)

    def replace(self, name: str, data: bytes) -> None:
        """See :class:`~fastboot_common.store.WriteStore`.

        :raises Invalid: the name is that of a write-once object.
        """
        if name != 'head.json':
            raise exception.Invalid(f'{name!r} is never overwritten')
        target = self._path(name)
        with self._explained(name), self._unfinished([data]) as temporary:
            os.rename(temporary, target)
            self._settle(target)

    def scratch(self) -> pathlib.Path:
        with self._explained('tmp'):
            return self._scratch()

    def _scratch(self) -> pathlib.Path:
        path = self._root / 'tmp'
        self._make_directory(path)
        return path

    @contextlib.contextmanager
    def _unfinished(self, pieces: Iterable[bytes]) -> Iterator[pathlib.Path]:
        """A synced temporary file, gone afterwards unless it was renamed."""
        path = self._scratch() / uuid.uuid4().hex
        try:
            _write_synced(path, pieces)
            yield path
        finally:
            # Not an error of its own: it would hide the first one.
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _link(self, name: str, temporary: pathlib.Path,
              target: pathlib.Path) -> None:
        try:
            os.link(temporary, target)
        except FileExistsError as error:
            # NFS: the server may have linked it and its answer been lost;
            # then the repeated request finds the name taken, by us.
            if not os.path.samefile(temporary, target):
                raise exception.Exists(
                    f'{self._what(name)} is there already') from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise exception.Invalid(
                f'{self._what(name)}: {error.strerror}; the store needs a '
                f'file system with hard links') from error

    def _move(self, name: str, path: pathlib.Path,
              target: pathlib.Path) -> None:
        with (files.explained(f'{path} for {name}', exception.Invalid),
              open(path, 'rb', opener=_opener) as source):
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise exception.Invalid(
                    f'{path} for {name} is no regular file')
            os.fchmod(source.fileno(), files.MODE)
            os.fsync(source.fileno())
            try:
                os.rename(path, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                pieces = iter(lambda: source.read(_PIECE), b'')
                with self._unfinished(pieces) as temporary:
                    os.rename(temporary, target)

    def _make_directory(self, path: pathlib.Path) -> None:
        """Make `path` and its parents, but never the store's directory."""
        if path == self._root:
            self._check_root()
            return
        try:
            os.mkdir(path, files.DIRECTORY_MODE)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_directory(path.parent)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, files.DIRECTORY_MODE)

    def _settle(self, target: pathlib.Path) -> None:
        """Make the name lasting, and those of its directories.

        All of them each time: whoever made a directory may not have synced
        it yet.
        """
        for directory in target.parents:
            files.sync_directory(directory)
            if directory == self._root:
                break

    # Pruning

    def list(self, kind: str) -> Iterator[tuple[str, int, float]]:
        if kind not in _KINDS:
            raise exception.Invalid(f'not a kind of object: {kind!r}')
        self._check_root()
        return self._list(kind)

    def _list(self, kind: str) -> Iterator[tuple[str, int, float]]:
        with self._explained(kind):
            for name in self._names(kind):
                try:
                    status = os.lstat(self._root / name)
                except FileNotFoundError:
                    continue  # deleted since
                if stat.S_ISREG(status.st_mode):
                    yield name, status.st_size, status.st_mtime

    def _names(self, kind: str) -> Iterator[str]:
        for entry in _listed(self._root / kind):
            if kind == 'journal':
                yield from _valid(f'{kind}/{entry}')
                continue
            for leaf in _listed(self._root / kind / entry):
                yield from _valid(f'{kind}/{entry}/{leaf}')

    def delete(self, name: str) -> None:
        path = self._path(name)
        self._check_root()
        with self._explained(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with contextlib.suppress(FileNotFoundError):
                files.sync_directory(path.parent)

    # What all of them need

    def _path(self, name: str) -> pathlib.Path:
        return self._root / validate_name(name)

    def _what(self, name: str) -> str:
        return f'{name} in {self._root}'

    def _check_root(self) -> None:
        with files.explained(f'store {self._root}', exception.Unavailable):
            os.stat(f'{self._root}/.')

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            with files.explained(self._what(name)):
                yield
        except exception.NotFound:
            self._check_root()
            raise


def _opener(path: str, flags: int) -> int:
    """Opens neither what a link points to nor, waiting, a pipe."""
    return os.open(
        path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _write_synced(path: pathlib.Path, pieces: Iterable[bytes]) -> None:
    file = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.MODE)
    try:
        os.fchmod(file, files.MODE)
        for data in pieces:
            files.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _listed(path: pathlib.Path) -> builtins.list[str]:
    """The sorted names in a directory; none if there is no directory."""
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _valid(name: str) -> Iterator[str]:
    """`name`, if it is the name of an object."""
    with contextlib.suppress(exception.Invalid):
        yield validate_name(name)
