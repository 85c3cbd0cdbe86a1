# SPDX-License-Identifier: Apache-2.0
"""Measured boots and resumes side by side: when each was how far."""

from collections.abc import Sequence
from typing import Any


def rows(boots: Sequence[dict[str, Any]]
         ) -> list[tuple[str, list[float | None]]]:
    """What was reached, and for each boot the seconds until then.

    :param boots: from :func:`fastboot_common.report.read_boots`.
    :returns: in the order of time; None: this boot has no such phase.
    """
    reached = [_reached(boot) for boot in boots]
    return [(name, [one.get(name) for one in reached])
            for name in merged([list(one) for one in reached])]


def _reached(boot: dict[str, Any]) -> dict[str, float]:
    """The seconds at the end of each phase, which begin one by one."""
    found, now = {}, 0.0
    for phase in boot['phases']:
        now += phase['seconds']
        found[phase['name']] = round(now, 3)
    return found


def merged(sequences: Sequence[Sequence[str]]) -> list[str]:
    """The names of all sequences, each behind what any has before it.

    Where they contradict each other the first is right.
    """
    left = [list(one) for one in sequences if one]
    found = []
    while left:
        heads = [one[0] for one in left]
        name = next((head for head in heads
                     if not any(head in one[1:] for one in left)), heads[0])
        found.append(name)
        left = [rest for one in left
                if (rest := [other for other in one if other != name])]
    return found


def labels(boots: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the boots, no two alike."""
    found: list[str] = []
    for boot in boots:
        label, number = boot['label'], 1
        while label in found:
            number += 1
            label = f'{boot["label"]} ({number})'
        found.append(label)
    return found
