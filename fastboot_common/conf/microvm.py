# SPDX-License-Identifier: Apache-2.0
"""Options of µVMs on a compute host."""

from typing import Any, Final

from oslo_config import cfg

GROUP: Final = 'microvm'

OPTS: Final[list[Any]] = [
    cfg.BoolOpt(
        'enabled', default=True,
        help='Keep the µVMs here that this host can run, so that servers of '
             'their images are resumed. Off: those that are here go, and '
             'servers are booted.'),
    cfg.IntOpt(
        'lanes', default=2, min=1, max=16,
        help='Copies of each µVM\'s memory that are made ahead: so many '
             'servers of an image can be resumed at the same time without '
             'waiting. More are made while all are in use, and go again. '
             'Each takes 100 to 200 MiB of disk with [bakery] memory of 512.'),
    cfg.IntOpt(
        'disk', default=20, min=0,
        help='GiB that µVMs may take on this host: as they came, unpacked, '
             'and their copies. Beyond it those go that were not used for '
             'longest, unless a server is being resumed from them. They '
             'count for [agent] quota and min_free as well.'),
    cfg.IntOpt(
        'memory', default=0, min=0,
        help='MiB of copies, of the µVMs used last, that are read ahead '
             'again and again, so that they stay in the page cache. Raise it '
             'where the disk is slow: a resume reads about 100 MiB. 0: '
             'none.'),
]
