# SPDX-License-Identifier: Apache-2.0
"""The flow that builds one image: fetch, build, announce.

Every task makes only what is not there yet, so that a flow that another
builder began, on this machine or elsewhere, is simply run to its end.
Nothing is visible to hosts before the journal entry, the last step of the
task ``build``; a task that fails leaves nothing to revert but files in the
staging directory, which the next attempt uses.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging
from taskflow import task
from taskflow.patterns import linear_flow

from fastboot_common import exception, publish
from fastboot_glance import build, images, logbooks, registry, staging
from fastboot_glance.flows import engine

LOG = logging.getLogger(__name__)

#: Seconds between two notes of progress.
_NOTE_EVERY: Final = 2.0


class Report:
    """Notes in the records how far a build is."""

    def __init__(self, note: Callable[..., None], boots: int,
                 timeout: float) -> None:
        """Take notes.

        :param note: writes a stage and its progress (0 to 1).
        :param boots: how many there will be.
        :param timeout: seconds that each may take.
        """
        self._note = note
        self._boots = boots
        self._timeout = timeout
        self._stage = ''
        self._total: int | None = None
        self._done = 0
        #: Of its time, what each boot has used.
        self._shares: dict[int, float] = {}
        self._last = 0.0

    def progress(self) -> build.Progress:
        """The form in which builds report."""
        return build.Progress(self.phase, self._add, self._boot)

    def phase(self, name: str, total: int | None) -> None:
        """A stage begins."""
        self._stage, self._total, self._done = name, total, 0
        self._say(0.0)

    def reach(self, done: int) -> None:
        """So many bytes of the stage are done."""
        self._done = done
        if time.monotonic() - self._last >= _NOTE_EVERY:
            self._say(done / self._total if self._total else 0.0)

    def _add(self, count: int) -> None:
        self.reach(self._done + count)

    def _boot(self, number: int, seconds: float, unique: int) -> None:
        self._shares[number] = min(seconds / self._timeout, 1.0)
        if time.monotonic() - self._last >= _NOTE_EVERY:
            self._say(sum(self._shares.values()) / self._boots)

    def _say(self, progress: float) -> None:
        self._last = time.monotonic()
        try:
            self._note(stage=self._stage, progress=min(progress, 1.0))
        except exception.Unavailable as error:
            LOG.warning('progress is not noted: %s', error)


@dataclasses.dataclass(frozen=True)
class Work:
    """One image to build, and what is needed for it.

    :ivar force: make a new trace even if the image is registered.
    :ivar options: the group ``[capture]``.
    :ivar largest: bytes that the image's disk may have.
    :ivar copy_limit: bytes that its raw copy may take.
    """

    image: images.Image
    force: bool
    stage: staging.Stage
    cancel: threading.Event
    glance: images.Images
    registry: registry.Registry
    publisher: publish.Publisher
    options: Any
    largest: int
    copy_limit: int
    report: Report

    @property
    def request(self) -> build.Request:
        """What is asked of the build."""
        image = self.image
        return build.Request(
            self.stage.image, image.image_id, image.name, image.visibility,
            image.owner, image.disk_format or None, origin=registry.ORIGIN,
            largest=self.largest, copy_limit=self.copy_limit)

    def fetch(self) -> None:
        """Have the image's file here."""
        fetch(self.image, self.stage, self.glance, self.cancel, self.report)

    def build(self) -> dict[str, Any]:
        """Have the image registered, with a boot set if it boots."""
        self.fetch()
        repository = self.registry.repository
        arguments = (repository.block_size, self.stage.work, self.options,
                     self.report.progress(), self.cancel, self.stage)
        stored = 0
        if self.force and self.registry.find(self.image.image_id):
            with build.prepare(self.request, *arguments) as ready:
                found = self.registry.refresh(ready.draft)
        else:
            done = build.build(self.request, self.publisher, *arguments)
            found, stored = done.image, done.stored_bytes
        made = repository.read_manifest(found.manifest)
        return {'version': found.serial, 'size': stored,
                'boot_size': len(made.boot) * made.block_size,
                'problem': registry.problem_of(made)}

    def announce(self, published: dict[str, Any]) -> None:
        """Tell agents, users and operators.

        :raises NotFound: the image was deleted meanwhile.
        """
        self.report.phase('announcing', None)
        image, one = self.image, published
        self.registry.tell(image, {
            'fastboot_state': 'ready',
            'fastboot_version': str(one['version']),
            'fastboot_boot_size': str(one['boot_size']),
            'fastboot_size': str(one['size']),
            'fastboot_error': one['problem'] or None})
        self.registry.note(
            image, 'ready', error=one['problem'], version=one['version'],
            boot_size=one['boot_size'])
        self.registry.announce('ready', image.image_id, name=image.name,
                               version=one['version'])


def fetch(image: images.Image, stage: staging.Stage, glance: images.Images,
          cancel: threading.Event, report: Report) -> None:
    """Have an image's file in its staging directory."""
    if not stage.image.exists():
        report.phase('fetching', image.size)
        glance.fetch(image, stage.image, cancel, report.reach)


class _Fetch(task.Task):
    """The image's file, from Glance."""

    def __init__(self, work: Work) -> None:
        super().__init__(name='fetch')
        self._work = work

    def execute(self) -> None:
        self._work.fetch()


class _Build(task.Task):
    """Inspect, boot and trace, dedup, publish."""

    default_provides = 'published'

    def __init__(self, work: Work) -> None:
        super().__init__(name='build')
        self._work = work

    def execute(self) -> dict[str, Any]:
        return self._work.build()


class _Announce(task.Task):
    """Say that it is there."""

    def __init__(self, work: Work) -> None:
        super().__init__(name='announce')
        self._work = work

    def execute(self, published: dict[str, Any]) -> None:
        self._work.announce(published)


def run(work: Work, book: logbooks.Logbook, books: logbooks.Logbooks) -> None:
    """Run the flow, or what an earlier attempt left of it.

    :raises FastbootError: it failed; the error of the task.
    """
    engine.run(linear_flow.Flow('build').add(
        _Fetch(work), _Build(work), _Announce(work)), book, books)
