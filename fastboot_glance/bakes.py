# SPDX-License-Identifier: Apache-2.0
"""Which images are to be baked here, and what is said of their µVMs.

A builder bakes for its own platform, if some host has that platform, or no
host has said yet what it has. What the repository has is the truth; the
records remember what was refused, so that it is not tried again and again.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import journal
from fastboot_common.microvm import key, template
from fastboot_glance import (
    bakery,
    eligibility,
    images,
    jobs,
    microvms,
    records,
    registry,
)

LOG = logging.getLogger(__name__)

#: Results that are the same until their basis changes.
_ENDS: Final = ('refused', 'failed')


class Bakes:
    """What is to be baked. For one thread.

    :param platform: of this builder; None: it bakes nothing.
    """

    def __init__(self, conf: Any, board: jobs.Board,
                 policies: eligibility.Policies, store: records.Records,
                 register: registry.Registry,
                 platform: key.Platform | None) -> None:
        self._options = conf.bakery
        self._again: float = conf.builder.error_hours * 3600
        self._board = board
        self._policies = policies
        self._records = store
        self._registry = register
        self.platform = platform.text if platform else ''

    def wishes(self, image: images.Image) -> bool:
        """Whether an image is to have µVMs at all."""
        return self._policies.refuse(image) is None \
            and self._policies.bakes(image)

    def look(self, image: images.Image, found: journal.Image,
             waiting: Sequence[jobs.Job] | None = None) -> bool:
        """A registered image: see to its µVMs.

        :param found: as it is registered.
        :param waiting: the jobs on the board, if they are known.
        :returns: whether a bake of it waits that is for this builder.
        :raises Unavailable: something is away; the audit comes later.
        """
        if not self._policies.bakes(image):
            self._withdraw(image)
            return False
        if not self._registry.from_glance(found):
            return False
        root = self.root(found)
        # First: what another builder says since, we need not have seen.
        known = self._known(image)
        there = [one for one in self._registry.microvms.of(image.image_id)
                 if self._is_present(found, one, root)]
        self._note_there(image, known, there)
        wanted = self._is_wanted(there, known.get(self.platform), root)
        if wanted:
            if self.platform not in known or known[
                    self.platform].state not in ('none', 'baking'):
                self.note(image, 'none')
            self._board.post(image.image_id, 'its µVM is missing',
                             among=waiting, platform=self.platform)
        self.tell(image, there)
        return wanted

    def root(self, found: journal.Image) -> str:
        """The content of a registered image."""
        return self._registry.repository.read_manifest(found.manifest).root

    def basis(self, root: str) -> str:
        """What a refusal here is of; with another, it is tried again.

        :param root: the image's content.
        """
        return hashlib.sha256(' '.join((
            root, template.digest(bakery.config(self._options)),
            str(self._options.timeout))).encode()).hexdigest()

    def forget(self, image: images.Image) -> None:
        """There is nothing that µVMs could be of."""
        self._records.forget_microvms(image.image_id)

    def again(self, image: images.Image) -> None:
        """Somebody wants what was refused to be tried once more."""
        self._records.forget_microvms(image.image_id, _ENDS)

    def note(self, image: images.Image, state: str, **values: Any) -> None:
        """Write the record of an image's µVM for this platform."""
        self._records.note_microvm(image.image_id, self.platform,
                                   state=state, **values)

    def ready(self, image: images.Image, group: str,
              **known: int | float | None) -> None:
        """The image has its µVM: tell agents, users and operators.

        :param group: name of its class of hosts.
        :param known: its size, seconds and time as
            :meth:`.records.Records.note_microvm` wants them.
        """
        self.note(image, 'ready', group=group, **known)
        self.tell(image)
        self._registry.announce('baked', image.image_id, name=image.name,
                                platform=self.platform, microvm_class=group)

    def ended(self, image: images.Image, state: str, root: str,
              reason: str, passing: bool = False) -> None:
        """There is no µVM, and nobody tries again unasked.

        :param state: ``refused`` or ``failed``.
        :param passing: at least not soon: it was not the image's fault.
        """
        LOG.warning('image %s: not baked: %s', image.image_id, reason)
        self.note(image, state, reason=reason, basis=self.basis(root),
                  stage=records.PASSING if passing else '')
        self.tell(image)
        self._registry.announce('not_baked', image.image_id,
                                name=image.name, platform=self.platform,
                                state=state, error=reason)

    def tell(self, image: images.Image,
             there: Sequence[microvms.Published] | None = None) -> None:
        """Bring Glance's properties up to date.

        :param there: the µVMs that it has; None: something happened since
            Glance was asked, see which.
        :raises NotFound: the image was deleted.
        """
        settled = there is not None
        if there is None:
            there = self._registry.microvms.of(image.image_id)
        ends = [one for one in self._records.microvms(image.image_id)
                if one.state in _ENDS]
        values: dict[str, str | None] = dict.fromkeys(
            registry.MICROVM_PROPERTIES)
        values['fastboot_microvm'] = (
            'ready' if there else 'error' if ends else 'none')
        if ends and not there:
            values['fastboot_microvm_error'] = ends[0].reason
        if not settled or images.changes(image.properties, values):
            self._registry.tell(image, values)

    def _withdraw(self, image: images.Image) -> None:
        """The image is to have none, or none any more."""
        self._registry.remove_microvms(
            image.image_id, 'it is not to have any', ours=True)
        if self._records.microvms(image.image_id):
            self._records.forget_microvms(image.image_id)
        values: dict[str, str | None] = dict.fromkeys(
            registry.MICROVM_PROPERTIES)
        if images.changes(image.properties, values):
            self._registry.tell(image, values)

    def _is_present(self, found: journal.Image, one: microvms.Published,
                    root: str) -> bool:
        """Whether a µVM is of what the image is now."""
        shelved = self._registry.microvms
        if one.root != root:
            shelved.remove(one)
            return False
        if shelved.follow(one, found.visibility, found.owner):
            self._registry.announce('microvm_moved', found.image_id)
        return True

    def _known(self, image: images.Image) -> dict[str, records.Microvm]:
        """What the records say, by platform."""
        return {one.platform: one for one in self._records.microvms(
            image.image_id)}

    def _note_there(self, image: images.Image,
                    known: dict[str, records.Microvm],
                    there: Sequence[microvms.Published]) -> None:
        """Have the records say what the repository has, of all platforms:
        of some there may be no builder any more."""
        gone = known.keys() - {one.platform for one in there}
        for platform in gone - {self.platform}:
            if known[platform].state == 'ready':
                self._records.note_microvm(
                    image.image_id, platform, state='none', group='',
                    reason='the repository does not have it any more')
        for one in there:
            said = known.get(one.platform)
            if said is None or (said.state, said.group) != (
                    'ready', one.name.group):
                self._records.note_microvm(
                    image.image_id, one.platform, state='ready',
                    group=one.name.group)

    def _is_wanted(self, there: Sequence[microvms.Published],
                   known: records.Microvm | None, root: str) -> bool:
        if not self.platform or any(
                one.platform == self.platform for one in there):
            return False
        if (known and known.state in _ENDS and not self._is_due(known)
                and known.basis == self.basis(root)):
            return False
        used = self._records.platforms()
        return not used or self.platform in used

    def _is_due(self, ended: records.Microvm) -> bool:
        """Whether what failed for a passing reason is to be tried again."""
        return (self._again > 0 and ended.stage == records.PASSING
                and time.time() - ended.updated >= self._again)

