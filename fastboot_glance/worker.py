# SPDX-License-Identifier: Apache-2.0
"""The workers of a builder: each takes a job, runs its flow, says how it
ended, and takes the next.

What TaskFlow's own conductors leave to their users is here: claims that run
out and are extended, oldest job first unless there is no room for it, a cap
on attempts that counts builders which died, and waiting for an image without
occupying a worker.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_glance import cases, jobs

LOG = logging.getLogger(__name__)

#: Seconds until a job is tried again that could not even be begun.
_AGAIN: Final = 10.0


class Worker:
    """One thread that builds, or bakes, one image at a time."""

    def __init__(self, tools: Callable[[], cases.Tools], poll: float,
                 platform: str = '') -> None:
        """Make a worker; :meth:`start` starts it.

        :param tools: called in its thread; repositories are for one.
        :param poll: seconds between two looks at the jobboard.
        :param platform: that it bakes for; empty: it builds.
        """
        self._make = tools
        self._platform = platform
        self._poll = poll
        self._who = (f'{socket.gethostname()}:{os.getpid()}:'
                     f'{secrets.token_hex(4)}')
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._claim: jobs.Claim | None = None
        #: When to look at a job again, by its uuid (monotonic seconds).
        self._later: dict[str, float] = {}
        #: Uuids of jobs that could not be done here. Each try may take long:
        #: others come first.
        self._unable: set[str] = set()
        self._thread = threading.Thread(
            target=self._run, name='baker' if platform else 'worker')

    def start(self) -> None:
        """Start to work."""
        self._thread.start()

    def stop(self) -> None:
        """Give the job back to the board. Does not wait."""
        with self._lock:
            self._stop.set()
            if self._claim:
                self._claim.cancel.set()

    def join(self, seconds: float) -> bool:
        """Wait until it has stopped; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        tools = None
        while not self._stop.is_set():
            busy = False
            try:
                tools = tools or self._make()
                busy = self._turn(tools)
            except exception.Unavailable as error:
                LOG.warning('%s', error)
            except Exception:
                LOG.exception('a worker failed; it goes on')
            if not busy:
                self._stop.wait(self._poll)

    def _turn(self, tools: cases.Tools) -> bool:
        """Take the first job that can be had; whether there was one."""
        found = tools.board.jobs()
        now = time.monotonic()
        self._later = {job.uuid: self._later[job.uuid] for job in found
                       if self._later.get(job.uuid, 0) > now}
        self._unable &= {job.uuid for job in found}
        for job in sorted(found, key=lambda job: job.uuid in self._unable):
            if job.uuid in self._later or self._stop.is_set() \
                    or not self._is_ours(job, found):
                continue
            claim = tools.board.claim(job, self._who)
            if claim:
                self._have(claim, tools)
                return True
        return False

    def _is_ours(self, job: jobs.Job, among: Sequence[jobs.Job]) -> bool:
        """Builds are not kept waiting by bakes, and come first."""
        return job.platform == self._platform and not (job.platform and any(
            other.image_id == job.image_id and not other.platform
            for other in among))

    def _have(self, claim: jobs.Claim, tools: cases.Tools) -> None:
        """Do a job, and remove it from the board or put it back."""
        job = claim.job
        wait: float | None = _AGAIN
        with self._lock:
            self._claim = claim
            if self._stop.is_set():
                claim.cancel.set()
        try:
            with claim:
                kind = cases.Bake if job.platform else cases.Build
                case = kind(claim, tools)
                wait = case.work()
                if case.unable:
                    self._unable.add(job.uuid)
        except cases.LATER as error:
            LOG.warning('image %s: later: %s', job.image_id, error)
        finally:
            with self._lock:
                self._claim = None
            if wait is not None:
                self._later[job.uuid] = time.monotonic() + wait
                if not claim.lost:
                    claim.release()
        if wait is None:
            # The books first: without the job nobody would look for them.
            tools.books.remove(job.uuid)
            claim.finish()
