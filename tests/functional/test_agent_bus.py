# SPDX-License-Identifier: Apache-2.0
"""The agent on a real message bus: there, away, and back."""

import threading
import time

import pytest
from agents import Agent, needs_nbdkit, wait_for
from images import World, disk
from oslo_config import cfg

from fastboot_common import rpc
from fastboot_common.rpc import oslo_messaging

pytestmark = needs_nbdkit


class Centre:
    """Collects what agents report and emit."""

    def __init__(self, url):
        self.reports = []
        self.events = []
        cfg.CONF([], default_config_files=[])
        self.bus = oslo_messaging.get_rpc_transport(cfg.CONF, url=url)
        notices = oslo_messaging.get_notification_transport(
            cfg.CONF, url=url)
        self.servers = [
            rpc.serve(self.bus, rpc.CENTRE, 'centre', self),
            oslo_messaging.get_notification_listener(
                notices, [oslo_messaging.Target(topic='notifications')],
                [self], executor='threading')]
        self.servers[1].start()

    @oslo_messaging.expose
    def report(self, context, report):
        self.reports.append(report)

    def info(self, context, publisher, event, payload, metadata):
        self.events.append((publisher, event, payload))

    def close(self):
        for server in self.servers:
            server.stop()
            server.wait()

    def states(self):
        return {image['id']: image['state']
                for image in self.reports[-1]['images']} \
            if self.reports else {}


def options(url, **agent):
    return {'DEFAULT': {'transport_url': url},
            'oslo_messaging_notifications': {'driver': 'messagingv2'},
            'oslo_messaging_rabbit': {'kombu_reconnect_delay': 0.5},
            'agent': {'messaging': True, 'interval': 3600, 'host': 'host-1',
                      **agent}}


@pytest.mark.timeout(400)
def test_the_bus(room, broker):
    world = World(room)
    world.publish('image', disk(300 * 4096, 1), range(40))
    agent = Agent(room / 's', world.path / 'repo', **options(broker.url))
    centre = Centre(broker.url)
    agents = rpc.Agents(centre.bus)
    try:
        agent.start()
        wait_for(lambda: centre.states().get('image') == 'ready')
        wait_for(lambda: agent.status()['messaging'])
        assert centre.reports[-1]['host'] == 'host-1'

        # News come by announcement: nobody looks for an hour.
        world.publish('second', disk(90 * 4096, 2), range(9))
        agents.announce(2)
        wait_for(lambda: centre.states().get('second') == 'ready')
        world.publish('third', disk(90 * 4096, 3), range(9))
        agents.sync('host-1', ['third'])
        wait_for(lambda: centre.states().get('third') == 'ready')
        agents.sync('another-host')
        agents.sync('host-1')

        # What goes is told.
        agent.acquire('second', room / 'stub')
        agent.call('release', image='second', holder='nova',
                   file=str(room / 'stub'))
        world.repository.remove('second')
        agents.announce(4)
        wait_for(lambda: centre.events)
        publisher, event, payload = centre.events[0]
        assert (publisher, event) == ('fastboot.host-1',
                                      'fastboot.image.evict')
        assert payload['image_id'] == 'second'

        # Nonsense on the bus breaks nothing.
        client = oslo_messaging.get_rpc_client(
            centre.bus, oslo_messaging.Target(
                exchange=rpc.EXCHANGE, topic=rpc.AGENTS, version='1.0'))
        for name, words in (('announce', {'version': 'x'}),
                            ('announce', {'version': None}),
                            ('sync', {'images': 7}),
                            ('sync', {'images': [None, '../x']}),
                            ('stop', {}), ('announce', {})):
            client.prepare(fanout=True).cast({}, name, **words)

        # The broker goes away under it, and comes back: guests do not care.
        broker.freeze()
        assert agent.acquire('image', room / 'stub')[0] == 200
        assert agent.status()['state'] == 'serving'
        broker.thaw()
        world.publish('fourth', disk(90 * 4096, 4), range(9))
        agents.announce(5)
        wait_for(lambda: centre.states().get('fourth') == 'ready')
        agent.stop()
    finally:
        agent.clean()
        closer = threading.Thread(target=centre.close, daemon=True)
        closer.start()
        closer.join(20)


def test_no_broker_at_all(room):
    """Guests are served, news come by looking, and it stops at once."""
    world = World(room)
    world.publish('image', disk(300 * 4096, 1), range(40))
    agent = Agent(room / 's', world.path / 'repo', **options(
        'rabbit://guest:guest@127.0.0.1:1/', interval=1))
    try:
        agent.start()
        agent.await_state('image', 'ready')
        assert agent.acquire('image', room / 'stub')[0] == 200
        assert agent.status()['messaging'] is False
        world.publish('second', disk(90 * 4096, 2), range(9))
        agent.await_state('second', 'ready')
        begun = time.monotonic()
        agent.stop()
        assert time.monotonic() - begun < 40
    finally:
        agent.clean()
