# SPDX-License-Identifier: Apache-2.0
"""Eligibility: which of Glance's images are built, and which not and why.

A policy is a small driver with one question. Others can add theirs under
the entry point namespace ``fastboot.eligibility``: a class that is made with
the configuration and has the method of :class:`Policy`.
"""

import dataclasses
from typing import Any, Final, Protocol

from stevedore import driver
from stevedore import exception as stevedore_exception

from fastboot_common import exception
from fastboot_glance import images

NAMESPACE: Final = 'fastboot.eligibility'
WISHES: Final = ('off', 'cache', 'microvm')
_GIB: Final = 1 << 30
#: Properties of images whose disk alone does not boot.
_PARTS: Final = {
    'kernel_id': 'it boots with a kernel of its own',
    'ramdisk_id': 'it boots with a ramdisk of its own',
    'block_device_mapping': 'its data are volume snapshots',
    'cinder_encryption_key_id': 'it is encrypted',
    'os_encrypt_key_id': 'it is encrypted',
    'os_decrypt_container_format': 'it is encrypted',
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why an image is not built.

    :ivar off: somebody switched it off; nobody need be told.
    """

    reason: str
    off: bool = False


class Policy(Protocol):
    """A driver; made once for each builder."""

    def refuse(self, image: images.Image) -> Refusal | None:
        """Why the image is not to be built; None: this policy agrees."""


class Options:
    """The options of ``[eligibility]``, and the image's own wish."""

    def __init__(self, conf: Any) -> None:
        self._group = conf.eligibility

    def refuse(self, image: images.Image) -> Refusal | None:
        """Ask one after the other; the first reason counts."""
        wish = image.wish
        if wish is not None and wish not in WISHES:
            return Refusal(f'property fastboot={wish[:40]!r}: it must be '
                           f'{", ".join(WISHES)}')
        if (wish or self._group.default) == 'off':
            return Refusal(
                'property fastboot=off' if wish else
                'images are built only with property fastboot=cache or '
                'fastboot=microvm',
                off=True)
        reason = self._format(image) or self._place(image) \
            or self._size(image)
        return Refusal(reason) if reason else None

    def _format(self, image: images.Image) -> str | None:
        if image.container_format != 'bare':
            return f'container format {image.container_format} is not built'
        if image.disk_format not in self._group.formats:
            return f'disk format {image.disk_format} is not built'
        for name, reason in _PARTS.items():
            if image.properties.get(name, '') not in ('', '[]'):
                return f'{reason} ({name})'
        return None

    def _place(self, image: images.Image) -> str | None:
        if self._group.owners and image.owner not in self._group.owners:
            return f'images of project {image.owner} are not built'
        if image.visibility not in self._group.visibilities:
            return f'{image.visibility} images are not built'
        return None

    def _size(self, image: images.Image) -> str | None:
        largest = max(image.size or 0, image.virtual_size or 0)
        if image.size == 0:
            return 'it has no data'
        limit = self._group.max_size
        if limit and largest > limit * _GIB:
            return (f'{largest} bytes are more than the {limit} GiB that are '
                    f'built')
        return None


_OURS: Final = {'options': Options}


class Policies:
    """All policies that ``[eligibility] policies`` names."""

    def __init__(self, conf: Any) -> None:
        """Load them.

        :raises ConfigError: there is no such policy, or it does not load.
        """
        self._default: str = conf.eligibility.default
        self._policies: list[Policy] = [
            _load(name, conf) for name in conf.eligibility.policies]

    def bakes(self, image: images.Image) -> bool:
        """Whether an image that is built is to have a µVM, too."""
        return (image.wish or self._default) == 'microvm'

    def refuse(self, image: images.Image) -> Refusal | None:
        """The first policy's reason; None: the image may be built."""
        for policy in self._policies:
            refusal = policy.refuse(image)
            if refusal:
                return refusal
        return None


def _load(name: str, conf: Any) -> Any:
    if name in _OURS:
        return _OURS[name](conf)
    try:
        return driver.DriverManager(
            NAMESPACE, name, invoke_on_load=True, invoke_args=(conf,),
            warn_on_missing_entrypoint=False).driver
    except stevedore_exception.NoMatches as error:
        raise exception.ConfigError(
            f'[eligibility] policies: there is no policy {name!r} in the '
            f'entry points of {NAMESPACE}') from error
