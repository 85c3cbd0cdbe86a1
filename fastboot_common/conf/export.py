# SPDX-License-Identifier: Apache-2.0
"""Options of the NBD export and its shield."""

from oslo_config import cfg

GROUP = 'export'
OPTS = [
    cfg.IntOpt(
        'wait', default=25, min=1,
        help='Seconds that a read of a block that is not on the host waits '
             'for the agent (while it restarts, for instance) before it '
             'fails.'),
    cfg.IntOpt(
        'shield_wait', default=4, min=1,
        help='Seconds that the shield tries to reach a restarting export. '
             'Short, because a waiting read blocks suspend and snapshot; '
             'then the guest is paused (error_policy and rerror_policy are '
             '"stop").'),
    cfg.StrOpt(
        'group',
        help='Group that may connect to the sockets: the one QEMU runs in. '
             'Default: the group of the process.'),
]
