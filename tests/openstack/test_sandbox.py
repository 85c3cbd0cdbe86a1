# SPDX-License-Identifier: Apache-2.0
"""The sandbox itself: plain OpenStack in it works, and leaves no trace."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess

import pytest

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope='module')
def image(user, guest):
    """A guest in Glance that fastboot has no part in."""
    found = user.upload('sandbox-guest', guest, fastboot='off')
    yield found
    user.cloud.image.delete_image(found, ignore_missing=True)


def pids(layout):
    """Process ids of all services, by name."""
    from cloud.process import Records
    return {record.name: record.pid for record in Records(layout.run)
            if record.alive}


def spaces(layout):
    """The PID namespaces of the nodes."""
    from cloud import node, process
    records = process.Records(layout.run)
    return {process.namespace(node.target(records, which.name))
            for which in layout.nodes}


class TestServers:
    def test_on_each_host(self, user, layout, image, clean):
        """ACTIVE, the prompt, an address, metadata, ssh with the key."""
        found = [clean.boot(user.boot('plain', image, host.name, prompt=''))
                 for host in layout.hosts]
        for boot, host in zip(found, layout.hosts, strict=True):
            assert boot.server.status == 'ACTIVE'
            assert boot.server.hypervisor_hostname == host.name
        for boot in found:
            user.wait(lambda boot=boot: 'login:' in user.cloud.compute
                      .get_server_console_output(boot.server.id)['output'],
                      400, 'the prompt')
        for boot in found:
            address = boot.server.addresses['private'][0]['addr']
            self.reaches(user, address, boot.server.id)

    @staticmethod
    def reaches(user, address, server):
        from conftest import Tool
        sandbox = Tool()
        script = ('curl -s -m 20 http://169.254.169.254/openstack/latest/'
                  'meta_data.json; echo; hostname')

        def answer():
            return sandbox('exec', 'control', 'ssh', f'root@{address}',
                           script, check=False).stdout
        # sshd and the keys come a little after the prompt.
        user.wait(lambda: server in answer(), 200, 'ssh and metadata')
        assert answer().splitlines()[-1] == 'plain'

    def test_download_is_counted(self, user, layout, image, clean):
        """What "a host read so much from Glance" rests on."""
        host = layout.hosts[-1].name
        user.forget_base(host, image)
        size = user.cloud.image.get_image(image).size
        found = clean.boot(user.boot('counted', image, host, prompt=''))
        assert size <= found.traffic.glance < size * 1.1
        again = clean.boot(user.boot('counted', image, host, prompt=''))
        assert again.traffic.glance < size / 10


class TestServices:
    def test_restart_of_one(self, sandbox, user, layout):
        before = pids(layout)
        sandbox('restart', 'glance')
        after = pids(layout)
        assert {name for name in before if before[name] != after[name]} \
            == {'glance'}
        list(user.cloud.image.images())

    @pytest.mark.parametrize('service', ['mariadb', 'rabbitmq', 'libvirtd@h1',
                                         'nova-compute@h1', 'proxy'])
    def test_up_after_a_kill(self, sandbox, user, layout, service):
        """`up` starts what was killed and leaves the others alone."""
        before = pids(layout)
        os.killpg(before[service], signal.SIGKILL)
        user.wait(lambda: service not in pids(layout), 20, 'its end')
        assert sandbox('status', check=False).returncode == 3
        sandbox.up()
        after = pids(layout)
        assert sandbox('status').returncode == 0
        assert {name for name in before if before[name] != after[name]} \
            == {service}
        list(user.cloud.compute.servers())
        list(user.cloud.network.networks())

    def test_unknown_service(self, sandbox):
        done = sandbox('restart', 'nothing', check=False)
        assert done.returncode == 1
        assert 'there is no service nothing, but ' in done.stderr
        assert ' nova-conductor, ' in done.stderr

    def test_failed_start_names_service_and_log(self, sandbox, layout):
        config = layout.etc / 'proxy/machine.cfg'
        text = config.read_text()
        config.write_text('nonsense\n')
        try:
            done = sandbox('restart', 'proxy', check=False)
        finally:
            config.write_text(text)
            sandbox('start', 'proxy')
        assert done.returncode == 1
        assert 'proxy ended' in done.stderr
        assert f'{layout.log}/proxy.log:' in done.stderr
        assert "unknown keyword 'nonsense'" in done.stderr


class TestIsolation:
    def test_only_known_ports_of_loopback(self, layout):
        """Our processes listen at the APIs' ports, and nowhere else."""
        from cloud.layout import API_PORTS
        from cloud.process import Records
        ours = {record.pid for record in Records(layout.run)
                if record.alive and not record.node
                and not record.name.startswith('node@')}
        lines = subprocess.run(['ss', '-Hlntup'], capture_output=True,
                               text=True, check=True).stdout.splitlines()
        heard = {line.split()[4] for line in lines
                 for pid in ours if f'pid={pid},' in line}
        shown = set(API_PORTS) - (set() if layout.options.fastboot
                                  else {'fastboot'})
        assert heard == {f'127.0.0.1:{API_PORTS[name]}' for name in shown}

    def test_other_processes_are_elsewhere(self, layout):
        """All but the forwarder are in namespaces of a node."""
        from cloud.process import Records
        here = os.readlink('/proc/self/ns/net')
        for record in Records(layout.run):
            if record.node:
                there = os.readlink(f'/proc/{record.pid}/ns/net')
                assert there != here, record.name

    def test_links_are_elsewhere(self, layout):
        names = set(os.listdir('/sys/class/net'))
        assert not names & {'management', 'guests', 'br-int', 'br-ph', 'h1',
                            'h2', 'data', 'data-h1', 'data-h2'}
        named = pathlib.Path('/run/netns')
        if named.is_dir():
            assert not [name for name in os.listdir(named)
                        if name.startswith(('qdhcp-', 'qrouter-'))]

    def test_mounts_are_elsewhere(self, layout):
        mounts = pathlib.Path('/proc/self/mounts').read_text()
        assert str(layout.state) not in mounts
        assert '/var/lib/fastboot' not in mounts

    def test_hosts_see_each_other_and_their_own_state(self, sandbox, layout):
        for host in layout.hosts:
            assert sandbox.inside(host.name, 'hostname').strip() == host.name
            probe = layout.home(host) / 'fastboot' / 'probe'
            probe.write_text(host.name)
            try:
                assert sandbox.inside(
                    host.name, 'cat', '/var/lib/fastboot/probe') == host.name
            finally:
                probe.unlink()

    def test_link_rate(self, sandbox, layout):
        host = layout.hosts[0].name
        old = layout.options.link_rate or 'off'
        try:
            sandbox('link-rate', '100mbit')
            for node, device in (host, 'eth0'), ('control', host):
                assert 'rate 100Mbit' in sandbox.inside(
                    node, 'tc', 'qdisc', 'show', 'dev', device)
            sandbox('link-rate', 'off')
            assert 'tbf' not in sandbox.inside(
                host, 'tc', 'qdisc', 'show', 'dev', 'eth0')
        finally:
            sandbox('link-rate', old)


@pytest.mark.slow
class TestDown:
    """Last: everything goes, and comes back with its data."""

    def test_leaves_nothing(self, sandbox, user, layout):
        from cloud.layout import API_PORTS
        from cloud.process import members, start_time
        links = set(os.listdir('/sys/class/net'))
        processes, places = pids(layout), spaces(layout)
        images = {image.id for image in user.cloud.image.images()}
        try:
            sandbox('down')
            assert not [name for name, pid in processes.items()
                        if start_time(pid)]
            assert not [pid for place in places for pid in members(place)]
            assert set(os.listdir('/sys/class/net')) == links
            assert not pids(layout)
            for port in API_PORTS.values():
                with contextlib.closing(socket.socket()) as probe:
                    assert probe.connect_ex(('127.0.0.1', port))
        finally:
            sandbox.up()
        assert {image.id for image in user.cloud.image.images()} == images

    def test_up_after_the_end_of_a_node(self, sandbox, layout, user):
        """As after a power cut: the first process of control is killed."""
        from cloud import node
        from cloud.process import Records
        os.kill(node.target(Records(layout.run), 'control'), signal.SIGKILL)
        user.wait(lambda: 'mariadb' not in pids(layout), 20, 'the end')
        sandbox.up()
        assert sandbox('status').returncode == 0
        list(user.cloud.compute.servers())
