# SPDX-License-Identifier: Apache-2.0
"""Manifests: round trips, and manifests that someone made up."""

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest
from hostile import bounded, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import forged

from fastboot_common import exception, extents, manifest, pack, trace

REF = pack.PackRef('ab' * 32, 1 << 20, 600, 900_000, 'cd' * 32)


def example(count=500, boot=(7, 8, 9, 3), block_size=4096):
    numbers = np.arange(0, count, 3)
    reads = np.zeros(2, trace.DTYPE)
    reads['offset'], reads['length'] = [4096, 0], [512, 4096]
    reads['time'] = [0, 9]
    return manifest.Manifest(
        image_id='image', name='n\u00e4me \U0001f600',
        virtual_size=count * block_size - 512, block_size=block_size,
        root='12' * 32, packs=[REF],
        extents=extents.merge(numbers, np.zeros_like(numbers),
                              np.arange(len(numbers))[::-1]),
        boot=np.array(boot, np.int64), trace=reads,
        os_hash={'sha512': 'ff'}, source={'format': 'raw', 'size': 5},
        capture={'state': 'booted', 'reason': None})


def unpack(data):
    return manifest.Manifest.unpack(data, hashlib.sha256(data).hexdigest())


def same(one, two):
    for field in dataclasses.fields(manifest.Manifest):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, np.ndarray):
            assert left.tolist() == right.tolist()
        else:
            assert left == right


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 600), st.sets(st.integers(0, 599)).flatmap(
    lambda found: st.permutations(sorted(found))), st.text())
def test_round_trip(count, boot, name):
    made = example(count, [one for one in boot if one < count])
    made.name = name
    if made.trace['offset'].max() + 4096 > made.virtual_size:
        made.trace = trace.empty()
    same(unpack(made.pack()), made)


@pytest.mark.parametrize(('name', 'limit', 'words'), [
    ('LIMIT', 800, 'manifest'), ('_RECORDS_LIMIT', 3000, 'extents')])
def test_what_nobody_could_read_is_not_made(monkeypatch, name, limit, words):
    made = example()
    data = made.pack()
    monkeypatch.setattr(manifest, name, limit)
    with pytest.raises(exception.ImageRejected, match=words):
        made.pack()
    monkeypatch.setattr(
        manifest, name, len(data) if name == 'LIMIT' else made.extents.nbytes)
    assert made.pack() == data
    same(unpack(data), made)


def test_empty_image():
    made = example()
    made.virtual_size, made.packs = 0, []
    made.extents, made.boot = np.empty(0, extents.DTYPE), np.empty(0, int)
    made.trace = trace.empty()
    same(unpack(made.pack()), made)


def test_any_damage_is_seen():
    data = example().pack()
    digest = hashlib.sha256(data).hexdigest()
    assert not survives(
        lambda other: manifest.Manifest.unpack(other, digest), data)


def consistent(found):
    extents.validate(found.extents, found.block_count,
                     [ref.blocks for ref in found.packs])
    assert ((found.boot >= 0) & (found.boot < found.block_count)).all()


def test_manifests_that_someone_made_up():
    for _, found in survives(unpack, example().pack(), count=3000):
        consistent(found)


def rewritten(change, body=None):
    """An example whose header was changed, with a right digest."""
    data = example().pack()
    magic, version, length = struct.unpack_from('<8sII', data)
    header = json.loads(data[16:16 + length])
    change(header)
    text = json.dumps(header).encode()
    rest = data[16 + length:] if body is None else body
    return struct.pack('<8sII', magic, version, len(text)) + text + rest


def of(*keys):
    def setter(value):
        def change(header):
            for key in keys[:-1]:
                header = header[key]
            header[keys[-1]] = value
        return change
    return setter


WORTHLESS = [None, -1, 1 << 70, 1.5, float('inf'), float('nan'), 'x', [], {},
             True, 0, [[]], '../../etc']


@pytest.mark.parametrize('place', [
    of('virtual_size'), of('block_size'), of('packs'), of('packs', 0),
    of('packs', 0, 'digest'), of('packs', 0, 'size'),
    of('packs', 0, 'blocks'), of('packs', 0, 'index_offset'),
    of('packs', 0, 'index_digest'), of('sections'), of('os_hash'),
    of('sections', 'extents'), of('sections', 'boot', 'offset'),
    of('sections', 'boot', 'length'), of('sections', 'boot', 'records'),
    of('sections', 'extents', 'raw_length'), of('capture'), of('source'),
])
def test_worthless_members(place):
    original = rewritten(lambda header: None)
    same(unpack(original), example())
    for value in WORTHLESS:
        data = rewritten(place(value))
        with bounded():
            try:
                consistent(unpack(data))
            except exception.Corrupt:
                continue
        # Only what may be empty can be.
        assert value in ([], {}, [[]])


@pytest.mark.parametrize('place', [of('os_hash'), of('source'),
                                   of('capture')])
@pytest.mark.parametrize('value', [[], [[None, 1], ['a', 2]]])
def test_pairs_are_no_members(place, value):
    """They could not be written again."""
    with pytest.raises(exception.Corrupt):
        unpack(rewritten(place(value)))


def test_a_pack_listed_twice():
    def twice(header):
        header['packs'] *= 2
    with pytest.raises(exception.Corrupt):
        unpack(rewritten(twice))


def test_sections_that_claim_to_be_huge():
    for name, size in (('extents', 20), ('boot', 12), ('trace', 24)):
        def change(header, name=name, size=size):
            header['sections'][name] = {
                'offset': 0, 'length': 16, 'records': 1,
                'raw_length': size}
        with bounded(), pytest.raises(exception.Corrupt):
            unpack(rewritten(change, forged(1 << 40)))


def test_boot_sets_that_expand_to_terabytes():
    made = example()
    made.virtual_size = 1 << 40
    runs = np.array([(0, (1 << 28) - 1)], manifest.BOOT_DTYPE).tobytes()
    import zstandard
    body = zstandard.ZstdCompressor().compress(runs)
    empty = zstandard.ZstdCompressor().compress(b'')

    def change(header):
        header['virtual_size'] = 1 << 40
        header['sections'] = {
            'boot': {'offset': 0, 'length': len(body), 'records': 1,
                     'raw_length': 12},
            'extents': {'offset': len(body), 'length': len(empty),
                        'records': 0, 'raw_length': 0},
            'trace': {'offset': len(body), 'length': len(empty),
                      'records': 0, 'raw_length': 0}}
    with bounded(), pytest.raises(exception.Corrupt):
        unpack(rewritten(change, body + empty))


def test_the_largest_boot_set():
    made = example()
    made.virtual_size = 1 << 40
    made.boot = np.arange(manifest.BOOT_LIMIT)
    with bounded():
        packed = made.pack()
        assert len(unpack(packed).boot) == manifest.BOOT_LIMIT
    made.boot = np.arange(manifest.BOOT_LIMIT + 1)
    with bounded(), pytest.raises(exception.Corrupt, match='boot set'):
        unpack(made.pack())


def test_unknown_version():
    data = example().pack()
    with pytest.raises(exception.UnknownVersion):
        unpack(data[:8] + struct.pack('<I', 2) + data[12:])
