# SPDX-License-Identifier: Apache-2.0
"""What is done between the starts of services. All of it may be repeated."""

from cloud.accounts import Accounts
from cloud.databases import Databases
from cloud.inside import Inside
from cloud.layout import FASTBOOT_DIR, Layout
from cloud.process import Records
from cloud.resources import Resources
from cloud.rest import Rest
from cloud.services import IDENTITY
from cloud.steps import Clock, Step
from cloud.switches import Switches


def steps(layout: Layout, records: Records, rest: Rest) -> list[Step]:
    """All jobs of a layout."""
    inside = Inside(layout, records)
    databases = Databases(layout, inside)
    resources = Resources(layout, rest)
    switches = Switches(inside)
    computes = [f'nova-compute@{node.name}' for node in layout.hosts]
    found = [
        *databases.steps(),
        Accounts(rest, databases).step(),
        Step('guest network', resources.make_network, ('neutron', IDENTITY)),
        Step('compute', resources.await_hosts,
             ('nova', 'nova-scheduler', IDENTITY, *computes)),
    ]
    for node in layout.hosts:
        found += switches.steps(node.name)
    if layout.options.fastboot:
        found.append(_repository(layout, inside))
    return found


def _repository(layout: Layout, inside: Inside) -> Step:
    def make(clock: Clock) -> str:
        home = layout.home(layout.control) / 'fastboot'
        if (home / 'repository/config.json').exists():
            return ''
        inside.run(layout.bin('fastbootctl'), '--state-dir',
                   str(FASTBOOT_DIR), 'repo', 'init')
        return 'fastboot repository'
    return Step('fastboot repository', make, ('network', 'fastboot code'))
