# SPDX-License-Identifier: Apache-2.0
"""How fast this host's network is, towards the repository.

What the kernel tells without privileges, and without netlink, which the
agent's unit does not let it use.
"""

import fcntl
import ipaddress
import os
import pathlib
import socket
import struct
import urllib.parse
from collections.abc import Iterable
from typing import Final

_SYS: Final = pathlib.Path('/sys/class/net')
_INET6: Final = pathlib.Path('/proc/net/if_inet6')
#: linux/sockios.h, struct ifreq of linux/if.h.
_SIOCGIFADDR: Final = 0x8915
_IFREQ: Final = struct.Struct('16s2xH4s16x')
#: Mbit/s; what is above means "unknown" in older kernels.
_FASTEST: Final = 10 ** 7


def rate(option: int, locations: Iterable[str]) -> int:
    """What hydration may take, in bytes a second; 0: any.

    :param option: as it is configured; below 0: half of the network.
    :param locations: see :func:`speed`.
    """
    return option if option >= 0 else speed(locations) // 2


def speed(locations: Iterable[str]) -> int:
    """Of all interfaces together that lead to these places.

    :param locations: URLs; directories lead nowhere.
    :returns: bytes a second; 0: nobody knows, as with most virtual
        interfaces.
    """
    names = {_interface(location) for location in locations}
    return sum(_speed(name) for name in names if name)


def _interface(location: str) -> str:
    """The interface on the way to a URL's server; '': none is found."""
    try:
        host = urllib.parse.urlsplit(location).hostname
        if not host:
            return ''
        family, kind, _, _, address = socket.getaddrinfo(
            host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a route is chosen, and nothing sent
            own = probe.getsockname()[0]
        return _owner(family, own)
    except (OSError, ValueError):
        return ''


def _owner(family: int, address: str) -> str:
    """The interface that has an address; '': none has it."""
    if family == socket.AF_INET6:
        wanted = ipaddress.IPv6Address(address.partition('%')[0]).packed.hex()
        for line in _INET6.read_text().splitlines():
            words = line.split()
            if words[0] == wanted:
                return words[-1]
        return ''
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in os.listdir(_SYS):
            if _address(any_socket, name) == socket.inet_aton(address):
                return name
    return ''


def _address(any_socket: socket.socket, name: str) -> bytes:
    """The IPv4 address of an interface; nothing: it has none."""
    try:
        found = fcntl.ioctl(any_socket, _SIOCGIFADDR, _IFREQ.pack(
            name.encode()[:15], 0, b''))
    except OSError:
        return b''
    # struct sockaddr_in begins at 16: family, port, address.
    return found[20:24]


def _speed(name: str) -> int:
    """Bytes a second of an interface; 0: it does not say."""
    try:
        megabits = int((_SYS / name / 'speed').read_text())
    except (OSError, ValueError):
        return 0
    return megabits * 125_000 if 0 < megabits < _FASTEST else 0
