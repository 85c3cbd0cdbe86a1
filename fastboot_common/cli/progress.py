# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

import tqdm

#: Seconds between two lines of a log.
_EVERY: Final = 10.0


def tell(phase: str) -> None:
    """Say that a part of some work begins."""
    print(f'{phase} ...', file=sys.stderr, flush=True)


class Progress:
    """Shows how far some work on bytes is. A context manager.

    Call it with the number of bytes done since the last call.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        """Begin.

        :param what: the work, in a word or two.
        :param total: bytes, if known.
        """
        self._what = what
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(desc=what, total=total, unit='B',
                                  unit_scale=True, unit_divisor=1024,
                                  leave=False)

    def __call__(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        share = ''
        if self._total:
            share = f', {min(100, self._done * 100 // self._total)}%'
        rate = self._done / max(time.monotonic() - self._start, 1e-3)
        print(f'{self._what}: {self._done / 2**20:.0f} MiB{share}, '
              f'{rate / 2**20:.0f} MiB/s', file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 value: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done and kind is None:
            self._line()
