# SPDX-License-Identifier: Apache-2.0
"""A limit of bytes per second that many threads share."""

import threading
import time
from typing import Final

from fastboot_common import exception

#: What may pass at once after a pause, in seconds of the rate.
_BURST: Final = 0.25


class Throttle:
    """A token bucket.

    :param rate: bytes per second.
    :raises ConfigError: the rate is not positive.
    """

    def __init__(self, rate: int) -> None:
        if rate <= 0:
            raise exception.ConfigError(
                f'a rate limit of {rate} bytes/s lets nothing pass; use a '
                f'positive number, or none')
        self._rate = rate
        self._lock = threading.Lock()
        #: When all that was let through so far has passed at the rate.
        self._paid = time.monotonic()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may pass."""
        with self._lock:
            now = time.monotonic()
            self._paid = max(self._paid, now - _BURST) + count / self._rate
            wait = self._paid - now
        if wait > 0:
            time.sleep(wait)
