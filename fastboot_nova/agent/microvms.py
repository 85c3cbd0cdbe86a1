# SPDX-License-Identifier: Apache-2.0
"""The µVMs of this host: which come, are unpacked, have lanes, and go.

Two threads: one follows the repository of the µVMs, another does what needs
no network. What is here is chosen anew each time, by what was used last, and
all else goes; so nothing has to be remembered but when each was used.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception, files, journal
from fastboot_common.microvm import artifact, shelf
from fastboot_common.microvm.key import Platform
from fastboot_common.store import throttle
from fastboot_nova import mirror
from fastboot_nova.agent import metrics, space, window, worker
from fastboot_nova.agent.sync import StoppedError
from fastboot_nova.microvm import artifacts, pool, remote

LOG = logging.getLogger(__name__)

#: Seconds between two looks at what needs no network.
_KEEP_SECONDS: Final = 20.0
#: Failures in a row after which a µVM is put aside.
_FAILURES: Final = 3
#: Phases of a resume that tell of the µVM. In others the host, or what the
#: owner asked for, may be to blame.
_SUSPECT: Final = frozenset(('take', 'dress', 'load', 'activate', 'wait'))
#: Seconds before something is tried again that failed.
_AGAIN: Final = 300.0
#: Longest that guests who come hold up a copy (seconds).
_COURTESY: Final = 10.0
#: In which a server boots whose resume failed (seconds).
_AFTERMATH: Final = 5.0
_WORDS: Final = 500


@dataclasses.dataclass
class _Microvm:
    """A µVM that this host can run.

    :ivar rank: of its platform among the host's; the lower the better.
    :ivar root: of its image's content.
    :ivar base: the manifest of its image, if that has this content.
    :ivar came: bytes that came of it, while it comes; None: it does not.
    :ivar offered: it is unpacked, and lanes are made of it.
    :ivar bytes: that artifact and lanes take; 0: it was not unpacked yet.
    :ivar failures: resumes in a row that failed.
    :ivar damages: how often what was unpacked turned out damaged.
    :ivar aside: it is not tried again before `not_before`.
    :ivar setbacks: how often it was put aside.
    :ivar evicted: it went to make room, and comes back when there is some.
    :ivar reason: why it is not here, in words.
    :ivar error: `reason` tells a failure.
    :ivar not_before: of the next try (monotonic seconds).
    """

    entry: journal.Image
    name: shelf.Name
    rank: int = 0
    root: str = ''
    base: str = ''
    came: int | None = None
    offered: bool = False
    bytes: int = 0
    resumed: int = 0
    fallbacks: int = 0
    failures: int = 0
    damages: int = 0
    aside: bool = False
    setbacks: int = 0
    evicted: bool = False
    reason: str | None = None
    error: bool = False
    not_before: float = 0.0

    def fail(self, words: str) -> None:
        """Note a failure."""
        if self.reason != words:
            LOG.warning('the µVM of image %s: %s', self.name.image, words)
        self.reason, self.error = words[:_WORDS], True
        self.not_before = time.monotonic() + _AGAIN

    def put_aside(self, words: str) -> None:
        """Leave it for a while, longer each time."""
        self.fail(words)
        self.aside = True
        self.not_before += _AGAIN * (2 ** min(self.setbacks, 8) - 1)
        self.setbacks += 1

    def reconsider(self) -> None:
        """One that was put aside long enough gets one more try."""
        if self.aside and time.monotonic() >= self.not_before:
            self.aside, self.failures = False, _FAILURES - 1
            self.damages = min(self.damages, _FAILURES - 1)
            self.mend()

    def lack(self, words: str) -> None:
        """Note why it is not here."""
        self.reason, self.error = words, False

    def mend(self) -> None:
        """Nothing is wrong any more."""
        self.reason, self.error, self.not_before = None, False, 0.0

    def state(self, lanes: int) -> str:
        """In a word."""
        if self.aside or self.error:
            return 'error'
        if self.offered:
            return 'ready' if lanes else 'transferring'
        return 'absent' if self.came is None else 'transferring'


class Microvms:
    """All of them; methods are thread-safe.

    :param path: of their directory.
    :param images: the mirror of the images.
    :param room: the disk.
    :param told: counters.
    :param enabled: false: those that are here go.
    :param opened: opens the mirror of the µVMs; NotFound: there are none.
    :param platforms: gives what this host is; Unavailable: nobody knows.
    :param times: when pulls may begin that nobody asked for.
    :param limit: rate of pulls that nobody asked for; None: any.
    :param interval: seconds between two looks at the repository.
    :param jitter: seconds that a look may be late.
    :param lanes: of each, made ahead.
    :param disk: bytes that all may take.
    :param memory: bytes of lanes to have in the page cache.
    :param busy: whether a guest is just coming.
    :param changed: called when the state of one is another.
    """

    def __init__(self, path: pathlib.Path, images: mirror.Mirror,
                 room: space.Space, told: metrics.Metrics, *, enabled: bool,
                 opened: Callable[[pathlib.Path], mirror.Mirror],
                 platforms: Callable[[], list[Platform]],
                 times: window.Window, limit: throttle.Throttle | None,
                 interval: float, jitter: float, lanes: int, disk: int,
                 memory: int, busy: Callable[[], bool] = lambda: False,
                 changed: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._images = images
        self._room = room
        self._told = told
        self._enabled = enabled
        self._opened = opened
        self._ask_platforms = platforms
        self._times = times
        self._limit = limit
        self._jitter = jitter
        self._lanes = lanes
        self._disk = disk
        self._memory = memory
        self._busy = busy
        self._changed = changed
        if not enabled:
            shutil.rmtree(path, ignore_errors=True)
        for one in (path, path / 'used'):
            files.make_directory(one)
        self._artifacts = artifacts.Artifacts(path / 'artifacts')
        #: Held while artifacts are made and removed.
        self._work = threading.Lock()
        self._mutex = threading.Lock()
        self._looking = threading.Lock()
        self._mirror: mirror.Mirror | None = None
        self._prompt = False
        self._asked: set[str] = set()
        self._suspects: set[str] = set()
        #: Until then, servers boot whose resume failed (monotonic seconds).
        self._calm = 0.0
        #: By digest of a manifest: the platform and the content of the
        #: image that it names.
        self._named: dict[str, tuple[str, str]] = {}
        self._known: dict[str, _Microvm] = {}
        #: Whether the repository was looked at; nothing goes before.
        self._learned = False
        self._platforms: list[Platform] | None = None
        #: Why there are none, in words.
        self.reason = '' if enabled else (
            'µVMs are switched off ([microvm] enabled)')
        #: Why their repository cannot be followed, in words.
        self.error = ''
        self.follower = worker.Worker('microvms', self.follow, interval)
        self.keeper = worker.Worker('lanes', self.keep, _KEEP_SECONDS)
        self._pool = pool.Pool(path / 'lanes', lanes, self.keeper.wake)
        self.workers = [self.follower, self.keeper] if enabled else []
        told.follow('microvm_lanes', 'Lanes that wait for a server',
                    self._pool.ready)
        told.follow('microvm_bytes', 'Disk space that µVMs take', self.held)

    # What others ask

    @property
    def platforms(self) -> list[str]:
        """What this host is, in words."""
        return [one.text for one in self._platforms or ()]

    def held(self) -> int:
        """Bytes of the disk that they take."""
        return files.disk_used(self._path)

    def look(self) -> None:
        """The repository may have something new."""
        self.follower.wake()

    def everything(self) -> None:
        """Sync now, whatever the time of day."""
        self._prompt = True
        self.follower.wake()

    def rows(self) -> list[dict[str, Any]]:
        """Those of this host's platforms."""
        with self._mutex:
            known = sorted(self._known.values(),
                           key=lambda one: one.entry.serial)
        return [self._row(one) for one in known]

    def _row(self, one: _Microvm) -> dict[str, Any]:
        lanes, _ = self._pool.counts(one.entry.manifest)
        return {'image': one.name.image, 'class': one.name.group,
                'state': one.state(lanes), 'bytes': one.bytes,
                'lanes': lanes, 'resumed': one.resumed,
                'fallbacks': one.fallbacks, 'reason': one.reason}

    def take(self, image_id: str, holder: str,
             obstacle: str = '') -> dict[str, Any]:
        """Have a lane of an image's µVM. Copies and fetches nothing.

        :param obstacle: why none is lent now; '': they are.
        :raises NotFound: there is none here, and why.
        :raises Busy: all of its lanes are in use.
        """
        try:
            one = self._find(image_id)
            if obstacle:
                raise exception.NotFound(obstacle)
            loan = self._lend(one, holder)
        except exception.Busy:
            self._told.microvm_misses.labels('busy').inc()
            raise
        except exception.NotFound:
            self._told.microvm_misses.labels('absent').inc()
            raise
        return {'lane': loan.token, 'path': str(loan.path),
                'directory': str(loan.directory), 'class': one.name.group}

    def _find(self, image_id: str) -> _Microvm:
        """The best µVM of an image.

        :raises NotFound: there is none.
        """
        if self.reason:
            raise exception.NotFound(self.reason)
        with self._mutex:
            found = [one for one in self._known.values()
                     if one.name.image == image_id]
        if not found:
            raise exception.NotFound(
                f'image {image_id} has no µVM for this host')
        return min(found, key=lambda one: (
            not one.offered or one.aside, one.rank, -one.entry.serial))

    def _lend(self, one: _Microvm, holder: str) -> pool.Loan:
        self._use(one)
        if one.aside or not one.offered or not self._is_current(one):
            if not one.aside:
                self._ask(one)
            raise exception.NotFound(
                f'the µVM of image {one.name.image} is not ready here: '
                f'{one.reason or "it is coming"}')
        return self._pool.take(one.entry.manifest, holder)

    def _is_current(self, one: _Microvm) -> bool:
        """Whether the disks of its image are what it was baked of."""
        image = self._images.state.images.get(one.name.image)
        if image is None or not one.base:
            return False
        # Most of the time, nothing but its boot set was made anew. All that
        # is read for that lies here.
        return image.manifest == one.base or (
            self._images.ready(image) and self._compare(one, image))

    def _ask(self, one: _Microvm) -> None:
        """Have one here soon: somebody wanted it."""
        with self._mutex:
            one.evicted = False
            self._asked.add(one.entry.image_id)
        self.keeper.wake()
        if self._mirror and not self._mirror.ready(one.entry):
            self.follower.wake()

    def dress(self, token: str, xml: str) -> None:
        """See :meth:`fastboot_nova.microvm.pool.Pool.dress`."""
        self._pool.dress(token, xml)

    def fate(self, holder: str) -> pool.Fate:
        """See :meth:`fastboot_nova.microvm.pool.Pool.fate`."""
        return self._pool.fate(holder)

    def give_back(self, token: str, outcome: str, phase: str, reason: str,
                  seconds: dict[str, float]) -> None:
        """Be done with a lane, and count how it went.

        :param outcome: one of :data:`remote.OUTCOMES`.
        :raises Invalid: nobody has such a lane.
        """
        failed = outcome == remote.FAILED
        if failed:  # before the keeper makes another lane
            self._calm = time.monotonic() + _AFTERMATH
        name = self._pool.give_back(token, not failed)
        self._told.note_resume(outcome == remote.RESUMED, phase, seconds)
        self._note(name, outcome, phase, reason)

    def _note(self, name: str, outcome: str, phase: str,
              reason: str) -> None:
        with self._mutex:
            one = self._of(name)
            if one is None:
                return
            if outcome == remote.RESUMED:
                one.resumed += 1
                one.failures = one.setbacks = 0
            else:
                one.fallbacks += 1
            if outcome == remote.FAILED and phase in _SUSPECT:
                one.failures += 1
                self._suspects.add(name)
                if one.failures >= _FAILURES:
                    one.put_aside(
                        f'{one.failures} resumes in a row failed; the last '
                        f'({phase}): {reason}')
        LOG.info('the µVM of image %s: %s %s %s', one.name.image, outcome,
                 phase, reason)
        self._changed()

    def _of(self, name: str) -> _Microvm | None:
        return next((one for one in self._known.values()
                     if one.entry.manifest == name), None)

    # Following the repository

    def follow(self) -> None:
        """Bring what is chosen into the mirror.

        :raises FastbootError: the repository cannot be followed.
        """
        prompt, self._prompt = self._prompt, False
        if not (prompt or self._asked) and not self.follower.pause(
                random.uniform(0, self._jitter)):
            return
        self._look_at_host()
        try:
            found = self._open()
            if found is not None:
                self._follow_to(found, prompt)
        except StoppedError:
            pass
        except Exception as error:
            self.error = str(error) or repr(error)
            raise
        else:
            self.error = ''
        finally:
            self.keeper.wake()
            self._changed()

    def _follow_to(self, found: mirror.Mirror, everything: bool) -> None:
        """What is known is done also if there is no news.

        :param everything: whatever the time of day.
        """
        failed = None
        try:
            found.refresh()
        except exception.FastbootError as error:
            if not found.state.version:
                raise
            failed = error
        self._learn(found)
        for one in self._choose():
            if everything or one.entry.image_id in self._asked or (
                    self._times.is_open()):
                self._bring(found, one)
        self._prune(found)
        if failed:
            raise failed

    def _look_at_host(self) -> None:
        """Another QEMU or libvirt makes another platform of it."""
        try:
            with self._looking:
                found = self._ask_platforms()
        except exception.FastbootError as error:
            # Those that are here stay: it may answer again.
            if self._platforms is None:
                self.reason = f'this host\'s platform is not known: {error}'
            return
        if found != self._platforms:
            LOG.info('this host is %s',
                     ', '.join(one.text for one in found) or 'no platform')
        self._platforms = found
        self.reason = '' if found else (
            'libvirt here runs guests neither with kvm nor with qemu')

    def _open(self) -> mirror.Mirror | None:
        if self._mirror is None:
            with contextlib.suppress(exception.NotFound):
                self._mirror = self._opened(self._path / 'mirror')
        return self._mirror

    def _learn(self, found: mirror.Mirror) -> None:
        """Find the µVMs that this host can run."""
        if self._platforms is None:
            return
        ranks = {one.text: rank
                 for rank, one in enumerate(self._platforms)}
        known = {}
        for entry in sorted(found.state.images.values(),
                            key=lambda one: one.serial):
            rank = ranks.get(self._platform(found, entry))
            if rank is not None:
                with contextlib.suppress(exception.Corrupt):
                    known[entry.image_id] = self._microvm(entry, rank)
        with self._mutex:
            self._known = known
            self._asked &= known.keys()
        self._learned = True
        self._named = {digest: named for digest, named in self._named.items()
                       if digest in {entry.manifest for entry in
                                     found.state.images.values()}}

    def _platform(self, found: mirror.Mirror, entry: journal.Image) -> str:
        """Of the hosts that a µVM is for; empty: nobody knows."""
        if entry.manifest not in self._named:
            try:
                self._named[entry.manifest] = shelf.named(
                    found.read_manifest(entry.manifest))
            except exception.FastbootError as error:
                LOG.warning('the µVM %s: %s', entry.name, error)
                return ''
        return self._named[entry.manifest][0]

    def _microvm(self, entry: journal.Image, rank: int) -> _Microvm:
        one = self._known.get(entry.image_id)
        if one is None or one.entry.manifest != entry.manifest:
            # A new version gets another chance.
            old, one = one, _Microvm(entry, shelf.Name.of(entry))
            if old:
                one.resumed, one.fallbacks = old.resumed, old.fallbacks
            elif not self._mark(one).exists():
                self._use(one)
        one.entry, one.rank = entry, rank
        one.root = self._named[entry.manifest][1]
        return one

    def _bring(self, found: mirror.Mirror, one: _Microvm) -> None:
        """Have all of one in the mirror; a failure is noted.

        :raises StoppedError: the agent ends.
        """
        entry = one.entry
        asked = entry.image_id in self._asked
        if found.ready(entry) or (
                time.monotonic() < one.not_before and not asked):
            return
        one.came = 0

        def progress(count: int) -> None:
            if self.follower.stopping():
                raise StoppedError
            one.came = (one.came or 0) + count
            self._told.sync_bytes.inc(count)
            if self._limit and not asked:
                self._limit.take(count)

        self._changed()
        try:
            if not self._room.is_roomy(found.boot_bytes(entry)):
                one.lack('the disk has no room for it')
                return
            found.pull(entry, progress)
            one.mend()
            self._asked.discard(entry.image_id)
        except exception.FastbootError as error:
            one.fail(str(error))
        finally:
            one.came = None

    def _prune(self, found: mirror.Mirror) -> None:
        """Keep what is chosen, and no more of others than was looked at."""
        if self._platforms is None:
            return
        with found.following:
            try:
                found.prune({one.entry.manifest for one in self._choose()})
            except exception.FastbootError as error:
                LOG.warning('no µVMs are dropped: %s', error)

    # Choosing

    def _mark(self, one: _Microvm) -> pathlib.Path:
        """A file whose time says when it was used."""
        return self._path / 'used' / one.entry.image_id

    def _use(self, one: _Microvm) -> None:
        with contextlib.suppress(OSError):
            files.touch(self._mark(one))
            os.utime(self._mark(one))

    def _used(self, one: _Microvm) -> int:
        with contextlib.suppress(OSError):
            return self._mark(one).stat().st_mtime_ns
        return 0

    def _choose(self) -> list[_Microvm]:
        """Those to have here, the one used last first."""
        with self._mutex:
            known = list(self._known.values())
        left = self._disk
        chosen = []
        for one in sorted(known, key=self._used, reverse=True):
            cost = self._cost(one)
            lanes, taken = self._pool.counts(one.entry.manifest)
            why = self._refusal(one, cost, left)
            if why and not taken:
                if not one.aside:
                    one.lack(why)
                continue
            one.evicted = False
            left -= cost
            chosen.append(one)
        return chosen

    def _refusal(self, one: _Microvm, cost: int, left: int) -> str | None:
        """Why one is not to be here."""
        if one.name.image not in self._images.state.images:
            return 'its image is not registered'
        if cost > left:
            return ('those that were used since take all of [microvm] disk')
        if one.evicted and not self._room.is_roomy(cost):
            return 'it went to make room'
        return None

    def _cost(self, one: _Microvm) -> int:
        """Bytes that one takes with its lanes, or may take."""
        blob = one.entry.virtual_size
        # Until it was here once: what it shares with its image is not in
        # the blob, and zeros are nowhere.
        return blob + (one.bytes or (1 + self._lanes) * blob)

    def _measure(self, one: _Microvm) -> None:
        """What artifact and lanes take; the disk of a lane is none."""
        directory = self._artifacts.directory(one.entry)
        with contextlib.suppress(OSError):
            memory = (directory / artifact.MEMORY).stat().st_blocks * 512
            one.bytes = (files.disk_used(directory)
                         + self._lanes * memory)

    # Without the network

    def keep(self) -> None:
        """Unpack what is chosen, make its lanes, and let all else go."""
        if self._platforms is None:
            self._look_at_host()
            if self._platforms is not None:
                self.follower.wake()
            return
        found = self._mirror
        if found is None or not self._learned:
            return
        before = self.rows()
        with self._mutex:
            for one in self._known.values():
                one.reconsider()
        chosen = self._choose()
        keep = {one.entry.manifest for one in chosen}
        for name in self._artifacts.names() - keep:
            self._remove(name)
        for one in self._known.values():
            if one.entry.manifest not in keep:
                one.offered = False
        for one in chosen:
            if not self.keeper.stopping():
                self._make(found, one)
        self._check_suspects()
        for name, holder in self._pool.expire():
            LOG.warning('the lane of instance %s was never given back',
                        holder)
            self._told.note_resume(False, 'lost', {})
            self._note(name, remote.REFUSED, 'lost', '')
        self._fill()
        self._pool.read_ahead(self._memory)
        for mark in (self._path / 'used').iterdir():
            if mark.name not in found.state.images:
                mark.unlink(missing_ok=True)
        if self.rows() != before:
            self._changed()

    def _remove(self, name: str, force: bool = False) -> int:
        """Remove an artifact and its lanes, unless one is taken.

        :returns: bytes freed.
        """
        with self._work:
            lanes = self._pool.held(name)
            if not self._pool.withdraw(name, force):
                return 0
            return self._artifacts.remove(name) + lanes

    def _make(self, found: mirror.Mirror, one: _Microvm) -> None:
        """Unpack one, if all that it needs is here; a failure is noted."""
        if one.aside or time.monotonic() < one.not_before:
            return
        image = self._images.state.images.get(one.name.image)
        entry = one.entry
        if image is None or not self._images.ready(image):
            if not one.error:
                one.lack('its image is not here yet')
            return
        if not found.ready(entry):
            return
        try:
            if not self._compare(one, image):
                return
            if not self._artifacts.has(entry):
                if not self._room.is_roomy(self._cost(one)):
                    raise exception.NoSpace('the disk has no room for it')
                self._be_polite()
                one.came = 0
                with self._work:
                    self._artifacts.make(entry, found, image, self._images,
                                         self._go_on)
                LOG.info('the µVM of image %s is unpacked', one.name.image)
            self._measure(one)
            self._pool.offer(entry.manifest,
                             self._artifacts.directory(entry))
            one.mend()
            one.offered = True
        except StoppedError:
            pass
        except exception.NoSpace as error:
            one.lack(str(error))
        except exception.FastbootError as error:
            one.fail(str(error))
        finally:
            one.came = None

    def _compare(self, one: _Microvm, image: journal.Image) -> bool:
        """Whether an image still has the content that one was baked of.

        Another has the id if it was removed and published again. On its
        disks, what the µVM's boot wrote is rubbish.
        """
        if one.base != image.manifest:
            found = self._images.read_manifest(image.manifest)
            if found.root != one.root:
                one.base, one.offered = '', False
                one.lack('its image has another content now')
                return False
            one.base = image.manifest
        return True

    def _go_on(self, count: int) -> None:
        if self.keeper.stopping():
            raise StoppedError

    def _check_suspects(self) -> None:
        """A resume failed: the artifact may be to blame."""
        with self._mutex:
            suspects, self._suspects = self._suspects, set()
        for name in suspects:
            self._be_polite()
            try:
                self._artifacts.prove(name)
            except (exception.Corrupt, exception.NotFound) as error:
                self._replace(name, str(error))

    def _replace(self, name: str, words: str) -> None:
        """Unpack a damaged artifact anew."""
        LOG.warning('a µVM is damaged, and is unpacked anew: %s', words)
        self._remove(name, force=True)
        with self._mutex:
            one = self._of(name)
            if one:
                one.offered = one.aside = False
                one.failures = 0
                one.damages += 1
                one.mend()
                if one.damages >= _FAILURES:
                    one.put_aside(
                        f'it was damaged again and again: {words}')
        self.keeper.wake()

    def _fill(self) -> None:
        def may() -> bool:
            self._be_polite()
            return not self.keeper.stopping() and self._room.is_roomy(0)

        try:
            self._pool.fill(may)
        except pool.Damaged as error:
            self._replace(error.name, str(error))
        except exception.NoSpace as error:
            LOG.warning('no lane is made: %s', error)

    def _be_polite(self) -> None:
        """Let guests pass that are just coming."""
        deadline = time.monotonic() + _COURTESY
        while ((self._busy() or time.monotonic() < self._calm)
               and time.monotonic() < deadline):
            if not self.keeper.pause(0.05):
                return

    def make_room(self, wanted: int) -> int:
        """Let go those used longest ago, and that nobody has lanes of.

        :param wanted: bytes.
        :returns: bytes freed, perhaps less.
        """
        freed = 0
        for one in self._idle():
            if freed >= wanted:
                break
            count = self._remove(one.entry.manifest)
            if count:
                one.offered, one.evicted = False, True
                one.lack('it went to make room')
                freed += count
        return freed

    def _idle(self) -> Iterator[_Microvm]:
        with self._mutex:
            known = list(self._known.values())
        return iter(sorted((one for one in known if one.offered),
                           key=self._used))
