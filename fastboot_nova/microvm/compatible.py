# SPDX-License-Identifier: Apache-2.0
"""Whether this host can run what was saved elsewhere.

What a host does not know of itself before it runs a guest, its processor,
libvirt compares when it loads one; that refusal comes in time, too.
"""

import platform
from typing import Any

from fastboot_common import qemu
from fastboot_common.microvm import activation, clone, savefile
from fastboot_common.microvm.key import Key


def check(key: Key, connection: Any) -> None:
    """See that a guest with this key can be loaded here.

    :param connection: to libvirt.
    :raises Unsuitable: it cannot, and why not.
    """
    for name, here, there in (
            ('architecture', platform.machine(), key.arch),
            ('QEMU', qemu.package(), key.qemu),
            ('version of save files', savefile.VERSION, key.save),
            ('recipe', activation.RECIPE, key.recipe)):
        if here != there:
            raise clone.Unsuitable(
                f'it was baked for another {name}: {there}, not {here}')
    types = connection.getCapabilities()
    if f"<domain type='{key.virt_type}'" not in types:
        raise clone.Unsuitable(f'there is no {key.virt_type} here')
