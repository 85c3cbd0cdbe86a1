# SPDX-License-Identifier: Apache-2.0
"""Stores: where a repository's objects are kept.

A small interface that grows by capability: :class:`ReadStore` is all that a
host needs, :class:`WriteStore` what a publisher needs, :class:`PruneStore`
what ``gc`` needs. ``tests/functional/store_conformance.py`` is what every
store must pass. :func:`open_store` opens one.

Implementations are imported where they are opened: a process that has its
repository in a directory does not pay for an HTTP client.
"""

import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar

from fastboot_common import exception

#: Called with the number of bytes that arrived since the last call.
Progress = Callable[[int], None]
#: Proves bytes that were read; raises Corrupt if they are not what they
#: should be.
Check = Callable[[bytes], object]

T = TypeVar('T')

_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
_NAMES: Final = re.compile(
    r'(?:config|head)\.json'
    r'|journal/[0-9]{16}\.json'
    r'|(?:packs|manifests|states)/([0-9a-f]{2})/(\1[0-9a-f]{62})'
)


def validate_name(name: str) -> str:
    """Return `name` if it is the name of an object of a repository.

    Names are the closed set that the format knows (no user's word becomes a
    path), so that none can climb out of the store's directory.

    :raises Invalid: it is none.
    """
    if not _NAMES.fullmatch(name):
        raise exception.Invalid(f'not the name of an object: {name!r}')
    return name


def object_name(kind: str, digest: str) -> str:
    """``packs/ab/ab…`` for a digest.

    :param kind: ``packs``, ``manifests`` or ``states``.
    :param digest: 64 hexadecimal digits.
    :raises Invalid: either is something else.
    """
    if not _DIGEST.fullmatch(digest):
        raise exception.Invalid(f'not a sha256 digest: {digest!r}')
    return validate_name(f'{kind}/{digest[:2]}/{digest}')


def entry_name(number: int) -> str:
    """The name of journal entry `number` (1 or more)."""
    return validate_name(f'journal/{number:016d}.json')


def validate_range(offset: int, length: int) -> None:
    """Check a range of bytes before any store is asked for it.

    :raises Invalid: either is negative.
    """
    if offset < 0 or length < 0:
        raise exception.Invalid(
            f'no range of bytes: {length} bytes at {offset}')


def proven(data: bytes, check: Check | None) -> bytes:
    """Return `data` once it is proven, if somebody can."""
    if check is not None:
        check(data)
    return data


def parsed(read: Callable[[Check], bytes],
           parse: Callable[[bytes], T]) -> tuple[bytes, T]:
    """Read bytes whose parser is their proof; it runs once.

    :param read: reads them, with the check that it is given.
    :param parse: raises Corrupt if they are not what they should be.
    """
    made: list[T] = []
    data = read(lambda found: made.append(parse(found)))
    return data, made[-1]


class ReadStore(Protocol):
    """Reading objects. All raise Unavailable when the store is out of reach.

    All may be called by several threads at once. All raise Invalid for a name
    that no object can have, and where modes or owners forbid access. Nothing
    here checks content except :meth:`fetch`: callers hold digests. They may
    hand in how to check: a store of several copies then asks for another.
    """

    def get(self, name: str, limit: int = 64 << 20,
            check: Check | None = None) -> bytes:
        """The whole of a small object.

        :raises NotFound: there is no such object.
        :raises Corrupt: it has more than `limit` bytes, or `check` does.
        """

    def read(self, name: str, offset: int, length: int,
             check: Check | None = None) -> bytes:
        """Exactly `length` bytes at `offset`.

        :raises NotFound: there is no such object.
        :raises Corrupt: the object ends before, or `check` does.
        """

    def size(self, name: str) -> int:
        """The object's length in bytes.

        :raises NotFound: there is no such object.
        """

    def fetch(self, name: str, path: pathlib.Path, digest: str, size: int,
              progress: Progress | None = None) -> None:
        """Bring a whole object to the file `path`, checked.

        What an earlier call left in ``<path>.part`` is continued; where it
        turns out to be of no use, all is fetched again. `path` appears only
        with the right content, synced.

        :param digest: sha256 that the bytes must have.
        :param size: how many they must be; more are not taken, whatever the
            store says.
        :raises NotFound: there is no such object.
        :raises Corrupt: the bytes are others; the partial file is gone.
        :raises NoSpace: no room for the file; the partial file is kept.
        :raises Unavailable: the store failed midway; the partial file is
            kept.
        :raises Busy: another call is fetching to `path`.
        """


class WriteStore(ReadStore, Protocol):
    """Adding objects. Every write is synced before the call returns."""

    def create(self, name: str, data: bytes) -> None:
        """Make a small object, atomically and only if the name is free.

        :raises Exists: the name is taken (also if the bytes are the same).
        """

    def put(self, name: str, path: pathlib.Path,
            anew: bool = False) -> None:
        """Make an object of the file at `path`, which may be moved away.

        Only for names that say their content; one that is taken is left as
        it is, and `path` too.

        :param anew: what has the name is damaged: replace it, atomically.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Make or overwrite an object, atomically. Only for ``head.json``."""

    def scratch(self) -> pathlib.Path:
        """A directory for unfinished files, on the store's own file system
        where it has one."""


class PruneStore(WriteStore, Protocol):
    """Listing and deleting."""

    def list(self, kind: str) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and time of last change (seconds since the epoch).

        :param kind: ``packs``, ``manifests``, ``states`` or ``journal``.
        """

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""


def open_store(location: str, **options: Any) -> ReadStore:
    """The store at `location`.

    :param location: a directory, ``file:///directory``, or a URL that begins
        with ``http://`` or ``https://``.
    :param options: those of :class:`~fastboot_common.store.http.HttpStore`; a
        directory needs none of them.
    :raises ConfigError: nothing known can be there.
    """
    if location.startswith(('http://', 'https://')):
        from fastboot_common.store import http
        return http.HttpStore(location, **options)
    from fastboot_common.store import local
    return local.LocalStore(_directory(location))


def _directory(location: str) -> str:
    if '://' not in location:
        path = location
    else:
        url = urllib.parse.urlsplit(location)
        if url.scheme != 'file' or url.netloc not in ('', 'localhost'):
            raise exception.ConfigError(
                f'no store can be opened at {url.scheme}://…: use a '
                f'directory, file:///…, http://… or https://…')
        path = urllib.parse.unquote(url.path)
    if not path or '\0' in path:
        raise exception.ConfigError(
            f'the location of the store names no directory: {location!r}')
    return path
