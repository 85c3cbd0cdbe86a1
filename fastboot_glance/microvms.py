# SPDX-License-Identifier: Apache-2.0
"""The µVMs that are published, as builders and the API see them.

Who puts one there is :mod:`fastboot_common.microvm.shelf`; when one is
baked, :mod:`fastboot_glance.bakes` decides.
"""

import dataclasses
from typing import Any, Final

from oslo_log import log as logging

from fastboot_common import exception, journal
from fastboot_common.cli import base
from fastboot_common.microvm import activation, key, shelf
from fastboot_common.repository import Repository

LOG = logging.getLogger(__name__)

#: Seconds that an image may not be registered before its µVMs are of no use:
#: one that moves is registered anew.
_MOVES: Final = 600.0


@dataclasses.dataclass(frozen=True)
class Published:
    """A µVM in the repository.

    :ivar platform: of hosts that may run it, as its text.
    :ivar root: the content of the image that it was baked from.
    :ivar origin: the service that looks after it; None: whoever put it.
    """

    name: shelf.Name
    entry: journal.Image
    platform: str
    root: str
    origin: str | None


class Microvms:
    """The repository of the µVMs; there may be none yet. For one thread."""

    def __init__(self, environment: base.Environment) -> None:
        """Open nothing yet."""
        self._environment = environment
        self._found: Repository | None = None
        #: Of the version that was seen last, by serial.
        self._known: dict[int, Published] = {}
        self._version = -1

    def repository(self) -> Repository | None:
        """For reading; None: there is none."""
        if self._found is None:
            try:
                self._found = self._environment.open_microvms()
            except exception.NotFound:
                return None
        return self._found

    def writable(self) -> Repository:
        """For writing; made if there is none."""
        return self.repository() or self._environment.writable_microvms()

    def all(self) -> list[Published]:
        """All µVMs; one that cannot be read is told, and left out."""
        repository = self.repository()
        if repository is None:
            return []
        state = repository.state()
        if state.version != self._version:
            known, self._known = self._known, {}
            for name, entry in shelf.entries(state):
                # Repacking gives it another manifest of the same.
                found = dataclasses.replace(
                    known[entry.serial], entry=entry
                ) if entry.serial in known else _read(
                    repository, name, entry)
                if found:
                    self._known[entry.serial] = found
            self._version = state.version
        return list(self._known.values())

    def of(self, image_id: str) -> list[Published]:
        """Those of an image."""
        return [one for one in self.all() if one.name.image == image_id]

    def remove(self, one: Published) -> bool:
        """Remove a µVM, not another of the same name that came since.

        :returns: whether it was there.
        """
        removed = False

        def build(state: journal.State) -> dict[str, Any] | None:
            nonlocal removed
            image_id = one.entry.image_id
            found = state.images.get(image_id)
            removed = found is not None and found.serial == one.entry.serial
            return {'image_id': image_id} if removed else None

        self.writable().append('deregister', build)
        if removed:
            LOG.info('image %s: its µVM of class %s was removed',
                     one.name.image, one.name.group)
        return removed

    def follow(self, one: Published, visibility: str, owner: str) -> bool:
        """Let those see a µVM who may see its image.

        :returns: whether it was others before.
        """
        entry = one.entry
        if dataclasses.replace(entry, visibility=visibility,
                               owner=owner).domain == entry.domain:
            return False
        self.writable().move(entry, visibility, owner)
        return True

    def tidy(self, images: Repository, used: set[str]) -> int:
        """Remove what is of no use: µVMs of images that are gone or have
        another content, and those of older recipes that no host has.

        :param used: platforms of hosts, as far as they are known.
        :returns: how many there were.
        """
        # In this order: an image comes before its µVM.
        found = self.all()
        state = images.state()
        moving = {removed.image.image_id for removed in state.removed.values()
                  if abs(removed.age) < _MOVES}
        count = 0
        for one in found:
            image = state.images.get(one.name.image)
            try:
                if image is None:
                    useless = one.name.image not in moving
                else:
                    useless = images.read_manifest(
                        image.manifest).root != one.root or _is_old(one, used)
            except exception.UNREADABLE as error:
                LOG.warning('the µVM of image %s stays: %s', one.name.image,
                            error)
                continue
            count += useless and self.remove(one)
        return count


def _read(repository: Repository, name: shelf.Name,
          entry: journal.Image) -> Published | None:
    try:
        made = repository.read_manifest(entry.manifest)
    except (exception.Corrupt, exception.NotFound) as error:
        LOG.error('µVM %s: %s', name.text, error)
        return None
    return Published(name, entry, shelf.platform_of(made),
                     str(made.source.get('root')), made.source.get('origin'))


def _is_old(one: Published, used: set[str]) -> bool:
    """Whether no host can run it, nor ever will."""
    try:
        recipe = key.Platform.parse(one.platform).recipe
    except exception.Corrupt:
        recipe = 0
    return recipe < activation.RECIPE and one.platform not in used
