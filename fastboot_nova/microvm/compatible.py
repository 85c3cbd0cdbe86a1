# SPDX-License-Identifier: Apache-2.0
"""Whether this host can run what was saved elsewhere.

What a host does not know of itself before it runs a guest, its processor,
libvirt compares when it loads one; that refusal comes in time, too.
"""

import platform
from typing import Any

from fastboot_common import qemu
from fastboot_common.microvm import activation, clone, savefile
from fastboot_common.microvm.key import Key, Platform


def platforms(connection: Any) -> list[Platform]:
    """What this host is: a platform for each way to run guests.

    :param connection: to libvirt.
    """
    capabilities = connection.getCapabilities()
    return [Platform(platform.machine(), kind, qemu.package(),
                     savefile.VERSION, activation.RECIPE)
            for kind in ('kvm', 'qemu')
            if f"<domain type='{kind}'" in capabilities]


def check(key: Key, connection: Any) -> None:
    """See that a guest with this key can be loaded here.

    :param connection: to libvirt.
    :raises Unsuitable: it cannot, and why not.
    """
    here = platforms(connection)
    if key.platform not in here:
        raise clone.Unsuitable(
            f'it was baked for {key.platform.text}; this host is '
            + (' and '.join(one.text for one in here) or 'none'))
