# SPDX-License-Identifier: Apache-2.0
"""Options of the HTTP API."""

from oslo_config import cfg

GROUP = 'api'
OPTS = [
    cfg.StrOpt(
        'auth_strategy', default='keystone', choices=['keystone', 'noauth'],
        help='Who says who a caller is. "noauth" believes every caller, and '
             'is for tests on a machine of their own.'),
    cfg.IntOpt(
        'max_limit', default=1000, min=1,
        help='Rows of a list that are given at once at most; callers ask '
             'for more with a marker.'),
    cfg.IntOpt(
        'stale_after', default=180, min=1,
        help='Seconds without a report after which a host counts as stale. '
             'Set it to three times the report_interval of the agents.'),
]
