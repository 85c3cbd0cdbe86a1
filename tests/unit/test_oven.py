# SPDX-License-Identifier: Apache-2.0
"""The process that bakes, with a libvirt that does nothing."""

import importlib
import os
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

NAMES = ('SHUTDOWN', 'DESTROYED', 'CRASHED', 'FAILED')


def fake():
    numbers = {f'VIR_DOMAIN_EVENT_STOPPED_{name}': number
               for number, name in enumerate(NAMES)}
    return types.SimpleNamespace(
        VIR_DOMAIN_EVENT_STOPPED=5, VIR_DOMAIN_AFFECT_LIVE=1,
        libvirtError=type('libvirtError', (Exception,), {}), **numbers)


@pytest.fixture
def oven(monkeypatch):
    monkeypatch.setitem(sys.modules, 'libvirt', fake())
    sys.modules.pop('fastboot_glance.oven', None)
    yield importlib.import_module('fastboot_glance.oven')
    sys.modules.pop('fastboot_glance.oven', None)


@pytest.fixture
def guest(oven, tmp_path):
    """An oven, and the guest's end of the port."""
    path = tmp_path / 'port'
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        one = oven.Oven({'home': str(tmp_path), 'timeout': 5})
        one._port = oven.Port(path)
        end, _ = server.accept()
    with end:
        yield one, end


def test_a_word_in_pieces(guest):
    one, end = guest
    thread = threading.Thread(target=lambda: [
        (end.send(piece), time.sleep(.02)) for piece in
        (b'NOI', b'SE\nREA', b'DY 1.5 8', b'\n')])
    thread.start()
    assert one._await('READY', 10, 'it never comes') == 8
    thread.join()


def test_silence_and_noise_end(oven, guest):
    one, end = guest
    end.send(b'QUIET 1\n' + b'x' * 10000 + b'\nREADY now\n')
    begun = time.monotonic()
    with pytest.raises(oven.Failed, match='nothing'):
        one._await('READY', .3, 'nothing')
    assert time.monotonic() - begun < 3


def test_a_guest_that_cannot(oven, guest):
    one, end = guest
    end.send(b'REFUSED 3 1\n')
    with pytest.raises(oven.Failed, match='reseed'):
        one._await('READY', 10, '')


@pytest.mark.parametrize('number, word, refused', [
    (0, 'shut down', True), (2, 'crashed', True), (3, 'QEMU', False),
    (9, 'stopped', False)])
def test_a_guest_that_stops(oven, guest, number, word, refused):
    one, end = guest
    end.close()
    one._happened(None, None, 3, 0, None)  # another event
    one._happened(None, None, 5, number, None)
    with pytest.raises(oven.Failed, match=word) as caught:
        one._await('READY', 10, '')
    assert isinstance(caught.value, oven.Refused) == refused


@pytest.fixture
def baking(oven, monkeypatch, tmp_path):
    """An oven whose libvirt takes longer than the guest may, and what is
    waited for: the word, seconds, what it is if it does not come."""
    now, waited = [0.0], []

    def start(xml, flags):
        now[0] += 900

    monkeypatch.setattr(oven.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(oven, 'connect', lambda room: types.SimpleNamespace(
        getLibVersion=lambda: 9, createXML=start,
        domainEventRegisterAny=lambda *words: None))
    monkeypatch.setattr(oven, 'Port', lambda path: types.SimpleNamespace(
        send=lambda data: None))
    oven.libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE = 0
    one = oven.Oven({'home': str(tmp_path), 'timeout': 600, 'xml': '',
                     'port': 'port'})
    monkeypatch.setattr(one, '_unplug', lambda: None)

    def wait(word, seconds, otherwise, kind=oven.Refused):
        waited.append((word, seconds, kind))
        if word == 'QUIET':
            raise kind(otherwise)

    monkeypatch.setattr(one, '_await', wait)
    return one, waited


def test_what_libvirt_takes_is_not_the_guests_time(oven, baking):
    one, waited = baking
    with pytest.raises(oven.Failed):
        one.bake()
    assert waited[0] == ('READY', 600, oven.Refused)


def test_a_guest_that_was_ready_is_tried_again(oven, baking):
    one, _ = baking
    with pytest.raises(oven.Failed, match='rest') as caught:
        one.bake()
    assert not isinstance(caught.value, oven.Refused)


def test_a_device_that_stays(oven, guest, monkeypatch):
    one, _ = guest
    monkeypatch.setattr(oven, '_UNPLUG_SECONDS', 0)
    one._domain = types.SimpleNamespace(
        XMLDesc=lambda: "<domain><devices><disk><target dev='vdb'/></disk>"
                        "</devices></domain>",
        detachDeviceFlags=lambda xml, flags: None)
    with pytest.raises(oven.Failed, match='let go'):
        one._unplug()


def test_nothing_is_mounted_where_others_see_it(oven, tmp_path, monkeypatch):
    monkeypatch.setattr(oven, '_call',
                        lambda *words: pytest.fail(f'{words}'))
    with pytest.raises(OSError):
        oven.move_in({'room': str(tmp_path), 'home': '/run',
                      'mounts': os.stat('/proc/self/ns/mnt').st_ino})


def test_the_first_process_ends_as_the_second():
    code = ('import sys, types, os; sys.path.insert(0, "tests/unit")\n'
            'import test_oven; sys.modules["libvirt"] = test_oven.fake()\n'
            'from fastboot_glance import oven\n'
            'oven.reap(); os._exit(7 if os.getppid() else 0)')
    done = subprocess.run([sys.executable, '-c', code], timeout=60)
    assert done.returncode == 7
