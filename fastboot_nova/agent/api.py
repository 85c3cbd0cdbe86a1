# SPDX-License-Identifier: Apache-2.0
"""The agent's local API: what nova-compute and the export may ask.

See the reference of the agent. Callers are checked for what they may name:
ids, and absolute paths that are only ever looked at.
"""

import os
from collections.abc import Callable
from typing import Any, Final, Protocol

from fastboot_common import ensure, exception, journal, localapi

_PATH_LIMIT: Final = 4095


class Served(Protocol):
    """What answers; see :class:`fastboot_nova.agent.agent.Agent`."""

    def ensure(self, image_id: str, offset: int, length: int) -> None: ...

    def acquire(self, image_id: str, holder: str,
                file: str) -> dict[str, Any]: ...

    def release(self, image_id: str, holder: str, file: str) -> None: ...

    def prepare(self, image_id: str) -> None: ...

    def sync(self) -> None: ...

    def images(self) -> dict[str, Any]: ...


def routes(agent: Callable[[], Served],
           status: Callable[[], dict[str, Any]]) -> list[localapi.Route]:
    """The table of verbs.

    :param agent: gives what answers.
    :param status: gives the state of the service.
    """
    def acquire(body: localapi.Body) -> localapi.Body:
        return agent().acquire(*_lease(body))

    def release(body: localapi.Body) -> localapi.Body:
        agent().release(*_lease(body))
        return {}

    def prepare(body: localapi.Body) -> localapi.Body:
        agent().prepare(_image(body))
        return {}

    def sync(body: localapi.Body) -> localapi.Body:
        agent().sync()
        return {}

    def images(body: localapi.Body) -> localapi.Body:
        return agent().images()

    def image(body: localapi.Body, image_id: str) -> localapi.Body:
        for row in agent().images()['images']:
            if row['id'] == image_id:
                found: localapi.Body = row
                return found
        raise exception.NotFound(f'image {image_id} is not known here')

    return [
        ensure.route(lambda *extent: agent().ensure(*extent)),
        localapi.Route('POST', '/v1/acquire', acquire),
        localapi.Route('POST', '/v1/release', release),
        localapi.Route('POST', '/v1/prepare', prepare, status=202),
        localapi.Route('POST', '/v1/sync', sync, status=202),
        localapi.Route('GET', '/v1/images', images, limit=4),
        localapi.Route('GET', '/v1/images/([A-Za-z0-9._-]{1,64})', image,
                       limit=4),
        localapi.Route('GET', '/v1/status', lambda body: status()),
    ]


def _image(body: localapi.Body) -> str:
    return journal.validate_image_id(body.get('image', ''))


def _lease(body: localapi.Body) -> tuple[str, str, str]:
    """Image, holder and file of a request.

    :raises Invalid: it is none.
    """
    holder, file = body.get('holder', ''), body.get('file', '')
    try:
        journal.validate_image_id(holder)
    except exception.Invalid:
        raise exception.Invalid(
            '"holder" is not 1 to 64 of A-Z a-z 0-9 . _ -') from None
    if not _is_path(file):
        raise exception.Invalid('"file" is not a normal absolute path')
    return _image(body), holder, file


def _is_path(file: Any) -> bool:
    """An absolute path of a file that could be there."""
    try:
        return (isinstance(file, str) and file.isprintable()
                and file.startswith('/') and not file.startswith('//')
                and file != '/' and os.path.normpath(file) == file
                and len(file.encode()) <= _PATH_LIMIT)
    except UnicodeEncodeError:
        return False
