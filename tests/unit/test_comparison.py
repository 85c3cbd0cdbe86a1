# SPDX-License-Identifier: Apache-2.0
"""Where a disk differs from an image."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import blocks, exception, manifest
from fastboot_nova import comparison

SIZE = 4096
KINDS = st.lists(st.integers(0, 3), max_size=12)


def content(kinds, tail=b''):
    """Blocks by numbers; 0: zeros."""
    return b''.join(bytes([kind]) * SIZE for kind in kinds) + tail


def raw(tmp_path, data):
    """A file with holes where there are zeros."""
    path = tmp_path / 'raw'
    with path.open('wb') as file:
        for at in range(0, len(data), SIZE):
            if any(data[at:at + SIZE]):
                file.seek(at)
                file.write(data[at:at + SIZE])
        file.truncate(len(data))
    return path


class Index:
    """Of a pack that has each kind of block once."""

    digests = np.frombuffer(b''.join(blocks.digests(
        content(range(4)), SIZE, np.ones(4, bool))), 'V32')


def image(kinds):
    """An image of such blocks."""
    rows = [(at, 1, 0, kind) for at, kind in enumerate(kinds) if kind]
    return comparison.of_image(
        manifest.Manifest(
            'i', 'i', max(len(kinds), 1) * SIZE, SIZE, '', [None],
            np.array(rows, manifest.extents.DTYPE)),
        lambda ref: Index)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    return tmp_path_factory.mktemp('differences')


@given(old=KINDS, new=KINDS, tail=st.binary(max_size=100),
       piece=st.sampled_from([1, 2, 5, 4096]).map(SIZE.__mul__))
def test_a_file(room, old, new, tail, piece):
    """What is told, put over the image, makes the file; and no more is."""
    data = content(old, tail)
    fd = comparison.open_base(raw(room, data))
    before, comparison._PIECE = comparison._PIECE, piece
    try:
        count = max(len(new), -(-len(data) // SIZE))
        found = list(comparison.find(
            comparison.of_file(fd, SIZE), image(new), count, SIZE))
    finally:
        comparison._PIECE = before
        os.close(fd)
    whole = data.ljust(count * SIZE, b'\0')
    made = bytearray(content(new).ljust(count * SIZE, b'\0'))
    for first, length in found:
        for at in range(first * SIZE, (first + length) * SIZE, SIZE):
            assert made[at:at + SIZE] != whole[at:at + SIZE]
            made[at:at + SIZE] = whole[at:at + SIZE]
    assert made == whole


@given(old=KINDS, new=KINDS)
def test_an_image(old, new):
    count = max(len(old), len(new), 1)
    found = {at for first, length in comparison.find(
        image(old), image(new), count, SIZE)
        for at in range(first, first + length)}
    assert found == {at for at in range(count) if (
        (old + [0] * count)[at] != (new + [0] * count)[at])}


def test_digests_of_zeros_at_their_ends():
    """Numpy's strings would take them for shorter ones."""
    one, other = np.zeros((1, 32), np.uint8), np.zeros((1, 32), np.uint8)
    other[0, 31] = 1
    assert list(comparison.find(lambda *_: one, lambda *_: other, 1,
                                SIZE)) == [(0, 1)]


def test_what_is_no_base(tmp_path):
    with pytest.raises(exception.NotFound):
        comparison.open_base(tmp_path / 'nothing')
    (tmp_path / 'link').symlink_to('/etc/passwd')
    with pytest.raises(exception.NotFound):
        comparison.open_base(tmp_path / 'link')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'secret').touch(0o640)
    for path in tmp_path, tmp_path / 'pipe', tmp_path / 'secret':
        with pytest.raises(exception.Invalid):
            comparison.open_base(path)
