# SPDX-License-Identifier: Apache-2.0
"""Boot sets that grow by what guests of compute hosts read.

An observation comes from a compute host, where a guest may have broken out.
It chooses blocks of the image, and nothing else: what they hold is proven as
ever. How much a host can make others keep is bounded here.
"""

import dataclasses
from typing import Any, Final

import numpy as np
from oslo_log import log as logging

from fastboot_common import (
    blocks,
    exception,
    extents,
    journal,
    manifest,
    observation,
)
from fastboot_common import trace as traces
from fastboot_glance import images, records, registry, reports

LOG = logging.getLogger(__name__)

#: Bytes of a boot set that only observations made, the first time.
_FIRST: Final = 256 << 20
#: What is added to another at a time: a share of it, or bytes.
_SHARE: Final = 0.25
_GROWTH: Final = 16 << 20
#: How often a boot set is added to. A new capture begins anew.
_TIMES: Final = 4
#: Any image's size is below it (bytes).
_SIZE_LIMIT: Final = 1 << 62


def check(told: Any) -> dict[str, Any]:
    """An observation with known members only, each in bounds.

    Whether its reads lie within the image, only the manifest knows.

    :raises Invalid: it is none.
    """
    if not isinstance(told, dict):
        raise exception.Invalid('not a JSON object')
    host = reports.validate_host(told.get('host'))
    serial = told.get('serial')
    # JSON's true counts as an integer in Python.
    if type(serial) is not int or not 0 < serial < journal.SERIAL_LIMIT:
        raise exception.Invalid(f'host {host}: "serial" is none')
    try:
        image_id = journal.validate_image_id(told.get('image', ''))
        observation.decode(told.get('reads'), _SIZE_LIMIT)
    except (exception.Invalid, exception.Corrupt) as error:
        raise exception.Invalid(f'host {host}: {error}') from error
    return {'host': host, 'image': image_id, 'serial': serial,
            'reads': told['reads']}


def extend(old: manifest.Manifest, seen: list[traces.Trace],
           needed: int) -> manifest.Manifest | None:
    """A manifest with what hosts missed in its boot set.

    :param seen: the reads of each host, all within the image.
    :param needed: hosts that must have missed a block; of an image without
        boot set, one is enough.
    :returns: None if it is not worth it, or was done too often already.
    """
    before = old.capture.get('observed') or {'times': 0, 'bytes': 0}
    wanted = _wanted(old, seen, needed if len(old.boot) else 1)
    added, reads = _first_reads(seen, wanted, old.block_size, _room(old))
    size = len(added) * old.block_size
    if size < observation.LEAST or before['times'] >= _TIMES:
        return None
    state = {} if len(old.boot) else {'state': 'observed'}
    return dataclasses.replace(
        old, boot=np.concatenate([old.boot, added]),
        trace=traces.merge([old.trace, reads]),
        capture=old.capture | state | {'observed': {
            'times': before['times'] + 1, 'bytes': before['bytes'] + size,
            'hosts': len(seen)}})


def _wanted(old: manifest.Manifest, seen: list[traces.Trace],
            needed: int) -> blocks.Blocks:
    """Blocks with data that enough hosts missed."""
    missed, hosts = np.unique(np.concatenate([
        traces.boot_set(one, old.block_size, old.virtual_size)
        for one in seen]), return_counts=True)
    lacking = np.setdiff1d(missed[hosts >= needed], old.boot)
    return extents.locate(old.extents, lacking)[0]


def _room(old: manifest.Manifest) -> int:
    """Blocks that a boot set may grow by."""
    size = len(old.boot) * old.block_size
    limit = max(int(size * _SHARE), _GROWTH) if size else _FIRST
    return min(limit // old.block_size,
               manifest.BOOT_LIMIT - len(old.boot))


def _first_reads(seen: list[traces.Trace], wanted: blocks.Blocks,
                 block_size: int, limit: int,
                 ) -> tuple[blocks.Blocks, traces.Trace]:
    """Some blocks in the order of their first use, and the reads that were.

    :param limit: of the blocks; those that were used last are left out.
    """
    every = np.concatenate(seen)
    every = every[np.argsort(every['time'], kind='stable')]
    first = every['offset'].astype(np.int64) // block_size
    last = (every['offset'].astype(np.int64) + every['length'] - 1
            ) // block_size
    counts = last - first + 1
    reads = np.repeat(np.arange(len(every)), counts)
    touched = np.arange(counts.sum()) - np.repeat(
        np.cumsum(counts) - counts - first, counts)
    which = np.isin(touched, wanted)
    reads, touched = reads[which], touched[which]
    _, places = np.unique(touched, return_index=True)
    places = np.sort(places)[:limit]
    return touched[places], every[np.unique(reads[places])]


class Refresher:
    """Adds what was observed to registered images. For one thread.

    :param policy: ``never``, ``failed`` or ``always``.
    :param hosts: that must have missed a block of an image that booted.
    """

    def __init__(self, store: records.Records, register: registry.Registry,
                 policy: str, hosts: int) -> None:
        self._records = store
        self._registry = register
        self._policy = policy
        self._hosts = hosts

    def look(self, image: images.Image, found: journal.Image) -> None:
        """See whether what waits for an image is enough, and add it.

        Whoever did it before, or is doing it now, loses nothing and adds
        nothing twice.
        """
        waiting = self._records.observations(image.image_id)
        known = self._records.build(image.image_id)
        if not waiting or not known or known.state != 'ready':
            return
        seen = [reads for one in waiting
                if (reads := self._read(found, one)) is not None]
        after = self._registry.rewrite(
            image.image_id, lambda old: extend(old, seen, self._hosts)
            if seen and self._is_meant(old) else None)
        made = self._registry.repository.read_manifest(after.manifest)
        size = len(made.boot) * made.block_size
        # Also if it was added before, by one who died before he said so.
        if size != known.boot_size:
            self._tell(image, after.serial, size)
            self._records.forget_observations(image.image_id, waiting)

    def _read(self, found: journal.Image,
              one: records.Observation) -> traces.Trace | None:
        """Its reads; what is wrong with the image is forgotten."""
        try:
            if one.serial != found.serial:
                raise exception.Corrupt(f'it has serial {found.serial} now')
            return observation.decode(one.reads, found.virtual_size)
        except exception.Corrupt as error:
            LOG.warning('image %s: observation of %s dropped: %s',
                        found.image_id, one.host, error)
            self._records.forget_observations(found.image_id, [one])
            return None

    def _is_meant(self, old: manifest.Manifest) -> bool:
        return self._policy == 'always' or (
            self._policy == 'failed'
            and old.capture.get('state') != 'booted')

    def _tell(self, image: images.Image, serial: int, size: int) -> None:
        LOG.info('image %s: what hosts observed makes its boot set one of '
                 '%d bytes', image.image_id, size)
        self._registry.announce('refreshed', image.image_id, name=image.name,
                                version=serial, boot_size=size)
        self._registry.tell(image, {
            'fastboot_boot_size': str(size), 'fastboot_error': None})
        # Last: without it, the next look says all of it again.
        self._registry.note(image, 'ready', version=serial, boot_size=size)
