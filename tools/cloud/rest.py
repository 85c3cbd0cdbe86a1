# SPDX-License-Identifier: Apache-2.0
"""Just enough of a client of OpenStack's APIs, as the administrator.

An SDK would cost more time to import than most of what is asked here.
"""

import calendar
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Final

from cloud.layout import API_PORTS, PASSWORD, url

_PREFIX: Final = {
    'keystone': '/v3', 'nova': '/v2.1', 'neutron': '/v2.0', 'glance': '/v2',
}
#: Nova's, with the name of a hypervisor's host and updates' times.
_MICROVERSION: Final = 'compute 2.87'
_TOKEN_SECONDS: Final = 3600
#: A list that many wait for is not asked more often.
_LIST_SECONDS: Final = 1.0


class RestError(Exception):
    """A request failed, or nobody answers."""


class Rest:
    """The APIs of a sandbox, with a token and short-lived lists."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._token = ''
        self._token_until = 0.0
        self._lists: dict[str, tuple[float, Any]] = {}

    def __call__(self, service: str, method: str, path: str,
                 body: object = None) -> Any:
        """Ask an API.

        :param path: below the API's version.
        :return: the answer's JSON, None if it has none.
        :raises RestError: it fails.
        """
        return _request(service, method, path, body, self._get_token())[1]

    def listed(self, service: str, path: str) -> Any:
        """GET, at most once a second, for all that wait for something.

        :raises RestError: it fails.
        """
        with self._lock:
            until, answer = self._lists.get(path, (0.0, None))
            if time.monotonic() > until:
                answer = self(service, 'GET', path)
                self._lists[path] = (time.monotonic() + _LIST_SECONDS,
                                     answer)
            return answer

    def _get_token(self) -> str:
        with self._lock:
            if time.monotonic() > self._token_until:
                self._token = _login()
                self._token_until = time.monotonic() + _TOKEN_SECONDS
            return self._token


def _login() -> str:
    domain = {'name': 'Default'}
    user = {'name': 'admin', 'password': PASSWORD, 'domain': domain}
    headers, _ = _request('keystone', 'POST', '/auth/tokens', {'auth': {
        'identity': {'methods': ['password'], 'password': {'user': user}},
        'scope': {'project': {'name': 'admin', 'domain': domain}},
    }})
    return str(headers['X-Subject-Token'])


def _request(service: str, method: str, path: str, body: object,
             token: str = '') -> tuple[Any, Any]:
    request = urllib.request.Request(
        url(service) + _PREFIX.get(service, '') + path, method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={'Content-Type': 'application/json',
                 'OpenStack-API-Version': _MICROVERSION,
                 **({'X-Auth-Token': token} if token else {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.headers, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        raise RestError(f'{service}: {method} {path}: {error.code} '
                        f'{error.read()[:300]!r}') from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RestError(f'{service} does not answer at port '
                        f'{API_PORTS[service]}: {error}') from error


def moment(text: str | None) -> int:
    """Seconds since the epoch of a time in UTC as the APIs write it."""
    if not text:
        return 0
    return calendar.timegm(time.strptime(text[:19].replace('T', ' '),
                                         '%Y-%m-%d %H:%M:%S'))
