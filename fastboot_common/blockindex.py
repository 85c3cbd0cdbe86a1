# SPDX-License-Identifier: Apache-2.0
"""Where in a volume each block lies, by digest: so that it lies there once.

A cache that can be rebuilt from tables and manifests. It names a cluster only
after its data was synced.
"""

import pathlib
import sqlite3
from typing import Final

import numpy as np
import numpy.typing as npt

from fastboot_common import files

_BATCH: Final = 256


class BlockIndex:
    """Digest → offset, and where the free space begins."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open or make it.

        :raises sqlite3.DatabaseError: the file is damaged.
        """
        files.touch(path)
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=60)
        # There is no text. What damage made one need not be UTF-8.
        self._db.text_factory = bytes
        try:
            self._prepare()
        except (UnicodeDecodeError, MemoryError) as error:
            self._db.close()
            # SQLite's words quote the damage, or it believes a length.
            raise sqlite3.DatabaseError(f'damaged: {error!r}') from error
        except BaseException:
            # Nobody else closes it, and it may hold a lock on the file.
            self._db.close()
            raise
        path.chmod(0o640)

    def _prepare(self) -> None:
        # FULL: an index that forgot a commit would give clusters out twice.
        self._db.executescript(
            'PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; '
            'PRAGMA cache_size=-4096;'
            'CREATE TABLE IF NOT EXISTS blocks (digest BLOB PRIMARY KEY, '
            'offset INTEGER NOT NULL) WITHOUT ROWID;'
            'CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value);')

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def end(self) -> int | None:
        """Offset behind the last cluster ever given out; None: unknown."""
        row = self._db.execute(
            "SELECT value FROM meta WHERE key = 'end'").fetchone()
        return _offset(row[0]) if row else None

    @property
    def busy(self) -> bool:
        """Whether an operation on the volume began and did not end."""
        row = self._db.execute(
            "SELECT value FROM meta WHERE key = 'busy'").fetchone()
        return bool(row and row[0])

    @busy.setter
    def busy(self, value: bool) -> None:
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('busy', ?)",
                (int(value),))

    def find(self, digests: list[bytes]) -> dict[bytes, int]:
        """The offsets of those of `digests` that are in the volume."""
        found: dict[bytes, int] = {}
        for start in range(0, len(digests), _BATCH):
            part = digests[start:start + _BATCH]
            marks = ','.join('?' * len(part))
            rows = self._db.execute(
                'SELECT digest, offset FROM blocks '  # noqa: S608
                f'WHERE digest IN ({marks})', part)
            found.update((digest, _offset(value)) for digest, value in rows)
        return found

    def add(self, rows: list[tuple[bytes, int]], end: int) -> None:
        """Note synced clusters, durably."""
        with self._db:
            self._db.executemany(
                'INSERT OR IGNORE INTO blocks VALUES (?, ?)', rows)
            self._db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('end', ?)", (end,))

    def keep(self, used: npt.NDArray[np.int64]) -> None:
        """Forget all clusters but those at `used` (sorted), durably.

        :raises sqlite3.DatabaseError: it has other things than clusters.
        """
        gone = []
        for digest, offset in self._db.execute(
                'SELECT digest, offset FROM blocks'):
            at = int(np.searchsorted(used, _offset(offset)))
            if at == len(used) or used[at] != offset:
                gone.append((digest,))
        with self._db:
            self._db.executemany('DELETE FROM blocks WHERE digest = ?', gone)

    def clear(self) -> None:
        """Forget everything."""
        with self._db:
            self._db.execute('DELETE FROM blocks')
            self._db.execute('DELETE FROM meta')


def _offset(value: object) -> int:
    """:raises sqlite3.DatabaseError: `value` is none; SQLite takes any."""
    if not isinstance(value, int) or value < 0:
        raise sqlite3.DatabaseError(f'not an offset: {value!r}')
    return value
