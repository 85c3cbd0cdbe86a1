# SPDX-License-Identifier: Apache-2.0
"""The index of known blocks. How publishers use it: test_publish."""

import hashlib

import pytest
from disks import BLOCK, make_pack

from fastboot_common import dedup, pack


@pytest.fixture
def index(tmp_path):
    made = dedup.DedupIndex(tmp_path / 'cache' / 'dedup.sqlite')
    yield made
    made.close()


def digest_of(number):
    return hashlib.sha256(chunk(number)).digest()


def chunk(number):
    return b'%8d' % number * (BLOCK // 8)


def add(index, room, *numbers):
    ref, data = make_pack(room, [chunk(number) for number in numbers])
    index.add(pack.PackIndex.load(
        ref, lambda offset, length: data[offset:offset + length], BLOCK))
    return ref


def test_packs_come_and_go(index, tmp_path):
    refs = [add(index, tmp_path, number, 100 + number)
            for number in range(6)]
    digests = [ref.digest for ref in refs]
    numbers = index.packs()
    assert {index.refs()[numbers[ref.digest]] for ref in refs} == set(refs)
    assert index.keep({*digests, 'new'}) == {'new'}
    statements = []
    index._db.set_trace_callback(statements.append)
    assert index.keep(set(digests[3:])) == set()
    # Each goes through the whole table.
    assert sum('FROM blocks' in one for one in statements) == 1
    assert index.packs() == {
        digest: numbers[digest] for digest in digests[3:]}
    found = index.find([digest_of(number) for number in range(110)])
    assert found == {
        digest_of(base + at): (numbers[digests[at]], ordinal)
        for at in (3, 4, 5) for ordinal, base in enumerate((0, 100))}
    add(index, tmp_path, 0)
    assert len(index.find([digest_of(0)])) == 1
    del statements[:]
    index.keep(index.packs().keys())
    assert not any('FROM blocks' in one for one in statements)
