# SPDX-License-Identifier: Apache-2.0
"""Options of the database: records, and TaskFlow's logbooks."""

from oslo_config import cfg

GROUP = 'database'
OPTS = [
    cfg.StrOpt(
        'connection', secret=True,
        help='SQLAlchemy URL of the one database that builders and API '
             'share, e.g. mysql+pymysql://user:password@host/fastboot. '
             '"fastboot-manage db sync" makes its tables. SQLite '
             '(sqlite:////var/lib/fastboot/fastboot.db) is for one machine '
             'and few images. Compute hosts need none.'),
    cfg.IntOpt(
        'connection_recycle_time', default=3600, min=1,
        help='Seconds after which a connection is made anew. Must be less '
             'than the database server\'s timeout for idle connections.'),
    cfg.IntOpt(
        'max_pool_size', default=5, min=1,
        help='Connections that a process keeps open. Raise it with the '
             'threads of the API.'),
]
