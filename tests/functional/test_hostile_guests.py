# SPDX-License-Identifier: Apache-2.0
"""Guests that attack their builder, in the real QEMU and sandbox."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import bootsector
import intruder
import pytest
from test_capture import SIZE, children, options

from fastboot_common import qemu
from fastboot_glance import capture, guest

as_root = pytest.mark.skipif(os.geteuid() != 0, reason='needs root')


class Host:
    """What a guest could reach: one TCP and one UDP port everywhere."""

    def __init__(self):
        self._exit = contextlib.ExitStack()

    def __enter__(self):
        enter = self._exit.enter_context
        self.tcp = enter(socket.create_server(
            ('::', 0), family=socket.AF_INET6, dualstack_ipv6=True))
        self.udp = enter(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        self.udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.udp.bind(('::', 0))
        self.ports = (self.tcp.getsockname()[1], self.udp.getsockname()[1])
        return self

    def __exit__(self, *_):
        self._exit.close()

    def came(self):
        """Addresses that connections and datagrams came from."""
        found = {'tcp': [], 'udp': []}
        for name, server in (('tcp', self.tcp), ('udp', self.udp)):
            server.settimeout(.2)
            with contextlib.suppress(TimeoutError):
                while True:
                    if name == 'tcp':
                        line, peer = server.accept()
                        line.close()
                    else:
                        _, peer = server.recvfrom(100)
                    found[name].append(peer[0])
        return found


@pytest.fixture
def host():
    with Host() as one:
        yield one


def addresses():
    """IPv4 addresses of this host that are not its loopback's."""
    shown = subprocess.run(['ip', '-j', '-4', 'addr'], capture_output=True,
                           check=True).stdout
    return [address['local'] for link in json.loads(shown)
            for address in link['addr_info']
            if not address['local'].startswith('127.')]


@pytest.fixture
def attacker(tmp_path, host):
    """The raw disk of a guest that tries all ways out."""
    return intruder.disk(tmp_path / 'raw', intruder.attack(
        *host.ports, addresses()[:1]), SIZE)


USER = ('-netdev', 'user,id=link')


def run(path, disk, prefix=()):
    """Run a guest until it is done, and return what it printed."""
    room = path / 'room'
    room.mkdir(0o700)
    os.link(disk, room / 'disk')
    guest.Sandbox('nobody').own(room)
    config = qemu.Config(disk=qemu.file_disk('disk', 'raw'), memory=64,
                         dhcp=True)
    said = b''
    with qemu.Machine(config, room, prefix) as machine:
        deadline = time.monotonic() + 60
        while intruder.PROMPT not in said:
            assert machine.alive() and time.monotonic() < deadline, said
            said += machine.console()
            time.sleep(.05)
    return said


def prefix():
    return guest.Sandbox('nobody').prefix(guest.Limits(
        (64 << 20) + qemu.OVERHEAD, 1 << 30, 60))


def kinds(console):
    return {intruder.kind(frame) for frame in intruder.received(console)}


def test_the_attacker_is_one(tmp_path, host, attacker, monkeypatch):
    """Without any of our walls its packets arrive."""
    monkeypatch.setattr(qemu, '_DHCP', USER)
    said = run(tmp_path, attacker)
    came = host.came()
    # Of slirp, both the loopback's and the other address's.
    assert len(came['tcp']) >= 2 and len(came['udp']) >= 2, (came, said)
    frames = intruder.received(said)
    assert any(frame[23] == 6 and frame[47] == 0x12 for frame in frames)


@pytest.mark.parametrize('wall', ['sandbox', 'restrict', 'both'])
def test_each_wall_holds_alone(tmp_path, host, attacker, monkeypatch, wall):
    """QEMU's user network lets nothing pass, and if it did: where to?"""
    if wall == 'sandbox':
        monkeypatch.setattr(qemu, '_DHCP', USER)
    said = run(tmp_path, attacker, () if wall == 'restrict' else prefix())
    assert host.came() == {'tcp': [], 'udp': []}
    found = kinds(said)
    print(wall, found)
    assert found >= {intruder.ARP, intruder.DHCP}


def test_capture_of_an_attacker(tmp_path, host, attacker, monkeypatch):
    """Both machines of a capture: with a config drive, and with DHCP."""
    said = []

    class Machine(qemu.Machine):
        def console(self):
            more = super().console()
            said[self._config.dhcp] += more
            return more

    said = [b'', b'']
    monkeypatch.setattr(qemu, 'Machine', Machine)
    work = tmp_path / 'work'
    work.mkdir()
    found = capture.capture(attacker, SIZE, work, options(
        boots=2, config_drive=True))
    assert (found.state, len(found.seconds)) == ('booted', 2)
    assert host.came() == {'tcp': [], 'udp': []}
    drive, dhcp = said
    assert intruder.PROMPT in drive and not intruder.received(drive)
    assert kinds(dhcp) >= {intruder.ARP, intruder.DHCP}, dhcp
