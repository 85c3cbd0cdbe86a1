# SPDX-License-Identifier: Apache-2.0
"""Following the repository: which boot sets come here, and when."""

import concurrent.futures
import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from oslo_log import log as logging

from fastboot_common import exception, journal
from fastboot_common.store import throttle
from fastboot_nova import host
from fastboot_nova.agent import metrics, space, window, worker

LOG = logging.getLogger(__name__)

#: Images that were asked for and come at a time.
_ASKED: Final = 2
#: Seconds between two looks for images that nobody knows.
_LOOK: Final = 5.0
#: How often, a second apart, a pack is asked for that others are fetching.
_BUSY: Final = 600


class StoppedError(Exception):
    """The agent ends in the middle of a transfer; it is continued later."""


class Sync:
    """Pulls boot sets. Its own thread follows; others ask.

    :param served: the host.
    :param room: its disk.
    :param told: counters.
    :param times: when pulls may begin that nobody asked for.
    :param interval: seconds between two looks.
    :param jitter: seconds that a look may be late.
    :param rate: bytes a second of pulls that nobody asked for; 0: any.
    :param eager: thaw what came.
    :param evicted: told of deregistered images that went.
    :param changed: called when an image's state is another.
    """

    def __init__(self, served: host.Host, room: space.Space,
                 told: metrics.Metrics, *, times: window.Window,
                 interval: float, jitter: float, rate: int, eager: bool,
                 evicted: host.Evicted,
                 changed: Callable[[], None]) -> None:
        self._host = served
        self._room = room
        self._told = told
        self._times = times
        self._jitter = jitter
        #: Of pulls that nobody asked for; None: any rate.
        self.limit = throttle.Throttle(rate) if rate else None
        self._eager = eager
        self._evicted = evicted
        self._changed = changed
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(_ASKED, 'asked')
        self._prompt = False
        self._everything = False
        self._looked = 0.0
        self._dropped = -1
        #: Newest version that anybody told us of.
        self.heard = 0
        #: By image id: bytes that came, bytes that must.
        self.transfers: dict[str, tuple[int, int]] = {}
        #: By image id: why it is not here, in words.
        self.errors: dict[str, str] = {}
        #: Why the repository cannot be followed, in words.
        self.error = ''
        self.worker = worker.Worker('sync', self._step, interval)

    @property
    def version(self) -> int:
        """Of the repository, on this host."""
        return self._host.mirror.state.version

    def close(self) -> None:
        """Begin no more transfers."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Asking

    def announce(self, version: int) -> None:
        """The repository has this version."""
        self.heard = max(self.heard, version)
        if version > self.version:
            self.worker.wake()

    def look(self) -> None:
        """Somebody knows an image that we do not."""
        if time.monotonic() - self._looked > _LOOK:
            self._prompt = True
            self.worker.wake()

    def everything(self) -> None:
        """Sync now, whatever the time of day."""
        self._prompt = self._everything = True
        self.worker.wake()

    def ask(self, image_id: str,
            then: Callable[[journal.Image], object] = lambda image: None,
            ) -> None:
        """Bring an image now, whatever the time of day.

        :param then: called when it is here.
        """
        with contextlib.suppress(RuntimeError):  # it ends
            self._pool.submit(self._bring, image_id, then)

    def _bring(self, image_id: str,
               then: Callable[[journal.Image], object]) -> None:
        try:
            image = self._host.mirror.state.images.get(image_id)
            if image is None:
                image = self._host.mirror.refresh().images.get(image_id)
            if image is None:
                raise exception.NotFound(f'image {image_id} is not '
                                         f'registered')
            self._pull(image, None)
            then(image)
        except StoppedError:
            pass
        except exception.FastbootError as error:
            LOG.warning('image %s, which this host was asked for: %s',
                        image_id, error)
        except Exception:
            LOG.exception('image %s, which this host was asked for',
                          image_id)

    # Following

    def _step(self) -> None:
        prompt, self._prompt = self._prompt, False
        if not prompt and not self.worker.pause(
                random.uniform(0, self._jitter)):
            return
        everything, self._everything = self._everything, False
        try:
            self._follow(everything)
        except StoppedError:
            pass
        except Exception as error:
            self.error = str(error) or repr(error)
            self._everything |= everything
            raise
        else:
            self.error = ''
        finally:
            self._changed()

    def _follow(self, everything: bool) -> None:
        self._looked = time.monotonic()
        state = self._host.mirror.refresh()
        self.heard = max(self.heard, state.version)
        self.errors = {key: words for key, words in self.errors.items()
                       if key in state.images}
        self._drop(state)
        failed = [self._try(image) for image in sorted(
            state.images.values(), key=lambda one: one.serial)
            if everything or self._times.is_open()]
        for error in filter(None, failed):
            raise error

    def _drop(self, state: journal.State) -> None:
        """Let go what is not registered any more."""
        if not self._drop_is_due(state):
            return
        try:
            self._host.drop_gone(self._evicted)
            self._dropped = state.version
        except exception.FastbootError as error:
            LOG.warning('not all that is gone is dropped: %s', error)

    def _drop_is_due(self, state: journal.State) -> bool:
        return state.version != self._dropped or any(
            image.image_id not in state.images
            or state.images[image.image_id].serial != image.serial
            for one in self._host.volumes()
            for image in one.images().values())

    def _try(self, image: journal.Image) -> exception.FastbootError | None:
        """Bring an image; one that fails does not keep others away.

        :returns: a failure to be tried again sooner than at the next look.
        :raises Unavailable: all of the repository is out of reach.
        """
        if self.worker.stopping():
            raise StoppedError
        try:
            self._pull(image, self.limit)
        except (exception.Corrupt, exception.NotFound, exception.NoSpace,
                exception.Busy):
            return None  # noted
        except exception.FastbootError as error:
            self._host.mirror.refresh()
            return error
        if self._eager:
            self._thaw(image)
        return None

    def _pull(self, image: journal.Image,
              limit: throttle.Throttle | None) -> None:
        if self._host.mirror.ready(image):
            self.errors.pop(image.image_id, None)
            return
        with self._transfer(image.image_id) as mine:
            if not mine:
                return
            self._room.demand()
            total = self._host.mirror.boot_bytes(image)
            tell = functools.partial(self._tell, image.image_id, total, limit)
            for _ in range(_BUSY):
                self.transfers[image.image_id] = 0, total
                try:
                    self._host.mirror.pull(image, tell)
                    break
                except exception.Busy:
                    # Another image's transfer has a pack that is ours, too.
                    if not self.worker.pause(1):
                        raise StoppedError from None
            else:
                raise exception.Busy(
                    f'image {image.image_id}: others are still fetching a '
                    f'pack of it')
        LOG.info('image %s is here', image.image_id)

    @contextlib.contextmanager
    def _transfer(self, image_id: str) -> Iterator[bool]:
        """Note how a transfer goes. Gives false if another is at it."""
        with self._lock:
            if image_id in self.transfers:
                mine = False
            else:
                mine = True
                self.transfers[image_id] = 0, 0
        if not mine:
            yield False
            return
        self._changed()
        try:
            yield True
            self.errors.pop(image_id, None)
        except StoppedError:
            raise
        except exception.FastbootError as error:
            LOG.warning('image %s cannot come: %s', image_id, error)
            self.errors[image_id] = str(error)
            raise
        finally:
            with self._lock:
                self.transfers.pop(image_id, None)
            self._changed()

    def _tell(self, image_id: str, total: int,
              limit: throttle.Throttle | None, count: int) -> None:
        if self.worker.stopping():
            raise StoppedError
        done, _ = self.transfers[image_id]
        self.transfers[image_id] = done + count, total
        self._told.sync_bytes.inc(count)
        if limit:
            limit.take(count)

    def _thaw(self, image: journal.Image) -> None:
        """Put it into its volume, if nothing must go for it."""
        try:
            found = self._host.mirror.read_manifest(image.manifest)
            if not self._host.is_thawed(image) and self._room.is_roomy(
                    len(found.boot) * self._host.mirror.block_size):
                self._host.thaw(image)
        except exception.FastbootError as error:
            LOG.warning('image %s is not thawed yet: %s', image.image_id,
                        error)
