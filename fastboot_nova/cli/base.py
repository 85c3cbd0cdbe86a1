# SPDX-License-Identifier: Apache-2.0
"""What the commands of a host need."""

import pathlib

from fastboot_common.cli import base
from fastboot_nova import host, node


def open_host(env: base.Environment, writable: bool = True) -> host.Host:
    """The host that the configuration names.

    :param writable: false: only to look, also while another process writes.
    :raises Unavailable: it was never synced, and the repository is out of
        reach.
    """
    group = env.conf.host
    return host.Host(
        env.host_path, env.open_replicas(), socket=env.shield_socket,
        threads=group.threads or None, volume_size=group.volume_size,
        writable=writable, trust=env.trust())


def open_node(env: base.Environment, served: host.Host,
              log: pathlib.Path | None = None) -> node.Node:
    """What serves the misses of a host's guests, as it is configured.

    :param log: where the shield notes every request; None: nowhere.
    """
    group = env.conf.export
    return node.Node(
        served, env.run, socket=env.shield_socket, wait=group.wait,
        shield_wait=group.shield_wait, group=group.group, log=log)
