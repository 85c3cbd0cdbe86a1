# SPDX-License-Identifier: Apache-2.0
"""The index of a volume's blocks: what SQLite keeps, and we do not take."""

import contextlib
import sqlite3

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


@pytest.mark.parametrize('value', ['x', b'4', 1.5, -4096])
def test_a_place_that_is_no_offset(index, value):
    index._db.execute('UPDATE blocks SET offset = ?', (value,))
    with pytest.raises(sqlite3.DatabaseError):
        index.find([DIGEST])
