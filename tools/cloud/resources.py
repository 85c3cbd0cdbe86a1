# SPDX-License-Identifier: Apache-2.0
"""What users find: a network, flavors, a key pair, and hosts."""

import pathlib
import subprocess

from cloud.config.neutron import PHYSICAL_NETWORK
from cloud.layout import GUESTS, Layout
from cloud.rest import Rest
from cloud.steps import Clock, StepError

#: MiB of memory, processors, GiB of disk.
_FLAVORS = {'m1.nano': (64, 1, 2), 'm1.tiny': (512, 1, 2),
            'm1.small': (1024, 1, 5)}


class Resources:
    """Of Nova and Neutron."""

    def __init__(self, layout: Layout, rest: Rest) -> None:
        self._layout = layout
        self._rest = rest

    def make_network(self, clock: Clock) -> str:
        """A flat network for all, and a security group without walls."""
        external = self._layout.options.router
        found = self._rest('neutron', 'GET',
                           '/networks?name=private')['networks']
        if found:
            if found[0]['router:external'] != external:
                self._rest('neutron', 'PUT', f'/networks/{found[0]["id"]}',
                           {'network': {'router:external': external}})
            return ''
        network = self._rest('neutron', 'POST', '/networks', {'network': {
            'name': 'private', 'shared': True,
            'router:external': external,
            'provider:network_type': 'flat',
            'provider:physical_network': PHYSICAL_NETWORK,
        }})['network']
        self._rest('neutron', 'POST', '/subnets', {'subnet': {
            'name': 'private', 'network_id': network['id'], 'ip_version': 4,
            'cidr': f'{GUESTS}.0/24', 'gateway_ip': f'{GUESTS}.1',
            'allocation_pools': [{'start': f'{GUESTS}.10',
                                  'end': f'{GUESTS}.250'}],
        }})
        groups = self._rest(
            'neutron', 'GET', '/security-groups?name=default&project_id='
            f'{network["project_id"]}')['security_groups']
        for protocol in ('icmp', 'tcp', 'udp'):
            self._rest('neutron', 'POST', '/security-group-rules', {
                'security_group_rule': {
                    'security_group_id': groups[0]['id'],
                    'direction': 'ingress', 'ethertype': 'IPv4',
                    'protocol': protocol,
                    'remote_ip_prefix': '0.0.0.0/0'}})
        return 'network "private"'

    def await_hosts(self, clock: Clock) -> str:
        """Until Nova can use every host; flavors, the key pair."""
        names = {node.name for node in self._layout.hosts}
        if not clock.wait(lambda: names <= self._hypervisors(), 90, .3):
            raise StepError(f'Nova knows the hosts {self._hypervisors()}, '
                            f'not all of {names}')
        self._flavors()
        self._key_pair()
        return f'Nova can use {", ".join(sorted(names))}'

    def _hypervisors(self) -> set[str]:
        answer = self._rest.listed('nova', '/os-hypervisors/detail')
        return {row['service']['host'] for row in answer['hypervisors']}

    def _flavors(self) -> None:
        known = {flavor['name'] for flavor in
                 self._rest('nova', 'GET', '/flavors')['flavors']}
        for name, (ram, cpus, disk) in _FLAVORS.items():
            if name not in known:
                self._rest('nova', 'POST', '/flavors', {'flavor': {
                    'name': name, 'ram': ram, 'vcpus': cpus, 'disk': disk}})

    def _key_pair(self) -> None:
        public = make_ssh_key(self._layout)
        pairs = [row['keypair'] for row in
                 self._rest('nova', 'GET', '/os-keypairs')['keypairs']]
        old = [pair for pair in pairs if pair['name'] == 'sandbox']
        if old and old[0]['public_key'].strip() == public:
            return
        if old:
            self._rest('nova', 'DELETE', '/os-keypairs/sandbox')
        self._rest('nova', 'POST', '/os-keypairs', {'keypair': {
            'name': 'sandbox', 'type': 'ssh', 'public_key': public}})


def make_ssh_key(layout: Layout) -> str:
    """Make the key and the settings of ssh on the nodes.

    :return: the public key.
    """
    key = layout.key
    key.parent.mkdir(mode=0o700, exist_ok=True)
    if not key.exists():
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C',
                        'sandbox', '-f', str(key)], check=True, timeout=60)
    # Guests come and go, and their addresses with them.
    (key.parent / 'config').write_text(
        'StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n'
        'LogLevel ERROR\nConnectTimeout 10\n')
    return pathlib.Path(f'{key}.pub').read_text().strip()
