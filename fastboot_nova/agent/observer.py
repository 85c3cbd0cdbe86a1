# SPDX-License-Identifier: Apache-2.0
"""Guests' first minutes: what they read that the boot set does not have.

The centre adds it to the boot set, so that the next guest elsewhere finds
it. Nothing waits for that, and nobody misses what is lost: other guests come.
"""

import array
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from fastboot_common import observation, trace
from fastboot_nova import host
from fastboot_nova.agent import worker

#: Seconds between two looks whether a window has ended.
_LOOK: Final = 5.0
#: Seconds after an observation before the image is observed again.
_AGAIN: Final = 3600.0


@dataclasses.dataclass
class _Window:
    """The first minutes of an image's guests.

    :ivar since: when it began (monotonic seconds).
    :ivar reads: time (microseconds), offset and length (bytes) of each.
    """

    serial: int
    since: float
    reads: 'array.array[int]' = dataclasses.field(
        default_factory=lambda: array.array('Q'))
    bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return (len(self.reads) >= 3 * observation.READS
                or self.bytes >= observation.BYTES)

    def add(self, offset: int, length: int) -> None:
        """Record a read; what is too much is left out."""
        when = int((time.monotonic() - self.since) * 1e6)
        end = offset + length
        # In parts: reads of a trace are no longer than those of NBD.
        for start in range(offset, end, trace.LONGEST):
            part = min(end - start, trace.LONGEST)
            if not self.full and self.bytes + part <= observation.BYTES:
                self.reads.extend((when, start, part))
                self.bytes += part

    def trace(self) -> trace.Trace:
        """What was recorded."""
        rows = np.array(self.reads, np.uint64).reshape(-1, 3)
        found = np.zeros(len(rows), trace.DTYPE)
        found['time'], found['offset'], found['length'] = rows.T
        return found


class Observer:
    """Records misses while windows are open, and sends them as these end.

    Methods are thread-safe.

    :param name: of this host.
    :param seconds: that a window lasts; 0: there are none.
    :param send: takes an observation.
    """

    def __init__(self, name: str, served: host.Host, seconds: float,
                 send: Callable[[dict[str, Any]], None]) -> None:
        self._name = name
        self._host = served
        self._seconds = seconds
        self._send = send
        self._mutex = threading.Lock()
        #: By image id.
        self._windows: dict[str, _Window] = {}
        #: By image id: when it may be observed again (monotonic seconds).
        self._again: dict[str, float] = {}
        self.worker = worker.Worker('observe', self.look, _LOOK)

    def open(self, image_id: str) -> None:
        """A guest comes: its window begins, unless one is open.

        :raises NotFound: the image has no slot here.
        """
        if not self._seconds:
            return
        _, image = self._host.find(image_id)
        now = time.monotonic()
        with self._mutex:
            if now >= self._again.get(image_id, 0):
                # Not longer for guests that come later: on a busy host it
                # would never end.
                self._windows.setdefault(
                    image_id, _Window(image.serial, now))

    def is_open(self, image_id: str) -> bool:
        """Whether reads of an image are recorded."""
        with self._mutex:
            window = self._windows.get(image_id)
            return window is not None and not window.full

    def note(self, image_id: str, offset: int, length: int) -> None:
        """A guest read what was not here (bytes)."""
        with self._mutex:
            window = self._windows.get(image_id)
            if window:
                window.add(offset, length)

    def look(self) -> None:
        """End the windows whose time is over, and send what they have."""
        now = time.monotonic()
        with self._mutex:
            over = {image_id: window for image_id, window
                    in self._windows.items()
                    if now - window.since >= self._seconds}
            for image_id, window in over.items():
                del self._windows[image_id]
                if window.bytes >= observation.LEAST:
                    self._again[image_id] = now + _AGAIN
            self._again = {image_id: when for image_id, when
                           in self._again.items() if when > now}
        for image_id, window in over.items():
            if window.bytes >= observation.LEAST:
                self._send({'host': self._name, 'image': image_id,
                            'serial': window.serial,
                            'reads': observation.encode(window.trace())})
