# SPDX-License-Identifier: Apache-2.0
"""Reports of hosts: what one may say. Checking only; they come by
:mod:`fastboot_glance.centre` and are kept by :mod:`fastboot_glance.records`.

A report comes from a compute host, where a guest may have broken out: it is
checked before it goes anywhere.
"""

import re
from typing import Any, Final

from fastboot_common import exception, journal
from fastboot_common.microvm import key
from fastboot_glance import records

STATES: Final = (
    'absent', 'transferring', 'ready', 'thawed', 'complete', 'stale',
    'error')
#: Of a µVM.
MICROVM_STATES: Final = ('absent', 'transferring', 'ready', 'error')
#: Versions of a repository; the database has no larger ones.
_VERSION_LIMIT: Final = 1 << 31
#: Images in a report.
IMAGES_LIMIT: Final = 20_000
#: Of an image on a host.
_LEASES_LIMIT: Final = 1 << 31
#: Guests in a report.
GUESTS_LIMIT: Final = 1000
#: Platforms of a host: as many as there are ways to run guests, and some.
PLATFORMS_LIMIT: Final = 16
#: µVMs in a report.
MICROVMS_LIMIT: Final = 20_000
_ERROR_LIMIT: Final = 500
_GUEST: Final = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
_HOST: Final = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,254}')


def validate_host(name: Any) -> str:
    """Return `name` if a host can have it.

    :raises Invalid: none can.
    """
    if not isinstance(name, str) or not _HOST.fullmatch(name):
        raise exception.Invalid(
            f'not the name of a host: {str(name)[:80]!r}')
    return name


def check(report: Any) -> dict[str, Any]:
    """A report with known members only, each in bounds.

    :raises Invalid: it is none; the message names host and member.
    """
    if not isinstance(report, dict):
        raise exception.Invalid('not a JSON object')
    host = validate_host(report.get('host'))
    try:
        images = report['images']
        if not isinstance(images, list) or len(images) > IMAGES_LIMIT:
            raise exception.Invalid('"images" is no list, or too long')
        checked = [_image(one) for one in images]
        if len({one['id'] for one in checked}) != len(checked):
            raise exception.Invalid('an image is listed twice')
        return {
            'host': host,
            'at': _number(report, 'at', 1e12),
            'version': _integer(report, 'version', _VERSION_LIMIT),
            'software': _text(report, 'software', 64),
            'images': checked,
            'lazy_guests': _guests(report.get('lazy_guests')),
            'platforms': _platforms(report.get('platforms')),
            'microvms': _microvms(report.get('microvms')),
        } | {name: _integer(report, name, 1 << 63) for name in (
            'volume_bytes', 'mirror_bytes', 'free_bytes')}
    except KeyError as error:
        raise exception.Invalid(f'host {host}: {error} is missing') from error
    except exception.Invalid as error:
        raise exception.Invalid(f'host {host}: {error}') from error


def _image(one: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise exception.Invalid('an image is no JSON object')
    image_id = journal.validate_image_id(one.get('id', ''))
    state = one.get('state')
    if state not in STATES:
        raise exception.Invalid(
            f'image {image_id}: state {str(state)[:40]!r}')
    return {
        'id': image_id, 'state': state,
        'progress': _number({'progress': 0, **one}, 'progress', 1),
        'error': _text({'error': '', **one}, 'error', _ERROR_LIMIT),
        'serial': _optional(one, 'serial', journal.SERIAL_LIMIT),
        'leases': _optional(one, 'leases', _LEASES_LIMIT),
    }


def _guests(ids: Any) -> list[str] | None:
    """Ids of guests; None: the host cannot tell, or is too old to."""
    if ids is None:
        return None
    if not isinstance(ids, list) or len(ids) > GUESTS_LIMIT or not all(
            isinstance(one, str) and _GUEST.fullmatch(one) for one in ids):
        raise exception.Invalid('"lazy_guests" is no list of ids, or too '
                                'long')
    return ids


def _platforms(texts: Any) -> list[str] | None:
    """Platforms; None: the host is too old to say."""
    if texts is None:
        return None
    if not isinstance(texts, list) or len(texts) > PLATFORMS_LIMIT:
        raise exception.Invalid('"platforms" is no list, or too long')
    try:
        return [key.Platform.parse(one).text for one in texts]
    except exception.Corrupt as error:
        raise exception.Invalid(f'"platforms": {error}') from error


def _microvms(rows: Any) -> list[dict[str, Any]] | None:
    """µVMs; None: the host is too old to say."""
    if rows is None:
        return None
    if not isinstance(rows, list) or len(rows) > MICROVMS_LIMIT:
        raise exception.Invalid('"microvms" is no list, or too long')
    found = [_microvm(one) for one in rows]
    if len({(one['image'], one['class']) for one in found}) != len(found):
        raise exception.Invalid('a µVM is listed twice')
    return found


def _microvm(one: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise exception.Invalid('a µVM is no JSON object')
    what = f'µVM of {journal.validate_image_id(one.get("image", ""))}'
    group, state = one.get('class'), one.get('state')
    if not isinstance(group, str) or not _DIGEST.fullmatch(group):
        raise exception.Invalid(f'{what}: class {str(group)[:80]!r}')
    if state not in MICROVM_STATES:
        raise exception.Invalid(f'{what}: state {str(state)[:40]!r}')
    try:
        return {
            'image': one['image'], 'class': group, 'state': state,
            'reason': _text({'reason': '', **one}, 'reason', _ERROR_LIMIT),
        } | {name: _integer(one, name, 1 << 63)
             for name in ('bytes', 'lanes', 'resumed', 'fallbacks')}
    except KeyError as error:
        raise exception.Invalid(f'{what}: {error} is missing') from error


def _integer(where: dict[str, Any], key: str, limit: int) -> int:
    value = where[key]
    # JSON's true counts as an integer in Python.
    if type(value) is not int or not 0 <= value < limit:
        raise exception.Invalid(f'"{key}" is no number below {limit}')
    return value


def _optional(where: dict[str, Any], key: str, limit: int) -> int | None:
    return None if where.get(key) is None else _integer(where, key, limit)


def _number(where: dict[str, Any], key: str, limit: float) -> float:
    value = where[key]
    if type(value) not in (int, float) or not (
            0 <= value <= limit):
        raise exception.Invalid(f'"{key}" is not between 0 and {limit:g}')
    return float(value)


def _text(where: dict[str, Any], key: str, limit: int) -> str:
    value = where[key]
    if value is None:
        return ''
    if not isinstance(value, str):
        raise exception.Invalid(f'"{key}" is no text')
    return records.clean(value, limit)
