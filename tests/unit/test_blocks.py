# SPDX-License-Identifier: Apache-2.0
"""Blocks: zeros, digests, runs, and files that end early."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import blocks, exception

NUMBERS = st.lists(st.integers(0, 2 ** 40))


@given(st.lists(st.sampled_from(
    [bytes(4096), b'\1' + bytes(4095), bytes(4095) + b'\1', b'\xff' * 4096])))
def test_nonzero_and_digests(parts):
    data = b''.join(parts)
    which = blocks.nonzero(data, 4096)
    assert which.tolist() == [part != bytes(4096) for part in parts]
    assert blocks.digests(data, 4096, which) == [
        hashlib.sha256(part).digest() for part in parts if any(part)]


@given(st.integers(0, 4095))
def test_one_byte_anywhere_is_no_zero(at):
    data = bytearray(8192)
    data[4096 + at] = 1
    assert blocks.nonzero(data, 4096).tolist() == [False, True]


@given(NUMBERS)
def test_runs_expand_to_the_same(numbers):
    found = blocks.runs(np.array(numbers, np.int64))
    assert [first + inner for first, count in found
            for inner in range(count)] == numbers
    assert all(count > 0 for _, count in found)
    for (first, count), (after, _) in zip(found, found[1:], strict=False):
        assert first + count != after


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_reading_behind_the_end_gives_zeros(data, length, offset):
    fd = os.memfd_create('blocks')
    try:
        blocks.write_exactly(fd, data, 0)
        wanted = data[offset:offset + length].ljust(length, b'\0')
        assert blocks.read_exactly(fd, length, offset) == wanted
    finally:
        os.close(fd)


@pytest.mark.parametrize('size', [0, 1, -4096, 2048, 4097, 131072, '4096'])
def test_block_sizes_that_no_repository_has(size):
    with pytest.raises(exception.Invalid):
        blocks.validate_block_size(size)


def test_a_full_device():
    with open('/dev/full', 'wb', buffering=0) as file, \
            pytest.raises(exception.NoSpace):
        blocks.write_exactly(file.fileno(), b'x', 0)
