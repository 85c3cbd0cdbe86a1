# SPDX-License-Identifier: Apache-2.0
"""Options of the bakery: how µVMs are made of images."""

from typing import Any, Final

from oslo_config import cfg

GROUP: Final = 'bakery'

OPTS: Final[list[Any]] = [
    cfg.IntOpt(
        'workers', default=1, min=0, max=16,
        help='Images that this builder bakes at a time, besides those that '
             'it builds. Each needs a processor and the memory below. 0: '
             'this one bakes none.'),
    cfg.IntOpt(
        'retention_hours', default=24, min=0,
        help='Hours that the data of a µVM stay in the repository after it '
             'was removed. Hosts that are fetching it need them; nothing '
             'that runs does.'),
    cfg.IntOpt(
        'timeout', default=600, min=1,
        help='Seconds that a guest may take until it is ready to be saved. '
             'An image whose guest is not ready by then has no µVM, and is '
             'booted. Raise it where the builder is slow, or images take '
             'long for their first boot.'),
    cfg.IntOpt(
        'memory', default=512, min=128,
        help='Memory of the guest in MiB. Instances with less are booted; '
             'what they have more is plugged. Lower it for flavors smaller '
             'than this; raise it for images that do not boot with it.'),
    cfg.IntOpt(
        'max_memory', default=32768, min=256,
        help='MiB of memory up to which instances are resumed. Larger ones '
             'are booted. Each GiB costs the guest some memory for tables.'),
    cfg.IntOpt(
        'max_vcpus', default=8, min=1, max=64,
        help='Processors up to which instances are resumed. Larger ones are '
             'booted. Each costs the guest some memory.'),
    cfg.IntOpt(
        'slots', default=8, min=3, max=24,
        help='Network interfaces, volumes and config drives that can be '
             'plugged into a resumed instance before its first reboot. Each '
             'is a port that the guest looks at while it boots.'),
    cfg.StrOpt(
        'machine', default='pc-q35-7.2',
        help='Machine type, with its version. Take one that the QEMU of all '
             'compute hosts knows.'),
    cfg.StrOpt(
        'cpu', default='Westmere',
        help='Processor of the guest: a model of libvirt that every compute '
             'host can run, or "host-model" with "kvm", if all are alike. '
             'More recent models run guests faster.'),
    cfg.StrOpt(
        'virt_type', default='qemu', choices=['qemu', 'kvm'],
        help='What runs the guest; it must be what runs the instances. '
             '"kvm" lets uploaded images near the host kernel.'),
    cfg.StrOpt(
        'user', default='nobody',
        help='Account that libvirt and QEMU run as if the builder runs as '
             'root. Use one that owns nothing.'),
]
