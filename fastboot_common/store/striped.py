# SPDX-License-Identifier: Apache-2.0
"""One repository at several places: reads are spread over all of them.

Each read goes to the place that will probably have it done first, by what is
under way there and how fast it was. A place that fails, or gives other bytes
than its reader expects, is left out for a while, and the read is repeated at
another. Places may be behind each other: what one does not have, the others
are asked for.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from fastboot_common import exception
from fastboot_common.store import (
    Check,
    Progress,
    ReadStore,
    validate_name,
    validate_range,
)
from fastboot_common.store.download import download

LOG: Final = logging.getLogger(__name__)

#: Bytes that a whole object is fetched in at a time, and how many such pieces
#: of each place are under way.
_PIECE: Final = 1 << 20
_AHEAD: Final = 2
#: Bytes of the smallest read that tells how fast a place is.
_TELLING: Final = 64 << 10
#: Seconds after which that is not known any more.
_FORGET: Final = 30.0
#: Seconds a byte, for one of which it is not known.
_GUESS: Final = 1e-6
#: Share of a new measurement.
_FRESH: Final = 0.3
#: Longest that a place is left out (seconds).
_LONGEST_OUT: Final = 300.0
#: Seconds before all places are asked again; doubles.
_BACKOFF: Final = 0.2
_LONGEST_WAIT: Final = 10.0

T = TypeVar('T')


@dataclasses.dataclass(eq=False)
class _Place:
    """One copy of the repository.

    :ivar waiting: bytes that it was asked for and has not given.
    :ivar pace: seconds a byte; 0: not measured.
    :ivar measured: when that was (monotonic, as the other times).
    :ivar failures: in a row, those at the same time counted once.
    :ivar failed: when the last one was.
    """

    source: ReadStore
    waiting: int = 0
    pace: float = 0.0
    measured: float = 0.0
    failures: int = 0
    failed: float = 0.0
    out_until: float = 0.0

    def rank(self, count: int, now: float) -> tuple[float, ...]:
        """The lower, the better for a read of `count` bytes."""
        seconds = self.waiting * _GUESS  # an idle one is tried
        if self.pace and now - self.measured < _FORGET:
            seconds = (self.waiting + count) * self.pace
        return (max(self.out_until - now, 0), seconds, self.waiting,
                random.random())

    def measure(self, count: int, seconds: float, now: float) -> None:
        """A read took so long."""
        self.failures, self.out_until = 0, 0.0
        if count < _TELLING:
            return
        fresh = seconds / count
        known = self.pace and now - self.measured < _FORGET
        self.pace = (_FRESH * fresh + (1 - _FRESH) * self.pace if known
                     else fresh)
        self.measured = now

    def fail(self, begun: float, now: float) -> bool:
        """Leave it out for a while.

        :param begun: when the read was that failed.
        :returns: false if others have failed since then.
        """
        if begun < self.failed:
            return False
        self.failures += 1
        self.failed = now
        self.leave_out(now)
        return True

    def leave_out(self, now: float) -> None:
        """Also while one read tries whether it works again."""
        self.out_until = now + min(2.0 ** self.failures, _LONGEST_OUT)


class StripedStore:
    """A :class:`~fastboot_common.store.ReadStore` of several others.

    :param sources: stores of the same repository. They should not repeat
        what fails: the next one is faster.
    :param retries: how often all are asked again, where one of them cannot
        be reached.
    """

    def __init__(self, sources: Sequence[ReadStore], *,
                 retries: int = 5) -> None:
        self._places = [_Place(source) for source in sources]
        self._retries = retries
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(
            _AHEAD * len(self._places), 'stripes')

    def __repr__(self) -> str:
        return f'StripedStore({[place.source for place in self._places]})'

    def get(self, name: str, limit: int = 64 << 20,
            check: Check | None = None) -> bytes:
        return self._any(name, 0, lambda one: one.get(name, limit, check))

    def read(self, name: str, offset: int, length: int,
             check: Check | None = None) -> bytes:
        validate_range(offset, length)
        return self._any(name, length, lambda one: one.read(
            name, offset, length, check))

    def size(self, name: str) -> int:
        return self._any(name, 0, lambda one: one.size(name))

    def fetch(self, name: str, path: pathlib.Path, digest: str, size: int,
              progress: Progress | None = None) -> None:
        validate_name(name)
        try:
            download(f'{name} in {self}', path, digest, size,
                     lambda offset: self._pieces(name, offset, size),
                     progress)
        except exception.Corrupt as error:
            # Which place it was, its pieces do not tell.
            LOG.warning('%s; fetching all of it from one', error)
            self._any(name, 0, lambda one: one.fetch(
                name, path, digest, size, progress))

    def _pieces(self, name: str, offset: int, end: int) -> Iterator[bytes]:
        """The bytes from `offset` to `end`, read at all places at once."""
        starts = iter(range(offset, end, _PIECE))
        coming: collections.deque[
            concurrent.futures.Future[bytes]] = collections.deque()
        try:
            while True:
                while len(coming) < _AHEAD * len(self._places):
                    start = next(starts, None)
                    if start is None:
                        break
                    coming.append(self._pool.submit(
                        self.read, name, start, min(_PIECE, end - start)))
                if not coming:
                    return
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()

    # Choosing

    def _any(self, name: str, count: int,
             ask: Callable[[ReadStore], T]) -> T:
        """What one place answers, after the others if need be.

        :param count: bytes of the answer; 0: few.
        """
        validate_name(name)
        attempt = 0
        while True:
            try:
                return self._once(name, count, ask)
            except exception.Unavailable as error:
                if attempt >= self._retries:
                    raise
                LOG.info('%s; trying again', error)
            time.sleep(min(_BACKOFF * 2 ** attempt * random.uniform(1, 2),
                           _LONGEST_WAIT))
            attempt += 1

    def _once(self, name: str, count: int,
              ask: Callable[[ReadStore], T]) -> T:
        errors: list[exception.FastbootError] = []
        tried: list[_Place] = []
        # No place has all entries of the journal: that one more is missing
        # is how its end is known.
        passing = name.startswith(('journal/', 'head.json'))
        while place := self._next(tried, count, passing and any(
                isinstance(error, exception.NotFound) for error in errors)):
            tried.append(place)
            try:
                return self._ask(place, count, ask)
            except (exception.Unavailable, exception.Corrupt,
                    exception.NotFound, exception.Invalid) as error:
                errors.append(error)
        raise _worst(errors, passing)

    def _next(self, tried: list[_Place], count: int,
              answered: bool) -> _Place | None:
        """The best place that was not tried.

        :param answered: those that are left out need not be asked.
        """
        with self._lock:
            now = time.monotonic()
            place = min((one for one in self._places if one not in tried
                         and not (answered and one.out_until > now)),
                        key=lambda one: one.rank(count, now), default=None)
            if place:
                place.waiting += count
                if place.failures:
                    place.leave_out(now)
            return place

    def _ask(self, place: _Place, count: int,
             ask: Callable[[ReadStore], T]) -> T:
        begun = time.monotonic()
        try:
            found = ask(place.source)
        except (exception.Unavailable, exception.Corrupt) as error:
            with self._lock:
                first = place.fail(begun, time.monotonic())
            if first:
                LOG.warning('%s is left out for a while: %s', place.source,
                            error)
            raise
        else:
            now = time.monotonic()
            with self._lock:
                place.measure(count, now - begun, now)
            return found
        finally:
            with self._lock:
                place.waiting -= count


def _worst(errors: list[exception.FastbootError],
           passing: bool) -> exception.FastbootError:
    """What all places together answer.

    :param passing: NotFound is an answer, whatever the others say.
    """
    kinds: list[type[exception.FastbootError]] = [
        exception.Unavailable, exception.Corrupt, exception.Invalid,
        exception.NotFound]
    if passing:
        kinds.insert(0, exception.NotFound)
    return min(errors, key=lambda error: next(
        at for at, kind in enumerate(kinds) if isinstance(error, kind)))
