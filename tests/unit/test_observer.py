# SPDX-License-Identifier: Apache-2.0
"""Windows in which an agent records what guests miss."""

import threading
import types

import pytest

from fastboot_common import observation, trace
from fastboot_nova.agent import observer

SIZE = 1 << 40


class Host:
    """A host that has a slot of every image."""

    def find(self, image_id):
        return None, types.SimpleNamespace(serial=7)


@pytest.fixture
def clock(monkeypatch):
    found = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(observer.time, 'monotonic', lambda: found.now)
    return found


def make(seconds=300):
    sent = []
    return observer.Observer('h1', Host(), seconds, sent.append), sent


def test_a_window(clock):
    one, sent = make()
    one.note('a', 0, 1 << 20)
    assert not one.is_open('a')
    one.open('a')
    clock.now += 1.5
    one.note('a', 5 << 20, 1 << 20)
    clock.now += 1
    one.note('a', 0, 4096)
    one.note('b', 0, 1 << 20)
    # Another guest makes it no longer.
    clock.now += 297
    one.open('a')
    one.look()
    assert sent == []
    assert one.is_open('a')
    clock.now += 1
    one.look()
    assert not one.is_open('a')
    [found] = sent
    assert (found['host'], found['image'], found['serial']) == ('h1', 'a', 7)
    assert observation.decode(found['reads'], SIZE).tolist() == [
        (1_500_000, 5 << 20, 1 << 20, 0), (2_500_000, 0, 4096, 0)]


def test_one_an_hour(clock):
    one, sent = make()
    for _ in range(8):
        one.open('a')
        one.note('a', 0, 1 << 20)
        clock.now += 600
        one.look()
    assert len(sent) == 2


def test_little_is_not_told(clock):
    one, sent = make()
    one.open('a')
    one.note('a', 0, observation.LEAST - 1)
    clock.now += 300
    one.look()
    assert sent == []
    # The next guest is observed all the same.
    one.open('a')
    one.note('a', 0, observation.LEAST)
    clock.now += 300
    one.look()
    assert len(sent) == 1


def test_never(clock):
    one, _ = make(0)
    one.open('a')
    assert not one.is_open('a')


def test_bounds(clock):
    one, sent = make()
    one.open('reads')
    for number in range(observation.READS + 9):
        one.note('reads', number * 4096, 4096)
    assert not one.is_open('reads')
    one.open('bytes')
    for number in range(20):
        one.note('bytes', number << 32, trace.LONGEST + 65536)
    clock.now += 300
    one.look()
    reads, long = [observation.decode(found['reads'], SIZE)
                   for found in sent]
    assert len(reads) == observation.READS
    assert int(long['length'].sum()) <= observation.BYTES
    assert int(long['length'].max()) == trace.LONGEST


def test_threads():
    one, sent = make(0.001)
    one.open('a')

    def work(first):
        for number in range(500):
            one.note('a', (first + number) * 4096, 4096)

    threads = [threading.Thread(target=work, args=(at * 500,))
               for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.look()
    [found] = sent
    # Its times never go back, or it would be refused.
    assert len(observation.decode(found['reads'], SIZE)) == 2000
