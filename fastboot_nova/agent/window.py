# SPDX-License-Identifier: Apache-2.0
"""Times of the day: ``22:00-06:00``, several parted by commas."""

import datetime
import re
from typing import Final

from fastboot_common import exception

_SPAN: Final = re.compile(
    r'([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])')
_DAY: Final = 24 * 60


class Window:
    """Spans of the day, in local time.

    :param text: see above; empty: always.
    :raises ConfigError: it is something else.
    """

    def __init__(self, text: str) -> None:
        self._spans = []
        for part in filter(None, re.split(r'[,\s]+', text)):
            match = _SPAN.fullmatch(part)
            numbers = list(map(int, match.groups())) if match else [0] * 4
            start, end = (numbers[0] * 60 + numbers[1],
                          numbers[2] * 60 + numbers[3])
            if end > _DAY or start == end:
                raise exception.ConfigError(
                    f'[agent] window: {part!r} is no span of times like '
                    f'22:00-06:00')
            self._spans.append((start, end))

    def open_at(self, moment: datetime.time) -> bool:
        """Whether a time of the day lies within."""
        minute = moment.hour * 60 + moment.minute
        return not self._spans or any(
            start <= minute < end if start < end
            else minute >= start or minute < end
            for start, end in self._spans)

    def is_open(self) -> bool:
        """Whether now does."""
        return self.open_at(datetime.datetime.now().time())
