# SPDX-License-Identifier: Apache-2.0
"""Jobs in the hands of a worker: what is to be done, how often it is tried,
and what is said of its end.
"""

import abc
import dataclasses
import pathlib
import time
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception, journal, publish
from fastboot_common.microvm import key
from fastboot_glance import (
    bakes,
    eligibility,
    guest,
    images,
    jobs,
    logbooks,
    registry,
    source,
    staging,
)
from fastboot_glance.flows import bake as bake_flow
from fastboot_glance.flows import build as build_flow

LOG = logging.getLogger(__name__)

#: What an image goes through before it is active.
_COMING: Final = ('queued', 'saving', 'importing', 'uploading')
#: Seconds between two looks at an image that is not active yet: a share of
#: the job's age, so that small images are seen at once.
_LOOK: Final = (0.5, 0.05, 30.0)
#: Seconds until a job is tried again that others are in the way of, or that
#: this builder cannot do as it is configured.
_AGAIN: Final = 10.0
_MISCONFIGURED: Final = 60.0
#: Seconds until a job is tried again that this builder, or the repository,
#: has no room for: a multiple of what the attempt took, as the image's file
#: is fetched and converted anew each time.
_NO_ROOM: Final = (30.0, 2.0, 300.0)
#: Errors that say nothing of the image: of a store, a service, or what lies
#: between.
_PASSING: Final = (exception.Unavailable, exception.NotFound,
                   exception.Corrupt, OSError)
#: Errors that have nothing to do with the image: a job waits until they are
#: over, however long.
LATER: Final = (exception.Unavailable, exception.Busy, exception.NoSpace,
                exception.ConfigError)
#: Seconds that an attempt may fail before it is said that all is to stop.
_STOPPED: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a worker works with.

    :ivar publisher: into the repository of the images.
    :ivar cache: directory of what publishers can make again.
    :ivar platform: that is baked for here; None: nothing is.
    """

    conf: Any
    board: jobs.Board
    books: logbooks.Logbooks
    glance: images.Images
    policies: eligibility.Policies
    registry: registry.Registry
    bakes: bakes.Bakes
    publisher: publish.Publisher
    cache: pathlib.Path
    workdir: pathlib.Path
    platform: key.Platform | None


class Case(abc.ABC):
    """One job in hands.

    :ivar unable: this builder began it, and has no room for it or is not
        configured for it.
    """

    def __init__(self, claim: jobs.Claim, tools: Tools) -> None:
        self._claim = claim
        self._tools = tools
        self._registry = tools.registry
        self._options = tools.conf.builder
        self.unable = False

    def work(self) -> float | None:
        """Do what is to be done.

        :returns: None if the job is done, well or badly; else the seconds
            after which somebody should look at it again.
        :raises FastbootError: one of ``LATER``; nothing could be decided.
        """
        try:
            return self._look()
        except LATER:
            raise
        except Exception as error:
            return self._stuck(error)

    def _look(self) -> float | None:
        job, tools = self._claim.job, self._tools
        self._check_repository()
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
            return self._consider(image)
        except exception.NotFound:
            # Glance knows whether the image is what was not found.
            self._registry.gone(job.image_id)
            if self._is_gone():
                staging.remove(tools.workdir, job.image_id)
                return None
            raise

    def _check_repository(self) -> None:
        """See that the journal can be read: if not, it is not this image's
        fault.

        :raises Unavailable: it cannot.
        """
        try:
            self._registry.repository.state()
        except exception.Corrupt as error:
            raise exception.Unavailable(f'the repository: {error}') from error

    @abc.abstractmethod
    def _consider(self, image: images.Image) -> float | None:
        """An active image: is there something to do? As :meth:`work`."""

    @abc.abstractmethod
    def _do(self, image: images.Image, book: logbooks.Logbook) -> None:
        """Do it, and say that it is done."""

    @abc.abstractmethod
    def _put_off(self, image: images.Image, book: logbooks.Logbook,
                 words: str) -> None:
        """Say that somebody does it later.

        :param words: why; empty: nothing is wrong.
        """

    @abc.abstractmethod
    def _end(self, image: images.Image, words: str,
             passing: bool = False) -> None:
        """Say that nobody tries again.

        :param passing: at least not soon: it was not the image's fault.
        """

    @abc.abstractmethod
    def _give_up(self, words: str) -> None:
        """Say that nobody tries again, of an image that cannot even be
        looked at."""

    def _stuck(self, error: Exception) -> float | None:
        """A look failed, or saying how an attempt ended. Where it always
        does, the job must come to an end, too."""
        if self._claim.lost:
            return _AGAIN
        image_id = self._claim.job.image_id
        book = self._tools.books.open(self._claim.job)
        if book.wait > 0:
            return book.wait
        book.begin()
        LOG.warning('image %s cannot be looked at', image_id, exc_info=error)
        if book.attempts < self._options.attempts:
            return self._delay(book)
        self._give_up(f'{type(error).__name__}: {error}')
        staging.remove(self._tools.workdir, image_id)
        return None

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
            return book.wait
        cap = self._options.attempts
        if book.attempts >= cap:
            # Of a power cut, perhaps, or while the database was away.
            self._end(image, f'builders died in each of {cap} attempts; see '
                             f'their logs', passing=True)
            return None
        book.begin()
        begun = time.monotonic()
        LOG.info('image %s: attempt %d of %d', image.image_id, book.attempts,
                 cap)
        try:
            self._do(image, book)
            return None
        except exception.NotFound as error:
            if self._is_gone():
                raise
            return self._failed(image, book, 'something was not found', error)
        except exception.Busy as error:
            return self._given_up(image, book, error)
        except exception.NoSpace as error:
            return self._crowded(image, book, error,
                                 time.monotonic() - begun)
        except exception.ConfigError as error:
            return self._misconfigured(image, book, error)
        except source.CopyTooLarge as error:
            # A limit that nobody set is this builder's; another may have
            # a larger disk.
            self._end(image, str(error), not self._options.copy_limit)
            return None
        except (exception.Invalid, exception.Exists) as error:
            self._end(image, str(error))
            return None
        except exception.FastbootError as error:
            # Who stops a service may stop the programs that it runs first.
            if self._claim.cancel.wait(_STOPPED):
                return self._given_up(image, book, error)
            LOG.warning('image %s: %s', image.image_id, error)
            return self._failed(image, book, str(error), error)
        except Exception as error:
            LOG.exception('image %s', image.image_id)
            return self._failed(image, book, f'{type(error).__name__}: '
                                             f'{error}', error)

    def _failed(self, image: images.Image, book: logbooks.Logbook,
                words: str, error: Exception) -> float | None:
        """An attempt failed; perhaps the next one does not."""
        if book.attempts >= self._options.attempts:
            self._end(image, words, isinstance(error, _PASSING))
            return None
        wait = self._delay(book)
        self._put_off(image, book, words)
        return wait

    def _delay(self, book: logbooks.Logbook) -> float:
        """Let some time pass before the next attempt; how many seconds."""
        first: float = self._options.retry_wait
        wait = min(first * 2.0 ** (book.attempts - 1), logbooks.LONGEST_WAIT)
        book.put_off(wait)
        return wait

    def _given_up(self, image: images.Image, book: logbooks.Logbook,
                  error: exception.FastbootError) -> float:
        """Not the image's fault: we stop, or others are in the way."""
        LOG.info('image %s: %s', image.image_id, error)
        if self._claim.lost:
            # Another has it now; the book is his.
            return _AGAIN
        book.take_back()
        self._put_off(image, book, '')
        return 0 if self._claim.cancel.is_set() else _AGAIN

    def _crowded(self, image: images.Image, book: logbooks.Logbook,
                 error: exception.NoSpace, took: float) -> float:
        """There is no room, whoever took it; another builder may have some.

        One image's share is bounded (:meth:`_copy_limit`). What waits must
        not keep others from being built.
        """
        LOG.error('image %s is put off: %s', image.image_id, error)
        self.unable = True
        if self._claim.lost:
            return _AGAIN
        staging.drop_file(self._tools.workdir, image.image_id)
        book.take_back()
        self._put_off(image, book, f'no room: {error}')
        if self._claim.cancel.is_set():
            return 0
        least, times, most = _NO_ROOM
        return min(max(least, times * took), most)

    def _copy_limit(self) -> int:
        """Bytes on disk that the raw copy of an image may take.

        By default no more than makes all workers' copies fit.
        """
        limit: int = self._options.copy_limit << 30
        workers = self._options.workers + self._tools.conf.bakery.workers
        return limit or guest.disk_size(self._tools.workdir) // (workers + 1)

    def _misconfigured(self, image: images.Image, book: logbooks.Logbook,
                       error: exception.ConfigError) -> float:
        """This builder cannot do it at all; another may."""
        LOG.error('image %s is left to others: %s', image.image_id, error)
        self.unable = True
        book.take_back()
        self._put_off(image, book, f'a builder is misconfigured: {error}')
        return _MISCONFIGURED


class Build(Case):
    """An image is to have its cache."""

    def _consider(self, image: images.Image) -> float | None:
        job = self._claim.job
        book = self._tools.books.open(job)
        # An attempt that was not finished may have more to say; a look that
        # failed counts as one, and has not.
        if book.done or not (job.force or book.attempts and book.begun):
            found = self._registry.find(job.image_id)
            if found:
                self._registry.settle(image, found)
                self._have_baked(image)
                return None
        return self._attempt(image, book)

    def _do(self, image: images.Image, book: logbooks.Logbook) -> None:
        tools = self._tools

        def note(**values: Any) -> None:
            self._registry.note(image, 'building', attempts=book.attempts,
                                **values)

        if self._registry.find(image.image_id) is None:
            # Before the work, which would be for nothing.
            journal.check_serials(self._registry.repository.state().version)
        options = tools.conf.capture
        with staging.open_stage(tools.workdir, image.image_id) as stage:
            note(stage='beginning')
            self._registry.pending(image, 'building')
            work = build_flow.Work(
                image=image, force=self._claim.job.force, stage=stage,
                cancel=self._claim.cancel, glance=tools.glance,
                registry=self._registry, publisher=tools.publisher,
                options=options, largest=self._largest(),
                copy_limit=self._copy_limit(),
                report=build_flow.Report(
                    note, options.boots, options.timeout))
            build_flow.run(work, book, tools.books)
            # The bake needs the file.
            if not self._have_baked(image):
                stage.discard()

    def _have_baked(self, image: images.Image) -> bool:
        """Post a bake if the image is to be baked here; whether that is
        soon.

        The cache is there and announced; whatever is wrong with a bake is
        not to be taken for an error of it.
        """
        bakes = self._tools.bakes
        try:
            found = self._registry.find(image.image_id)
            if found is None:
                return False
            if self._claim.job.force:
                bakes.again(image)
            return bakes.look(image, found) and self._is_soon()
        except exception.FastbootError as error:
            LOG.warning('image %s: its µVM is left to the audit: %s',
                        image.image_id, error)
        except Exception:
            LOG.exception('image %s: its µVM is left to the audit',
                          image.image_id)
        return False

    def _is_soon(self) -> bool:
        """Whether what was posted now is among the next bakes.

        Builds are faster than bakes: the files of all images that wait
        would fill the disk, and then there are no builds. The bakes of
        others fetch them again.
        """
        waiting = [job for job in self._tools.board.jobs()
                   if job.platform == self._tools.bakes.platform]
        workers: int = self._tools.conf.bakery.workers
        return len(waiting) <= workers + 1

    def _largest(self) -> int:
        """Bytes of a disk; Glance may not know how many an image has."""
        limit: int = self._tools.conf.eligibility.max_size << 30
        return min(limit or source.LARGEST, source.LARGEST)

    def _put_off(self, image: images.Image, book: logbooks.Logbook,
                 words: str) -> None:
        self._registry.note(image, 'queued', error=words,
                            attempts=book.attempts)
        self._registry.tell(image, {'fastboot_state': 'queued',
                                    'fastboot_error': words or None})

    def _end(self, image: images.Image, words: str,
             passing: bool = False) -> None:
        LOG.warning('image %s is given up: %s', image.image_id, words)
        self._registry.failed(image, words, passing)
        staging.remove(self._tools.workdir, image.image_id)

    def _give_up(self, words: str) -> None:
        self._registry.stuck(self._claim.job.image_id, words)


class Bake(Case):
    """An image that has its cache is to have a µVM for our platform."""

    def _consider(self, image: images.Image) -> float | None:
        tools = self._tools
        found = self._registry.find(image.image_id)
        if found is None:
            LOG.info('image %s: not registered; its bake is dropped',
                     image.image_id)
            tools.bakes.forget(image)
            return None
        book = tools.books.open(self._claim.job)
        # An attempt that was not finished may have more to say.
        unfinished = book.attempts and book.begun
        if book.done or not (tools.bakes.look(image, found)
                             or unfinished and tools.bakes.wishes(image)):
            staging.remove(tools.workdir, image.image_id)
            return None
        return self._attempt(image, book)

    def _do(self, image: images.Image, book: logbooks.Logbook) -> None:
        tools = self._tools
        assert tools.platform
        found = self._found(image)

        def note(**values: Any) -> None:
            tools.bakes.note(image, 'baking', **values)

        with staging.open_stage(tools.workdir, image.image_id) as stage:
            note(stage='beginning')
            bake_flow.run(bake_flow.Work(
                image=image, found=found, stage=stage,
                cancel=self._claim.cancel, glance=tools.glance,
                registry=self._registry, bakes=tools.bakes,
                publisher=self._publisher(),
                platform=tools.platform, options=tools.conf.bakery,
                copy_limit=self._copy_limit(),
                report=build_flow.Report(
                    note, 1, tools.conf.bakery.timeout),
                gives_way=self._gives_way),
                book, tools.books)
            stage.discard()

    def _gives_way(self) -> bool:
        """Whether a build of the image waits: it does not begin before.

        :raises Unavailable: the jobboard cannot be asked.
        """
        image_id = self._claim.job.image_id
        return any(job.image_id == image_id and not job.platform
                   for job in self._tools.board.jobs())

    def _publisher(self) -> publish.Publisher:
        group = self._tools.conf.repository
        # All of it is what every host takes.
        return publish.Publisher(
            self._registry.microvms.writable(), self._tools.cache,
            level=group.boot_compression_level,
            boot_level=group.boot_compression_level,
            threads=group.threads or None)

    def _found(self, image: images.Image) -> journal.Image:
        """:raises NotFound: it is not registered any more."""
        found = self._registry.find(image.image_id)
        if found is None:
            raise exception.NotFound(
                f'image {image.image_id} is not registered')
        return found

    def _put_off(self, image: images.Image, book: logbooks.Logbook,
                 words: str) -> None:
        self._tools.bakes.note(image, 'none', reason=words)

    def _end(self, image: images.Image, words: str,
             passing: bool = False) -> None:
        root = self._tools.bakes.root(self._found(image))
        self._tools.bakes.ended(image, 'failed', root, words, passing)
        staging.remove(self._tools.workdir, image.image_id)

    def _give_up(self, words: str) -> None:
        LOG.warning('image %s: its bake is left to the audit: %s',
                    self._claim.job.image_id, words)
