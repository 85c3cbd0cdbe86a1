# SPDX-License-Identifier: Apache-2.0
"""Guests that come and go: acquire, release, and leases that end.

A guest that comes never waits for the network, and for nothing longer than a
fixed time: who asks has another way to start it.

A lease lasts while its file (Nova's base image) exists, or a disk names it.
That is looked at from time to time; a lease ends only if the directory is
there, the file was missing at two looks, no disk lies on it, and nobody asked
for the lease meanwhile. Times are those of this process: a clock that jumps
ends no lease.

Disks are looked at because Nova removes bases of which it knows no server:
the ones of rescue disks, of servers that migrate for longer than an hour or
wait for their resize to be confirmed. To a running QEMU the loss of a base is
nothing; that of the blocks below it would be wrong bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Final

from oslo_log import log as logging

from fastboot_common import chain, exception, journal, overlay, volume
from fastboot_nova import host
from fastboot_nova.agent import loopdevice

LOG = logging.getLogger(__name__)

#: Boot sets that are thawed at a time.
_THAWS: Final = 4
#: Seconds after the last acquire before which no lease with a file ends.
_FRESH: Final = 60.0


class NotHereError(exception.NotFound):
    """The image is registered, and its boot set is not on this host."""


@dataclasses.dataclass(frozen=True)
class Acquired:
    """What a guest gets.

    :ivar device: the volume as a block device, where that is wanted.
    :ivar thawed: bytes that were written for it.
    :ivar seconds: that it took.
    """

    link: chain.Link
    device: pathlib.Path | None
    thawed: int
    seconds: float


@dataclasses.dataclass
class _Watch:
    """What this process knows of a lease with a file.

    :ivar since: when it was acquired, or first met (monotonic).
    :ivar asked: acquires since then, or since the file was last there.
    :ivar seen: the file was there since then.
    :ivar missing: the file was not, at the last look.
    """

    since: float
    asked: int = 0
    seen: bool = False
    missing: bool = False


class Guests:
    """The leases of one host's images.

    :param served: the host, opened for writing.
    :param wait: seconds that an acquire takes at most.
    :param grace: seconds that a lease lasts whose file never appeared.
    :param reachable: whether guests can reach the export.
    :param loops: makes block devices of volumes; None: none are wanted.
    """

    def __init__(self, served: host.Host, *, wait: float, grace: float,
                 reachable: Callable[[], bool] = lambda: True,
                 loops: loopdevice.LoopDevices | None = None) -> None:
        self._host = served
        self._wait = wait
        self._grace = grace
        self._reachable = reachable
        self._loops = loops
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(_THAWS, 'thaw')
        self._thaws: dict[str, concurrent.futures.Future[int]] = {}
        #: By image, holder and file.
        self._watched: dict[tuple[str, str, str], _Watch] = {}
        #: Acquires under way; work in the background lets them pass.
        self.coming = 0

    def close(self) -> None:
        """Begin no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Coming

    def acquire(self, image_id: str, holder: str, file: str,
                removed: bool = False) -> Acquired:
        """Lease an image, and make it ready for a guest.

        A call that fails may leave a lease, which ends by itself: another
        guest may have got the same one meanwhile.

        :param file: the lease lasts while it exists.
        :param removed: an image that was deregistered will do; what of it is
            not on this host comes in the background.
        :raises NotFound: the image is not registered.
        :raises NotHereError: its boot set is not on this host.
        :raises Busy: it would take longer than a guest may wait.
        :raises NoSpace: there is no room for it.
        :raises Unavailable: the export does not answer.
        """
        begun = time.monotonic()
        with self._lock:
            self.coming += 1
        try:
            image = self._image(image_id, removed)
            one = (self._host.open_volume(image.domain) if image
                   else self._host.find(image_id)[0])
            one.lease(image_id, holder, file, self._wait)
            self._note(image_id, holder, file)
            thawed = self._thaw(
                image, self._wait - (time.monotonic() - begun)
            ) if image else 0
            link = self._host.link(image_id)
            if not link.complete and not self._reachable():
                raise exception.Unavailable(
                    f'image {image_id} is not complete, and the export does '
                    f'not answer')
            if image:
                self._host.read_ahead(image)
            device = self._loops.attach(one.file) if self._loops else None
            return Acquired(link, device, thawed, time.monotonic() - begun)
        finally:
            with self._lock:
                self.coming -= 1

    def _image(self, image_id: str, removed: bool) -> journal.Image | None:
        """The image that a guest is to have.

        :returns: None: what has a slot here already, and is not registered
            any more under this serial, or has no boot set here.
        """
        state = self._host.mirror.state
        image = state.images.get(image_id)
        if removed:
            with contextlib.suppress(exception.NotFound):
                here = self._host.find(image_id)[1]
                if (image is None or here.serial != image.serial
                        or not self._host.mirror.ready(image)):
                    return None
        if image is None and removed:
            return _last(state, image_id)
        if image is None:
            raise exception.NotFound(f'image {image_id} is not registered')
        if not self._host.mirror.ready(image):
            raise NotHereError(f'image {image_id}: its boot set is not on '
                               f'this host yet')
        return image

    def _note(self, image_id: str, holder: str, file: str) -> None:
        with self._lock:
            watch = self._watched.setdefault((image_id, holder, file),
                                             _Watch(0))
            watch.since = time.monotonic()
            watch.asked += 1
            watch.seen = watch.missing = False

    def _thaw(self, image: journal.Image, seconds: float) -> int:
        if self._host.is_thawed(image):
            return 0
        with self._lock:
            future = self._thaws.get(image.image_id)
            if future is None:
                future = self._pool.submit(self._host.thaw, image)
                self._thaws[image.image_id] = future
                future.add_done_callback(functools.partial(
                    self._forget, image.image_id))
        try:
            return future.result(max(seconds, 0))
        except concurrent.futures.CancelledError:
            raise exception.Busy('the agent is shutting down') from None
        except TimeoutError:
            raise exception.Busy(
                f'image {image.image_id} is still being thawed; '
                f'repeat') from None

    def _forget(self, image_id: str,
                _future: concurrent.futures.Future[int]) -> None:
        # By the thread that thawed, or at once by ours, which has the lock.
        self._thaws.pop(image_id, None)

    # Going

    def release(self, image_id: str, holder: str, file: str = '') -> None:
        """End a lease, unless its file exists or others asked for it too.

        :param file: as it was acquired.
        """
        if not file:
            self._host.release(image_id, holder)
            return
        # Before the file is looked at: who asks from now on keeps it.
        held = [(one, lease) for one in self._host.volumes()
                for lease in one.leased(image_id)
                if (lease.holder, lease.file) == (holder, file)]
        with self._lock:
            watch = self._watched.get((image_id, holder, file))
            alone = watch is not None and watch.asked == 1
            if watch:
                watch.asked -= 1
        # An older one may be of a disk that still lies on it.
        if alone and _is_missing(file) and not _is_needed(file):
            for one, lease in held:
                one.expire(image_id, lease)
        # Otherwise the next looks will tell.

    def reconcile(self) -> int:
        """End the leases whose files are gone.

        :returns: how many leases there are after it.
        """
        return sum(self._reconcile(one) for one in self._host.volumes())

    def _reconcile(self, one: volume.Volume) -> int:
        held = 0
        for image_id in one.leased_images():
            # The leases are read first, and then their files looked at.
            for lease in one.leased(image_id):
                if (self._is_over(image_id, lease)
                        and not _is_needed(lease.file)
                        and one.expire(image_id, lease)):
                    LOG.info('image %s: %s is gone, and so is its lease',
                             image_id, lease.file)
                else:
                    held += 1
        if self._loops:
            with self._lock:
                # Who comes now waits for the lock, and gets a new device.
                if not held and not self.coming:
                    self._loops.detach(one.file)
        return held

    def _is_over(self, image_id: str, lease: volume.Lease) -> bool:
        if not lease.file:
            return False
        missing = _is_missing(lease.file)
        key = image_id, lease.holder, lease.file
        now = time.monotonic()
        with self._lock:
            watch = self._watched.setdefault(key, _Watch(now))
            if not missing:
                watch.seen |= missing is False
                watch.asked = 0
                watch.missing = False
                return False
            before, watch.missing = watch.missing, True
            over = before and now - watch.since > (
                _FRESH if watch.seen else self._grace)
            if over:
                del self._watched[key]
            return over


def _last(state: journal.State, image_id: str) -> journal.Image:
    """The image that had an id before it was deregistered.

    :raises NotFound: the repository remembers none.
    """
    found = [gone.image for gone in state.removed.values()
             if gone.image.image_id == image_id]
    if not found:
        raise exception.NotFound(
            f'image {image_id} is not registered, and its blocks are not '
            f'kept any more')
    return max(found, key=lambda one: one.serial)


def _is_needed(file: str) -> bool:
    """Whether a disk lies on a file, or nobody can tell."""
    try:
        disk = next(overlay.lying_on(pathlib.Path(file)), None)
    except OSError as error:
        LOG.warning('the disks that may lie on %s cannot be read, so its '
                    'lease stays: %s', file, error)
        return True
    if disk:
        LOG.info('%s is gone, but %s lies on it: its lease stays', file, disk)
    return disk is not None


def _is_missing(file: str) -> bool | None:
    """Whether a file is not there. None: nobody can tell, because its
    directory is away, too (not mounted, for instance)."""
    try:
        os.lstat(file)
        return False
    except FileNotFoundError:
        return True if os.path.isdir(os.path.dirname(file)) else None
    except OSError:
        return None
