# SPDX-License-Identifier: Apache-2.0
"""From a guest's first reads to a boot set: agents, the bus, the centre."""

import queue
import random
import re
import subprocess
import time
import urllib.request
from unittest import mock

import pytest
from agents import Agent, needs_nbdkit, wait_for
from brokers import free_port
from images import Reader, World, data_blocks, disk
from oslo_config import cfg
from test_agent import link_of

from fastboot_common import chain, rpc
from fastboot_common.rpc import oslo_messaging
from fastboot_glance import centre, images, observations, records, registry

pytestmark = needs_nbdkit

BLOCK = 16384
SIZE = 40 << 20
WINDOW = 4


class Centre:
    """The endpoint, its records, and who looks at them; no Glance."""

    def __init__(self, world, url):
        self.world = world
        self.heard = queue.Queue()
        self.records = records.Records(f'sqlite:///{world.path}/records.db')
        self.records.create()
        cfg.CONF([], default_config_files=[])
        self.bus = oslo_messaging.get_rpc_transport(cfg.CONF, url=url)
        self.server = rpc.serve(
            self.bus, rpc.CENTRE, 'centre',
            centre.Endpoint(self.records, self.heard.put))
        self.repository = world.repository
        self.refresher = observations.Refresher(
            self.records, registry.Registry(
                self.repository, self.records, mock.Mock(), mock.Mock(),
                mock.Mock()),
            'always', 2)

    def look(self):
        """Wait for an observation, and follow it: the new manifest."""
        image_id = self.heard.get(timeout=60)
        self.refresher.look(images.Image(
            image_id, 'name', 'active', None, None, 'raw', 'bare', '',
            'public', '', '', {}), self.registered(image_id))
        rpc.Agents(self.bus).announce(self.repository.state().version)
        return self.manifest(image_id)

    def registered(self, image_id):
        return self.repository.state().images[image_id]

    def manifest(self, image_id):
        return self.repository.read_manifest(
            self.registered(image_id).manifest)

    def close(self):
        self.server.stop()
        self.server.wait()


class Host(Agent):
    """An agent that observes, and what its guests had to wait for."""

    def __init__(self, path, world, url, **agent):
        self.port = free_port()
        super().__init__(path, world.path / 'repo', **{
            'DEFAULT': {'transport_url': url}, 'agent': {
                'messaging': True, 'interval': 3600, 'host': path.name,
                'observe': WINDOW, 'metrics_port': self.port, **agent}})

    def misses(self):
        text = urllib.request.urlopen(
            f'http://127.0.0.1:{self.port}/metrics', timeout=20).read()
        found = re.search(
            rb'fastboot_ensure_requests_total{result="ok"} ([0-9.]+)', text)
        return int(float(found[1])) if found else 0

    def boot(self, image_id, extents):
        """A guest: a stub on the slot, and its reads one after another."""
        stub = self.state / '_base' / f'stub-{time.monotonic()}'
        stub.parent.mkdir(exist_ok=True)
        status, answer = self.acquire(image_id, stub)
        assert status == 200, answer
        chain.make_stub(stub, link_of(answer))
        begun = time.monotonic()
        done = subprocess.run(
            ['qemu-io', '-r', '-U', '-f', 'qcow2', stub], text=True,
            input=''.join(f'read -q {offset} {length}\n'
                          for offset, length in extents),
            capture_output=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert 'failed' not in done.stdout, done.stdout + self.words()
        self.seconds = time.monotonic() - begun

    def here(self, image):
        """The blocks with data that are in the volume, and they are right."""
        reader = Reader(self.state / 'host' / 'volumes' / image.domain
                        / 'volume', image.serial)
        try:
            return {number for number, block in enumerate(reader.read())
                    if block and block.strip(b'\0')}
        finally:
            reader.close()


def scattered(count, seed=1):
    """Reads of a boot: short ones here and there, and what they touch."""
    rng = random.Random(seed)
    extents, touched = [], []
    for _ in range(count):
        length = rng.choice([512, 4096, 16384, 40000]) // 512 * 512
        offset = rng.randrange(0, SIZE - length) // 512 * 512
        extents.append((offset, length))
        touched += range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
    return extents, list(dict.fromkeys(touched))


@pytest.mark.timeout(400)
def test_the_first_guest_boots_for_the_others(room, broker):
    world = World(room, BLOCK)
    data = disk(SIZE, 1, block=BLOCK)
    image = world.publish('image', data)
    with_data = set(data_blocks(data, BLOCK))
    there = Centre(world, broker.url)
    there.records.note_build('image', state='ready', boot_size=0,
                             version=image.serial, error='no boot set')
    first = Host(room / 'first', world, broker.url)
    second = Host(room / 'second', world, broker.url)
    extents, touched = scattered(200)
    wanted = [number for number in touched if number in with_data]
    try:
        for one in (first, second):
            one.start()
            one.await_state('image', 'ready')
            wait_for(lambda one=one: one.status()['messaging'])
        # Only what was read comes, so that all of it is seen.
        first.boot('image', extents)
        assert first.here(image) == set(wanted)
        made = there.look()
        assert made.capture['state'] == 'observed'
        assert made.capture['observed']['hosts'] == 1
        assert made.boot.tolist() == wanted
        assert there.registered('image').serial == image.serial
        build = there.records.build('image')
        assert (build.boot_size, build.error) == (len(wanted) * BLOCK, '')

        # The other host gets exactly that, and its guest waits for nothing.
        wait_for(lambda: second.status()['version'] == 2)
        second.await_state('image', 'ready')
        second.boot('image', extents)
        assert second.here(image) == set(wanted)
        assert second.misses() == 0
        # On the first it was there anyway.
        first.await_state('image', 'thawed')
        before = first.misses()
        first.boot('image', extents)
        assert first.misses() == before
        # Nothing was missed, so nothing is said.
        time.sleep(WINDOW + 6)
        assert there.heard.empty()
    finally:
        there.close()
        for one in (first, second):
            one.clean()


@pytest.mark.timeout(400)
def test_misses_of_two_hosts_grow_a_boot_set(room, broker):
    """And those of one do not, nor what a host makes up."""
    world = World(room, BLOCK)
    data = disk(SIZE, 2, block=BLOCK)
    boot, more = scattered(60, 1), scattered(60, 2)
    with_data = set(data_blocks(data, BLOCK))
    image = world.publish('image', data, boot[1])
    there = Centre(world, broker.url)
    old = there.manifest('image')
    there.records.note_build(
        'image', state='ready', version=image.serial,
        boot_size=len(old.boot) * BLOCK)
    hosts = [Host(room / name, world, broker.url) for name in ('h1', 'h2')]
    liar = rpc.Centre(there.bus)
    try:
        for wrong in (None, {'host': 'h9'}, {
                'host': 'h9', 'image': 'image', 'serial': image.serial,
                'reads': 'AAAA'}, {'host': '../h', 'image': 'x'}):
            liar.observe(wrong)
        for one in hosts:
            one.start()
            one.await_state('image', 'ready')
            wait_for(lambda one=one: one.status()['messaging'])
        for one in hosts:
            one.boot('image', boot[0] + more[0])
        assert there.look().boot.tolist() == old.boot.tolist()
        made = there.look()
        added = made.boot.tolist()[len(old.boot):]
        assert made.boot.tolist()[:len(old.boot)] == old.boot.tolist()
        # Whole frames came here, so later reads of them were not seen.
        want = [one for one in more[1]
                if one in with_data and one not in set(boot[1])]
        assert set(added) <= set(want)
        assert len(added) * BLOCK > 256 << 10
        assert there.heard.empty()
    finally:
        there.close()
        for one in hosts:
            one.clean()
