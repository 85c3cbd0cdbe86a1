# SPDX-License-Identifier: Apache-2.0
"""Reports and syncs over a real RabbitMQ, and what the centre says when it
is away."""

import queue
import time

import brokers
import pytest
from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code

from fastboot_common import exception, rpc
from fastboot_common.conf import agent, api, database, jobboard, opts
from fastboot_common.rpc import oslo_messaging
from fastboot_common.upgradecheck import common, result
from fastboot_glance import centre, records
from fastboot_glance.api import parts


@pytest.fixture(scope='module')
def broker(tmp_path_factory):
    with brokers.rabbitmq(tmp_path_factory.mktemp('rabbitmq')) as found:
        yield found


@pytest.fixture
def conf(broker, tmp_path):
    found = opts.register(cfg.ConfigOpts())
    for module in (agent, api, database, jobboard):
        found.register_opts(module.OPTS, group=module.GROUP)
    (tmp_path / 'fastboot.conf').write_text(
        f'[DEFAULT]\ntransport_url = {broker.url}\n'
        f'state_dir = {tmp_path}\n')
    found([], default_config_files=[str(tmp_path / 'fastboot.conf')])
    return found


def report(host, **more):
    return {'host': host, 'version': 3, 'at': time.time(), 'software': '1',
            'volume_bytes': 1, 'mirror_bytes': 2, 'free_bytes': 3,
            'images': [], **more}


def test_reports_arrive_and_hostile_ones_do_no_harm(conf, tmp_path):
    store = records.Records(f'sqlite:///{tmp_path}/records.db')
    store.create()
    bus = rpc.transport(conf)
    server = rpc.serve(bus, rpc.CENTRE, 'builder', centre.Endpoint(store))
    try:
        sender = rpc.Centre(bus)
        for wrong in (None, [], {'host': '../x'}, report('h1', images='x'),
                      report('h1', at='now')):
            sender.report(wrong)
        for number in range(20):
            sender.report(report(f'h{number}'))
        brokers.wait_for(lambda: len(store.hosts()) == 20, 'reports')
    finally:
        server.stop()
        server.wait()


class Agent:
    """The endpoint of a host's agent."""

    def __init__(self):
        self.heard = queue.Queue()

    @oslo_messaging.expose
    def sync(self, context, images):
        self.heard.put(images)


def test_sync_reaches_the_one_agent(conf):
    bus = rpc.transport(conf)
    agents = {name: Agent() for name in ('h1', 'h2')}
    servers = [rpc.serve(bus, rpc.AGENTS, name, endpoint)
               for name, endpoint in agents.items()]
    try:
        centre_parts = parts.Parts(conf)
        centre_parts.sync('h2', ['a'])
        centre_parts.sync('h2', None)
        assert agents['h2'].heard.get(timeout=60) == ['a']
        assert agents['h2'].heard.get(timeout=60) is None
        assert agents['h1'].heard.empty()
    finally:
        for server in servers:
            server.stop()
            server.wait()


def test_status(conf):
    assert result.guarded(common.bus)(conf).code == Code.SUCCESS


def test_broker_away(conf, tmp_path):
    """Nothing waits for ever."""
    rpc.transport(conf)  # registers the option
    conf.set_override('transport_url',
                      f'rabbit://x:y@127.0.0.1:{brokers.free_port()}/')
    found = result.guarded(common.bus)(conf)
    assert found.code == Code.FAILURE
    assert 'transport_url' in found.details
    with pytest.raises(exception.Unavailable, match='message bus'):
        parts.Parts(conf).sync('h1', None)
