# SPDX-License-Identifier: Apache-2.0
"""Links between nodes: a switch for management, one for the guests.

Both switches are Linux bridges on control. A host's management link is
`eth0`, with the host's name at control's end; its guests' link is `data`,
with `data-<host>` at control's end, a port of the host's bridge `br-ph`.
"""

import json
import pathlib
import subprocess

from cloud.layout import GUESTS, Layout, Node
from cloud.node import target
from cloud.process import Records
from cloud.steps import StepError

# What a shaper passes at once. Offloads make packets of 64 KiB, so less
# would be slower than the rate; and 2 ms at 1 Gb/s, so that bursts hardly
# show.
_BURST = '256kb'


class Network:
    """The links of a running sandbox."""

    def __init__(self, layout: Layout, records: Records) -> None:
        self._layout = layout
        self._records = records

    def build(self) -> None:
        """Make all links that are not there.

        :raises StepError: not possible.
        """
        for name, address in (('management', self._layout.control.address),
                              ('guests', f'{GUESTS}.1')):
            self._bridge(name, address)
        for node in self._layout.hosts:
            self._link(node, 'eth0', node.name, 'management')
            self._run(node, 'ip', 'address', 'replace',
                      f'{node.address}/24', 'dev', 'eth0')
            self._link(node, 'data', f'data-{node.name}', 'guests')

    def _bridge(self, name: str, address: str) -> None:
        control = self._layout.control
        if name not in self._links(control):
            self._run(control, 'ip', 'link', 'add', name, 'type', 'bridge')
            self._run(control, 'ip', 'address', 'replace', f'{address}/24',
                      'dev', name)
        self._run(control, 'ip', 'link', 'set', name, 'up')

    def _link(self, node: Node, inner: str, outer: str, bridge: str) -> None:
        control = self._layout.control
        if inner not in self._links(node):
            # Born inside: this machine never has these links.
            _command('ip', 'link', 'add', outer, 'netns',
                     str(target(self._records, control.name)), 'type',
                     'veth', 'peer', 'name', inner, 'netns',
                     str(target(self._records, node.name)))
        self._run(control, 'ip', 'link', 'set', outer, 'master', bridge, 'up')
        self._run(node, 'ip', 'link', 'set', inner, 'up')

    def _links(self, node: Node) -> set[str]:
        table = json.loads(self._run(node, 'ip', '-json', 'link'))
        return {link['ifname'] for link in table}

    def shape(self, rate: str) -> None:
        """Limit each host's management link, both ways.

        :param rate: as tc writes it, such as ``1gbit``; empty: no limit.
        :raises StepError: tc refuses it.
        """
        for host in self._layout.hosts:
            for node, device in ((host, 'eth0'),
                                 (self._layout.control, host.name)):
                self._shape(node, device, rate)

    def _shape(self, node: Node, device: str, rate: str) -> None:
        if rate:
            self._run(node, 'tc', 'qdisc', 'replace', 'dev', device, 'root',
                      'tbf', 'rate', rate, 'burst', _BURST, 'latency',
                      '50ms')
        elif ' tbf ' in self._run(node, 'tc', 'qdisc', 'show', 'dev',
                                  device):
            self._run(node, 'tc', 'qdisc', 'delete', 'dev', device, 'root')

    def _run(self, node: Node, *words: str) -> str:
        return _command(*enter(self._records, node.name), *words)


def enter(records: Records, name: str, *,
          directory: pathlib.Path | None = None) -> tuple[str, ...]:
    """The words before a command that is to run on a node.

    :raises StepError: the node does not run.
    """
    where = (f'--wdns={directory}',) if directory else ()
    return ('nsenter', '--target', str(target(records, name)), '--mount',
            '--uts', '--ipc', '--net', '--pid', *where)


def _command(*words: str) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise StepError(f'{" ".join(words)}: {done.stderr.strip()}')
    return done.stdout
