# SPDX-License-Identifier: Apache-2.0
"""Notifications of nova-compute's side: hit and miss.

Sent by one thread from a short queue, so that a bus that is away costs a
spawn nothing; what finds the queue full is dropped. Imports nova.
"""

import contextlib
import functools
import queue
import threading
from typing import Any, Final

import nova.conf
import nova.rpc
import oslo_messaging
from oslo_log import log as logging

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

_QUEUE: Final[queue.Queue[tuple[str, dict[str, Any]]]] = queue.Queue(100)


def emit(event: str, image_id: str, instance: Any, **payload: Any) -> None:
    """Say ``fastboot.image.<event>`` to whom it may concern.

    :param payload: seconds, thawed (bytes), reason.
    """
    _start()
    payload.update(image_id=image_id, host=CONF.host,
                   instance_uuid=instance.uuid if instance else None)
    with contextlib.suppress(queue.Full):
        _QUEUE.put_nowait((f'fastboot.image.{event}', payload))


@functools.cache
def _start() -> None:
    threading.Thread(target=_send_all, daemon=True,
                     name='fastboot-notice').start()


def _send_all() -> None:
    notifier = None
    while True:
        event, payload = _QUEUE.get()
        try:
            notifier = notifier or oslo_messaging.Notifier(
                nova.rpc.NOTIFICATION_TRANSPORT,
                publisher_id=f'fastboot.{CONF.host}', retry=0)
            notifier.info({}, event, payload)
        except Exception as error:
            LOG.debug('fastboot: %s was not sent: %s', event, error)
