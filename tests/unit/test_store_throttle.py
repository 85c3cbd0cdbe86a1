# SPDX-License-Identifier: Apache-2.0
"""The rate limit, against a clock that only sleeping moves."""

import threading

import pytest

from fastboot_common import exception
from fastboot_common.store import throttle


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throttle, 'time', clock)
    return clock


def test_the_rate_is_kept(clock):
    limit = throttle.Throttle(1000)
    for _ in range(100):
        limit.take(100)
    assert clock.now - 1000 == pytest.approx(10)


def test_a_pause_is_no_saving(clock):
    limit = throttle.Throttle(1000)
    clock.now += 3600
    for _ in range(100):
        limit.take(100)
    assert 9.5 < clock.now - 4600 < 10


def test_threads_share_it(clock, monkeypatch):
    waits = []
    monkeypatch.setattr(clock, 'sleep', waits.append)
    limit = throttle.Throttle(1000)
    threads = [threading.Thread(target=limit.take, args=(500,))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(waits) == pytest.approx([.5 * n for n in range(1, 9)])


@pytest.mark.parametrize('rate', [0, -1])
def test_a_rate_that_lets_nothing_pass(rate):
    with pytest.raises(exception.ConfigError):
        throttle.Throttle(rate)
