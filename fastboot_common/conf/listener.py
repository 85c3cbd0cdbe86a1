# SPDX-License-Identifier: Apache-2.0
"""Options of the listener: where Glance's notifications come from.

Glance sends them with ``[oslo_messaging_notifications] driver =
messagingv2``.
"""

from oslo_config import cfg

GROUP = 'listener'
OPTS = [
    cfg.StrOpt(
        'transport_url', secret=True,
        help='Message bus of Glance\'s notifications. Default: '
             '[oslo_messaging_notifications] transport_url, or else '
             'transport_url.'),
    cfg.StrOpt(
        'exchange', default='glance',
        help='Exchange that Glance sends to: its control_exchange.'),
    cfg.ListOpt(
        'topics', default=['notifications'],
        help='Topics that Glance sends to: its '
             '[oslo_messaging_notifications] topics. Empty: nothing is '
             'listened to, only the audit finds images.'),
    cfg.StrOpt(
        'pool', default='fastboot',
        help='Name of the queue that builders share. Other listeners of the '
             'topic, with other pools, get every notification as well.'),
]
