# SPDX-License-Identifier: Apache-2.0
"""Who calls: Keystone's middleware, or (for tests) anybody."""

from typing import Any

import webob.dec
from keystonemiddleware import auth_token


class NoAuth:
    """Believes every caller: an administrator, unless ``X-Roles`` says
    otherwise."""

    def __init__(self, application: Any) -> None:
        self._application = application

    @webob.dec.wsgify
    def __call__(self, request: Any) -> Any:
        user, _, project = request.headers.get(
            'X-Auth-Token', 'admin').partition(':')
        request.headers.update({
            'X-User-Id': user, 'X-Project-Id': project or user,
            'X-Roles': request.headers.get('X-Roles', 'admin'),
            'X-Identity-Status': 'Confirmed',
        })
        return self._application


def protect(application: Any, conf: Any) -> Any:
    """The application behind what ``[api] auth_strategy`` names."""
    if conf.api.auth_strategy == 'noauth':
        return NoAuth(application)
    return auth_token.AuthProtocol(
        application, {'oslo_config_config': conf})
