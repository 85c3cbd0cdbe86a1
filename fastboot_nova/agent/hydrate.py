# SPDX-License-Identifier: Apache-2.0
"""Completing images in the background, while nobody needs the host."""

import time
from collections.abc import Callable, Iterator
from typing import Final

from oslo_log import log as logging

from fastboot_common import exception, journal, volume
from fastboot_common.store import throttle
from fastboot_nova import host
from fastboot_nova.agent import metrics, space, worker

LOG = logging.getLogger(__name__)

#: Seconds between two looks for images to complete.
_INTERVAL: Final = 30.0
#: Seconds before an image is tried again that failed.
_AGAIN: Final = 300.0
#: Longest that guests who come hold it up (seconds).
_COURTESY: Final = 10.0


class Hydrator:
    """Completes one image at a time.

    :param served: the host.
    :param room: its disk.
    :param told: counters.
    :param policy: ``never``, ``leased`` or ``all``.
    :param rate: gives bytes a second, 0: any. Asked before each image.
    :param delay: seconds between a guest's coming and the beginning.
    :param busy: whether a guest is just coming.
    :param changed: called when an image's state is another.
    """

    def __init__(self, served: host.Host, room: space.Space,
                 told: metrics.Metrics, *, policy: str,
                 rate: Callable[[], int], delay: float,
                 busy: Callable[[], bool],
                 changed: Callable[[], None]) -> None:
        self._host = served
        self._room = room
        self._told = told
        self._policy = policy
        self._delay = delay
        self._ask_rate = rate
        self._throttle: throttle.Throttle | None = None
        self._busy = busy
        self._changed = changed
        #: Asked for: completed before all others, whatever the policy.
        self._wanted: dict[str, None] = {}
        self._not_before: dict[str, float] = {}
        #: Bytes a second of the image at hand; 0: any.
        self.rate = 0
        #: Bytes that it lacks; 0: none is being completed.
        self.left = 0
        #: By image id: why it is not completed, in words.
        self.errors: dict[str, str] = {}
        self.worker = worker.Worker('hydrate', self._step, _INTERVAL)

    def ask(self, image: journal.Image) -> None:
        """Complete an image before all others."""
        self._not_before.pop(image.image_id, None)
        self._wanted[image.image_id] = None
        self.worker.wake()

    def _step(self) -> None:
        while not self.worker.stopping():
            image_id = next(self._candidates(), None)
            if image_id is None:
                return
            self._try(image_id)

    def _candidates(self) -> Iterator[str]:
        """Images to complete, the first first."""
        yield from filter(self._is_due, list(self._wanted))
        if self._policy == 'never':
            return
        for one in self._host.volumes():
            for image_id in one.images():
                if self._is_meant(one, image_id) and self._is_due(image_id):
                    yield image_id
        if self._policy == 'all':
            for image in list(self._host.mirror.state.images.values()):
                if (self._is_due(image.image_id)
                        and self._host.mirror.ready(image)
                        and not self._has_slot(image)):
                    yield image.image_id

    def _is_meant(self, one: volume.Volume, image_id: str) -> bool:
        """Whether the policy wants it whole, sooner or later."""
        if one.is_complete(image_id):
            return False
        if self._policy == 'all':
            return True
        if not one.leases(image_id):
            return False
        self._not_before.setdefault(image_id, time.monotonic() + self._delay)
        return True

    def _is_due(self, image_id: str) -> bool:
        return time.monotonic() >= self._not_before.get(image_id, 0)

    def _has_slot(self, image: journal.Image) -> bool:
        return any(one.image(image.image_id) for one in self._host.volumes())

    def _try(self, image_id: str) -> None:
        try:
            if self._hydrate(image_id):
                LOG.info('image %s is complete', image_id)
                self._wanted.pop(image_id, None)
            self.errors.pop(image_id, None)
        except exception.FastbootError as error:
            words = f'not completed: {error}'
            if self.errors.get(image_id) != words:
                LOG.warning('image %s is %s', image_id, words)
            self.errors[image_id] = words
            self._not_before[image_id] = time.monotonic() + _AGAIN
            if isinstance(error, exception.NotFound):
                self._wanted.pop(image_id, None)
        self._changed()

    def _hydrate(self, image_id: str) -> bool:
        image = self._host.mirror.state.images.get(image_id)
        if image and not self._has_slot(image):
            self._host.thaw(image)
        one, _ = self._host.find(image_id)
        missing = one.slot_of(image_id).missing() * one.block_size
        if not self._room.is_roomy(missing):
            raise exception.NoSpace(
                f'{missing >> 20} MiB more would leave less free than '
                f'[agent] min_free, or pass [agent] quota')
        self._follow_rate()
        self.left = missing
        try:
            return self._host.hydrate(
                image_id, pace=self._pace,
                cancelled=lambda: self._is_to_yield(image_id))
        finally:
            self.left = 0

    def _follow_rate(self) -> None:
        rate = self._ask_rate()
        if rate != self.rate:
            LOG.info('hydration takes at most %d bytes/s', rate)
            self._throttle = throttle.Throttle(rate) if rate else None
            self.rate = rate

    def _is_to_yield(self, image_id: str) -> bool:
        # To another that was asked for; this one goes on later.
        return self.worker.stopping() or (
            image_id not in self._wanted
            and any(map(self._is_due, list(self._wanted))))

    def _pace(self, count: int) -> None:
        if self._throttle:
            self._throttle.take(count)
        deadline = time.monotonic() + _COURTESY
        while self._busy() and time.monotonic() < deadline:
            if not self.worker.pause(0.05):
                return
        self.left = max(0, self.left - count)
        self._told.hydrate_bytes.inc(count)
