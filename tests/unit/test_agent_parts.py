# SPDX-License-Identifier: Apache-2.0
"""The agent's small parts: times of the day, threads, the service manager."""

import datetime
import os
import socket
import threading
import time

import pytest

from fastboot_common import exception
from fastboot_nova.agent import network, systemd, window, worker

#: As good as never, and still a time that threads can wait for.
LATER = time.monotonic() + 600


@pytest.mark.parametrize('text, inside, outside', [
    ('', ['00:00', '12:00', '23:59'], []),
    ('22:00-06:00', ['22:00', '23:59', '00:00', '05:59'],
     ['06:00', '21:59', '12:00']),
    ('01:00-05:00,12:00-13:30', ['01:00', '04:59', '13:29'],
     ['00:59', '05:00', '13:30']),
    ('00:00-24:00', ['00:00', '23:59'], []),
    ('20:00-24:00 03:15-03:16', ['20:00', '23:59', '03:15'],
     ['00:00', '03:14', '03:16']),
])
def test_window(text, inside, outside):
    found = window.Window(text)
    for moment in inside:
        assert found.open_at(datetime.time.fromisoformat(moment)), moment
    for moment in outside:
        assert not found.open_at(datetime.time.fromisoformat(moment)), moment
    assert not text or found.is_open() in (True, False)


@pytest.mark.parametrize('text', [
    'always', '1:00-2:00', '24:00-06:00', '22:00', '22:00-24:01',
    '22:00-06:60', '10:00-10:00', '٢٢:00-23:00', '22:00-06:00;'])
def test_windows_that_are_none(text):
    with pytest.raises(exception.ConfigError, match='window'):
        window.Window(text)


@pytest.fixture
def interfaces(tmp_path, monkeypatch):
    """What the kernel says of interfaces; loopback is really there."""
    monkeypatch.setattr(network, '_SYS', tmp_path)

    def make(name, speed):
        (tmp_path / name).mkdir()
        if speed is not None:
            (tmp_path / name / 'speed').write_text(f'{speed}\n')

    return make


@pytest.mark.parametrize(('said', 'speed'), [
    (1000, 125_000_000), (25000, 3_125_000_000), (-1, 0), (0, 0),
    (4294967295, 0), ('', 0), (None, 0)])
def test_speed_of_the_network(interfaces, said, speed):
    interfaces('lo', said)
    assert network.speed(['http://127.0.0.1:8080/store']) == speed
    assert network.speed(['http://[::1]/', 'https://u:p@127.0.0.1/']) == speed


def test_speed_of_two_interfaces(interfaces, monkeypatch):
    interfaces('a', 1000)
    interfaces('b', 10)
    monkeypatch.setattr(network, '_interface', lambda location: location)
    assert network.speed(['a', 'b', 'a', '']) == 126_250_000


@pytest.mark.parametrize('location', [
    '/srv/store', 'file:///srv/store', 'http://nowhere.invalid/',
    'http://[::1', 'http://'])
def test_no_way_no_speed(location):
    assert network.speed([location]) == 0


@pytest.mark.parametrize(('option', 'rate'), [
    (-1, 62_500_000), (0, 0), (5, 5)])
def test_hydration_takes_half_the_network(interfaces, option, rate):
    interfaces('lo', 1000)
    assert network.rate(option, ['http://127.0.0.1/']) == rate


def test_worker_goes_on_after_failures():
    steps, enough = [], threading.Event()

    def step():
        steps.append(1)
        if len(steps) == 1:
            raise ZeroDivisionError
        if len(steps) == 2:
            raise exception.Unavailable('away')
        enough.set()

    one = worker.Worker('test', step, 60, longest=0.01)
    one.start()
    assert enough.wait(20)
    count = len(steps)
    enough.clear()
    one.wake()
    assert enough.wait(20)
    assert len(steps) == count + 1
    one.stop()
    assert one.join(LATER)
    assert one.stopping() and not one.pause(60)


def test_worker_that_hangs_is_not_waited_for():
    gate, inside = threading.Event(), threading.Event()

    def step():
        inside.set()
        gate.wait(60)

    one = worker.Worker('test', step, 60)
    assert one.join(0), 'never started'
    one.start()
    assert inside.wait(20)
    one.stop()
    assert not one.join(0)
    gate.set()
    assert one.join(LATER)


def test_wake_during_a_step_is_not_lost():
    begun, gate = threading.Semaphore(0), threading.Semaphore(0)

    def step():
        begun.release()
        assert gate.acquire(timeout=20)

    one = worker.Worker('test', step, 3600)
    one.start()
    assert begun.acquire(timeout=20)
    one.wake()
    gate.release()
    assert begun.acquire(timeout=20)
    one.stop()
    gate.release()
    assert one.join(LATER)


@pytest.mark.parametrize('abstract', [False, True])
def test_notify(tmp_path, monkeypatch, abstract):
    name = f'@fastboot-{os.getpid()}' if abstract else str(tmp_path / 'n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace('@', '\0') if abstract else name)
        manager.settimeout(20)
        monkeypatch.setenv('NOTIFY_SOCKET', name)
        systemd.notify('READY=1')
        assert manager.recv(99) == b'READY=1'


def test_no_service_manager(monkeypatch):
    monkeypatch.delenv('NOTIFY_SOCKET', raising=False)
    monkeypatch.delenv('WATCHDOG_USEC', raising=False)
    systemd.notify('READY=1')
    assert systemd.watchdog_seconds() == 0
    monkeypatch.setenv('WATCHDOG_USEC', '30000000')
    assert systemd.watchdog_seconds() == 15
    monkeypatch.setenv('WATCHDOG_PID', '1')
    assert systemd.watchdog_seconds() == 0
    # It went away: no reason to end.
    monkeypatch.setenv('NOTIFY_SOCKET', '/nonexistent/socket')
    systemd.notify('WATCHDOG=1')
