# SPDX-License-Identifier: Apache-2.0
"""A thread that does one thing again and again, and can be woken."""

import threading
import time
from collections.abc import Callable
from typing import Final

from oslo_log import log as logging

from fastboot_common import exception

LOG = logging.getLogger(__name__)

#: Longest pause after failures in a row (seconds).
_LONGEST: Final = 60.0


class Worker:
    """Calls `step` every `seconds`, and at once when woken.

    A step that fails is logged and repeated, with longer and longer pauses;
    nothing ends the thread but :meth:`stop`.

    :param name: of the thread, and in the log.
    :param step: what to do.
    :param seconds: between two steps.
    :param longest: pause after failures (seconds).
    """

    def __init__(self, name: str, step: Callable[[], None],
                 seconds: float, longest: float = _LONGEST) -> None:
        self.name = name
        self._step = step
        self._seconds = seconds
        self._longest = longest
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(
            target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin, with a first step."""
        self._thread.start()

    def wake(self) -> None:
        """Do a step now (one more, if one is under way)."""
        self._woken.set()

    def stop(self) -> None:
        """Ask the thread to end after the step under way."""
        self._stopping.set()
        self._woken.set()

    def join(self, deadline: float) -> bool:
        """Wait for the end, until a moment of :func:`time.monotonic`.

        :returns: whether it came.
        """
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def stopping(self) -> bool:
        """Whether :meth:`stop` was called; steps that take long ask."""
        return self._stopping.is_set()

    def pause(self, seconds: float) -> bool:
        """Wait within a step.

        :returns: whether to go on; false at once when stopping.
        """
        return not self._stopping.wait(seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            self._woken.wait(self._try())

    def _try(self) -> float:
        """One step.

        :returns: seconds until the next.
        """
        try:
            self._step()
        except exception.FastbootError as error:
            self._failures += 1
            LOG.warning('%s: %s', self.name, error)
        except Exception:
            self._failures += 1
            LOG.exception('%s failed; it is tried again', self.name)
        else:
            self._failures = 0
        if self._failures:
            return min(2.0 ** min(self._failures, 16) / 2, self._longest)
        return self._seconds
