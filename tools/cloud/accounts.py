# SPDX-License-Identifier: Apache-2.0
"""The services' accounts in Keystone, and the catalog."""

from cloud.databases import Databases
from cloud.layout import PASSWORD, REGION, url
from cloud.rest import Rest
from cloud.services import IDENTITY
from cloud.steps import Step

#: Types in the catalog, and what follows an API's address there.
_CATALOG = {'glance': ('image', ''), 'placement': ('placement', ''),
            'nova': ('compute', '/v2.1'), 'neutron': ('network', ''),
            'fastboot': ('fastboot', '')}


class Accounts:
    """Made once; then they are part of Keystone's new database."""

    def __init__(self, rest: Rest, databases: Databases) -> None:
        self._rest = rest
        self._databases = databases

    def step(self) -> Step:
        """For `up`."""
        return self._databases.stamped(IDENTITY, self._make, 'keystone')

    def _make(self) -> None:
        project = self._ensure('project', name='service',
                               domain_id='default')
        roles = [self._ensure('role', name=name)
                 for name in ('admin', 'service')]
        for name, (kind, path) in _CATALOG.items():
            user = self._ensure('user', name=name, domain_id='default',
                                password=PASSWORD)
            for role in roles:
                self._rest('keystone', 'PUT', f'/projects/{project}/users/'
                           f'{user}/roles/{role}')
            service = self._ensure('service', name=name, type=kind)
            for interface in ('public', 'internal'):
                self._ensure('endpoint', service_id=service,
                             interface=interface, url=url(name) + path,
                             region_id=REGION)
        self._databases.remember(['keystone'])

    def _ensure(self, kind: str, **wanted: str) -> str:
        """The id of a thing in Keystone, made if there is none."""
        known = self._rest.listed('keystone', f'/{kind}s')[f'{kind}s']
        shown = {key: value for key, value in wanted.items()
                 if key != 'password'}
        for thing in known:
            if shown.items() <= thing.items():
                return str(thing['id'])
        made = self._rest('keystone', 'POST', f'/{kind}s', {kind: wanted})
        return str(made[kind]['id'])
