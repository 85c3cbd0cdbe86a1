# SPDX-License-Identifier: Apache-2.0
"""Journal, builds and reports put together. Pure functions.

An image on a host is

* ``absent``: the host has nothing of it, or does not know of it yet;
* ``transferring``: it comes, with progress;
* ``ready``: its boot set is there;
* ``stale``: what the host has is older than the journal, or its last report
  is too old to believe;
* ``error``: the host says so.
"""

import collections
import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Any, Final

from fastboot_common import journal
from fastboot_glance import microvms, records

#: States in a report that mean that a guest could start at once.
_USABLE: Final = ('ready', 'thawed', 'complete')
#: States of µVMs.
_BEST_FIRST: Final = ('ready', 'baking', 'none', 'failed', 'refused')
_ABSENT: Final = records.HostImage('absent')


@dataclasses.dataclass(frozen=True)
class Clock:
    """What tells stale reports.

    :ivar now: seconds, Unix time.
    :ivar stale_after: seconds that a report may be old.
    """

    now: float
    stale_after: float

    def is_stale(self, host: records.Host) -> bool:
        """Whether the host has been silent for too long."""
        return self.now - host.at > self.stale_after

    def silence(self, host: records.Host) -> str:
        """How long the host has been silent, in words."""
        return f'no report for {max(0, int(self.now - host.at))} s'


def iso(moment: float) -> str | None:
    """Seconds of Unix time as ISO 8601 in UTC; None for 0."""
    if not moment:
        return None
    return datetime.datetime.fromtimestamp(
        moment, datetime.UTC).isoformat(timespec='seconds')


def _on_host(state: str, progress: float = 0.0, error: str = '',
             detail: str = '', present: float = 0.0) -> dict[str, Any]:
    return {'state': state, 'detail': detail, 'progress': progress,
            'present': present, 'error': error}


def on_host(image: journal.Image | None, image_id: str, host: records.Host,
            clock: Clock) -> dict[str, Any]:
    """State, progress and error of an image on a host.

    :param image: as the journal has it; None: it is not registered.
    """
    said = host.images.get(image_id, _ABSENT)
    if clock.is_stale(host):
        return _on_host('stale', said.progress, f'{clock.silence(host)}; '
                        f'was {said.state} then', said.state)
    if said.state == 'error':
        return _on_host('error', said.progress,
                        said.error or 'the host gives no reason', said.state)
    if image is None:
        if said.state == 'absent':
            return _on_host('absent')
        return _on_host('stale', said.progress, 'not registered any more; '
                        'kept until no guest needs it', said.state)
    if said.state == 'absent':
        behind = f'the host is at version {host.version}, the image is of ' \
                 f'{image.serial}' if host.version < image.serial else ''
        return _on_host('absent', 0.0, said.error or behind, said.state)
    has = host.version if said.serial is None else said.serial
    if said.state == 'stale' or (
            said.state in _USABLE and has < image.serial):
        return _on_host(
            'stale', said.progress, said.error or f'the host has version '
            f'{has} of the image, the newest is {image.serial}', said.state)
    if said.state == 'transferring':
        return _on_host('transferring', said.progress, said.error,
                        said.state)
    present = said.progress if said.state in ('thawed', 'complete') else 0.0
    return _on_host('ready', 1.0, said.error, said.state, present)


def image_row(image_id: str, image: journal.Image | None,
              build: records.Build | None) -> dict[str, Any]:
    """What the centre knows of an image (sizes in bytes).

    One of `image` and `build` is there.
    """
    known = build or records.Build(image_id, state='ready')
    state, error = known.state, known.error
    if image is None and state == 'ready':
        state, error = 'error', ('the repository does not have it any more; '
                                 'build it again')
    if known.requested and state != 'building':
        state, error = 'queued', ''
    working = state in ('queued', 'building')
    return {
        'id': image_id,
        'name': image.name if image else known.name,
        'owner': image.owner if image else known.owner,
        'visibility': image.visibility if image else None,
        'state': state,
        'stage': known.stage if working else '',
        'progress': known.progress if state == 'building' else
        float(state == 'ready'),
        'error': error,
        'version': image.serial if image else None,
        'virtual_size': image.virtual_size if image else None,
        'boot_size': known.boot_size if image else None,
        'builder': known.builder, 'attempts': known.attempts,
        'requested_at': iso(known.requested), 'updated_at': iso(known.updated),
    }


def microvm_states(known: Iterable[records.Microvm]) -> dict[str, str]:
    """How it is with the µVMs of each image, in a word: the best of its
    platforms'."""
    best: dict[str, str] = {}
    for one in known:
        best[one.image_id] = min(
            best.get(one.image_id, one.state), one.state,
            key=_BEST_FIRST.index)
    return best


def microvm_rows(known: Iterable[records.Microvm],
                 there: Sequence[microvms.Published], image_id: str,
                 hosts: Iterable[records.Host]) -> list[dict[str, Any]]:
    """The µVMs of an image: what the repository has, then what builders say
    of others (sizes in bytes).
    """
    said = {one.platform: one for one in known}
    rows = [_microvm_row(dataclasses.replace(
        said.get(one.platform) or records.Microvm(
            image_id, one.platform, 'ready'), state='ready', stage='',
        progress=1.0, reason='', group=one.name.group)) for one in there]
    for one in there:
        said.pop(one.platform, None)
    rows += [_microvm_row(one if one.state != 'ready' else
             dataclasses.replace(
                 one, state='none', group='', progress=0.0,
                 reason='the repository does not have it any more'))
             for one in said.values()]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter)
    for host in hosts:
        for here in host.microvms or ():
            if here.image_id == image_id:
                counts[here.group][here.state] += 1
    return [row | {'hosts': dict(counts.get(row['class'], {}))}
            for row in rows]


def _microvm_row(one: records.Microvm) -> dict[str, Any]:
    return {
        'class': one.group, 'platform': one.platform, 'state': one.state,
        'stage': one.stage if one.state == 'baking' else '',
        'progress': one.progress, 'reason': one.reason,
        'bytes': one.bytes, 'seconds': one.seconds,
        'baked_at': iso(one.baked_at), 'updated_at': iso(one.updated),
    }


def host_microvm_row(one: records.HostMicrovm) -> dict[str, Any]:
    """What a host says of a µVM (bytes, counts)."""
    return {
        'image': one.image_id, 'class': one.group, 'state': one.state,
        'bytes': one.bytes, 'lanes': one.lanes, 'resumed': one.resumed,
        'fallbacks': one.fallbacks, 'reason': one.reason,
    }


def host_row(host: records.Host, state: journal.State,
             clock: Clock) -> dict[str, Any]:
    """What a host says of itself (sizes in bytes)."""
    stale = clock.is_stale(host)
    return {
        'name': host.name, 'state': 'stale' if stale else 'up',
        'error': clock.silence(host) if stale else '',
        'reported_at': iso(host.at), 'version': host.version,
        'behind': max(0, state.version - host.version),
        'software': host.software, 'volume_bytes': host.volume_bytes,
        'mirror_bytes': host.mirror_bytes, 'free_bytes': host.free_bytes,
        'lazy_guests': host.lazy_guests, 'platforms': host.platforms,
    }


def count(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many are in which state."""
    return dict(collections.Counter(row['state'] for row in rows))
