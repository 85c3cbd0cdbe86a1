# SPDX-License-Identifier: Apache-2.0
"""When a server reached what, and what comes of many such times."""

import re
import statistics
import uuid
from collections.abc import Iterable
from typing import Any, Final

ANSWER: Final = 'first answer'
MULTI_USER: Final = 'multi-user'
CLOUD_INIT: Final = 'cloud-init'
#: What a boot prints where it is so far.
_PRINTED: Final = {
    MULTI_USER: re.compile(rb'FASTBOOT-READY [0-9.]+\s'),
    CLOUD_INIT: re.compile(rb'Cloud-init v\. \S+ finished at'),
}
#: All that is waited for when a server boots.
OF_BOOTS: Final = (ANSWER, *_PRINTED)
#: Seconds since the call, by what was reached then.
Times = dict[str, float]


def printed(console: bytes) -> set[str]:
    """What a boot has reached, by its console."""
    return {name for name, pattern in _PRINTED.items()
            if pattern.search(console)}


def ordered(times: Times) -> Times:
    """The same, the first reached first."""
    return dict(sorted(times.items(), key=lambda one: one[1]))


def medians(rounds: Iterable[Times]) -> Times:
    """The median time of each that was reached."""
    found: dict[str, list[float]] = {}
    for times in rounds:
        for name, seconds in times.items():
            found.setdefault(name, []).append(seconds)
    return ordered({name: statistics.median(values)
                    for name, values in found.items()})


def phases(label: str, times: Times) -> dict[str, Any]:
    """A row of what ``fastbootctl report`` takes: each phase's own time."""
    before, rows = 0.0, []
    for name, seconds in ordered(times).items():
        rows.append({'name': name, 'seconds': round(seconds - before, 3)})
        before = seconds
    return {'label': label, 'phases': rows}


def shared(sets: Iterable[set[str]]) -> int:
    """How many values are in more than one of the sets."""
    seen: set[str] = set()
    twice: set[str] = set()
    for one in sets:
        twice |= seen & one
        seen |= one
    return len(twice)


def mac(known: str) -> str:
    """An address of Nova's, of a server's UUID."""
    return 'fa:16:3e:' + ':'.join(
        f'{byte:02x}' for byte in uuid.UUID(known).bytes[-3:])
