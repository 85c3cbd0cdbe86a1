# SPDX-License-Identifier: Apache-2.0
"""Options of nova-compute's driver; they stand in nova.conf."""

from collections.abc import Sequence
from typing import Any

from oslo_config import cfg

GROUP = 'fastboot'
OPTS = [
    cfg.BoolOpt(
        'enabled', default=True,
        help='Whether new servers boot from local blocks where they can. '
             'Off: every new server takes the stock path; servers that are '
             'here already go on as they are.'),
    cfg.BoolOpt(
        'reserve_disk', default=True,
        help='Whether what fastboot holds on the file system of '
             '"instances_path" is reserved in Placement (DISK_GB), beside '
             '"reserved_host_disk_mb". Off: keep a share for it there.'),
    cfg.StrOpt(
        'agent_socket', default='/var/lib/fastboot/run/agent.sock',
        help='Socket of fastboot-agent on this host.'),
    cfg.StrOpt(
        'export_socket', default='/var/lib/fastboot/run/nbd.sock',
        help='Socket where guests reach blocks that are not on this host '
             'yet: that of the shield, which stands before the export. It '
             'must be the same on all hosts between which servers '
             'migrate.'),
    cfg.FloatOpt(
        'timeout', default=0.95, min=0.05, max=30,
        help='Seconds that the start of a new server waits for the agent '
             'before it takes the stock path.'),
    cfg.FloatOpt(
        'thaw_timeout', default=3.0, min=0,
        help='Seconds that the start of a new server waits while the agent '
             'says that it is just thawing the boot set, on a host without '
             'a stock base of the image: the stock path would download it. '
             'A host that has one does not wait longer than "timeout".'),
    cfg.FloatOpt(
        'complete_timeout', default=600.0, min=0,
        help='Seconds that the start of a new server waits for all of its '
             'image, where the image or the flavor has "fastboot:lazy" = '
             '"no". Then it takes the stock path.'),
    cfg.FloatOpt(
        'patience', default=60.0, min=0,
        help='Seconds that a server whose disk already lies on local blocks '
             'waits until they are here, or the export is that has the rest: '
             'a migration to a host that never saw the image, or a start '
             'while the agent restarts. After one that waited in vain for '
             'agent or export, others only ask, for five minutes or until '
             'the export answers.'),
    cfg.BoolOpt(
        'resume', default=True,
        help='Whether new servers are resumed where the host has a µVM of '
             'their image. Off: they boot. A flavor says so with the extra '
             'spec "fastboot:microvm" = "no".'),
    cfg.FloatOpt(
        'resume_wait', default=5.0, min=0, max=60,
        help='Seconds that a new server waits for a lane while others '
             'of the same image are resumed. Then it boots.'),
    cfg.FloatOpt(
        'resume_deadline', default=10.0, min=1, max=300,
        help='Seconds that a resume may take until the guest has an identity '
             'of its own. 0.75 seconds sooner, one that has none is thrown '
             'away, so that the server boots from a fresh disk by then. '
             'Raise it where the processors of hosts are overcommitted.'),
]


def list_opts() -> list[tuple[str, Sequence[Any]]]:
    """What stands in nova.conf."""
    return [(GROUP, OPTS)]
