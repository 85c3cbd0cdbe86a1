# SPDX-License-Identifier: Apache-2.0
"""Packs: round trips, and packs that someone damaged."""

import concurrent.futures
import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import zstandard
from disks import make_pack
from hostile import bounded, survives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastboot_common import blocks, exception, pack


def reader(data):
    def read(offset, length):
        if offset < 0 or offset + length > len(data):
            raise exception.Corrupt('ends before')
        return data[offset:offset + length]
    return read


def chunk(number, size):
    return struct.pack('<Q', number) * (size // 8)


def unpack(data, digest=None):
    """All blocks of a pack, the way a reader goes."""
    ref, size = pack.read_ref(digest or 'ab' * 32, len(data), reader(data))
    index = pack.PackIndex.load(ref, reader(data), size)
    found = []
    for frame in range(len(index.frames)):
        plain = index.decode(frame, reader(data)(*index.extent(frame)))
        found += [plain[at:at + size] for at in range(0, len(plain), size)]
    assert [hashlib.sha256(one).digest() for one in found] == [
        one.tobytes() for one in index.digests]
    return found


@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(blocks.BLOCK_SIZES), st.integers(1, 300), st.data())
def test_round_trip(tmp_path, size, count, data):
    chunks = [chunk(number + 1, size) for number in range(count)]
    ref, raw = make_pack(tmp_path, chunks, size)
    assert hashlib.sha256(raw).hexdigest() == ref.digest
    assert len(raw) == ref.size
    assert unpack(raw, ref.digest) == chunks
    found, block_size = pack.read_ref(ref.digest, len(raw), reader(raw))
    assert (found, block_size) == (ref, size)
    index = pack.PackIndex.load(ref, reader(raw), size)
    ordinal = data.draw(st.integers(0, count - 1))
    frame = int(index.frame_of(np.array([ordinal]))[0])
    assert index.first[frame] <= ordinal < index.first[frame + 1]
    assert index.intact(frame, raw[slice(
        index.extent(frame)[0], sum(index.extent(frame)))])


def test_any_damage_is_seen(tmp_path):
    ref, raw = make_pack(tmp_path, [chunk(n + 1, 4096) for n in range(300)])
    whole = unpack(raw, ref.digest)

    def parse(data):
        index = pack.PackIndex.load(ref, reader(data), 4096)
        return [index.decode(frame, reader(data)(*index.extent(frame)))
                for frame in range(len(index.frames))]

    for variant, found in survives(parse, raw):
        # Only header, trailer and what follows may differ.
        assert b''.join(found) == b''.join(whole)
        assert len(variant) >= ref.index_offset


def test_packs_that_someone_made_up(tmp_path):
    """Nothing vouches for these: still no other error, no wrong block."""
    _ref, raw = make_pack(tmp_path, [chunk(n + 1, 4096) for n in range(9)])
    assert survives(unpack, raw, count=1500) is not None


def test_unknown_version(tmp_path):
    _ref, raw = make_pack(tmp_path, [chunk(1, 4096)])
    newer = raw[:8] + struct.pack('<I', 2) + raw[12:]
    with pytest.raises(exception.UnknownVersion):
        unpack(newer)


def forged(claimed):
    """A zstd frame that claims a length, and has none of it."""
    return (b'\x28\xb5\x2f\xfd\xe0' + struct.pack('<Q', claimed)
            + b'\x01\0\0')


@pytest.mark.parametrize('data', [
    forged(1 << 40), forged(1 << 62), forged(4096), b'', b'x' * 20,
    zstandard.ZstdCompressor().compress(bytes(4095)),
    zstandard.ZstdCompressor().compress(bytes(4097)),
    zstandard.ZstdCompressor(write_content_size=False).compress(
        bytes(1 << 20)),
])
def test_a_frame_of_another_length(data):
    with bounded(), pytest.raises(exception.Corrupt):
        pack.decompress(data, 4096, 'frame')


def test_a_frame_without_a_length():
    data = zstandard.ZstdCompressor(write_content_size=False).compress(
        b'x' * 4096)
    assert pack.decompress(data, 4096, 'frame') == b'x' * 4096


def test_references_without_sense(tmp_path):
    ref, raw = make_pack(tmp_path, [chunk(1, 4096)])
    for change in ({'index_offset': ref.size}, {'index_offset': 0},
                   {'blocks': 2}, {'blocks': 0}, {'blocks': 1 << 31},
                   {'size': ref.size + 1}, {'size': 1 << 60}):
        wrong = dataclasses.replace(ref, **change)
        with bounded(), pytest.raises(exception.Corrupt):
            pack.PackIndex.load(wrong, reader(raw), 4096)


def test_a_full_device_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pack.PackWriter(tmp_path, 4096, 1, pool)
        writer.add(bytes(32), memoryview(chunk(1, 4096)))
        monkeypatch.setattr('os.fsync', full)
        with pytest.raises(exception.NoSpace):
            writer.finish()
        writer.abandon()
    assert not list(tmp_path.iterdir())
