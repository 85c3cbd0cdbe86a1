# SPDX-License-Identifier: Apache-2.0
"""oslo.config's files: sections of options."""

from collections.abc import Mapping

from cloud.layout import PASSWORD, REGION, Layout

Section = Mapping[str, object]
Sections = Mapping[str, Section]


def render(sections: Sections) -> str:
    """The text of a file.

    >>> render({'DEFAULT': {'debug': True, 'hosts': ['a', 'b']}})
    '[DEFAULT]\\ndebug = true\\nhosts = a,b\\n'
    """
    lines = []
    for name, options in sections.items():
        lines.append(f'[{name}]')
        lines += [f'{key} = {_value(value)}'
                  for key, value in options.items()]
    return '\n'.join(lines) + '\n'


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ','.join(map(str, value))
    return str(value)


def merged(*parts: Sections) -> dict[str, dict[str, object]]:
    """Sections of several parts; later ones win, option by option."""
    result: dict[str, dict[str, object]] = {}
    for part in parts:
        for name, options in part.items():
            result.setdefault(name, {}).update(options)
    return result


def login(layout: Layout, user: str) -> Section:
    """How a service says who it is."""
    return {
        'auth_url': layout.auth_url, 'auth_type': 'password',
        'username': user, 'password': PASSWORD, 'project_name': 'service',
        'user_domain_name': 'Default', 'project_domain_name': 'Default',
    }


def client(layout: Layout, user: str) -> Section:
    """How a service finds and calls another one."""
    return {**login(layout, user), 'region_name': REGION}


def authtoken(layout: Layout, user: str) -> Sections:
    """How an API checks its callers."""
    return {'keystone_authtoken': {
        **login(layout, user), 'www_authenticate_uri': layout.auth_url,
        'service_token_roles_required': True,
        'service_token_roles': 'service',
    }}
