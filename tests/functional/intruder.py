# SPDX-License-Identifier: Apache-2.0
"""A guest that attacks the network, and boots in a second.

It sends frames as they are given, one after the other, and says on the
console which came back (``<hexadecimal>``); then ``login:``.

What it tries here is what QEMU's user network could be talked into: the
host's own ports (10.0.2.2 and fec0::2 stand for its loopback), ports behind
its other addresses, names, files over TFTP, Windows shares.
"""

import ipaddress
import pathlib
import re
import struct

import bootsector
import witness

GUEST = '10.0.2.15'
GATEWAY = '10.0.2.2'
GUEST6 = 'fec0::5054:ff:fe12:3456'
GATEWAY6 = 'fec0::2'
PROMPT = b'login:'
#: What our frames can be answered with. All of it comes out of QEMU itself.
ARP, DHCP, RESET, ECHO, ICMP6, TFTP, UNREACHABLE = (
    'arp', 'dhcp', 'reset', 'echo', 'icmp6', 'no TFTP', 'unreachable')

_MAC = bytes.fromhex('525400123456')
_ALL = b'\xff' * 6
#: QEMU's gateway has this one.
_ROUTER = bytes.fromhex('525500000000')
_SOURCE = pathlib.Path(__file__).with_name('intruder.S')
_SECTORS = 24
_TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58
_TFTP, _DNS, _SHARES = 69, 53, 445
_OWN = 1025


def disk(path, frames, size=16 << 20):
    """The raw disk of a guest that sends these frames."""
    code = witness.assemble(_SOURCE)
    data = b''.join(struct.pack('<H', 10 + len(frame)) + bytes(10) + frame
                    for frame in frames)
    whole = code[512:-2] + struct.pack('<H', len(frames)) + data
    assert len(whole) <= (_SECTORS - 1) * 512
    return bootsector.disk(
        path, size, bootsector.signed(code[:440]) + whole)


def received(console):
    """The frames that a guest says it got."""
    return [bytes.fromhex(found.decode())
            for found in re.findall(rb'<([0-9A-F]+)>', console)]


def attack(tcp, udp, hosts):
    """Frames to everything that a user network may lead to.

    :param tcp: port that listens on all addresses of the host, v4 and v6.
    :param udp: the same.
    :param hosts: other addresses (IPv4) of the host.
    """
    frames = [_arp(), _dhcp()]
    for host in (GATEWAY, *hosts):
        frames += [_syn(host, tcp), _datagram(host, udp, b'attack'),
                   _echo(host)]
    frames += [
        _datagram('10.0.2.3', _DNS, bytes.fromhex(
            '12340100000100000000000007') + b'example\3com\0\0\1\0\1'),
        _datagram('10.0.2.3', udp, b'attack'),
        _datagram(GATEWAY, _TFTP, b'\0\1/etc/passwd\0octet\0'),
        _syn('10.0.2.4', _SHARES), _syn('10.0.2.3', _DNS),
        _datagram('255.255.255.255', udp, b'attack', _ALL),
        # The guest forges the sender: its packets must not come out there.
        _datagram('127.0.0.1', udp, b'attack', source='127.0.0.1'),
        _syn('127.0.0.1', tcp),
        _solicit(), _syn(GATEWAY6, tcp), _datagram(GATEWAY6, udp, b'attack'),
        _syn('::1', tcp), _datagram('::1', udp, b'attack'),
        _MAC + _MAC + b'\x88\xb5' + b'no protocol',
    ]
    return frames


def kind(frame):
    """What a frame from the network is.

    :raises AssertionError: nothing that QEMU itself says.
    """
    protocol = frame[12:14]
    if protocol == b'\x08\x06':
        return ARP
    if protocol == b'\x86\xdd':
        if frame[20] == _ICMP6:
            return ICMP6
        return _tcp_kind(frame[54:]) if frame[20] == _TCP else _strange(frame)
    if protocol != b'\x08\x00':
        _strange(frame)
    body = frame[14 + (frame[14] & 15) * 4:]
    if frame[23] == _TCP:
        return _tcp_kind(body)
    if frame[23] == _UDP and body[:4] == b'\0\x43\0\x44':
        return DHCP
    if frame[23] == _UDP and body[:4] == struct.pack(
            '>HH', _TFTP, _OWN) and body[8:10] == b'\0\5':
        return TFTP
    if frame[23] == _ICMP and frame[26:30] == _packed(GATEWAY):
        return {0: ECHO, 3: UNREACHABLE}.get(body[0]) or _strange(frame)
    return _strange(frame)


def _tcp_kind(segment):
    return RESET if segment[13] & 4 else _strange(segment)


def _strange(frame):
    raise AssertionError(f'the network answered {frame.hex()}')


def _packed(address):
    return ipaddress.ip_address(address).packed


def _sum(data):
    words = struct.unpack(f'>{len(data + b"0") // 2}H',
                          data + b'\0' * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return total ^ 0xffff


def _arp():
    return (_ALL + _MAC + bytes.fromhex('08060001080006040001') + _MAC
            + _packed(GUEST) + bytes(6) + _packed(GATEWAY))


def _packet(protocol, source, target, body, to):
    """An IP packet of one version, with the body's checksum put in."""
    at = {_TCP: 16, _UDP: 6, _ICMP: 2, _ICMP6: 2}[protocol]
    one, other = _packed(source), _packed(target)
    pseudo = b'' if protocol == _ICMP else one + other + struct.pack(
        '>II', len(body), protocol)
    body = body[:at] + struct.pack('>H', _sum(pseudo + body)) + body[at + 2:]
    if len(one) == 16:
        return to + _MAC + b'\x86\xdd' + struct.pack(
            '>IHBB', 6 << 28, len(body), protocol, 255) + one + other + body
    header = struct.pack('>BBHHHBBH', 0x45, 0, 20 + len(body), 1, 0, 64,
                         protocol, 0) + one + other
    header = header[:10] + struct.pack('>H', _sum(header)) + header[12:]
    return to + _MAC + b'\x08\x00' + header + body


def _source_of(target):
    return GUEST6 if ':' in target else GUEST


def _syn(host, port):
    body = struct.pack('>HHIIBBHHH', 1024, port, 1, 0, 5 << 4, 2, 8192, 0, 0)
    return _packet(_TCP, _source_of(host), host, body, _ROUTER)


def _datagram(host, port, data, to=_ROUTER, source=None, own=_OWN):
    body = struct.pack('>HHHH', own, port, 8 + len(data), 0) + data
    return _packet(_UDP, source or _source_of(host), host, body, to)


def _echo(host):
    return _packet(_ICMP, GUEST, host, struct.pack(
        '>BBHHH', 8, 0, 0, 1, 1) + b'attack', _ROUTER)


def _dhcp():
    ask = (b'\1\1\6\0' + bytes(24) + _MAC + bytes(202)
           + bytes.fromhex('63825363' '350101' 'ff')).ljust(300, b'\0')
    return _datagram('255.255.255.255', 67, ask, _ALL, '0.0.0.0',  # noqa: S104
                     68)


def _solicit():
    """Where is the router? So it learns where we are."""
    return _packet(
        _ICMP6, GUEST6, GATEWAY6, b'\x87' + bytes(7) + _packed(GATEWAY6)
        + b'\1\1' + _MAC, bytes.fromhex('3333ff000002'))
