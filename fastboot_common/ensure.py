# SPDX-License-Identifier: Apache-2.0
"""The agent's side of a miss: one verb of the local API.

``POST /v1/ensure`` with ``{"image": id, "offset": bytes, "length": bytes}``
answers 200 and ``{}`` once every entry of the extent is set, else an error as
:mod:`fastboot_common.localapi` says; after 503 the export asks again. The
client is :mod:`fastboot_common.export`.
"""

from collections.abc import Callable
from typing import Any, Final

from fastboot_common import exception, journal, localapi

#: Misses that are served at a time. Fewer than the server has threads: a
#: repository that hangs must not keep other calls out.
_CALLS: Final = 48


def route(ensure: Callable[[str, int, int], None]) -> localapi.Route:
    """The verb.

    :param ensure: called with image id, offset and length (bytes), by many
        threads at once; returns when all entries of the extent are set. May
        raise any of fastboot's errors.
    """
    def call(body: localapi.Body) -> localapi.Body:
        ensure(*_parse(body))
        return {}

    return localapi.Route('POST', '/v1/ensure', call, limit=_CALLS)


def _parse(body: dict[str, Any]) -> tuple[str, int, int]:
    """Image, offset and length of a request.

    :raises Invalid: it is none.
    """
    offset, length = body.get('offset'), body.get('length')
    if not (type(offset) is int and type(length) is int
            and 0 <= offset < 1 << 62 and 0 < length < 1 << 62):
        raise exception.Invalid('"offset" and "length" must be bytes')
    image_id = journal.validate_image_id(body.get('image', ''))
    return image_id, offset, length
