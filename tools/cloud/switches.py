# SPDX-License-Identifier: Apache-2.0
"""Open vSwitch on the hosts, before Neutron's agent takes over."""

from cloud.config.neutron import bridge
from cloud.inside import Inside
from cloud.steps import Clock, Step

_FILE = '/run/openvswitch/conf.db'
_SCHEMA = '/usr/share/openvswitch/vswitch.ovsschema'


class Switches:
    """The switches of all hosts."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    def steps(self, name: str) -> list[Step]:
        """For `up`, of one host."""
        def files(clock: Clock) -> str:
            # In /run, hence new with each node: on an old database nobody
            # would wait for the daemon to make the devices.
            self._inside.run(
                'sh', '-c', f'test -e {_FILE} || '
                f'ovsdb-tool create {_FILE} {_SCHEMA}', node=name)
            return ''

        def setup(clock: Clock) -> str:
            self._vsctl(name, '--no-wait', 'init')
            # The userspace datapath reads taps by raw sockets, where
            # checksums that a guest left to its card look wrong, and drops
            # TCP. With this it reads virtio-net's headers instead. Read
            # only when the daemon starts.
            self._vsctl(name, '--no-wait', 'set', 'Open_vSwitch', '.',
                        f'external-ids:hostname={name}',
                        f'external-ids:system-id={name}',
                        'other_config:userspace-tso-enable=true')
            return ''

        def ports(clock: Clock) -> str:
            self._vsctl(name, *bridge())
            self._inside.run('ip', 'link', 'set', 'br-ph', 'up', node=name)
            return ''

        return [Step(f'ovs files@{name}', files, ('network',)),
                Step(f'ovs setup@{name}', setup, (f'ovsdb@{name}',)),
                Step(f'bridge@{name}', ports, (f'vswitchd@{name}',))]

    def _vsctl(self, node: str, *words: str) -> None:
        self._inside.run('ovs-vsctl', '--timeout=20', *words, node=node)
