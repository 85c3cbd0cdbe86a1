# SPDX-License-Identifier: Apache-2.0
"""The lanes of a host: made ahead, taken, dressed, given back.

A lane is one taker's at a time. It serves again if its instance was resumed,
and is removed otherwise: QEMU may still read it, or what it says may be
wrong. Who has lanes is known to this process only, so one that begins removes
all that it finds; a libvirt that restores has its file open, and goes on.
"""

import contextlib
import dataclasses
import enum
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final

from fastboot_common import exception, files
from fastboot_common.microvm import clone
from fastboot_nova.microvm.lane import Lane

#: Seconds after which a lane is taken back. A resume has 30 to load and 10
#: to answer.
TAKEN_SECONDS: Final = 300.0
#: Seconds without a taker after which lanes go that were made beyond those
#: made ahead.
_SURPLUS_SECONDS: Final = 60.0
#: Lanes of a µVM at most, however many servers come at once.
_MOST: Final = 16
#: Seconds that a resume is remembered which failed.
_MEMORY_SECONDS: Final = 60.0


class Fate(enum.Enum):
    """How the resume of an instance goes."""

    #: Nobody knows of one, or it went well.
    NONE = enum.auto()
    #: Somebody has a lane for it.
    COMING = enum.auto()
    #: It was in vain, just now: whoever asked for it boots it.
    FAILED = enum.auto()


@dataclasses.dataclass
class _Taken:
    """A lane that somebody has.

    :ivar since: monotonic seconds.
    :ivar spoiled: it must not serve again.
    :ivar lock: held while it is dressed, and while it is given back.
    """

    stock: '_Stock'
    lane: Lane
    holder: str
    since: float
    spoiled: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@dataclasses.dataclass
class _Stock:
    """The lanes of one artifact.

    :ivar ready: the last one given back is the first one taken.
    :ivar used: when one was taken last (monotonic seconds).
    """

    name: str
    directory: pathlib.Path
    ready: list[Lane] = dataclasses.field(default_factory=list)
    taken: int = 0
    making: int = 0
    used: float = 0.0

    @property
    def count(self) -> int:
        """Lanes that are, or are about to be."""
        return len(self.ready) + self.taken + self.making


@dataclasses.dataclass(frozen=True)
class Loan:
    """What a taker gets.

    :ivar token: that it is given back with.
    """

    token: str
    path: pathlib.Path
    directory: pathlib.Path


class Pool:
    """The lanes of all artifacts; methods are thread-safe.

    :param path: of their directory. What is in there is removed.
    :param ahead: lanes of each artifact.
    :param wanting: called when lanes should be made.
    :param clock: gives seconds.
    """

    def __init__(self, path: pathlib.Path, ahead: int,
                 wanting: Callable[[], None] = lambda: None, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._ahead = ahead
        self._wanting = wanting
        self._clock = clock
        self._mutex = threading.Lock()
        self._stocks: dict[str, _Stock] = {}
        self._loans: dict[str, _Taken] = {}
        #: By holder, when it failed.
        self._failed: dict[str, float] = {}
        files.make_directory(path)
        for old in path.iterdir():
            old.unlink()

    # Artifacts

    def offer(self, name: str, directory: pathlib.Path) -> None:
        """Make lanes of an artifact from now on."""
        with self._mutex:
            known = self._stocks.get(name)
            if known and known.directory == directory:
                return
            if known:
                self._close(known)
            self._stocks[name] = _Stock(name, directory)
        self._wanting()

    def withdraw(self, name: str, force: bool = False) -> bool:
        """Remove the lanes of an artifact, unless somebody has one.

        :param force: also then; who has one can finish, and it goes.
        :returns: whether there are none now.
        """
        with self._mutex:
            stock = self._stocks.get(name)
            if stock is None:
                return True
            if stock.taken and not force:
                return False
            self._close(stock)
            return True

    def _close(self, stock: _Stock) -> None:
        del self._stocks[stock.name]
        while stock.ready:
            stock.ready.pop().remove()

    def counts(self, name: str) -> tuple[int, int]:
        """Lanes of an artifact: all there are, and those taken of them."""
        with self._mutex:
            stock = self._stocks.get(name)
            return (len(stock.ready) + stock.taken, stock.taken) \
                if stock else (0, 0)

    def held(self, name: str) -> int:
        """Bytes of the disk that the lanes take which wait for takers."""
        with self._mutex:
            stock = self._stocks.get(name)
            return sum(lane.path.stat().st_blocks * 512
                       for lane in stock.ready) if stock else 0

    def ready(self) -> int:
        """Lanes that wait for a taker."""
        with self._mutex:
            return sum(len(one.ready) for one in self._stocks.values())

    # Takers

    def take(self, name: str, holder: str) -> Loan:
        """Have a lane of an artifact. Copies nothing.

        :param holder: UUID of the instance.
        :raises NotFound: there is no such artifact.
        :raises Busy: all of its lanes are taken; one is being made.
        """
        with self._mutex:
            stock = self._stocks.get(name)
            if stock is None:
                raise exception.NotFound('it is not unpacked here')
            stock.used = self._clock()
            loan = self._lend(stock, holder) if stock.ready else None
            lacking = not stock.ready
        if lacking:
            self._wanting()
        if loan is None:
            raise exception.Busy('all of its lanes are in use')
        return loan

    def _lend(self, stock: _Stock, holder: str) -> Loan:
        lane = stock.ready.pop()
        token = secrets.token_hex(16)
        self._loans[token] = _Taken(stock, lane, holder, self._clock())
        self._failed.pop(holder, None)
        stock.taken += 1
        return Loan(token, lane.path, stock.directory)

    def dress(self, token: str, xml: str) -> None:
        """Make a lane the instance's.

        :param xml: its definition.
        :raises Invalid: the lane is not lent, or was to another, or the
            instance cannot be a copy of this guest.
        :raises Unavailable: the lane cannot be used.
        """
        taken = self._lent(token)
        try:
            instance = clone.instance(xml, taken.lane.description.machine)
        except exception.Corrupt as error:
            raise exception.Invalid(str(error)) from error
        if str(instance.uuid) != taken.holder:
            raise exception.Invalid(
                f'the lane was taken for {taken.holder}, not for '
                f'{instance.uuid}')
        kind = taken.lane.description.key.virt_type
        if instance.tree.get('type') != kind:
            # A host with KVM has both, and would run it without for as
            # long as it lives.
            raise clone.Unsuitable(f'it does not run with {kind}')
        with taken.lock:
            # It may have been taken back meanwhile, and be another's.
            self._lent(token)
            taken.spoiled = True
            try:
                taken.lane.dress(instance)
            except exception.Invalid:
                # It does not fit; nothing was written.
                taken.spoiled = False
                raise
            except (exception.Corrupt, OSError) as error:
                raise exception.Unavailable(
                    f'the lane cannot be dressed: {error}') from error
            taken.spoiled = False

    def _lent(self, token: str) -> _Taken:
        with self._mutex:
            taken = self._loans.get(token)
        if taken is None:
            raise exception.Invalid('nobody has such a lane')
        return taken

    def give_back(self, token: str, well: bool) -> str:
        """Be done with a lane.

        :param well: it may serve again.
        :returns: the artifact's name.
        :raises Invalid: the lane is not lent.
        """
        taken = self._lent(token)
        with taken.lock, self._mutex:
            if self._loans.pop(token, None) is None:
                raise exception.Invalid('nobody has such a lane')
            self._return(taken, well)
        self._wanting()
        return taken.stock.name

    def fate(self, holder: str) -> Fate:
        """How the resume of an instance goes.

        :param holder: UUID of the instance.
        """
        with self._mutex:
            if any(one.holder == holder for one in self._loans.values()):
                return Fate.COMING
            return Fate.FAILED if holder in self._failed else Fate.NONE

    def _return(self, taken: _Taken, well: bool) -> None:
        stock, lane = taken.stock, taken.lane
        if not well:
            self._failed[taken.holder] = self._clock()
        stock.taken -= 1
        if (well and not taken.spoiled and _is_ours(lane.path)
                and self._stocks.get(stock.name) is stock):
            stock.ready.append(lane)
        else:
            lane.remove()

    # In the background

    def expire(self) -> list[tuple[str, str]]:
        """Take back what nobody gave back; let go what is too much.

        :returns: of each lane taken back, artifact and holder.
        """
        now = self._clock()
        with self._mutex:
            late = {token: taken for token, taken in self._loans.items()
                    if now - taken.since > TAKEN_SECONDS}
        back = []
        for token, taken in late.items():
            with contextlib.suppress(exception.Invalid):
                back.append((self.give_back(token, False), taken.holder))
        with self._mutex:
            self._failed = {
                holder: since for holder, since in self._failed.items()
                if now - since < _MEMORY_SECONDS}
            for stock in self._stocks.values():
                while (stock.count > self._ahead and stock.ready
                       and now - stock.used > _SURPLUS_SECONDS):
                    stock.ready.pop(0).remove()
        return back

    def fill(self, may: Callable[[], bool]) -> None:
        """Make the lanes that lack, one each before the second of any.

        :param may: asked before each.
        :raises Damaged: an artifact is not what it was.
        :raises NoSpace: no room for a lane.
        """
        while may():
            stock = self._poorest()
            if stock is None:
                return
            self._make(stock)

    def _poorest(self) -> _Stock | None:
        """The stock that lacks a lane most; it counts as being made."""
        with self._mutex:
            lacking = [one for one in self._stocks.values()
                       if one.count < self._wanted(one)]
            if not lacking:
                return None
            found = min(lacking, key=lambda one: (len(one.ready), -one.used))
            found.making += 1
            return found

    def _wanted(self, stock: _Stock) -> int:
        """One more than is taken, also when all those made ahead are."""
        return max(self._ahead, min(stock.taken + 1, _MOST))

    def _make(self, stock: _Stock) -> None:
        path = self._path / secrets.token_hex(8)
        lane: Lane | None = None
        try:
            lane = Lane.create(stock.directory, path)
        except (exception.Corrupt, exception.NotFound) as error:
            if self._stocks.get(stock.name) is stock:
                raise Damaged(stock.name, str(error)) from error
        finally:
            with self._mutex:
                stock.making -= 1
                if lane and self._stocks.get(stock.name) is stock:
                    stock.ready.append(lane)
                elif lane:
                    lane.remove()

    def read_ahead(self, budget: int) -> None:
        """Have lanes in the page cache, those of the artifacts used last.

        :param budget: bytes.
        """
        with self._mutex:
            lanes = [lane for stock in sorted(
                self._stocks.values(), key=lambda one: -one.used)
                for lane in stock.ready]
        for lane in lanes:
            with contextlib.suppress(OSError), lane.path.open('rb') as file:
                budget -= os.fstat(file.fileno()).st_blocks * 512
                if budget < 0:
                    return
                os.posix_fadvise(file.fileno(), 0, 0,
                                 os.POSIX_FADV_WILLNEED)


class Damaged(exception.Corrupt):
    """An artifact is not what it was. Unpack it anew.

    :ivar name: of the artifact.
    """

    def __init__(self, name: str, words: str) -> None:
        self.name = name
        super().__init__(words)


def _is_ours(path: pathlib.Path) -> bool:
    """Whether we can write a lane.

    libvirt gives what it restores to QEMU's user, and then to root, if it
    was told to care for owners.
    """
    try:
        if os.geteuid() == 0:
            os.chown(path, 0, os.getegid())
        path.chmod(0o640)
    except OSError:
        return False
    return True
