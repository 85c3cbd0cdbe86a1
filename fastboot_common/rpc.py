# SPDX-License-Identifier: Apache-2.0
"""What builders and agents say to each other over the message bus.

Two topics, both casts: nobody waits for an answer, and nobody fails because
the bus is away. What is lost, a catch-up finds.

* ``fastboot-agent``: ``announce(version)`` to every agent, ``sync(images)``
  to one.
* ``fastboot-centre``: ``report(report)``, which one builder takes.

Only services import this; the standalone commands need no bus.
"""

import contextlib
from typing import Any, Final

import oslo_messaging
from oslo_config import cfg
from oslo_service import backend as service_backend

EXCHANGE: Final = 'fastboot'
AGENTS: Final = 'fastboot-agent'
CENTRE: Final = 'fastboot-centre'
_VERSION: Final = '1.0'


def transport(conf: cfg.ConfigOpts) -> Any:
    """The bus that ``[DEFAULT] transport_url`` names.

    It connects when it is used.
    """
    return oslo_messaging.get_rpc_transport(conf)


def use_threads() -> None:
    """Keep oslo's services off eventlet.

    To be called before anything imports oslo_messaging's servers:
    oslo_service decides at its first import, and its default was eventlet.
    """
    # The program that we run in may have decided.
    with contextlib.suppress(
            service_backend.exceptions.BackendAlreadySelected):
        service_backend.init_backend(service_backend.BackendType.THREADING)


class Agents:
    """The agents of all compute hosts, as builders see them."""

    def __init__(self, bus: Any) -> None:
        self._client = _client(bus, AGENTS)

    def announce(self, version: int) -> None:
        """Tell every agent that the repository has a new version.

        :raises oslo_messaging.MessagingException: the bus is away; agents
            find the version at their next look.
        """
        self._client.prepare(fanout=True).cast({}, 'announce',
                                               version=version)

    def sync(self, host: str, images: list[str] | None = None) -> None:
        """Tell the agent of one host to sync.

        :param images: ids; None: all.
        :raises oslo_messaging.MessagingException: the bus is away.
        """
        self._client.prepare(server=host).cast({}, 'sync', images=images)


class Centre:
    """The builders, as an agent sees them."""

    def __init__(self, bus: Any) -> None:
        self._client = _client(bus, CENTRE)

    def report(self, report: dict[str, Any]) -> None:
        """Tell what a host has; see the reference of the agent.

        :raises oslo_messaging.MessagingException: the bus is away.
        """
        self._client.cast({}, 'report', report=report)


def _client(bus: Any, topic: str) -> Any:
    target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic,
                                   version=_VERSION)
    return oslo_messaging.get_rpc_client(bus, target)


def serve(bus: Any, topic: str, server: str, endpoint: object) -> Any:
    """Start to answer a topic, each call in a thread.

    :param server: the name of this host.
    :param endpoint: its public methods are the calls: ``(context, …)``.
    :returns: to be stopped with ``stop()`` and ``wait()``.
    """
    target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic,
                                   server=server, version=_VERSION)
    started = oslo_messaging.get_rpc_server(
        bus, target, [endpoint], executor='threading',
        access_policy=oslo_messaging.ExplicitRPCAccessPolicy)
    started.start()
    return started
