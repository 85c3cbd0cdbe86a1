# SPDX-License-Identifier: Apache-2.0
"""Slots: their tables against a dictionary, and damaged ones."""

import os
import random

import numpy as np
import pytest
from hostile import bounded, survives
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import exception, files, qcow2, slot

SIZE = 1 << 40


def make(fd, serial, block_count, data, cluster=4096):
    """A slot whose blocks `data` have data that is not here."""
    start = serial * slot.SLOT
    os.ftruncate(fd, SIZE)
    zeros = np.full(cluster // 8, qcow2.ZERO, '>u8').tobytes()
    os.pwrite(fd, zeros, slot.ZERO_TABLE)
    count = qcow2.l1_entries(block_count * cluster, cluster)
    l1 = np.full(count, slot.ZERO_TABLE - start, np.uint64)
    where = slot.DATA
    if data:
        which, tables = slot.table_array(np.array(sorted(data)),
                                         cluster // 8)
        os.pwrite(fd, tables.tobytes(), where)
        l1[which] = where - start + np.arange(len(which)) * cluster
        where += tables.nbytes
    os.pwrite(fd, (l1 | np.uint64(qcow2.COPIED)).astype('>u8').tobytes(),
              where)
    header = qcow2.Header(
        block_count * cluster, cluster.bit_length() - 1, where - start,
        count, slot.REFCOUNTS - start, 'nbd:x')
    os.pwrite(fd, header.pack(), start)
    return slot.Slot(fd, serial)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, (1 << 20) - 1), st.data())
def test_against_a_dictionary(count, serial, data):
    rng = random.Random(data.draw(st.integers(0, 99)))
    chosen = {rng.randrange(count) for _ in range(rng.randrange(40))}
    fd = os.memfd_create('slot')
    try:
        target = make(fd, serial, count, chosen)
        model = dict.fromkeys(chosen)
        for _ in range(3):
            new = sorted(number for number in chosen if rng.random() < .4)
            places = [slot.DATA + rng.randrange(1 << 20) * 4096
                      for _ in new]
            target.set(np.array(new, np.int64), np.array(places, np.int64))
            model.update(zip(new, places, strict=True))
            for one in (target, slot.Slot(fd, serial)):
                compare(one, count, model)
    finally:
        os.close(fd)


def compare(target, count, model):
    numbers = np.arange(count)
    entries = target.entries(numbers)
    for number, entry in zip(numbers.tolist(), entries.tolist(),
                             strict=True):
        if number not in model:
            assert entry == qcow2.ZERO
        elif model[number] is None:
            assert entry == 0
        else:
            assert entry == qcow2.COPIED | (model[number] - target.start)
    here = [place for place in model.values() if place]
    assert sorted(target.clusters().tolist()) == sorted(here)
    assert target.missing() == len(model) - len(here)
    assert target.present() == len(here)
    assert target.block_count == count


def test_header_and_l1_that_someone_made_up():
    fd = os.memfd_create('slot')
    try:
        target = make(fd, 5, 3000, {1, 700, 2999})
        header = os.pread(fd, 512, target.start)

        def parse(data):
            os.pwrite(fd, data[:512].ljust(512, b'\0'), target.start)
            found = slot.Slot(fd, 5)
            found.missing(), found.clusters()
            return found

        survives(parse, header, count=1500,
                 allowed=(exception.Corrupt, exception.NotFound))
        os.pwrite(fd, header, target.start)
        place, length = slot.Slot(fd, 5).l1_place
        l1 = os.pread(fd, length, place)

        def parse_l1(data):
            os.pwrite(fd, data[:length], place)
            found = slot.Slot(fd, 5)
            return found.missing(), found.clusters()

        survives(parse_l1, l1, count=500)
    finally:
        os.close(fd)


@pytest.mark.parametrize('size', [1 << 62, (1 << 64) - 512, 8 << 41])
def test_a_header_of_an_impossible_disk(size):
    fd = os.memfd_create('slot')
    try:
        target = make(fd, 1, 10, {1})
        header = qcow2.Header(
            size, 12, target.header.l1_offset,
            min(qcow2.l1_entries(size, 4096), (1 << 32) - 1), 0)
        os.pwrite(fd, header.pack(), target.start)
        with bounded(), pytest.raises(exception.Corrupt):
            slot.Slot(fd, 1)
    finally:
        os.close(fd)


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_table_array(numbers):
    which, tables = slot.table_array(np.array(sorted(numbers)), 512)
    assert which.tolist() == sorted({number // 512 for number in numbers})
    for row, table in zip(which.tolist(), tables, strict=True):
        assert table.tolist() == [
            0 if row * 512 + inner in numbers else 1 for inner in range(512)]


@pytest.mark.parametrize('offset', [0, 8, 4096 - 8, 65536 + 16])
def test_stored_words_are_where_they_belong(tmp_path, offset):
    words = bytes(range(1, 25))
    path = tmp_path / 'file'
    path.write_bytes(b'\xff' * 70000)
    with path.open('r+b') as file:
        files.store_words(file.fileno(), offset, words)
    data = path.read_bytes()
    assert data[offset:offset + 24] == words
    assert data.count(0xff) == 70000 - 24
