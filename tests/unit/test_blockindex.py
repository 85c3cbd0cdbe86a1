# SPDX-License-Identifier: Apache-2.0
"""The index of a volume's blocks: what SQLite keeps, and we do not take."""

import contextlib
import os
import pathlib
import sqlite3

import numpy as np
import pytest

from fastboot_common import blockindex

DIGEST = b'd' * 32


@pytest.fixture
def index(tmp_path):
    with contextlib.closing(blockindex.BlockIndex(
            tmp_path / 'index.sqlite')) as found:
        found.add([(DIGEST, 4096)], 8192)
        yield found


def test_what_was_added_is_found(index):
    assert index.end == 8192
    assert index.find([DIGEST, b'x' * 32]) == {DIGEST: 4096}
    assert not index.busy


@pytest.mark.parametrize('value', ['x', '4096', None, b'4', 1.5, -4096])
def test_an_end_that_is_no_offset(index, value):
    index._db.execute("UPDATE meta SET value = ? WHERE key = 'end'",
                      (value,))
    with pytest.raises(sqlite3.DatabaseError):
        assert index.end


@pytest.mark.parametrize('value', [
    "'x'", "x'34'", '1.5', '-4096', "CAST(x'ff' AS TEXT)"])
def test_a_place_that_is_no_offset(index, value):
    with index._db:
        index._db.execute(f'UPDATE blocks SET offset = {value}')
    for use in (lambda: index.find([DIGEST]),
                lambda: index.keep(np.array([4096]))):
        with pytest.raises(sqlite3.DatabaseError,
                           match='not an offset') as caught:
            use()
        assert not isinstance(caught.value, sqlite3.OperationalError)


def test_a_damaged_file_is_not_kept_open(tmp_path):
    path = tmp_path / 'index.sqlite'
    blockindex.BlockIndex(path).close()
    data = bytearray(path.read_bytes())
    data[100:] = b'\xa5' * (len(data) - 100)
    path.write_bytes(data)
    with pytest.raises(sqlite3.DatabaseError):
        blockindex.BlockIndex(path)
    assert str(path) not in [
        os.path.realpath(link) for link in
        pathlib.Path('/proc/self/fd').iterdir()]


def test_damaged_names(tmp_path):
    """SQLite's own error is no text then."""
    path = tmp_path / 'index.sqlite'
    blockindex.BlockIndex(path).close()
    data = path.read_bytes()
    assert data.count(b'CREATE TABLE meta') == 1
    path.write_bytes(data.replace(b'CREATE TABLE meta',
                                  b'CREATE TAB\xec\xec meta'))
    with pytest.raises(sqlite3.DatabaseError):
        blockindex.BlockIndex(path)


def test_a_damaged_length(tmp_path):
    """Python says that there is no memory; there is."""
    path = tmp_path / 'index.sqlite'
    made = blockindex.BlockIndex(path)
    made._db.executescript(
        'PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM')
    made.close()
    data = bytearray(path.read_bytes())
    row = data.index(b'tablemetameta')
    data[row - 9:row] = b'\xff' * 9
    path.write_bytes(data)
    with pytest.raises(sqlite3.DatabaseError) as caught:
        blockindex.BlockIndex(path)
    assert isinstance(caught.value.__cause__, MemoryError)
