# SPDX-License-Identifier: Apache-2.0
"""Options of the jobboard: where builds wait for a builder.

The import plugin in glance-api has the same group, in
``glance-image-import.conf``.
"""

from oslo_config import cfg

GROUP = 'jobboard'
OPTS = [
    cfg.StrOpt(
        'connection', default='redis://127.0.0.1:6379/0', secret=True,
        help='Where jobs are kept: redis://[user:password@]host:port/db, '
             'etcd://host:port or zookeeper://host:port[,host:port...]. What '
             'stands behind a "?" goes to TaskFlow\'s driver, e.g. '
             'redis://host:26379/0?sentinel=name&ssl=true or '
             'etcd://host:2379?protocol=https&ca_cert=/etc/ssl/ca.pem. All '
             'builders, the API and glance-api must name the same one.'),
    cfg.StrOpt(
        'namespace', default='fastboot',
        help='Prefix of the names of all jobs. Change it where two clouds '
             'share one server.'),
    cfg.IntOpt(
        'claim_seconds', default=60, min=6,
        help='Seconds after which the job of a builder that died is given '
             'to another. Living builders extend their claims four times as '
             'often. Raise it where the server or the network is away for '
             'longer now and then: a build whose claim runs out is given '
             'up. All builders must have the same.'),
    cfg.IntOpt(
        'timeout', default=5, min=1,
        help='Seconds that the server may be silent.'),
]
