# SPDX-License-Identifier: Apache-2.0
"""Maps, against the obvious model: a dictionary of single blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import exception, extents

#: Block → (pack, ordinal), with many adjacent ones.
MAPS = st.dictionaries(
    st.integers(0, 60), st.tuples(st.integers(0, 2), st.integers(0, 60)),
    max_size=60,
) | st.builds(
    lambda first, count, ordinal: {
        first + at: (0, ordinal + at) for at in range(count)},
    st.integers(0, 50), st.integers(0, 60), st.integers(0, 9))


def build(model, order=None):
    rows = list(model.items())
    if order:
        order.shuffle(rows)
    return extents.merge(
        np.array([block for block, _ in rows], np.int64),
        np.array([pack for _, (pack, _) in rows], np.int64),
        np.array([ordinal for _, (_, ordinal) in rows], np.int64))


def as_model(found):
    numbers, packs, ordinals = extents.expand(found)
    assert len(set(numbers.tolist())) == len(numbers)
    return {number: (pack, ordinal) for number, pack, ordinal in zip(
        numbers.tolist(), packs.tolist(), ordinals.tolist(), strict=True)}


@given(MAPS, st.randoms(use_true_random=False))
def test_merge_and_expand(model, order):
    found = build(model, order)
    assert as_model(found) == model
    assert extents.total(found) == len(model)
    starts = [number for number in model
              if number - 1 not in model or model[number - 1] != (
                  model[number][0], model[number][1] - 1)]
    assert found['block'].tolist() == sorted(starts)
    extents.validate(found, 200, [200] * 3)


@given(MAPS, st.integers(1, 5))
def test_concatenate(model, count):
    parts = [build({number: place for number, place in model.items()
                    if number % count == turn}) for turn in range(count)]
    whole = extents.concatenate(parts)
    assert as_model(whole) == model
    assert whole.tolist() == build(model).tolist()


@given(MAPS, st.integers(0, 120), st.integers(0, 120))
def test_clip(model, first, count):
    part = extents.clip(build(model), first, count)
    assert as_model(part) == {
        number: place for number, place in model.items()
        if first <= number < first + count}
    assert (part['count'] > 0).all()


@given(MAPS, st.lists(st.integers(0, 130)))
def test_locate(model, numbers):
    found, packs, ordinals = extents.locate(
        build(model), np.array(numbers, np.int64))
    assert found.tolist() == [one for one in numbers if one in model]
    assert list(zip(packs.tolist(), ordinals.tolist(), strict=True)) == [
        model[one] for one in numbers if one in model]


@given(MAPS, st.integers(0, 2), st.integers(0, 70), st.integers(0, 70))
def test_within(model, pack, first, end):
    found = extents.within(build(model), pack, first, end)
    assert sorted(found.tolist()) == sorted(
        number for number, (where, ordinal) in model.items()
        if where == pack and first <= ordinal < end)


@given(MAPS, st.integers(1, 70), st.integers(0, 2 ** 40))
def test_pieces(model, limit, shift):
    far = {number + shift * (number > 30): place
           for number, place in model.items()}
    parts = list(extents.pieces(build(far), limit))
    assert all(0 < extents.total(part) <= limit for part in parts)
    joined = {}
    for part in parts:
        joined.update(as_model(part))
    assert joined == far
    assert list(joined) == sorted(joined)


@settings(max_examples=300)
@given(st.lists(st.tuples(
    st.integers(0, 2 ** 64 - 1) | st.integers(0, 40),
    st.integers(0, 2 ** 32 - 1) | st.integers(0, 9),
    st.integers(0, 3), st.integers(0, 2 ** 32 - 1) | st.integers(0, 9)),
    max_size=4))
def test_validate_takes_exactly_what_has_sense(rows):
    array = np.array(rows, extents.DTYPE)
    rooms = [5, 40, 3]
    end, sane = 0, True
    for block, count, pack, ordinal in rows:
        sane &= (count > 0 and block >= end and block + count <= 40
                 and pack < 3 and ordinal + count <= rooms[min(pack, 2)])
        end = block + count
    if sane:
        extents.validate(array, 40, rooms)
    else:
        with pytest.raises(exception.Corrupt):
            extents.validate(array, 40, rooms)
