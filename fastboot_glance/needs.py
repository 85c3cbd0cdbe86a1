# SPDX-License-Identifier: Apache-2.0
"""What hosts need of images that were deregistered: their servers read it,
and nobody else has it.

Each host's newest report counts, however old it is. A host that is off has
its servers' disks all the same; one that is gone for good, the operator
forgets.
"""

from collections.abc import Sequence
from typing import Final

from oslo_log import log as logging

from fastboot_common import journal
from fastboot_glance import records

LOG = logging.getLogger(__name__)

#: States of an image that has a slot on its host.
_SLOT: Final = ('thawed', 'complete', 'stale')
#: Hosts that a message names.
_NAMED: Final = 5


def find(store: records.Records,
         images: Sequence[journal.Image]) -> dict[int, list[str]]:
    """The names of the hosts that need an image, by its serial.

    :param images: that were deregistered; those that nobody needs are not
        in the result.
    :raises Unavailable: the reports cannot be read.
    """
    said = store.host_images({image.image_id for image in images})
    found = {image.serial: [
        host for host, rows in said.items() if image.image_id in rows
        and _is_needed(rows[image.image_id], image.serial)]
        for image in images}
    return {serial: hosts for serial, hosts in found.items() if hosts}


def keep(store: records.Records,
         images: Sequence[journal.Image]) -> set[int]:
    """Serials of images that are not to be collected yet; says why.

    See :func:`find`.
    """
    found = find(store, images)
    for image in images:
        if image.serial in found:
            LOG.warning('%s', describe(image, found[image.serial]))
    return set(found)


def describe(image: journal.Image, hosts: Sequence[str]) -> str:
    """Which image is kept for whom, in words."""
    more = len(hosts) - _NAMED
    return (f'image {image.image_id} (serial {image.serial}) was '
            f'deregistered and is kept: servers on '
            f'{", ".join(hosts[:_NAMED])}{f" and {more} more" * (more > 0)} '
            f'need it, which have not all of it there')


def _is_needed(said: records.HostImage, serial: int) -> bool:
    # Agents of old do not tell leases: each slot may have some.
    leased = said.state in _SLOT if said.leases is None else said.leases > 0
    is_whole = said.state in _SLOT and said.progress >= 1
    # Of an image that was registered anew, a stale row has the new serial.
    return leased and not is_whole and (
        said.state == 'stale' or said.serial in (None, serial))
