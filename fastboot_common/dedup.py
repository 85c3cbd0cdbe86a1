# SPDX-License-Identifier: Apache-2.0
"""Where each known block lies: a publisher's cache of all pack indexes.

On disk, so that a publisher's memory does not grow with the repository. It
can be deleted at any time; what a manifest says is proven by its root.

A file is one publisher's alone: another that covered other packs meanwhile
would give their numbers a new meaning.
"""

import dataclasses
import fcntl
import itertools
import os
import pathlib
import sqlite3
from collections.abc import Set
from typing import Final

from fastboot_common import files
from fastboot_common.pack import PackIndex, PackRef

#: Of the tables below; others are made anew.
_VERSION: Final = 1
_DROP: Final = 'DROP TABLE IF EXISTS packs; DROP TABLE IF EXISTS blocks;'
#: Pack 0 is never in the index: the one that is being written.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS packs (
    id INTEGER PRIMARY KEY, digest TEXT UNIQUE NOT NULL,
    size INTEGER NOT NULL, blocks INTEGER NOT NULL,
    index_offset INTEGER NOT NULL, index_digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blocks (
    digest BLOB PRIMARY KEY, pack INTEGER NOT NULL, ordinal INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TEMP TABLE fresh (
    digest BLOB PRIMARY KEY, pack INTEGER NOT NULL, ordinal INTEGER NOT NULL
) WITHOUT ROWID;
"""
_BATCH: Final = 64

#: Pack (as :meth:`DedupIndex.packs` counts; negative: fresh) and ordinal.
Place = tuple[int, int]


class DedupIndex:
    """Digest → place, for one repository. Use from one thread."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open or make the index at `path`, or beside it if that is taken."""
        files.make_directory(path.parent)
        self._path, self._lock = _free(path)
        try:
            self._open()
        except sqlite3.OperationalError:
            os.close(self._lock)
            raise
        except sqlite3.DatabaseError:
            self.discard()

    def _open(self) -> None:
        files.touch(self._path)
        self._db = sqlite3.connect(self._path, timeout=60)
        [version] = self._db.execute('PRAGMA user_version').fetchone()
        # WAL: a crash loses the last packs, never half of one.
        self._db.executescript(
            'PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; '
            'PRAGMA cache_size=-32768; PRAGMA temp_store=FILE;'
            + ('' if version == _VERSION else _DROP) + _SCHEMA
            + f'PRAGMA user_version={_VERSION};')
        self._db.commit()

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        os.close(self._lock)

    def discard(self) -> None:
        """Begin anew: the file is damaged."""
        self._db.close()
        for suffix in ('', '-wal', '-shm'):
            self._path.with_name(self._path.name + suffix).unlink(
                missing_ok=True)
        self._open()

    def packs(self) -> dict[str, int]:
        """The packs that the index covers: digest → number."""
        return dict(self._db.execute('SELECT digest, id FROM packs'))

    def refs(self) -> dict[int, PackRef]:
        """The same packs: number → reference, as it was added."""
        return {row[0]: PackRef(*row[1:])
                for row in self._db.execute('SELECT * FROM packs')}

    def keep(self, wanted: Set[str]) -> Set[str]:
        """Cover no packs but those of `wanted`.

        :returns: those that are to be added.
        """
        known = self.packs().keys()
        gone = known - wanted
        if gone:
            with self._db:
                self._db.executemany('DELETE FROM packs WHERE digest = ?',
                                     ((digest,) for digest in gone))
                # Each such statement reads the whole table: one for all.
                self._db.execute('DELETE FROM blocks WHERE pack NOT IN '
                                 '(SELECT id FROM packs)')
        return wanted - known

    def add(self, index: PackIndex) -> None:
        """Cover one more pack.

        :param index: of a reference that is proven.
        """
        with self._db:
            number = self._db.execute(
                'INSERT INTO packs VALUES (NULL, ?, ?, ?, ?, ?)',
                dataclasses.astuple(index.ref)).lastrowid
            self._db.executemany(
                'INSERT OR IGNORE INTO blocks VALUES (?, ?, ?)',
                ((value.tobytes(), number, ordinal)
                 for ordinal, value in enumerate(index.digests)))

    def find(self, digests: list[bytes]) -> dict[bytes, Place]:
        """The places of those of `digests` that are known."""
        found: dict[bytes, Place] = {}
        for start in range(0, len(digests), _BATCH):
            part = digests[start:start + _BATCH]
            marks = ','.join('?' * len(part))
            for table in ('fresh', 'blocks'):
                rows = self._db.execute(
                    f'SELECT digest, pack, ordinal FROM {table} '  # noqa: S608
                    f'WHERE digest IN ({marks})', part)
                found.update((row[0], (row[1], row[2])) for row in rows)
        return found

    def remember(self, rows: list[tuple[bytes, int, int]]) -> None:
        """Note blocks of the pack being written, until :meth:`forget`."""
        self._db.executemany('INSERT OR IGNORE INTO fresh VALUES (?, ?, ?)',
                             rows)

    def forget(self) -> None:
        """Drop what :meth:`remember` noted."""
        self._db.execute('DELETE FROM fresh')
        self._db.commit()


def _free(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A file that no other publisher has open, and the lock on it."""
    for number in itertools.count():
        name = path.with_name(f'{path.name}.{number}' if number
                              else path.name)
        fd = os.open(f'{name}.lock', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                     0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return name, fd
    raise AssertionError
