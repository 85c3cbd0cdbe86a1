# SPDX-License-Identifier: Apache-2.0
"""What the commands of a host need."""

from fastboot_common.cli import base
from fastboot_nova import host


def open_host(env: base.Environment, writable: bool = True) -> host.Host:
    """The host that the configuration names.

    :param writable: false: only to look, also while another process writes.
    :raises Unavailable: it was never synced, and the repository is out of
        reach.
    """
    group = env.conf.host
    return host.Host(
        env.host_path, env.open_store(), socket=env.shield_socket,
        threads=group.threads or None, volume_size=group.volume_size,
        writable=writable)
