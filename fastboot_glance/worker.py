# SPDX-License-Identifier: Apache-2.0
"""The workers of a builder: each takes a job, runs its flow, says how it
ended, and takes the next.

What TaskFlow's own conductors leave to their users is here: claims that run
out and are extended, oldest job first, a cap on attempts that counts
builders which died, and waiting for an image without occupying a worker.
"""

import dataclasses
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception, publish
from fastboot_glance import (
    eligibility,
    images,
    jobs,
    logbooks,
    registry,
    source,
    staging,
)
from fastboot_glance.flows import build as build_flow

LOG = logging.getLogger(__name__)

#: What an image goes through before it is active.
_COMING: Final = ('queued', 'saving', 'importing', 'uploading')
#: Seconds between two looks at an image that is not active yet: a share of
#: the job's age, so that small images are seen at once.
_LOOK: Final = (0.5, 0.05, 30.0)
_LONGEST_WAIT: Final = 600.0
#: Seconds until a job is tried again that could not even be begun, or that
#: this builder cannot do as it is configured.
_AGAIN: Final = 10.0
_MISCONFIGURED: Final = 60.0
#: Seconds that an attempt may fail before it is said that all is to stop.
_STOPPED: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a worker works with."""

    conf: Any
    board: jobs.Board
    books: logbooks.Logbooks
    glance: images.Images
    policies: eligibility.Policies
    registry: registry.Registry
    publisher: publish.Publisher
    workdir: pathlib.Path


class Worker:
    """One thread that builds one image at a time."""

    def __init__(self, tools: Callable[[], Tools], poll: float) -> None:
        """Make a worker; :meth:`start` starts it.

        :param tools: called in its thread; repositories are for one.
        :param poll: seconds between two looks at the jobboard.
        """
        self._make = tools
        self._poll = poll
        self._who = (f'{socket.gethostname()}:{os.getpid()}:'
                     f'{secrets.token_hex(4)}')
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._claim: jobs.Claim | None = None
        #: When to look at a job again, by its uuid (monotonic seconds).
        self._later: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name='worker')

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

    def _turn(self, tools: Tools) -> bool:
        """Take the first job that can be had; whether there was one."""
        found = tools.board.jobs()
        now = time.monotonic()
        self._later = {job.uuid: self._later[job.uuid] for job in found
                       if self._later.get(job.uuid, 0) > now}
        for job in found:
            if job.uuid in self._later or self._stop.is_set():
                continue
            claim = tools.board.claim(job, self._who)
            if claim:
                self._have(claim, tools)
                return True
        return False

    def _have(self, claim: jobs.Claim, tools: Tools) -> None:
        """Do a job, and remove it from the board or put it back."""
        job = claim.job
        wait: float | None = _AGAIN
        with self._lock:
            self._claim = claim
            if self._stop.is_set():
                claim.cancel.set()
        try:
            with claim:
                wait = _Case(claim, tools).work()
        except exception.Unavailable as error:
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


class _Case:
    """One job in hands."""

    def __init__(self, claim: jobs.Claim, tools: Tools) -> None:
        self._claim = claim
        self._tools = tools
        self._registry = tools.registry
        self._options = tools.conf.builder

    def work(self) -> float | None:
        """Do what is to be done.

        :returns: None if the job is done, well or badly; else the seconds
            after which somebody should look at it again.
        :raises Unavailable: something is away that is needed to decide.
        """
        job, tools = self._claim.job, self._tools
        try:
            image = tools.glance.get(job.image_id)
            if image.status != 'active':
                return self._wait(image)
            refusal = tools.policies.refuse(image)
            if refusal:
                LOG.info('image %s: not built: %s', job.image_id,
                         refusal.reason)
                self._registry.refuse(image, refusal)
                return None
            book = tools.books.open(job)
            # An attempt that was not finished may have more to say.
            if book.done or not (job.force or book.attempts):
                found = self._registry.find(job.image_id)
                if found:
                    self._registry.settle(image, found)
                    return None
            return self._attempt(image, book)
        except exception.NotFound:
            # Glance knows whether the image is what was not found.
            self._registry.gone(job.image_id)
            if self._is_gone():
                staging.remove(tools.workdir, job.image_id)
                return None
            raise

    def _is_gone(self) -> bool:
        try:
            self._tools.glance.get(self._claim.job.image_id)
        except exception.NotFound:
            return True
        return False

    def _wait(self, image: images.Image) -> float | None:
        """The image is not active."""
        age = time.time() - self._claim.job.posted
        if image.status not in _COMING or age > self._options.wait_active:
            LOG.info('image %s is %s; the job is dropped', image.image_id,
                     image.status)
            return None
        least, share, most = _LOOK
        return min(max(least, share * age), most)

    def _attempt(self, image: images.Image,
                 book: logbooks.Logbook) -> float | None:
        if book.wait > 0:
            return min(book.wait, _LONGEST_WAIT)
        cap = self._options.attempts
        if book.attempts >= cap:
            self._end(image, f'builders died in each of {cap} attempts to '
                             f'build it; see their logs')
            return None
        book.begin()
        LOG.info('image %s: attempt %d of %d', image.image_id, book.attempts,
                 cap)
        try:
            self._build(image, book)
            return None
        except exception.NotFound:
            if self._is_gone():
                raise
            return self._failed(image, book, 'something was not found')
        except exception.Busy as error:
            return self._given_up(image, book, error)
        except exception.ConfigError as error:
            return self._misconfigured(image, book, error)
        except (exception.Invalid, exception.Exists) as error:
            self._end(image, str(error))
            return None
        except exception.FastbootError as error:
            # Who stops a service may stop the programs that it runs first.
            if self._claim.cancel.wait(_STOPPED):
                return self._given_up(image, book, error)
            LOG.warning('image %s: %s', image.image_id, error)
            return self._failed(image, book, str(error))
        except Exception as error:
            LOG.exception('image %s', image.image_id)
            return self._failed(image, book, f'{type(error).__name__}: '
                                             f'{error}')

    def _build(self, image: images.Image, book: logbooks.Logbook) -> None:
        tools = self._tools

        def note(**values: Any) -> None:
            self._registry.note(image, 'building', attempts=book.attempts,
                                **values)

        options = tools.conf.capture
        with staging.open_stage(tools.workdir, image.image_id) as stage:
            note(stage='beginning')
            self._registry.tell(image, {
                'fastboot_state': 'building', 'fastboot_error': None})
            work = build_flow.Work(
                image=image, force=self._claim.job.force, stage=stage,
                cancel=self._claim.cancel, glance=tools.glance,
                registry=self._registry, publisher=tools.publisher,
                options=options, largest=self._largest(),
                report=build_flow.Report(
                    note, options.boots, options.timeout))
            build_flow.run(work, book, tools.books)
            stage.discard()

    def _largest(self) -> int:
        """Bytes of a disk; Glance may not know how many an image has."""
        limit: int = self._tools.conf.eligibility.max_size << 30
        return min(limit or source.LARGEST, source.LARGEST)

    def _failed(self, image: images.Image, book: logbooks.Logbook,
                words: str) -> float | None:
        """An attempt failed; perhaps the next one does not."""
        if book.attempts >= self._options.attempts:
            self._end(image, words)
            return None
        first: float = self._options.retry_wait
        wait = min(first * 2.0 ** (book.attempts - 1), _LONGEST_WAIT)
        book.put_off(wait)
        self._queued(image, book, words)
        return wait

    def _given_up(self, image: images.Image, book: logbooks.Logbook,
                  error: exception.FastbootError) -> float:
        """Not the image's fault: we stop, or others are in the way."""
        LOG.info('image %s: %s', image.image_id, error)
        if self._claim.lost:
            # Another has it now; the book is his.
            return _AGAIN
        book.take_back()
        self._queued(image, book, '')
        return 0 if self._claim.cancel.is_set() else _AGAIN

    def _misconfigured(self, image: images.Image, book: logbooks.Logbook,
                       error: exception.ConfigError) -> float:
        """This builder cannot build at all; another may."""
        LOG.error('image %s is not built here: %s', image.image_id, error)
        book.take_back()
        self._queued(image, book, f'a builder is misconfigured: {error}')
        return _MISCONFIGURED

    def _queued(self, image: images.Image, book: logbooks.Logbook,
                words: str) -> None:
        self._registry.note(image, 'queued', error=words,
                            attempts=book.attempts)
        self._registry.tell(image, {'fastboot_state': 'queued',
                                    'fastboot_error': words or None})

    def _end(self, image: images.Image, words: str) -> None:
        LOG.warning('image %s is given up: %s', image.image_id, words)
        self._registry.failed(image, words)
        staging.remove(self._tools.workdir, image.image_id)
