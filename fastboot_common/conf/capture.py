# SPDX-License-Identifier: Apache-2.0
"""Options of the capture: how images are booted to see what they read."""

from typing import Any, Final

from oslo_config import cfg

GROUP: Final = 'capture'

OPTS: Final[list[Any]] = [
    cfg.IntOpt(
        'boots', default=2, min=1, max=8,
        help='How many times an image is booted. The blocks of all boots are '
             'merged, because no two boots read quite the same. More boots '
             'take more time and miss fewer blocks.'),
    cfg.IntOpt(
        'parallel', default=2, min=1, max=8,
        help='Boots of an image that run at the same time; an image that '
             'does not boot at all is found by the first that ends. Each '
             'takes "memory" and "vcpus".'),
    cfg.IntOpt(
        'grow', default=10, min=0,
        help='GiB by which the disk of the second boot (the fourth, ...) is '
             'larger than the image, as the disks of most instances are: '
             'guests then grow their file system. 0: never.'),
    cfg.IntOpt(
        'timeout', default=600, min=1,
        help='Seconds that one boot may take. An image that has not booted '
             'by then is published without a boot set. Raise it where the '
             'builder is slow, or images take long to boot.'),
    cfg.IntOpt(
        'memory', default=512, min=64,
        help='Memory of the guest in MiB. Raise it for images that do not '
             'boot with less. A builder needs this much and 2 GiB of address '
             'space more for each boot.'),
    cfg.IntOpt(
        'vcpus', default=1, min=1, max=16,
        help='Processors of the guest.'),
    cfg.StrOpt(
        'accelerator', default='tcg', choices=['tcg', 'kvm'],
        help='What runs the guest. "kvm" is ten times faster, falls back to '
             '"tcg" where it does not work, and lets uploaded images near '
             'the host kernel.'),
    cfg.ListOpt(
        'end', default=['agent', 'console', 'quiet'],
        item_type=cfg.types.String(choices=['agent', 'console', 'quiet']),
        help='What tells that a boot is over; the first of them that comes '
             'counts. "agent": the guest agent answers. "console": the '
             'serial console shows "console_pattern". "quiet": no new block '
             'was read for "quiet_seconds".'),
    cfg.StrOpt(
        'console_pattern', default=r'login: ?(\r?\n?$|\[)',
        help='Regular expression that the serial console is searched for. '
             'Change it for images that greet in another way.'),
    cfg.IntOpt(
        'quiet_seconds', default=120, min=1,
        help='Seconds without a new block after which a boot is over. Lower '
             'it with "kvm"; raise it if guests are cut off while they '
             'compute.'),
    cfg.IntOpt(
        'quiet_mib', default=8, min=0,
        help='MiB that a guest must have read before "quiet_seconds" '
             'counts. A guest that reads less and then nothing for three '
             'minutes is taken for one that does not boot.'),
    cfg.IntOpt(
        'settle_seconds', default=10, min=0,
        help='Seconds without a new block, after the end of the boot, that '
             'end the recording; it ends anyway after six times as many. A '
             'guest agent answers some seconds before the login prompt '
             'comes: lower it only where guests run fast. Raise it to '
             'include services that start late.'),
    cfg.StrOpt(
        'user', default='nobody',
        help='Account that QEMU runs as if the builder runs as root. Use one '
             'that owns nothing.'),
    cfg.BoolOpt(
        'config_drive', default=True,
        help='Attach a config drive to the first boot, the third and so on, '
             'so that cloud-init does in the capture what it does in a new '
             'instance. The other boots have a DHCP server, and look in vain '
             'for a metadata service.'),
]
