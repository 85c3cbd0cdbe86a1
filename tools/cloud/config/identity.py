# SPDX-License-Identifier: Apache-2.0
"""Keystone's and Placement's files, and the user's."""

import base64
import os

from cloud.config.ini import authtoken, render
from cloud.layout import PASSWORD, REGION, Layout

#: What a login of the administrator consists of.
_ADMIN = {
    'username': 'admin', 'password': PASSWORD, 'project_name': 'admin',
    'user_domain_name': 'Default', 'project_domain_name': 'Default',
}


def keystone(layout: Layout) -> str:
    """keystone.conf."""
    return render({
        'database': {'connection': layout.database('keystone')},
        'fernet_tokens': {'key_repository': layout.data / 'fernet'},
        'fernet_receipts': {'key_repository': layout.data / 'fernet'},
        'credential': {'key_repository': layout.data / 'credential'},
        'token': {'provider': 'fernet', 'expiration': 86400},
        'cache': {'backend': 'dogpile.cache.memory'},
    })


def make_keys(layout: Layout) -> None:
    """What keystone-manage's fernet_setup and credential_setup do."""
    for name in ('fernet', 'credential'):
        directory = layout.data / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in (0, 1):
            file = directory / str(number)
            if not file.exists():
                file.write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
                file.chmod(0o600)


def placement(layout: Layout) -> str:
    """placement.conf."""
    return render({
        'DEFAULT': {},
        'api': {'auth_strategy': 'keystone'},
        'placement_database': {'connection': layout.database('placement')},
        **authtoken(layout, 'placement'),
    })


def openrc(layout: Layout) -> str:
    """For the user's shell."""
    settings = {
        'auth_url': layout.auth_url, **_ADMIN, 'region_name': REGION,
        'identity_api_version': '3', 'compute_api_version': '2.87',
    }
    lines = [f'export OS_{key.upper()}={value}'
             for key, value in settings.items()]
    return '\n'.join([*lines, f'export PATH={layout.venv}/bin:$PATH', ''])


def clouds(layout: Layout) -> str:
    """clouds.yaml: the cloud `sandbox`."""
    auth = {'auth_url': layout.auth_url, **_ADMIN}
    return '\n'.join([
        'clouds:', '  sandbox:', f'    region_name: {REGION}',
        "    identity_api_version: '3'",
        "    compute_api_version: '2.87'", '    auth:',
        *(f'      {key}: {value}' for key, value in auth.items()), ''])
