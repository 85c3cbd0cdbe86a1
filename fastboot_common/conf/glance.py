# SPDX-License-Identifier: Apache-2.0
"""Options of the builders' access to Glance: keystoneauth's, and a few."""

from typing import Any, Final

from keystoneauth1 import loading
from oslo_config import cfg

GROUP: Final = 'glance'
_OWN: Final[list[Any]] = [
    cfg.IntOpt(
        'retries', default=8, min=0,
        help='How often a download that breaks off without having brought a '
             'byte is taken up again. What is there already is kept.'),
    cfg.IntOpt(
        'limit_rate', default=0, min=0,
        help='Bytes a second that one download takes from Glance at most. '
             '0: no limit.'),
]


def _options() -> list[Any]:
    """Session, adapter and type of authentication.

    The type's own options (``auth_url``, ``username`` and so on) register
    themselves: some are required by one type and unknown to the next.
    """
    found = [
        *loading.get_auth_common_conf_options(),
        *loading.get_session_conf_options(),
        *loading.get_adapter_conf_options(),
    ]
    # Without a timeout a lost connection would stop a builder for ever.
    cfg.set_defaults(found, service_type='image', timeout=60,
                     valid_interfaces=['internal', 'public'])
    return found


OPTS: Final[list[Any]] = [*_OWN, *_options()]
