# SPDX-License-Identifier: Apache-2.0
"""The flow that bakes one image for one platform: bake and publish, then
announce.

As in :mod:`fastboot_glance.flows.build`, every task makes only what is not
there yet. What was baked lies in the staging directory until it is
published, so that a builder that dies while it publishes has not baked for
nothing, if the next one is on this machine.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from oslo_log import log as logging
from taskflow import task
from taskflow.patterns import linear_flow

from fastboot_common import exception, journal, publish
from fastboot_common.microvm import artifact, key, shelf, template
from fastboot_glance import (
    bakery,
    bakes,
    images,
    logbooks,
    microvms,
    registry,
    source,
    staging,
)
from fastboot_glance.flows import build, engine

LOG = logging.getLogger(__name__)

#: What the disk of a µVM says that it lies on. Hosts say where it is there;
#: a name of this machine would be in every one, and tell about it.
_BACKING: Final = (pathlib.Path('image'), 'raw')
#: Seconds between two looks at whether the image is still wanted, and how
#: soon the end of a bake is noticed.
_LOOK: Final = 10.0
_TICK: Final = 0.2
#: Seconds that a guest may die before it is said that all is to stop.
_STOPPED: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """One image to bake, and what is needed for it.

    :ivar found: as it is registered.
    :ivar cancel: when set, the bake is given up.
    :ivar platform: that it is baked for.
    :ivar options: the group ``[bakery]``.
    :ivar copy_limit: bytes that the image's raw copy may take; None: any.
    :ivar gives_way: whether something else waits for the image meanwhile,
        and the bake is to be given up; None: nothing ever does.
    """

    image: images.Image
    found: journal.Image
    stage: staging.Stage
    cancel: threading.Event
    glance: images.Images
    registry: registry.Registry
    bakes: bakes.Bakes
    publisher: publish.Publisher
    platform: key.Platform
    options: Any
    report: build.Report
    copy_limit: int | None = None
    gives_way: Callable[[], bool] | None = None

    def bake(self) -> dict[str, Any]:
        """Have the µVM published, or the reason why there is none.

        :raises ConfigError: this builder cannot bake any more.
        """
        there = self._published()
        if there:
            return _result(there.name.group)
        seconds = None
        if not self._is_baked():
            shutil.rmtree(self.stage.microvm, ignore_errors=True)
            build.fetch(self.image, self.stage, self.glance, self.cancel,
                        self.report)
            done = self._bake()
            if done.state == 'refused':
                return {'state': 'refused', 'reason': done.reason}
            seconds = sum(done.seconds.values())
        return self._publish(seconds)

    def announce(self, baked: dict[str, Any]) -> None:
        """Tell agents, users and operators.

        :raises NotFound: the image was deleted.
        """
        values = dict(baked)
        state = values.pop('state')
        if state == 'ready':
            self.bakes.ready(self.image, **values)
        else:
            self.bakes.ended(self.image, state, self._root,
                             values['reason'])

    @property
    def _root(self) -> str:
        return self.bakes.root(self.found)

    @property
    def _baked(self) -> pathlib.Path:
        """Where what was baked of this content is. On another it would be
        damage, and an id may have come again with another."""
        return self.stage.microvm / self._root

    def _published(self, group: str | None = None
                   ) -> microvms.Published | None:
        """The µVM for our platform, of what the image is now.

        One of another content that has its place is removed.

        :param group: only of this class.
        """
        for one in self.registry.microvms.of(self.image.image_id):
            if one.platform != self.platform.text or group not in (
                    None, one.name.group):
                continue
            if one.root == self._root:
                return one
            self.registry.microvms.remove(one)
        return None

    def _is_baked(self) -> bool:
        """Whether an earlier attempt left what we would bake."""
        try:
            found = artifact.read(self._baked).key
        except (exception.NotFound, exception.Corrupt,
                exception.UnknownVersion):
            return False
        return (found.platform, found.template) == (
            self.platform, template.digest(bakery.config(self.options)))

    def _bake(self) -> bakery.Bake:
        # QEMU may have been upgraded under us: then what we bake is for
        # other hosts than we said.
        if bakery.platform(self.options) != self.platform:
            raise exception.ConfigError(
                'QEMU is another than when the builder was started; '
                'restart it')
        with self._watched() as cancel:
            self.report.phase('inspecting', None)
            with source.open_source(
                    self.stage.image, self.stage.work,
                    claimed_format=self.image.disk_format or None,
                    user=self.options.user, hashes=('sha512',),
                    cancel=cancel, copy_limit=self.copy_limit) as found:
                self._check(found)
                done = bakery.bake(
                    found.raw_path, found.virtual_size, self._baked,
                    self.stage.work, self.options, backing=_BACKING,
                    progress=lambda phase: self.report.phase(
                        f'baking: {phase}', None), cancel=cancel)
            # Who stops a service may stop its guests first.
            if done.state == 'none' or (
                    done.state != 'baked' and cancel.wait(_STOPPED)):
                raise exception.Busy(
                    f'image {self.image.image_id}: the bake was cancelled')
        if done.state == 'failed':
            raise exception.Unavailable(f'it was not baked: {done.reason}')
        return done

    def _check(self, found: source.Source) -> None:
        """See that it is what is registered.

        :raises Invalid: it is something else.
        """
        known = self.registry.repository.read_manifest(self.found.manifest)
        if known.os_hash.get('sha512') != found.os_hash['sha512']:
            raise exception.Invalid(
                f'image {self.image.image_id}: what is registered is not '
                f'what Glance has')

    def _publish(self, seconds: float | None) -> dict[str, Any]:
        """Put what was baked on the shelf."""
        baked = artifact.read(self._baked)
        try:
            made = self._put()
        except exception.Exists:
            # Another builder was first, or it is of what the image was.
            there = self._published(baked.key.digest)
            if there:
                return _result(there.name.group)
            made = self._put()
        except exception.Corrupt:
            shutil.rmtree(self.stage.microvm, ignore_errors=True)
            raise
        return _result(
            made.name.group, made.published.stored_bytes
            if made.published.created else None, seconds, baked.baked)

    def _put(self) -> shelf.Put:
        def count(done: int) -> None:
            if self.cancel.is_set():
                raise exception.Busy(
                    f'image {self.image.image_id}: cancelled')

        return shelf.put(
            self._baked, self._found(), self.registry.repository,
            self.publisher, self.stage.work, origin=registry.ORIGIN,
            phase=lambda name: self.report.phase(name, None),
            progress=count)

    def _found(self) -> journal.Image:
        """The image as it is registered now: others may see it than when
        the bake began.

        :raises NotFound: it is not registered any more.
        :raises Busy: it has another content.
        """
        found = self.registry.find(self.image.image_id)
        if found is None:
            raise exception.NotFound(
                f'image {self.image.image_id} is not registered')
        if self.bakes.root(found) != self._root:
            raise exception.Busy(
                f'image {self.image.image_id} has another content')
        return found

    @contextlib.contextmanager
    def _watched(self) -> Iterator[threading.Event]:
        """Set when the bake is to be given up: we stop, a build of the image
        waits, or nobody wants it any more, which Glance says. It takes
        minutes of a processor."""
        given_up, over = threading.Event(), threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(given_up, over),
            name=f'watch-{self.image.image_id}', daemon=True)
        watcher.start()
        try:
            yield given_up
        finally:
            over.set()
            # It may be waiting for a Glance that hangs; it changes nothing
            # any more.
            watcher.join(1)

    def _watch(self, given_up: threading.Event,
               over: threading.Event) -> None:
        waited = 0.0
        while not over.is_set():
            if self.cancel.wait(_TICK):
                break
            waited += _TICK
            if waited >= _LOOK:
                waited = 0.0
                if not self._is_wanted():
                    break
        given_up.set()

    def _is_wanted(self) -> bool:
        try:
            if self.gives_way and self.gives_way():
                return False
            return self.bakes.wishes(self.glance.get(self.image.image_id))
        except exception.NotFound:
            return False
        except exception.FastbootError as error:
            LOG.info('image %s: %s', self.image.image_id, error)
            return True


def _result(group: str, size: int | None = None,
            seconds: float | None = None, baked_at: int | None = None
            ) -> dict[str, Any]:
    """Of a µVM that is published; None: another attempt knew."""
    return {'state': 'ready', 'group': group, 'size': size,
            'seconds': seconds, 'baked_at': baked_at}


class _Bake(task.Task):
    """Fetch, boot, save, publish."""

    default_provides = 'baked'

    def __init__(self, work: Work) -> None:
        super().__init__(name='bake')
        self._work = work

    def execute(self) -> dict[str, Any]:
        return self._work.bake()


class _Announce(task.Task):
    """Say that it is there, or why not."""

    def __init__(self, work: Work) -> None:
        super().__init__(name='announce')
        self._work = work

    def execute(self, baked: dict[str, Any]) -> None:
        self._work.announce(baked)


def run(work: Work, book: logbooks.Logbook, books: logbooks.Logbooks) -> None:
    """Run the flow, or what an earlier attempt left of it.

    :raises FastbootError: it failed; the error of the task.
    """
    engine.run(linear_flow.Flow('bake').add(
        _Bake(work), _Announce(work)), book, books)
