# SPDX-License-Identifier: Apache-2.0
"""Observations: what guests read in their first minutes that the boot set
did not have.

An agent sends one to the centre as ``{"host": …, "image": …, "serial": …,
"reads": …}``. The reads are records of a trace (reference/trace),
compressed, as text: the bus speaks JSON.
"""

import base64
import binascii
from typing import Any, Final

import numpy as np
import zstandard

from fastboot_common import exception, pack
from fastboot_common import trace as traces

#: Reads in an observation: whatever they are, their text is within LIMIT.
READS: Final = 32_000
#: Bytes that they read. A miss happens once, so more is no boot.
BYTES: Final = 512 << 20
#: Characters of the text.
LIMIT: Final = 1 << 20
#: Bytes that are worth an observation, and a new manifest for every host:
#: less is noise.
LEAST: Final = 256 << 10
#: A read happens in the first minutes (microseconds).
_LATEST: Final = 86_400_000_000


def encode(trace: traces.Trace) -> str:
    """The reads of an observation as text."""
    packed = zstandard.ZstdCompressor(level=9).compress(
        trace.astype(traces.DTYPE).tobytes())
    return base64.b64encode(packed).decode()


def decode(text: Any, virtual_size: int) -> traces.Trace:
    """Read what :func:`encode` made, or what somebody says it did.

    :param virtual_size: bytes of the image.
    :raises Corrupt: it breaks a rule.
    """
    what = 'reads of an observation'
    if not isinstance(text, str) or len(text) > LIMIT:
        raise exception.Corrupt(f'{what}: no text, or too long')
    try:
        packed = base64.b64decode(text, validate=True)
        length = zstandard.frame_content_size(packed)
    except (binascii.Error, ValueError, zstandard.ZstdError) as error:
        raise exception.Corrupt(f'{what}: {error}') from error
    if not 0 < length <= READS * traces.DTYPE.itemsize:
        raise exception.Corrupt(f'{what}: {length} bytes')
    found = traces.unpack(pack.decompress(packed, length, what),
                          virtual_size)
    if ((found['time'] > _LATEST) | (found['boot'] != 0)).any() or int(
            found['length'].sum(dtype=np.uint64)) > BYTES:
        raise exception.Corrupt(f'{what}: not those of first minutes')
    return found
