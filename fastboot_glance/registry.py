# SPDX-License-Identifier: Apache-2.0
"""Keeps journal, records and Glance's properties of an image in step.

Images that somebody registered by hand, not from Glance, are left alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import (
    exception,
    extents,
    journal,
    manifest,
)
from fastboot_common.repository import Repository
from fastboot_glance import (
    eligibility,
    herald,
    images,
    microvms,
    records,
)

LOG = logging.getLogger(__name__)

#: ``origin`` in the manifest's source of images that came from Glance.
ORIGIN: Final = 'glance'
#: Seconds between two moves of an image.
_MOVES_APART: Final = 300.0
MICROVM_PROPERTIES: Final = ('fastboot_microvm', 'fastboot_microvm_error')
#: All that builders say of an image in Glance.
PROPERTIES: Final = ('fastboot_state', 'fastboot_version',
                     'fastboot_boot_size', 'fastboot_size',
                     'fastboot_error', *MICROVM_PROPERTIES)


class Registry:
    """The registered images, as one thread of a builder changes them."""

    def __init__(self, repository: Repository, store: records.Records,
                 glance: images.Images, crier: herald.Herald,
                 shelved: microvms.Microvms) -> None:
        self.repository = repository
        self.microvms = shelved
        self._records = store
        self._glance = glance
        self._herald = crier

    def find(self, image_id: str) -> journal.Image | None:
        """The image with this id as it is registered, if it is."""
        return self.repository.state().images.get(image_id)

    def from_glance(self, image: journal.Image) -> bool:
        """Whether the image is a copy of one in Glance."""
        found = self.repository.read_manifest(image.manifest)
        return found.source.get('origin') == ORIGIN

    def gone(self, image_id: str) -> None:
        """Glance has no such image any more.

        Believed only if Glance says so itself, now.

        :raises Unavailable: it cannot be asked; nothing was changed.
        """
        try:
            self._glance.get(image_id)
            return
        except exception.NotFound:
            pass
        self._deregister(image_id, 'it was deleted in Glance')
        self._records.forget_build(image_id)

    def refuse(self, image: images.Image,
               refusal: eligibility.Refusal) -> None:
        """The image is not to be built, or not any more."""
        self._deregister(image.image_id, refusal.reason)
        state = 'off' if refusal.off else 'skipped'
        known = self._records.build(image.image_id)
        if not known or (known.state, known.error, known.requested) != (
                state, records.clean(refusal.reason, 1000), 0.0):
            self._records.forget_microvms(image.image_id)
            self.note(image, state, error=refusal.reason)
        values: dict[str, str | None] = dict.fromkeys(PROPERTIES)
        if not refusal.off:
            values |= {'fastboot_state': 'skipped',
                       'fastboot_error': refusal.reason}
        if images.changes(image.properties, values):
            self.tell(image, values)

    def settle(self, image: images.Image, found: journal.Image) -> None:
        """The image is registered: bring what is said of it up to date."""
        known = self._records.build(image.image_id)
        values: dict[str, str | None] = {
            'fastboot_state': 'ready', 'fastboot_version': str(found.serial)}
        noted = (known is not None and known.state == 'ready'
                 and known.version == found.serial and not known.requested)
        told = not images.changes(image.properties, values)
        if (noted and told and _moved(found, image).domain == found.domain) \
                or not self.from_glance(found):
            return
        found = self._move(image, found)
        boot = self.repository.read_manifest(found.manifest)
        boot_size = len(boot.boot) * boot.block_size
        problem = problem_of(boot)
        self.note(image, 'ready', error=problem, version=found.serial,
                  boot_size=boot_size)
        self.tell(image, values | {
            'fastboot_version': str(found.serial),
            'fastboot_boot_size': str(boot_size),
            'fastboot_error': problem or None})

    def note(self, image: images.Image, state: str, **values: Any) -> None:
        """Write an image's record."""
        self._records.note_build(image.image_id, state=state,
                                 owner=image.owner, name=image.name, **values)

    def tell(self, image: images.Image,
             values: dict[str, str | None]) -> None:
        """Set properties in Glance, if they are not so already.

        They are for people to read: without them all works as well.

        :raises NotFound: the image was deleted.
        """
        try:
            self._glance.tell(image.image_id, values)
        except exception.Unavailable as error:
            LOG.warning('properties of image %s are not set: %s',
                        image.image_id, error)

    def pending(self, image: images.Image, state: str) -> None:
        """Say in Glance that the image's cache is being made.

        If it has none yet, what else is said there is another's: Nova gives
        a snapshot all properties of the image that its server came from,
        but those in ``[DEFAULT] non_inheritable_image_properties``.

        :raises NotFound: the image was deleted.
        """
        values: dict[str, str | None] = {}
        if self.find(image.image_id) is None:
            values = dict.fromkeys(PROPERTIES)
        self.tell(image, values | {'fastboot_state': state,
                                   'fastboot_error': None})

    def announce(self, event: str, image_id: str, **payload: Any) -> None:
        """Tell agents the newest version, and others what happened."""
        version = self.repository.state().version
        self._herald.announce(version)
        self._herald.notify(event, {'image_id': image_id,
                                    'repository_version': version, **payload})

    def failed(self, image: images.Image, words: str,
               passing: bool = False) -> None:
        """The image cannot be built; nobody tries again unasked.

        :param passing: but the audit, later.
        """
        self.tell(image, {'fastboot_state': 'error',
                          'fastboot_error': words})
        self.note(image, 'error', error=words,
                  stage=records.PASSING if passing else '')
        self._herald.notify('error', {
            'image_id': image.image_id, 'name': image.name, 'error': words})

    def stuck(self, image_id: str, words: str) -> None:
        """As :meth:`failed`, of an image that cannot be looked at: only the
        records can be told. The audit tries again, later."""
        LOG.warning('image %s is given up: %s', image_id, words)
        self._records.note_build(image_id, state='error', error=words,
                                 stage=records.PASSING)

    def refresh(self, draft: manifest.Manifest) -> journal.Image:
        """Give a registered image the boot set and trace of a new capture.

        Its blocks stay where they are, and its serial stays: hosts take
        over the new manifest, guests notice nothing.

        :raises NotFound: it is not registered any more.
        """
        return self.rewrite(draft.image_id, lambda old: dataclasses.replace(
            old, boot=extents.locate(old.extents, draft.boot)[0],
            trace=draft.trace, capture=draft.capture))

    def rewrite(self, image_id: str, change: Callable[
            [manifest.Manifest], manifest.Manifest | None],
            ) -> journal.Image:
        """Give a registered image another manifest of the same content.

        :param change: makes it from the newest; called again when others
            changed the repository meanwhile. None: it stays as it is, as it
            does if the other were too large.
        :raises NotFound: it is not registered any more.
        """
        data: bytes | None = None

        def build(state: journal.State) -> dict[str, Any] | None:
            nonlocal data
            data = None
            current = state.images.get(image_id)
            if current is None:
                raise exception.NotFound(
                    f'image {image_id} is not registered')
            made = change(self.repository.read_manifest(current.manifest))
            if made is None:
                return None
            try:
                data = made.pack()
            except exception.ImageRejected as error:
                LOG.warning('it keeps its old manifest: %s', error)
                return None
            digest = self.repository.keep_manifest(data)
            return {'packs': [], 'manifests': {image_id: {
                'manifest': digest, 'manifest_size': len(data)}}}

        after = self.repository.append('repack', build)
        if data is not None:
            # It may have been there before, as a leftover that gc removed.
            self.repository.keep_manifest(data)
        return after.images[image_id]

    def remove_microvms(self, image_id: str, reason: str, *,
                        ours: bool = False) -> None:
        """Remove the µVMs of an image.

        :param ours: leave those that somebody put there by hand.
        """
        for one in self.microvms.of(image_id):
            if not ours or one.origin == ORIGIN:
                self.microvms.remove(one)
                self.announce('microvm_removed', image_id, reason=reason,
                              microvm_class=one.name.group)

    def _deregister(self, image_id: str, reason: str) -> None:
        found = self.find(image_id)
        if found and not self.from_glance(found):
            return
        try:
            # First: without its image a µVM is of no use, and whoever dies
            # between the two comes here again.
            self.remove_microvms(image_id, reason)
        finally:
            # Whatever is wrong with them: nobody is to boot from it.
            if found:
                self._remove(image_id, reason)

    def _remove(self, image_id: str, reason: str) -> None:
        with contextlib.suppress(exception.NotFound):
            self.repository.remove(image_id)
        LOG.info('image %s: deregistered: %s', image_id, reason)
        self.announce('deregistered', image_id, reason=reason)

    def _move(self, image: images.Image,
              found: journal.Image) -> journal.Image:
        """Follow a change of visibility or owner.

        Who may see an image decides which volume it lies in, so it is
        registered anew: guests keep the old copy, hosts make a new one. Its
        packs are those that it has.
        """
        wanted = _moved(found, image)
        if wanted.domain == found.domain:
            return found
        if self._is_restless(image.image_id):
            LOG.info('image %s: it was registered anew less than %d s ago; '
                     'the audit makes it %s later', image.image_id,
                     _MOVES_APART, wanted.domain)
            return found
        moved = self.repository.move(found, image.visibility, image.owner)
        LOG.info('image %s: now %s, was %s', image.image_id, wanted.domain,
                 found.domain)
        self.announce('moved', image.image_id)
        return moved

    def _is_restless(self, image_id: str) -> bool:
        """Whether it was deregistered just now. A move takes two numbers of
        the journal, which has so many only (``journal.SERIAL_LIMIT``)."""
        return any(gone.image.image_id == image_id
                   and abs(gone.age) < _MOVES_APART for gone
                   in self.repository.state().removed.values())


def _moved(found: journal.Image, image: images.Image) -> journal.Image:
    return dataclasses.replace(found, visibility=image.visibility,
                               owner=image.owner)


def problem_of(found: manifest.Manifest) -> str:
    """Why an image has no boot set; empty if it has one."""
    if found.capture.get('state') != 'failed':
        return ''
    return f'no boot set: {found.capture.get("reason")}'
