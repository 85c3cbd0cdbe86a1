# SPDX-License-Identifier: Apache-2.0
"""The listener: hears Glance's notifications.

It takes nothing from them but the ids of images; what is to be done, the
steward finds out by asking Glance.
"""

import re
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common.rpc import oslo_messaging
from fastboot_glance import audit

LOG = logging.getLogger(__name__)

#: Images that others change do not matter before they are active. The
#: notifications ``activate`` and ``upload`` come before Glance has stored
#: that they are; an ``update`` follows.
_EVENTS: Final = r'^image\.(update|activate|upload|delete)$'
#: What Glance gives images, or lets their owners give them.
_ID: Final = re.compile(r'[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}')
_STATES: Final = ('active', 'deleted', 'pending_delete')


class Endpoint:
    """Takes notifications of priority INFO, as all of Glance's are."""

    filter_rule = oslo_messaging.NotificationFilter(event_type=_EVENTS)

    def __init__(self, desk: audit.Desk) -> None:
        self._desk = desk

    def info(self, context: dict[str, Any], publisher: str, event: str,
             payload: Any, metadata: dict[str, Any]) -> None:
        """Pass on what may matter."""
        if not isinstance(payload, dict) \
                or payload.get('status') not in _STATES:
            return
        image_id = payload.get('id')
        if isinstance(image_id, str) and _ID.fullmatch(image_id):
            LOG.debug('heard %s of image %s', event, image_id)
            self._desk.put(image_id)


def start(conf: Any, desk: audit.Desk) -> Any:
    """Start to listen, in threads.

    :returns: to be stopped with ``stop()`` and ``wait()``; None: nothing is
        to be listened to.
    """
    group = conf.listener
    if not group.topics:
        return None
    found = oslo_messaging.get_notification_listener(
        oslo_messaging.get_notification_transport(
            conf, url=group.transport_url),
        [oslo_messaging.Target(exchange=group.exchange, topic=topic)
         for topic in group.topics],
        [Endpoint(desk)], executor='threading', pool=group.pool)
    found.start()
    return found
