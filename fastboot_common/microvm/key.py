# SPDX-License-Identifier: Apache-2.0
"""What a host must be for a saved guest to run on it.

QEMU takes a stream for any machine that looks the same, and does not notice
a processor that can do less: the guest hangs then, or dies later (tried
with 7.2). So what it was saved on is written down, and compared before.
"""

import dataclasses
import hashlib
import json
import re
from typing import Any, Final, Self

from fastboot_common import exception
from fastboot_common.microvm import document

_LIMIT: Final = 64 << 10
_WORDS: Final = re.compile(r'[ -~]{1,16384}')
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
#: Characters of a platform's line: records have a column of that size.
_PLATFORM_LIMIT: Final = 255
_PLATFORM: Final = re.compile(
    r'([\w-]{1,32})/([\w-]{1,32})/([1-9]\d{0,4})/([1-9]\d{0,4})/'
    r'([ -~]{1,220})', re.ASCII)


@dataclasses.dataclass(frozen=True)
class Platform:
    """What a host knows of itself before it runs a guest.

    The part of a key that needs no guest: hosts take the µVMs of their own
    platforms, builders make those that hosts have.
    """

    arch: str
    virt_type: str
    qemu: str
    save: int
    recipe: int

    @property
    def text(self) -> str:
        """One line, which equal platforms have."""
        return (f'{self.arch}/{self.virt_type}/{self.save}/{self.recipe}/'
                f'{self.qemu}')

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Read that line, which may come from a stranger.

        :raises Corrupt: it is none.
        """
        match = _PLATFORM.fullmatch(text) if isinstance(
            text, str) and len(text) <= _PLATFORM_LIMIT else None
        if match is None:
            raise exception.Corrupt(f'not a platform: {str(text)[:80]!r}')
        arch, virt_type, save, recipe, qemu = match.groups()
        return cls(arch, virt_type, qemu, int(save), int(recipe))


@dataclasses.dataclass(frozen=True)
class Key:
    """A class of hosts.

    :ivar qemu: version, with the distribution's own.
    :ivar save: version of libvirt's save files.
    :ivar cpu: model and features, as libvirt expanded them.
    :ivar template: sha256 of the template.
    :ivar recipe: how guests are prepared.
    """

    arch: str
    virt_type: str
    machine: str
    qemu: str
    save: int
    cpu: str
    template: str
    recipe: int

    def to_json(self) -> dict[str, Any]:
        """As it is in ``microvm.json``."""
        return dataclasses.asdict(self)

    @property
    def canonical(self) -> bytes:
        """The one form that equal keys have."""
        return json.dumps(self.to_json(), sort_keys=True,
                          separators=(',', ':')).encode()

    @property
    def digest(self) -> str:
        """sha256 of that form: the name of the class."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def platform(self) -> Platform:
        """Of hosts that may have this key."""
        return Platform(self.arch, self.virt_type, self.qemu, self.save,
                        self.recipe)

    def differences(self, other: Self) -> list[str]:
        """The members in which two keys are not the same."""
        return [field.name for field in dataclasses.fields(self)
                if getattr(self, field.name) != getattr(other, field.name)]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read it back.

        :raises Corrupt: it is not exactly what :meth:`to_json` gives.
        """
        fields = {field.name: field.type for field in
                  dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != set(fields):
            raise exception.Corrupt('key: other members than a key has')
        for name, kind in fields.items():
            one = value[name]
            if type(one) is not kind or (
                    kind is str and not _WORDS.fullmatch(one)):
                raise exception.Corrupt(f'key: {name}: {one!r:.100}')
            if kind is int and not 0 < one < 1 << 16:
                raise exception.Corrupt(f'key: {name}: {one:.0f}')
        if not _DIGEST.fullmatch(value['template']):
            raise exception.Corrupt('key: no digest of a template')
        return cls(**value)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a key from JSON.

        :raises Corrupt: it is none.
        """
        try:
            if len(data) > _LIMIT:
                raise ValueError('too long')
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise exception.Corrupt(f'key: {error}') from error
        return cls.from_json(value)


def cpu_of(cookie: str) -> str:
    """The processor of a guest that was saved, in one form.

    libvirt notes in its cookie what the processor came to be when QEMU ran,
    and compares with that when it restores; the domain's own XML still says
    what was asked for.

    :param cookie: of the save file.
    :raises Corrupt: it says nothing of it.
    """
    cpu = document.parse(cookie, 'cookie').find('cpu')
    model = None if cpu is None else cpu.findtext('model')
    if cpu is None or not model or cpu.get('mode') != 'custom':
        raise exception.Corrupt('key: the save file names no processor')
    signs = {'require': '+', 'disable': '-'}
    features = sorted(
        signs.get(one.get('policy', ''), '?') + one.get('name', '')
        for one in cpu.iterfind('feature'))
    return ','.join([model, *features])
