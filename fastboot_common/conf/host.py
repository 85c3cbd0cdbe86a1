# SPDX-License-Identifier: Apache-2.0
"""Options of a compute host."""

from oslo_config import cfg

GROUP = 'host'
OPTS = [
    cfg.StrOpt(
        'path',
        help='Directory of mirror and volumes. Default: "host" in '
             'state_dir.'),
    cfg.IntOpt(
        'volume_size', default=8 << 40, min=128 << 30,
        help='Apparent size of a new volume in bytes. It is sparse: lower it '
             'only if the file system has no files as large, and then on all '
             'hosts between which servers migrate live.'),
    cfg.IntOpt(
        'threads', default=0, min=0,
        help='Threads that decompress. 0: one a CPU.'),
]
