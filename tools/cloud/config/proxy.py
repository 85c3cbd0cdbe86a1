# SPDX-License-Identifier: Apache-2.0
"""Forwarders: 127.0.0.1:<port> everywhere, the service on control.

HAProxy counts what passes; on the hosts, tests ask it how much a host read
from whom.
"""

from cloud.layout import API_PORTS, REPOSITORY_PORT, Layout, Node

_COMMON = '''\
global
  maxconn 512
  {stats}
defaults
  # Bytes are counted when an answer ends. In mode tcp, and with contstats,
  # HAProxy 2.6 counts up to 5 s late.
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
'''
_LISTEN = '''\
listen {name}
  bind 127.0.0.1:{port}
  server control {address}
'''


def machine(layout: Layout) -> str:
    """Of this machine, over UNIX sockets."""
    return _COMMON.format(stats='') + ''.join(
        _LISTEN.format(name=name, port=port,
                       address=f'unix@{layout.api_socket(name)}')
        for name, port in _ports(layout).items())


def host(layout: Layout, node: Node) -> str:
    """Of a compute host, over its management link."""
    stats = f'stats socket {layout.run}/proxy-{node.name}.stats mode 600'
    ports = _ports(layout)
    if layout.options.fastboot:
        ports['repository'] = REPOSITORY_PORT
    return _COMMON.format(stats=stats) + ''.join(
        _LISTEN.format(name=name, port=port,
                       address=f'{layout.control.address}:{port}')
        for name, port in ports.items())


def _ports(layout: Layout) -> dict[str, int]:
    return {name: port for name, port in API_PORTS.items()
            if name != 'fastboot' or layout.options.fastboot}
