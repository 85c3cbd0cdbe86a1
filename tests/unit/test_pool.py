# SPDX-License-Identifier: Apache-2.0
"""Lanes: one taker each, whoever comes, and whatever ends meanwhile."""

import concurrent.futures
import os
import pathlib
import threading
import uuid

import microvms
import pytest

from fastboot_common import exception
from fastboot_common.microvm import savefile
from fastboot_nova.microvm import definition, lane, pool

ONE = str(uuid.UUID('aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee'))
TWO = str(uuid.UUID('bbbbbbbb-bbbb-4ccc-8ddd-eeeeeeeeeeee'))


def xml(known=ONE, **changes):
    return definition.Server(
        'name', known, pathlib.Path('/disk'), pathlib.Path('/console'),
        **changes).xml()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def directory(tmp_path):
    microvms.make(tmp_path / 'artifact', b'm' * 70_000)
    return tmp_path / 'artifact'


@pytest.fixture
def lanes(tmp_path, directory, clock):
    found = pool.Pool(tmp_path / 'lanes', 2, clock=clock)
    found.offer('one', directory)
    found.fill(lambda: True)
    return found


def files(tmp_path):
    return sorted((tmp_path / 'lanes').iterdir())


def test_a_lane_serves_again(lanes, tmp_path, directory):
    assert lanes.counts('one') == (2, 0)
    for known in (ONE, TWO, ONE):
        loan = lanes.take('one', known)
        assert loan.directory == directory
        assert lanes.counts('one') == (2, 1)
        lanes.dress(loan.token, xml(known))
        with loan.path.open('rb') as file:
            head = savefile.SaveFile.read(file.fileno())
            assert known in head.xml
            data = file.read()
        assert data.count(uuid.UUID(known).bytes_le) == 1
        assert microvms.BAKED.bytes_le not in data
        assert lanes.give_back(loan.token, True) == 'one'
    assert len(files(tmp_path)) == 2
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {
        0o640}


def test_one_that_failed_does_not(lanes, tmp_path):
    loan = lanes.take('one', ONE)
    lanes.give_back(loan.token, False)
    assert not loan.path.exists()
    assert lanes.counts('one') == (1, 0)
    lanes.fill(lambda: True)
    assert lanes.counts('one') == (2, 0)
    assert loan.path not in files(tmp_path)


def test_more_takers_than_lanes(lanes):
    held = [lanes.take('one', ONE) for _ in range(2)]
    with pytest.raises(exception.Busy):
        lanes.take('one', ONE)
    lanes.fill(lambda: True)
    held.append(lanes.take('one', ONE))
    assert len({loan.path for loan in held}) == 3
    with pytest.raises(exception.NotFound):
        lanes.take('two', ONE)


def test_lanes_have_a_limit(lanes):
    for _ in range(16):
        lanes.take('one', ONE)
        lanes.fill(lambda: True)
    with pytest.raises(exception.Busy):
        lanes.take('one', ONE)


def test_what_is_too_much_goes(lanes, clock):
    held = [lanes.take('one', ONE) for _ in range(2)]
    lanes.fill(lambda: True)
    for loan in held:
        lanes.give_back(loan.token, True)
    assert lanes.expire() == []
    assert lanes.counts('one') == (3, 0)
    clock.now += 61
    lanes.expire()
    assert lanes.counts('one') == (2, 0)


def test_never_given_back(lanes, clock, tmp_path):
    loan = lanes.take('one', ONE)
    clock.now += 299
    assert lanes.expire() == []
    clock.now += 2
    assert lanes.expire() == [('one', ONE)]
    assert not loan.path.exists()
    with pytest.raises(exception.Invalid):
        lanes.give_back(loan.token, True)
    with pytest.raises(exception.Invalid):
        lanes.dress(loan.token, xml())
    assert lanes.counts('one') == (1, 0)


@pytest.mark.parametrize('text, words', [
    (xml(TWO), 'taken for'), (xml(virt_type='kvm'), 'with qemu'),
    (xml(memory=64), 'MiB'),
    (xml(vcpus=99), 'processors'), ('', 'XML'), ('<domain/>', 'memory'),
    ('<!DOCTYPE x><domain/>', 'XML'), ('\ud800', 'XML'),
    ('<domain>' * 100, 'XML')])
def test_definitions_that_do_not_fit(lanes, text, words):
    loan = lanes.take('one', ONE)
    before = loan.path.read_bytes()
    with pytest.raises(exception.Invalid, match=words):
        lanes.dress(loan.token, text)
    assert loan.path.read_bytes() == before
    # Nothing was written: it serves again.
    lanes.give_back(loan.token, True)
    assert lanes.counts('one') == (2, 0)


def test_a_definition_that_is_too_long(lanes):
    loan = lanes.take('one', ONE)
    before = loan.path.read_bytes()
    with pytest.raises(exception.Invalid, match='do not fit'):
        lanes.dress(loan.token, xml().replace(
            '<memory', f'<title>{"x" * 99_000}</title><memory'))
    assert loan.path.read_bytes() == before
    lanes.give_back(loan.token, True)
    assert loan.path.exists()


def test_a_lane_that_cannot_be_dressed_goes(lanes):
    loan = lanes.take('one', ONE)
    data = loan.path.read_bytes()
    loan.path.write_bytes(data[:66_000] + b'?' * (len(data) - 66_000))
    with pytest.raises(exception.Unavailable):
        lanes.dress(loan.token, xml())
    lanes.give_back(loan.token, True)
    assert not loan.path.exists()


def test_another_version(lanes, tmp_path, directory):
    held = lanes.take('one', ONE)
    microvms.make(tmp_path / 'new')
    lanes.offer('one', tmp_path / 'new')
    lanes.fill(lambda: True)
    assert lanes.take('one', ONE).directory == tmp_path / 'new'
    assert held.path.exists()
    lanes.give_back(held.token, True)
    assert not held.path.exists(), 'it is of the old one'


def test_withdrawn(lanes, tmp_path):
    loan = lanes.take('one', ONE)
    assert not lanes.withdraw('one')
    assert lanes.counts('one') == (2, 1)
    lanes.give_back(loan.token, True)
    assert lanes.withdraw('one')
    assert not files(tmp_path)
    assert lanes.withdraw('one')
    with pytest.raises(exception.NotFound):
        lanes.take('one', ONE)


def test_withdrawn_by_force(lanes, tmp_path):
    loan = lanes.take('one', ONE)
    assert lanes.withdraw('one', force=True)
    assert files(tmp_path) == [loan.path]
    lanes.dress(loan.token, xml())
    lanes.give_back(loan.token, True)
    assert not files(tmp_path)


def test_withdrawn_while_a_lane_is_made(tmp_path, directory, monkeypatch):
    lanes = pool.Pool(tmp_path / 'lanes', 1)
    lanes.offer('one', directory)
    create = lane.Lane.create

    def slow(*args):
        made = create(*args)
        assert lanes.withdraw('one')
        return made

    monkeypatch.setattr(lane.Lane, 'create', slow)
    lanes.fill(lambda: True)
    assert not files(tmp_path)


def test_a_damaged_artifact(tmp_path, directory):
    lanes = pool.Pool(tmp_path / 'lanes', 1)
    lanes.offer('one', directory)
    with (directory / 'memory').open('r+b') as file:
        file.seek(80_000)
        file.write(b'!')
    with pytest.raises(pool.Damaged) as caught:
        lanes.fill(lambda: True)
    assert caught.value.name == 'one'
    assert not files(tmp_path)
    lanes.withdraw('one')
    (directory / 'microvm.json').unlink()
    lanes.offer('one', directory)
    with pytest.raises(pool.Damaged):
        lanes.fill(lambda: True)


def test_no_room(tmp_path, directory, monkeypatch):
    lanes = pool.Pool(tmp_path / 'lanes', 1)
    lanes.offer('one', directory)

    def full(fd, *_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'pwrite', full)
        with pytest.raises(exception.NoSpace):
            lanes.fill(lambda: True)
    assert not files(tmp_path)
    lanes.fill(lambda: True)
    assert lanes.counts('one') == (1, 0)


def test_whoever_begins_removes_all(lanes, tmp_path, directory):
    held = lanes.take('one', ONE)
    lanes.dress(held.token, xml())
    with held.path.open('rb') as loading:
        again = pool.Pool(tmp_path / 'lanes', 2)
        assert not files(tmp_path)
        assert loading.read(16) == savefile.MAGIC
    with pytest.raises(exception.Invalid):
        again.give_back(held.token, True)


def test_each_has_one_before_any_has_two(tmp_path, directory):
    lanes = pool.Pool(tmp_path / 'lanes', 2)
    for name in ('a', 'b', 'c'):
        lanes.offer(name, directory)
    left = iter([True] * 3 + [False])
    lanes.fill(lambda: next(left))
    assert [lanes.counts(name)[0] for name in 'abc'] == [1, 1, 1]


def test_many_takers(lanes, tmp_path):
    """No lane has two takers, however they come."""
    owners = {}
    lock = threading.Lock()
    barrier = threading.Barrier(8)

    def taker(number):
        served = 0
        barrier.wait(20)
        while served < 15:
            known = str(uuid.uuid4())
            try:
                loan = lanes.take('one', known)
            except exception.Busy:
                lanes.fill(lambda: True)
                continue
            with lock:
                assert loan.path not in owners
                owners[loan.path] = known
            lanes.dress(loan.token, xml(known))
            with loan.path.open('rb') as file:
                assert known in savefile.SaveFile.read(file.fileno()).xml
            with lock:
                assert owners.pop(loan.path) == known
            lanes.give_back(loan.token, number % 3 > 0)
            served += 1

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for one in [threads.submit(taker, number) for number in range(8)]:
            one.result(60)
    count, taken = lanes.counts('one')
    assert taken == 0
    assert len(files(tmp_path)) == count


def test_two_give_it_back(lanes):
    loan = lanes.take('one', ONE)
    results = []

    def back():
        try:
            results.append(lanes.give_back(loan.token, True))
        except exception.Invalid:
            results.append(None)

    threads = [threading.Thread(target=back) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert sorted(results, key=str) == [None, None, None, 'one']
    assert lanes.counts('one') == (2, 0)


def test_read_ahead_has_a_budget(lanes, monkeypatch):
    read = []
    monkeypatch.setattr(os, 'posix_fadvise', lambda *args: read.append(args))
    size = lanes.held('one') // 2
    for budget, count in ((0, 0), (size, 1), (2 * size, 2)):
        read.clear()
        lanes.read_ahead(budget)
        assert len(read) == count


def test_how_it_goes(lanes, clock):
    assert lanes.fate(ONE) is pool.Fate.NONE
    loan = lanes.take('one', ONE)
    assert lanes.fate(ONE) is pool.Fate.COMING
    assert lanes.fate(TWO) is pool.Fate.NONE
    lanes.give_back(loan.token, True)
    assert lanes.fate(ONE) is pool.Fate.NONE
    lanes.give_back(lanes.take('one', ONE).token, False)
    assert lanes.fate(ONE) is pool.Fate.FAILED
    loan = lanes.take('one', ONE)
    assert lanes.fate(ONE) is pool.Fate.COMING
    lanes.give_back(loan.token, True)
    assert lanes.fate(ONE) is pool.Fate.NONE, 'another try'
    lanes.fill(lambda: True)
    lanes.give_back(lanes.take('one', TWO).token, False)
    clock.now += 61
    lanes.expire()
    assert lanes.fate(TWO) is pool.Fate.NONE
