# SPDX-License-Identifier: Apache-2.0
"""The herald: tells agents and whoever listens what builders did.

A message bus that is away would block its callers for ever; here it blocks
one thread, and what does not fit behind it is dropped. Agents find a version
that nobody announced at their next look.
"""

import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception, rpc
from fastboot_common.rpc import oslo_messaging

LOG = logging.getLogger(__name__)

_WAITING: Final = 1000


class Herald:
    """Sends announcements and notifications, in a thread of its own."""

    def __init__(self, conf: Any) -> None:
        """Connect when used."""
        self._conf = conf
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(_WAITING)
        self._agents: rpc.Agents | None = None
        self._notifier: Any = None
        threading.Thread(target=self._run, name='herald',
                         daemon=True).start()

    def announce(self, version: int) -> None:
        """Tell all agents of a new version of the repository."""
        self._put(lambda: self._announce(version))

    def notify(self, event: str, payload: dict[str, Any]) -> None:
        """Send a notification.

        :param event: what comes behind ``fastboot.image.``.
        """
        self._put(lambda: self._notify(f'fastboot.image.{event}', payload))

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            LOG.warning('the message bus is away; a message is dropped')

    def _run(self) -> None:
        while True:
            call = self._queue.get()
            try:
                call()
            except exception.Unavailable as error:
                LOG.warning('a message was not sent: %s', error)
            except Exception:  # whatever a driver of the bus may raise
                LOG.exception('a message was not sent')

    def _announce(self, version: int) -> None:
        if self._agents is None:
            self._agents = rpc.Agents(rpc.transport(self._conf))
        self._agents.announce(version)

    def _notify(self, event: str, payload: dict[str, Any]) -> None:
        if self._notifier is None:
            self._notifier = oslo_messaging.Notifier(
                oslo_messaging.get_notification_transport(self._conf),
                publisher_id=f'fastboot.{socket.gethostname()}')
        send = self._notifier.error if event.endswith('.error') \
            else self._notifier.info
        send({}, event, payload)
