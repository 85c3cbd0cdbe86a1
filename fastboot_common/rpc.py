# SPDX-License-Identifier: Apache-2.0
"""What builders and agents say to each other over the message bus.

Two topics, both casts: nobody waits for an answer, and nobody fails because
the bus is away. What is lost, a catch-up finds.

* ``fastboot-agent``: ``announce(version)`` to every agent, ``sync(images)``
  to one.
* ``fastboot-centre``: ``report(report)`` and ``observe(observation)``, which
  one builder takes.

Only services import this; the standalone commands need no bus.
"""

import contextlib
import importlib
from typing import Any, Final

from oslo_config import cfg
from oslo_service import backend as service_backend

from fastboot_common import exception

#: Others take oslo_messaging from here.
__all__ = ['AGENTS', 'CENTRE', 'EXCHANGE', 'Agents', 'Centre',
           'oslo_messaging', 'serve', 'transport']

# oslo_messaging decides at its import what oslo_service runs on, and its
# default is eventlet. The program that we run in may have decided.
with contextlib.suppress(service_backend.exceptions.BackendAlreadySelected):
    service_backend.init_backend(service_backend.BackendType.THREADING)

import oslo_messaging  # noqa: E402

EXCHANGE: Final = 'fastboot'
AGENTS: Final = 'fastboot-agent'
CENTRE: Final = 'fastboot-centre'
_VERSION: Final = '1.0'


def transport(conf: cfg.ConfigOpts) -> Any:
    """The bus that ``[DEFAULT] transport_url`` names.

    It connects when it is used.
    """
    _register(conf)
    return oslo_messaging.get_rpc_transport(conf)


def _register(conf: cfg.ConfigOpts) -> None:
    """Options that oslo.messaging 18 registers with ``cfg.CONF`` only."""
    for name in ('metrics', 'tracing'):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(
                f'oslo_messaging._{name}.client')
            group = f'oslo_messaging_{name}'
            conf.register_opts(getattr(module, group), group=group)


class Agents:
    """The agents of all compute hosts, as builders see them."""

    def __init__(self, bus: Any) -> None:
        self._client = _client(bus, AGENTS)

    def announce(self, version: int) -> None:
        """Tell every agent that the repository has a new version.

        :raises Unavailable: the bus is away; agents find the version at
            their next look.
        """
        _cast(self._client.prepare(fanout=True), 'announce',
              version=version)

    def sync(self, host: str, images: list[str] | None = None) -> None:
        """Tell the agent of one host to sync.

        :param images: ids; None: all.
        :raises Unavailable: the bus is away.
        """
        _cast(self._client.prepare(server=host), 'sync', images=images)


class Centre:
    """The builders, as an agent sees them."""

    def __init__(self, bus: Any) -> None:
        self._client = _client(bus, CENTRE)

    def report(self, report: dict[str, Any]) -> None:
        """Tell what a host has; see the reference of the agent.

        :raises Unavailable: the bus is away.
        """
        _cast(self._client, 'report', report=report)

    def observe(self, observation: dict[str, Any]) -> None:
        """Tell what guests read in their first minutes; see
        :mod:`fastboot_common.observation`.

        :raises Unavailable: the bus is away.
        """
        _cast(self._client, 'observe', observation=observation)


def _client(bus: Any, topic: str) -> Any:
    target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic,
                                   version=_VERSION)
    # Not for ever, which is the default.
    return oslo_messaging.get_rpc_client(bus, target, retry=1)


def _cast(client: Any, method: str, **words: Any) -> None:
    try:
        client.cast({}, method, **words)
    except Exception as error:  # kombu's own errors come through
        raise exception.Unavailable(f'the message bus: {error}') from error


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
