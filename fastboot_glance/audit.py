# SPDX-License-Identifier: Apache-2.0
"""The steward: sees to it that what Glance has, the repository gets.

It looks at single images when the listener hears of them, and at all of
them now and then (the audit), which finds what nobody told. What a
notification says is never believed: Glance itself is asked. Everything may
be done twice, and by several builders.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_glance import (
    bakes,
    eligibility,
    images,
    jobs,
    observations,
    records,
    registry,
)

LOG = logging.getLogger(__name__)

#: Seconds that notifications are gathered for: one upload sends several.
_GATHER: Final = 0.3
_WAITING: Final = 10_000
#: Seconds until an audit that failed is repeated.
_AGAIN: Final = 30.0
#: Seconds after which a bake that nobody began is nobody's.
_ABANDONED: Final = 86400.0


class Steward:
    """Compares images in Glance with the repository. For one thread."""

    def __init__(self, board: jobs.Board, glance: images.Images,
                 policies: eligibility.Policies, store: records.Records,
                 register: registry.Registry,
                 refresher: observations.Refresher, baker: bakes.Bakes,
                 removals: int, again: float) -> None:
        """Make one.

        :param refresher: sees to what hosts observed.
        :param baker: sees to µVMs.
        :param removals: how many images one audit deregisters at most.
        :param again: seconds after which a build is tried again that
            failed, though not by the image; 0: never.
        """
        self._who = (f'{socket.gethostname()}:{os.getpid()}:'
                     f'{secrets.token_hex(4)}')
        self._board = board
        self._glance = glance
        self._policies = policies
        self._records = store
        self._registry = register
        self._refresher = refresher
        self._bakes = baker
        self._removals = removals
        self._again = again

    def look_at(self, image_ids: Iterable[str]) -> None:
        """See what happened to each of some images, and follow.

        :raises Unavailable: something is away; the audit comes later.
        """
        for image_id in image_ids:
            self._one(self.look, image_id)

    def look(self, image_id: str) -> None:
        """Something happened to an image: see what, and follow.

        :raises Unavailable: something is away; the audit comes later.
        """
        try:
            image = self._glance.get(image_id)
        except exception.NotFound:
            self._registry.gone(image_id)
            return
        if image.status == 'active':
            self._follow(image)

    def audit(self) -> None:
        """Compare everything.

        :raises Unavailable: something is away, or Glance's list is not
            complete; nothing was deregistered.
        """
        begun = time.monotonic()
        # The list of jobs, records and registered images first: what comes
        # in meanwhile is left to the next audit.
        known = {build.image_id for build in self._records.builds()}
        registered = set(self._registry.repository.state().images)
        waiting = self._board.jobs()
        found = {image.image_id: image for image in self._glance.list()}
        for image in found.values():
            if image.status == 'active':
                self._one(lambda one: self._follow(one, waiting), image)
        self._remove(sorted(registered - found.keys()), bool(found))
        for image_id in known - registered - found.keys():
            self._one(self._registry.gone, image_id)
        self._drop(waiting)
        LOG.info('audit: %d images in Glance, %d registered, %.1f s',
                 len(found), len(registered), time.monotonic() - begun)

    def _one(self, step: Callable[[Any], None], what: Any) -> None:
        """Let one bad image not keep the others from being looked at."""
        try:
            step(what)
        except exception.NotFound as error:
            LOG.info('audit: %s', error)  # gone since the list was made
        except (exception.Invalid, exception.Corrupt,
                exception.NoSpace) as error:
            LOG.error('audit: %s', error)

    def _follow(self, image: images.Image,
                waiting: Sequence[jobs.Job] | None = None) -> None:
        """An active image: is it as it should be?

        :param waiting: the jobs on the board, if they are known.
        """
        refusal = self._policies.refuse(image)
        if refusal:
            self._registry.refuse(image, refusal)
            return
        found = self._registry.find(image.image_id)
        if found:
            self._registry.settle(image, found)
            self._refresher.look(image, found)
            # As it is now: it may have been registered anew.
            found = self._registry.find(image.image_id)
            if found:
                self._bakes.look(image, found, waiting)
            return
        known = self._records.build(image.image_id)
        if known and known.state == 'error' and not self._is_due(known):
            return
        # Said before a builder can have it, and say more.
        if not known or known.state not in ('queued', 'building'):
            self._registry.note(image, 'queued')
            self._registry.pending(image, 'queued')
        self._board.post(image.image_id, 'seen active in Glance',
                         among=waiting)

    def _is_due(self, failed: records.Build) -> bool:
        """Whether a build in error is to be tried again."""
        return bool(failed.requested) or (
            self._again > 0 and failed.stage == records.PASSING
            and time.time() - failed.updated >= self._again)

    def _remove(self, missing: list[str], any_found: bool) -> None:
        """Deregister images that Glance's complete list does not have."""
        gone = [image_id for image_id in missing if self._is_gone(image_id)]
        if len(gone) > self._removals:
            LOG.error(
                'audit: %d registered images are not in Glance, which shows '
                '%s. None is deregistered: does [glance] name the right '
                'region and a user that sees all images? If so, raise '
                '[builder] audit_removals.', len(gone),
                'others' if any_found else 'none at all')
            return
        for image_id in gone:
            self._one(self._registry.gone, image_id)

    def _drop(self, waiting: Sequence[jobs.Job]) -> None:
        """Take bakes from the board that no builder has the platform for.

        Who has it posts them again.
        """
        for job in waiting:
            if job.platform and time.time() - job.posted > _ABANDONED:
                claim = self._board.claim(job, self._who)
                if claim:
                    LOG.warning('image %s: nobody bakes for %s; the job is '
                                'dropped', job.image_id, job.platform)
                    claim.finish()

    def _is_gone(self, image_id: str) -> bool:
        """Whether Glance had it once, and says itself that it has not."""
        image = self._registry.find(image_id)
        try:
            if image is None or not self._registry.from_glance(image):
                return False
            self._glance.get(image_id)
        except exception.NotFound:
            return True
        except exception.Corrupt as error:
            LOG.error('audit: image %s: %s', image_id, error)
        return False


class Desk:
    """The steward's thread, and the list of what he is to look at."""

    def __init__(self, make: Callable[[], Steward],
                 interval: float) -> None:
        """Make it; :meth:`start` starts it.

        :param make: makes the steward, in its thread.
        :param interval: seconds between two audits.
        """
        self._make = make
        self._interval = interval
        self._changed = threading.Condition()
        self._waiting: set[str] = set()
        self._stopped = False
        self._steward: Steward | None = None
        self._thread = threading.Thread(target=self._run, name='steward',
                                        daemon=True)

    def start(self) -> None:
        """Begin, with an audit."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is being looked at. Does not wait."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait until it has ended."""
        self._thread.join(seconds)

    def put(self, image_id: str) -> None:
        """Have an image looked at soon."""
        with self._changed:
            if len(self._waiting) < _WAITING:  # else: the audit
                self._waiting.add(image_id)
                self._changed.notify()

    def _run(self) -> None:
        due = time.monotonic()
        while (wanted := self._take(due)) is not None:
            due = self._turn(wanted, due)

    def _turn(self, wanted: set[str], due: float) -> float:
        """Look at some images, or at all; when the next audit is due."""
        soon = min(self._interval, _AGAIN)
        if wanted and not self._done(lambda one: one.look_at(wanted)):
            # The audit looks at what was left. It may be due before, and is
            # not put off: some image may always fail.
            due = min(due, time.monotonic() + soon)
        if time.monotonic() < due:
            return due
        well = self._done(lambda one: one.audit())
        return time.monotonic() + (self._interval if well else soon)

    def _done(self, work: Callable[[Steward], None]) -> bool:
        """Have the steward do something; whether he could."""
        try:
            self._steward = self._steward or self._make()
            work(self._steward)
            return True
        except exception.FastbootError as error:
            LOG.warning('audit: %s', error)
        except Exception:
            LOG.exception('the steward failed; he goes on')
        return False

    def _take(self, due: float) -> set[str] | None:
        """What to look at; empty: an audit is due; None: stop."""
        with self._changed:
            while not (self._stopped or self._waiting):
                left = due - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._waiting and not self._stopped:
                self._changed.wait(_GATHER)
            wanted, self._waiting = self._waiting, set()
            return None if self._stopped else wanted
