# SPDX-License-Identifier: Apache-2.0
"""Headers of slots."""

import pytest
from hostile import survives
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import exception, qcow2

HEADERS = st.builds(
    qcow2.Header, st.integers(0, 2 ** 62), st.integers(12, 16),
    st.integers(0, 2 ** 62), st.integers(0, 2 ** 32 - 1),
    st.integers(0, 2 ** 62),
    st.none() | st.text('abcdefgh/:?=.', min_size=1, max_size=300))


@given(HEADERS)
def test_round_trip(header):
    data = header.pack()
    assert len(data) == qcow2.HEADER_LIMIT
    assert qcow2.Header.unpack(data) == header


@given(st.text(min_size=1).map(lambda text: text * 400))
def test_backing_strings_that_do_not_fit(text):
    with pytest.raises(exception.Invalid):
        qcow2.Header(0, 16, 0, 0, 0, text).pack()


def test_headers_that_someone_made_up():
    header = qcow2.Header(1 << 30, 14, 1 << 36, 32, 1 << 36, 'nbd:x')
    for _, found in survives(
            qcow2.Header.unpack, header.pack(), count=2000,
            allowed=(exception.Corrupt, exception.NotFound)):
        assert 12 <= found.cluster_bits <= 16
        assert found.backing is None or len(found.backing) <= 512


def test_an_empty_slot():
    with pytest.raises(exception.NotFound):
        qcow2.Header.unpack(bytes(512))


@given(st.integers(0, 1 << 45), st.sampled_from([12, 13, 14, 15, 16]))
def test_l1_entries(size, bits):
    covered = 1 << bits << (bits - 3)
    count = qcow2.l1_entries(size, 1 << bits)
    assert (count - 1) * covered < size <= count * covered or not size
    assert not count or size


@pytest.mark.parametrize('size, bits, fits', [
    (0, 12, True), (512, 12, True), (511, 12, False), (-512, 12, False),
    (8 << 40, 12, True), ((8 << 40) + 512, 12, False),
    (128 << 40, 14, True), (1 << 62, 16, False)])
def test_what_fits(size, bits, fits):
    assert qcow2.fits(size, 1 << bits) == fits
