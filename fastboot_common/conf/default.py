# SPDX-License-Identifier: Apache-2.0
"""Options of no group: where things are."""

from oslo_config import cfg

GROUP = 'DEFAULT'
OPTS = [
    cfg.StrOpt(
        'state_dir', default='/var/lib/fastboot',
        help='Directory of everything that fastboot keeps on this machine. '
             'Sockets lie below it, so its path should have fewer than 60 '
             'characters. It should be on the file system that has room for '
             'the volumes, one that knows sparse files (ext4, XFS).'),
]
