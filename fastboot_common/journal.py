# SPDX-License-Identifier: Apache-2.0
"""The journal: which images there are. See reference/repository.

Pure functions over entries and states; who reads and writes them is
:mod:`fastboot_common.repository`.
"""

import copy
import dataclasses
import datetime
import hashlib
import json
import re
from typing import Any, Final

from fastboot_common import exception

FORMAT: Final = 'fastboot-journal'
VERSION: Final = 1
ENTRY_LIMIT: Final = 16 << 20
#: Slots end at 64 GiB: reference/volume. Every entry takes a number, and an
#: image's number is its serial.
SERIAL_LIMIT: Final = 1 << 20
#: The version from which on operators are told: half of them.
SERIAL_WARNING: Final = SERIAL_LIMIT // 2
#: No file is as long (bytes), and no system call takes more.
_SIZE_LIMIT: Final = 1 << 63

#: An image's id becomes an export name and a file name: no '/', no leading
#: dot or dash, and short enough for a slot's header.
_IMAGE_ID: Final = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')
_DIGEST: Final = re.compile(r'[0-9a-f]{64}')
_OWNER: Final = re.compile(r'[A-Za-z0-9._-]{0,64}')
VISIBILITIES: Final = ('public', 'community', 'shared', 'private')


def validate_image_id(image_id: str) -> str:
    """Return `image_id` if it can be one.

    :raises Invalid: it has characters that a file name should not have.
    """
    if not isinstance(image_id, str) or not _IMAGE_ID.fullmatch(image_id):
        raise exception.Invalid(
            f'not an image id: {image_id!r} (1 to 64 of A-Z a-z 0-9 . _ -, '
            f'beginning with a letter or a digit)')
    return image_id


@dataclasses.dataclass(frozen=True)
class Image:
    """An image as the journal knows it (sizes in bytes)."""

    image_id: str
    name: str
    serial: int
    manifest: str
    manifest_size: int
    virtual_size: int
    visibility: str = 'public'
    owner: str = ''
    os_hash: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def domain(self) -> str:
        """The volume that holds it: who may see an image may share pages."""
        if self.visibility in ('public', 'community'):
            return 'public'
        if self.visibility == 'private' and self.owner:
            return f'project-{self.owner}'
        return f'image-{self.image_id}'

    def check(self) -> None:
        """:raises Corrupt: a member has no sense."""
        try:
            validate_image_id(self.image_id)
        except exception.Invalid as error:
            raise exception.Corrupt(str(error)) from error
        sane = (
            0 < self.serial < SERIAL_LIMIT
            and _DIGEST.fullmatch(self.manifest)
            and 0 < self.manifest_size < _SIZE_LIMIT
            and 0 <= self.virtual_size < _SIZE_LIMIT
            and self.visibility in VISIBILITIES
            and _OWNER.fullmatch(self.owner)
            and type(self.serial) is int
            and type(self.manifest_size) is int
            and type(self.virtual_size) is int
            and _is_text(self.name)
            and all(_is_text(word) for pair in self.os_hash.items()
                    for word in pair)
        )
        if not sane:
            raise exception.Corrupt(f'image {self.image_id}: no sense in '
                                    f'its journal entry')


@dataclasses.dataclass(frozen=True)
class Removed:
    """An image that was deregistered at `time` (ISO 8601)."""

    image: Image
    time: str

    @property
    def age(self) -> float:
        """Seconds since then."""
        return age(self.time)


@dataclasses.dataclass
class State:
    """The fold of all entries up to number `version`.

    :ivar previous: digest of the newest entry's bytes.
    :ivar checkpoint: number of the newest checkpoint, or 0.
    :ivar packs: size (bytes) by digest.
    :ivar removed: images by serial (as text) that were deregistered and
        whose packs are still kept, for hosts that have guests of them.
    :ivar retired: packs that were rewritten, and when (ISO 8601): kept for
        hosts that have not heard of it.
    """

    version: int = 0
    previous: str | None = None
    checkpoint: int = 0
    images: dict[str, Image] = dataclasses.field(default_factory=dict)
    packs: dict[str, int] = dataclasses.field(default_factory=dict)
    removed: dict[str, 'Removed'] = dataclasses.field(default_factory=dict)
    retired: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        """The state as a checkpoint holds it."""
        return canonical(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: bytes, what: str) -> 'State':
        """:raises Corrupt: `data` (named `what`) is no state."""
        try:
            raw = json.loads(data)
            images = {
                key: Image(**value) for key, value in raw['images'].items()
            }
            removed = {
                key: Removed(Image(**value['image']), value['time'])
                for key, value in raw['removed'].items()
            }
            state = cls(int(raw['version']), raw['previous'],
                        int(raw['checkpoint']), images,
                        _packs([{'digest': d, 'size': s}
                                for d, s in raw['packs'].items()]), removed,
                        dict(raw.get('retired', {})))
            for key, image in images.items():
                image.check()
                if key != image.image_id:
                    raise ValueError(f'image {key!r}')
            for key, gone in removed.items():
                gone.image.check()
                _moment(gone.time)
                if key != str(gone.image.serial):
                    raise ValueError(f'serial {key!r}')
            for moment in state.retired.values():
                _moment(moment)
            if not state.retired.keys() <= state.packs.keys():
                raise ValueError('retired packs')
            if state.previous is not None and not _DIGEST.fullmatch(
                    state.previous) or not 0 <= state.checkpoint <= (
                    state.version):
                raise ValueError(f'version {state.version}')
        except (ValueError, TypeError, KeyError, AttributeError,
                OverflowError, RecursionError) as error:
            raise exception.Corrupt(f'{what}: {error!r}') from error
        return state

    def copy(self) -> 'State':
        """An independent state with the same content."""
        return copy.copy(self)._replace_maps()

    def _replace_maps(self) -> 'State':
        self.images = dict(self.images)
        self.packs = dict(self.packs)
        self.removed = dict(self.removed)
        self.retired = dict(self.retired)
        return self

    def by_serial(self, serial: int) -> Image | None:
        """The image with this serial, registered or not long gone."""
        for image in self.images.values():
            if image.serial == serial:
                return image
        gone = self.removed.get(str(serial))
        return gone.image if gone else None


def _is_text(value: Any) -> bool:
    # JSON may hold halves of surrogate pairs, which no file can.
    return isinstance(value, str) and not any(
        '\ud800' <= character <= '\udfff' for character in value)


def _moment(text: str) -> datetime.datetime:
    """:raises ValueError: `text` is no ISO 8601 time with its zone."""
    moment = datetime.datetime.fromisoformat(text)
    # Python takes any character between date and time.
    if moment.tzinfo is None or not text.isascii():
        raise ValueError(f'{text!r} is no time with its zone')
    return moment


def age(time: str) -> float:
    """Seconds since a time of the journal (ISO 8601)."""
    now = datetime.datetime.now(datetime.UTC)
    return (now - _moment(time)).total_seconds()


def find(state: State, image_id: str) -> Image:
    """The registered image with this id, or with this name if one only.

    :raises NotFound: there is none.
    :raises Invalid: several have that name.
    """
    if image_id in state.images:
        return state.images[image_id]
    named = [one for one in state.images.values() if one.name == image_id]
    if not named:
        raise exception.NotFound(f'no image {image_id!r} is registered')
    if len(named) > 1:
        raise exception.Invalid(
            f'{len(named)} images are named {image_id!r}; use an id: '
            + ', '.join(one.image_id for one in named))
    return named[0]


def serials_left(version: int) -> int:
    """How many entries may follow that register images."""
    return max(0, SERIAL_LIMIT - 1 - version)


def check_serials(version: int) -> None:
    """See that another image can be registered.

    :raises NoSpace: the repository has none of its numbers left.
    """
    if not serials_left(version):
        raise exception.NoSpace(describe_serials(version))


def describe_serials(version: int) -> str:
    """How it is with the numbers of a repository, in words."""
    return (f'its journal has {version} entries, and images can be '
            f'registered up to entry {SERIAL_LIMIT - 1}: move to a new '
            f'repository in time (see "The journal fills" in the '
            f'administrator\'s guide)')


def canonical(value: Any) -> bytes:
    """JSON with one possible spelling, so that digests agree."""
    return json.dumps(value, sort_keys=True, separators=(',', ':'),
                      ensure_ascii=False).encode()


def make(state: State, kind: str, body: dict[str, Any]) -> bytes:
    """The bytes of the entry that follows `state`.

    :param kind: register, deregister, repack, drop or checkpoint.
    :param body: the kind's own members.
    """
    now = datetime.datetime.now(datetime.UTC)
    return canonical({
        'format': FORMAT, 'version': VERSION, 'number': state.version + 1,
        'previous': state.previous, 'checkpoint': state.checkpoint,
        'time': now.isoformat(timespec='seconds'), 'kind': kind,
        'signature': None, **body,
    })


def parse(data: bytes, number: int) -> dict[str, Any]:
    """Read an entry's envelope.

    :raises Corrupt: it is no entry, or not this number's.
    :raises UnknownVersion: it is of a newer format.
    """
    what = f'journal entry {number}'
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise exception.Corrupt(f'{what}: {error}') from error
    if not isinstance(entry, dict) or entry.get('format') != FORMAT:
        raise exception.Corrupt(f'{what}: not a journal entry')
    if entry.get('version') != VERSION:
        raise exception.UnknownVersion(
            f'{what}: version {entry.get("version")!r}')
    if type(entry.get('number')) is not int or entry['number'] != number:
        raise exception.Corrupt(f'{what}: says that it is number '
                                f'{entry.get("number")!r}')
    checkpoint = entry.get('checkpoint')
    if type(checkpoint) is not int or not 0 <= checkpoint < number:
        raise exception.Corrupt(f'{what}: checkpoint {checkpoint!r}')
    return entry


def state_digest(data: bytes, number: int) -> str:
    """The digest of the state that entry `number`, a checkpoint, names.

    :raises Corrupt: it is no checkpoint.
    """
    entry = parse(data, number)
    digest = entry.get('state')
    if entry.get('kind') != 'checkpoint' or not isinstance(
            digest, str) or not _DIGEST.fullmatch(digest):
        raise exception.Corrupt(f'journal entry {number}: no checkpoint')
    return digest


def apply(state: State, data: bytes) -> State:
    """The state after one more entry.

    :param data: the bytes of entry ``state.version + 1``.
    :raises Corrupt: it does not follow `state`, or has no sense.
    :raises UnknownVersion: its format or kind is newer.
    """
    number = state.version + 1
    entry = parse(data, number)
    if entry.get('previous') != state.previous:
        raise exception.Corrupt(
            f'journal entry {number} does not follow entry {state.version} '
            f'as it is known here: the journal was rewritten; restore it')
    fold = _KINDS.get(str(entry.get('kind')))
    if fold is None:
        raise exception.UnknownVersion(
            f'journal entry {number}: kind {entry.get("kind")!r}')
    result = state.copy()
    try:
        fold(result, entry)
    except (ValueError, TypeError, KeyError, AttributeError,
            RecursionError) as error:
        raise exception.Corrupt(
            f'journal entry {number}: {error!r}') from error
    result.version = number
    result.previous = hashlib.sha256(data).hexdigest()
    return result


def _packs(rows: list[dict[str, Any]]) -> dict[str, int]:
    for row in rows:
        if not _DIGEST.fullmatch(row['digest']) or not (
                type(row['size']) is int and 0 < row['size'] < _SIZE_LIMIT):
            raise ValueError(f'pack {row!r}')
    return {row['digest']: row['size'] for row in rows}


def _register(state: State, entry: dict[str, Any]) -> None:
    image = Image(serial=entry['number'], **entry['image'])
    image.check()
    if image.image_id in state.images:
        raise ValueError(f'image {image.image_id} is registered already')
    state.images[image.image_id] = image
    state.packs.update(_packs(entry['packs']))


def _deregister(state: State, entry: dict[str, Any]) -> None:
    image = state.images.pop(entry['image_id'])
    _moment(entry['time'])
    state.removed[str(image.serial)] = Removed(image, entry['time'])


def _repack(state: State, entry: dict[str, Any]) -> None:
    for image_id, change in entry['manifests'].items():
        image = dataclasses.replace(
            state.images[image_id], manifest=change['manifest'],
            manifest_size=change['manifest_size'])
        image.check()
        state.images[image_id] = image
    state.packs.update(_packs(entry['packs']))
    _moment(entry['time'])
    for digest in entry.get('retired', []):
        if digest not in state.packs:
            raise ValueError(f'retired pack {digest!r}')
        state.retired[digest] = entry['time']


def _drop(state: State, entry: dict[str, Any]) -> None:
    for digest in entry['packs']:
        state.packs.pop(digest, None)
        state.retired.pop(digest, None)
    for serial in entry['serials']:
        state.removed.pop(str(serial), None)


def _checkpoint(state: State, entry: dict[str, Any]) -> None:
    if not _DIGEST.fullmatch(entry['state']):
        raise ValueError(f'state {entry["state"]!r}')
    state.checkpoint = entry['number']


_KINDS: Final = {
    'register': _register, 'deregister': _deregister, 'repack': _repack,
    'drop': _drop, 'checkpoint': _checkpoint,
}
