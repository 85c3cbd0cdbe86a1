# SPDX-License-Identifier: Apache-2.0
"""What an agent says of its host: to callers, to the centre, to metrics."""

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable
from typing import Any, Final

from fastboot_nova import host
from fastboot_nova.agent import (
    hydrate,
    metrics,
    microvms,
    space,
    sync,
    worker,
)

#: Seconds that changes are gathered before they are reported.
_GATHER: Final = 1.0
_WORDS: Final = 500

Report = dict[str, Any]


def software() -> str:
    """The version of fastboot."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version('openstack-fastboot')
    return 'unknown'


def _rounded(share: float) -> float:
    """Four digits, and 1 only of all: the centre keeps what lacks."""
    return math.floor(share * 10_000) / 10_000


class Reporter:
    """Makes reports, regularly and after changes.

    :param name: of this host.
    :param lazy: the ids of guests that need the export; None: unknown.
    :param send: takes a report.
    :param beside: the µVMs.
    :param interval: seconds between two of them.
    """

    def __init__(self, name: str, served: host.Host, follower: sync.Sync,
                 completer: hydrate.Hydrator, room: space.Space,
                 told: metrics.Metrics, *, send: Callable[[Report], None],
                 interval: float,
                 lazy: Callable[[], list[str] | None] = lambda: None,
                 beside: microvms.Microvms | None = None) -> None:
        self._name = name
        self._host = served
        self._sync = follower
        self._hydrator = completer
        self._room = room
        self._told = told
        self._lazy = lazy
        self._microvms = beside
        self._send = send
        #: The last one.
        self.last: Report = {}
        self.worker = worker.Worker('report', self._step, interval)

    def images(self) -> list[dict[str, Any]]:
        """All images that are registered, or that only this host has.

        :raises OSError: it cannot be told which.
        """
        rows = self._readable()
        # Later: a volume that the rows lack is still found damaged.
        unreadable = self._host.unreadable()
        return [row for row in rows if row['id'] not in unreadable] + [
            self._unreadable(name, one) for name, one in unreadable.items()]

    def _unreadable(self, name: str, one: host.Unreadable) -> dict[str, Any]:
        """Its guests need it, perhaps, and whichever serial they have: it
        must not be collected before the volume is mended."""
        known = self._host.mirror.state.images.get(name)
        return {'id': name, 'name': known.name if known else '',
                'serial': None, 'domain': one.domain, 'state': 'error',
                'progress': 0.0, 'leases': max(1, one.leases),
                'pinned': False, 'error': (
                    f'volume {one.domain} cannot be opened: {one.words}'
                )[:_WORDS]}

    def _readable(self) -> list[dict[str, Any]]:
        registered = self._host.mirror.state.images
        here = {image.image_id: image.serial for one in self._host.volumes()
                for image in one.images().values()}
        rows = []
        for status in self._host.status():
            name = status.image_id
            row = {'id': name, 'name': status.name, 'serial': status.serial,
                   'domain': status.domain, 'state': status.state,
                   'progress': _rounded(status.progress),
                   'leases': status.leases, 'pinned': status.pinned,
                   'error': ''}
            if name not in registered:
                row |= {'state': 'stale', 'error': 'it was deregistered; '
                        'it goes when its last guest does'}
            elif here.get(name, status.serial) != status.serial:
                row |= {'state': 'stale', 'progress': 0.0, 'error':
                        f'guests have its serial {here[name]}; the new one '
                        f'comes when they are gone'}
            else:
                self._add_progress(row)
            rows.append(row)
        return rows

    def _add_progress(self, row: dict[str, Any]) -> None:
        """What sync and hydration know of an image."""
        name = row['id']
        transfer = self._sync.transfers.get(name)
        if row['state'] == 'absent':
            if transfer:
                done, total = transfer
                row |= {'state': 'transferring',
                        'progress': round(done / max(total, done, 1), 4)}
            elif name in self._sync.errors:
                row |= {'state': 'error', 'error': self._sync.errors[name]}
        elif row['state'] != 'complete':
            row['error'] = self._hydrator.errors.get(name, '')
        row['error'] = row['error'][:_WORDS]

    def _step(self) -> None:
        self.worker.pause(_GATHER)
        images = self.images()
        volumes, mirror = self._host.held()
        report = {
            'host': self._name, 'at': time.time(), 'software': software(),
            'version': self._sync.version,
            'images': [{key: image[key] for key in (
                'id', 'state', 'progress', 'error', 'serial', 'leases')}
                for image in images],
            'volume_bytes': volumes, 'mirror_bytes': mirror,
            'free_bytes': self._room.free(),
            'lazy_guests': self._lazy(), **self._of_microvms(),
        }
        self.last = report
        self._told.note(report, sum(image['leases'] for image in images))
        self._send(report)

    def _of_microvms(self) -> Report:
        known = self._microvms
        if known is None:
            return {'platforms': [], 'microvms': []}
        return {'platforms': known.platforms, 'microvms': known.rows()}
