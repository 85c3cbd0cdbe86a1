# SPDX-License-Identifier: Apache-2.0
"""The message bus: announcements come in, reports and notifications go out.

Nothing waits for it. While it is away, the newest report and a bounded number
of notifications are kept; what is lost, the next report says.
"""

import collections
import threading
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import rpc
from fastboot_common.rpc import oslo_messaging
from fastboot_nova.agent import microvms, sync

LOG = logging.getLogger(__name__)

_NOTIFICATIONS: Final = 1000
_IMAGES: Final = 1000
_OBSERVATIONS: Final = 16
#: More than any version.
_VERSIONS: Final = 1 << 31


class Endpoint:
    """What builders may call.

    :param follower: does it.
    :param beside: the µVMs, which have a repository of their own.
    """

    def __init__(self, follower: sync.Sync,
                 beside: microvms.Microvms | None = None) -> None:
        self._sync = follower
        self._microvms = beside

    @oslo_messaging.expose
    def announce(self, context: dict[str, Any], version: Any) -> None:
        """The repository has a new version."""
        if type(version) is int and version < _VERSIONS:
            self._sync.announce(version)
            if self._microvms:
                self._microvms.look()

    @oslo_messaging.expose
    def sync(self, context: dict[str, Any], images: Any = None) -> None:
        """Sync now; all, or some images."""
        if images is None:
            self._sync.everything()
            if self._microvms:
                self._microvms.everything()
        elif isinstance(images, list):
            for image_id in images[:_IMAGES]:
                if isinstance(image_id, str):
                    self._sync.ask(image_id)
            if self._microvms:
                self._microvms.look()


class Bus:
    """A thread that listens, and one that speaks.

    :param conf: with ``transport_url``.
    :param host: the name of this host.
    :param endpoint: see :class:`Endpoint`.
    """

    def __init__(self, conf: Any, host: str, endpoint: Endpoint) -> None:
        self._conf = conf
        self._host = host
        self._endpoint = endpoint
        self._wakened = threading.Condition()
        self._report: dict[str, Any] | None = None
        self._notifications: collections.deque[
            tuple[str, dict[str, Any]]] = collections.deque(
                maxlen=_NOTIFICATIONS)
        self._observations: collections.deque[
            dict[str, Any]] = collections.deque(maxlen=_OBSERVATIONS)
        self._stopping = False
        self._server: Any = None
        self._transport = rpc.transport(conf)
        self._centre = rpc.Centre(self._transport)

    def start(self) -> None:
        """Begin. Connecting may take for ever; nobody waits for it."""
        for name, run in (('listen', self._listen), ('speak', self._speak)):
            threading.Thread(target=run, name=f'bus-{name}',
                             daemon=True).start()

    def stop(self) -> None:
        """End, in the background."""
        with self._wakened:
            self._stopping = True
            self._wakened.notify_all()
        if self._server is not None:
            threading.Thread(target=self._server.stop, daemon=True).start()

    @property
    def connected(self) -> bool:
        """Whether announcements can come."""
        return self._server is not None

    def report(self, report: dict[str, Any]) -> None:
        """Tell the centre; of several that wait only the last is sent."""
        with self._wakened:
            self._report = report
            self._wakened.notify_all()

    def notify(self, event: str, payload: dict[str, Any]) -> None:
        """Emit a notification."""
        with self._wakened:
            self._notifications.append((event, payload))
            self._wakened.notify_all()

    def observe(self, observation: dict[str, Any]) -> None:
        """Tell the centre what guests read in their first minutes."""
        with self._wakened:
            self._observations.append(observation)
            self._wakened.notify_all()

    def _listen(self) -> None:
        # Blocks until there is a broker.
        try:
            self._server = rpc.serve(self._transport, rpc.AGENTS, self._host,
                                     self._endpoint)
            LOG.info('listening to %s', rpc.AGENTS)
        except Exception:
            LOG.exception('announcements of builders cannot come; new '
                          'versions are found every [agent] interval')

    def _speak(self) -> None:
        notifier = oslo_messaging.Notifier(
            oslo_messaging.get_notification_transport(self._conf),
            f'fastboot.{self._host}')
        while True:
            with self._wakened:
                self._wakened.wait_for(
                    lambda: self._stopping or self._report is not None
                    or self._notifications or self._observations)
                if self._stopping:
                    return
                report, self._report = self._report, None
                events = list(self._notifications)
                self._notifications.clear()
                observations = list(self._observations)
                self._observations.clear()
            try:
                for event, payload in events:
                    notifier.info({}, event, payload)
                if report is not None:
                    self._centre.report(report)
                for observation in observations:
                    self._centre.observe(observation)
            except Exception as error:
                LOG.warning('the message bus is away: %s', error)
