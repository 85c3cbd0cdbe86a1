# SPDX-License-Identifier: Apache-2.0
"""The agent's local API: what nova-compute and the export may ask.

See the reference of the agent. Callers are checked for what they may name:
ids, and absolute paths that are only ever looked at.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, Final, Protocol

from fastboot_common import ensure, exception, journal, localapi
from fastboot_nova.microvm import remote

_PATH_LIMIT: Final = 4095
#: Bytes of a request with a definition; 30,000 are a domain with everything.
_DEFINITION: Final = 256 << 10
_WORDS: Final = 500
_TOKEN: Final = re.compile(r'[0-9a-f]{32}')
_PHASE: Final = re.compile(r'[A-Za-z_]{0,32}')
_PHASES: Final = 64
#: No phase takes as long (seconds).
_LONGEST: Final = 3600.0


class Served(Protocol):
    """What answers; see :class:`fastboot_nova.agent.agent.Agent`."""

    def ensure(self, image_id: str, offset: int, length: int) -> None: ...

    def acquire(self, image_id: str, holder: str, file: str,
                removed: bool) -> dict[str, Any]: ...

    def release(self, image_id: str, holder: str, file: str) -> None: ...

    def prepare(self, image_id: str) -> None: ...

    def differences(self, image_id: str, base: pathlib.Path | str,
                    ) -> list[tuple[int, int]]: ...

    def sync(self) -> None: ...

    def images(self) -> dict[str, Any]: ...

    def microvms(self) -> dict[str, Any]: ...

    def take(self, image_id: str, holder: str) -> dict[str, Any]: ...

    def dress(self, token: str, xml: str) -> None: ...

    def give_back(self, token: str, outcome: str, phase: str, reason: str,
                  seconds: dict[str, float]) -> None: ...

    def leave(self, holder: str) -> None: ...


def routes(agent: Callable[[], Served],
           status: Callable[[], dict[str, Any]]) -> list[localapi.Route]:
    """The table of verbs.

    :param agent: gives what answers.
    :param status: gives the state of the service.
    """
    def acquire(body: localapi.Body) -> localapi.Body:
        return agent().acquire(*_lease(body),
                               body.get('removed') is True)

    def release(body: localapi.Body) -> localapi.Body:
        agent().release(*_lease(body))
        return {}

    def prepare(body: localapi.Body) -> localapi.Body:
        agent().prepare(_image(body))
        return {}

    def differences(body: localapi.Body) -> localapi.Body:
        return {'extents': agent().differences(_image(body), _base(body))}

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

    def microvms(body: localapi.Body) -> localapi.Body:
        return agent().microvms()

    def take(body: localapi.Body) -> localapi.Body:
        return agent().take(_image(body), _holder(body))

    def dress(body: localapi.Body) -> localapi.Body:
        xml = body.get('xml')
        if not isinstance(xml, str):
            raise exception.Invalid('"xml" is no text')
        agent().dress(_token(body), xml)
        return {}

    def give_back(body: localapi.Body) -> localapi.Body:
        agent().give_back(_token(body), *_outcome(body))
        return {}

    def leave(body: localapi.Body) -> localapi.Body:
        agent().leave(_holder(body))
        return {}

    return [
        ensure.route(lambda *extent: agent().ensure(*extent)),
        localapi.Route('POST', '/v1/acquire', acquire),
        localapi.Route('POST', '/v1/release', release),
        localapi.Route('POST', '/v1/prepare', prepare, status=202),
        localapi.Route('POST', '/v1/differences', differences, limit=2),
        localapi.Route('POST', '/v1/sync', sync, status=202),
        localapi.Route('GET', '/v1/images', images, limit=4),
        localapi.Route('GET', '/v1/images/([A-Za-z0-9._-]{1,64})', image,
                       limit=4),
        localapi.Route('GET', '/v1/microvms', microvms, limit=4),
        localapi.Route('POST', '/v1/microvms/take', take),
        localapi.Route('POST', '/v1/microvms/dress', dress,
                       body=_DEFINITION),
        localapi.Route('POST', '/v1/microvms/return', give_back),
        localapi.Route('POST', '/v1/reboots/leave', leave),
        localapi.Route('GET', '/v1/status', lambda body: status()),
    ]


def _image(body: localapi.Body) -> str:
    return journal.validate_image_id(body.get('image', ''))


def _lease(body: localapi.Body) -> tuple[str, str, str]:
    """Image, holder and file of a request.

    :raises Invalid: it is none.
    """
    return _image(body), _holder(body), _file(body)


def _file(body: localapi.Body) -> str:
    file = body.get('file', '')
    if not _is_path(file):
        raise exception.Invalid('"file" is not a normal absolute path')
    return str(file)


def _base(body: localapi.Body) -> pathlib.Path | str:
    """What an image is compared with: a file, or another image.

    :raises Invalid: it is neither, or both.
    """
    if 'other' not in body:
        return pathlib.Path(_file(body))
    if 'file' in body:
        raise exception.Invalid('"file" or "other", not both')
    return journal.validate_image_id(body['other'])


def _holder(body: localapi.Body) -> str:
    try:
        return journal.validate_image_id(body.get('holder', ''))
    except exception.Invalid:
        raise exception.Invalid(
            '"holder" is not 1 to 64 of A-Z a-z 0-9 . _ -') from None


def _token(body: localapi.Body) -> str:
    token = body.get('lane')
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise exception.Invalid('"lane" is not what was given')
    return token


def _outcome(body: localapi.Body,
             ) -> tuple[str, str, str, dict[str, float]]:
    """Outcome, phase, reason and seconds of a return.

    :raises Invalid: it is none.
    """
    outcome, phase = body.get('outcome'), body.get('phase') or ''
    reason, seconds = body.get('reason') or '', body.get('seconds') or {}
    if outcome not in remote.OUTCOMES:
        raise exception.Invalid(
            f'"outcome" is not one of {", ".join(remote.OUTCOMES)}')
    if not isinstance(phase, str) or not _PHASE.fullmatch(phase):
        raise exception.Invalid('"phase" is no name')
    if not isinstance(reason, str):
        raise exception.Invalid('"reason" is no text')
    if (not isinstance(seconds, dict) or len(seconds) > _PHASES
            or not all(map(_PHASE.fullmatch, seconds))
            or not all(map(_is_time, seconds.values()))):
        raise exception.Invalid('"seconds" are no times of phases')
    # JSON has halves of characters, which nobody can write down.
    reason = reason[:_WORDS].encode(errors='replace').decode()
    return outcome, phase, reason, {
        name: float(value) for name, value in seconds.items()}


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _LONGEST


def _is_path(file: Any) -> bool:
    """An absolute path of a file that could be there."""
    try:
        return (isinstance(file, str) and file.isprintable()
                and file.startswith('/') and not file.startswith('//')
                and file != '/' and os.path.normpath(file) == file
                and len(file.encode()) <= _PATH_LIMIT)
    except UnicodeEncodeError:
        return False
