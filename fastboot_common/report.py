# SPDX-License-Identifier: Apache-2.0
"""The report: what a repository holds, as one page to look at.

:func:`gather` makes plain figures of a repository and :func:`render` a page
of them. The page draws itself (``report.html``); nothing here knows colours.

Blocks are compared by their places (pack and ordinal), as runs of numbers
and never one by one, so that memory follows the manifests and not the disks.
"""

import base64
import dataclasses
import datetime
import hashlib
import importlib.resources
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from fastboot_common import blocks, exception, extents, journal, trace
from fastboot_common import store as stores
from fastboot_common.manifest import Manifest
from fastboot_common.repository import Repository

#: Images that are drawn if none are chosen: the newest. A matrix of more
#: cannot be read.
IMAGES: Final = 24
#: Reads of an image that are drawn; of more, every n-th.
_POINTS: Final = 4000
#: Steps of the curves of bytes over time.
_STEPS: Final = 160
#: Cells of the map of a disk.
_CELLS: Final = 2048
_FILE_LIMIT: Final = 16 << 20
#: The origin of packs that no image brought (``repack``); serials begin at 1.
_REPACKED: Final = 0
_NONE: Final = np.empty(0, np.int64)


class Runs:
    """A set of numbers as ascending runs that do not touch.

    :param start: first numbers, in any order.
    :param count: how many follow each; runs may overlap.
    """

    def __init__(self, start: blocks.Blocks, count: blocks.Blocks) -> None:
        order = np.argsort(start, kind='stable')
        start = start[order]
        end = np.maximum.accumulate(start + count[order])
        new = np.ones(len(start), bool)
        new[1:] = start[1:] > end[:-1]
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(start))[:len(first)] - 1
        self.start = start[first]
        self.end = end[last]
        self._before = np.concatenate(
            ([0], np.cumsum(self.end - self.start)))

    @property
    def total(self) -> int:
        """How many numbers are in the set."""
        return int(self._before[-1])

    def below(self, numbers: blocks.Blocks) -> blocks.Blocks:
        """For each of `numbers`, how many of the set are smaller."""
        if not len(self.start):
            return np.zeros(len(numbers), np.int64)
        row = np.searchsorted(self.start, numbers, side='right') - 1
        inside = np.clip(numbers - self.start[row], 0,
                         self.end[row] - self.start[row])
        return np.where(row < 0, 0, self._before[row] + inside)

    def shared(self, other: 'Runs') -> int:
        """How many numbers both sets have."""
        return int((self.below(other.end) - self.below(other.start)).sum())


def singles(numbers: blocks.Blocks) -> Runs:
    """The set of single numbers."""
    return Runs(numbers, np.ones(len(numbers), np.int64))


def union(sets: Sequence[Runs]) -> Runs:
    """The numbers that any of the sets has."""
    start = np.concatenate([_NONE, *(one.start for one in sets)])
    end = np.concatenate([_NONE, *(one.end for one in sets)])
    return Runs(start, end - start)


def similarity(sets: Sequence[Runs]) -> float:
    """The cross-similarity of several sets (Squirrel, section 4.3.1).

    :returns: 0 if nothing is in two of them, 1 if they are equal.
    """
    starts = np.concatenate([_NONE, *(one.start for one in sets)])
    ends = np.concatenate([_NONE, *(one.end for one in sets)])
    edges = np.concatenate([starts, ends])
    order = np.argsort(edges, kind='stable')
    depth = np.cumsum(np.where(order < len(starts), 1, -1))[:-1]
    alone = int(np.diff(edges[order])[depth == 1].sum())
    total = sum(one.total for one in sets)
    return (total - alone) / total if total else 0.0


@dataclasses.dataclass
class _Drawn:
    """One image and the sets that are compared."""

    image: journal.Image
    manifest: Manifest
    origins: blocks.Blocks
    boot: Runs
    whole: Runs


class _Packs:
    """Packs by number, and where they came from."""

    def __init__(self, repository: Repository, state: journal.State) -> None:
        self._repository = repository
        self.brought: dict[str, int] = {}
        #: Name and whether it was removed, by serial.
        self.images: dict[int, dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}
        self._refs: list[Any] = []
        self._read_journal(state.version)

    def _read_journal(self, version: int) -> None:
        """Who brought a pack is in the entries only, not in their fold."""
        state = journal.State()
        for number in range(1, version + 1):
            data = self._repository.store.get(
                stores.entry_name(number), journal.ENTRY_LIMIT)
            before, state = state, journal.apply(state, data)
            new = state.packs.keys() - before.packs.keys()
            added = state.images.keys() - before.images.keys()
            for image_id in added:
                self.images[number] = {
                    'name': state.images[image_id].name, 'removed': False}
            for image_id in before.images.keys() - state.images.keys():
                serial = before.images[image_id].serial
                self.images[serial]['removed'] = True
            self.brought |= dict.fromkeys(
                new, number if added else _REPACKED)

    def numbers(self, manifest: Manifest) -> blocks.Blocks:
        """The number of each pack that a manifest lists."""
        for ref in manifest.packs:
            if ref.digest not in self._numbers:
                self._numbers[ref.digest] = len(self._refs)
                self._refs.append(ref)
        return np.array([self._numbers[ref.digest]
                         for ref in manifest.packs] or [0], np.int64)

    def origins(self, manifest: Manifest) -> blocks.Blocks:
        """The serial of the image that brought each listed pack."""
        return np.array([self.brought.get(ref.digest, _REPACKED)
                         for ref in manifest.packs] or [0], np.int64)

    def stored(self, sets: Sequence[Runs]) -> list[int]:
        """Bytes that each set of places takes compressed.

        A block takes its part of its frame.
        """
        sums = [0.0] * len(sets)
        for number, ref in enumerate(self._refs):
            index = self._repository.pack_index(ref)
            length = index.frames['length'] / index.frames['blocks']
            edges = (number << 32) + index.first
            for position, places in enumerate(sets):
                inside = np.diff(places.below(edges))
                sums[position] += float((inside * length).sum())
        return [round(value) for value in sums]


def gather(repository: Repository, images: Sequence[str] | None = None,
           bench: list[dict[str, Any]] | None = None,
           boots: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The figures of a repository; bytes and seconds, JSON-able.

    :param images: ids or names; None: the newest.
    :param bench: from :func:`read_bench`.
    :param boots: from :func:`read_boots`.
    :raises NotFound: there is no such image.
    :raises Corrupt: something read from the repository is damaged.
    """
    state = repository.state()
    packs = _Packs(repository, state)
    chosen = _choose(state, images)
    drawn = [_drawn(repository, packs, image) for image in chosen]
    sets = {'boot': [one.boot for one in drawn],
            'whole': [one.whole for one in drawn]}
    size = repository.block_size
    *stored, boot, whole = packs.stored([
        *sets['boot'], union(sets['boot']), union(sets['whole'])])
    rows = [_image(one, size, stored[number])
            for number, one in enumerate(drawn)]
    matrix = {name: _matrix(found, size) for name, found in sets.items()}
    origins = {source['origin'] for row in rows for source in row['sources']}
    return {
        'made': datetime.datetime.now(datetime.UTC).isoformat(
            timespec='seconds'),
        'repository': {
            'id': repository.id, 'version': state.version,
            'block_size': size, 'images': len(state.images),
            'packs': len(state.packs),
            'pack_bytes': sum(state.packs.values()),
        },
        'totals': _totals(rows, matrix, boot, whole),
        # Of other images, which may be private, not even the names.
        'origins': {str(origin): packs.images[origin]
                    for origin in origins if origin != _REPACKED},
        'images': rows, 'matrix': matrix,
        'boots': boots or [], 'bench': bench or [],
    }


def _totals(rows: list[dict[str, Any]], matrix: dict[str, Any],
            boot: int, whole: int) -> dict[str, int]:
    """The sums of all images that are drawn.

    :param boot: compressed bytes of all boot sets together.
    :param whole: compressed bytes of all images together.
    """
    return {
        **{name: sum(row[name] for row in rows)
           for name in ('virtual_bytes', 'data_bytes', 'boot_bytes')},
        'unique_bytes': matrix['whole']['union_bytes'],
        'stored_bytes': whole,
        'boot_unique_bytes': matrix['boot']['union_bytes'],
        'boot_stored_bytes': boot,
    }


def _choose(state: journal.State,
            images: Sequence[str] | None) -> list[journal.Image]:
    if images:
        found = {journal.find(state, name).image_id for name in images}
        return _by_serial(state.images[image_id] for image_id in found)
    return _by_serial(state.images.values())[-IMAGES:]


def _by_serial(images: Iterable[journal.Image]) -> list[journal.Image]:
    return sorted(images, key=lambda image: image.serial)


def _drawn(repository: Repository, packs: _Packs,
           image: journal.Image) -> _Drawn:
    found = repository.read_manifest(image.manifest)
    numbers = packs.numbers(found)
    _, position, ordinal = extents.locate(found.extents, found.boot)
    whole = found.extents
    places = (numbers[whole['pack']] << 32) + whole['ordinal']
    return _Drawn(
        image, found, packs.origins(found),
        singles((numbers[position] << 32) + ordinal),
        Runs(places, whole['count'].astype(np.int64)))


def _matrix(sets: list[Runs], size: int) -> dict[str, Any]:
    """What each two images share, and all of them together."""
    shared = [[0] * len(sets) for _ in sets]
    for row, one in enumerate(sets):
        for column in range(row, len(sets)):
            shared[row][column] = shared[column][row] = (
                one.shared(sets[column]) * size)
    return {'shared_bytes': shared, 'union_bytes': union(sets).total * size,
            'cross_similarity': round(similarity(sets), 4)}


def _image(one: _Drawn, size: int, stored: int) -> dict[str, Any]:
    """The figures of one image.

    :param stored: compressed bytes of its boot set.
    """
    image, found = one.image, one.manifest
    located, position, _ = extents.locate(found.extents, found.boot)
    origins = one.origins[position]
    return {
        'id': image.image_id, 'name': image.name, 'serial': image.serial,
        'visibility': image.visibility, 'owner': image.owner,
        'virtual_bytes': image.virtual_size,
        'data_bytes': extents.total(found.extents) * size,
        'unique_bytes': one.whole.total * size,
        'boot_bytes': len(located) * size,
        'boot_unique_bytes': one.boot.total * size,
        'boot_stored_bytes': stored,
        'extents': len(found.extents),
        'capture': _capture(found.capture),
        'statistics': trace.statistics(found.trace, size),
        'reads': _reads(one, size),
        'growth': _growth(found, size),
        'sources': _sources(one, origins, size),
        'map': _map(one, located, origins, size),
    }


def _capture(header: dict[str, Any]) -> dict[str, Any]:
    """Of the manifest's ``capture`` what the page shows, in known types."""
    seconds = header.get('seconds')
    return {
        **{name: None if header.get(name) is None else str(header[name])
           for name in ('state', 'reason', 'end', 'devices')},
        'seconds': [float(value) for value in seconds
                    if _is_number(value)] if isinstance(seconds, list)
        else [],
    }


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value) and value >= 0)


def _reads(one: _Drawn, size: int) -> dict[str, Any]:
    """The recorded reads, column by column, and where their first block
    came from (-1: zeros)."""
    every = -(-len(one.manifest.trace) // _POINTS) or 1
    rows = one.manifest.trace[::every]
    first = rows['offset'].astype(np.int64) // size
    located, position, _ = extents.locate(one.manifest.extents, first)
    origins = np.full(len(rows), -1, np.int64)
    origins[np.isin(first, located)] = one.origins[position]
    return {
        'every': every,
        'seconds': (rows['time'] / 1e6).round(3).tolist(),
        'offset': rows['offset'].tolist(),
        'bytes': rows['length'].tolist(),
        'boot': rows['boot'].tolist(),
        'origin': origins.tolist(),
    }


def _growth(found: Manifest, size: int) -> list[dict[str, Any]]:
    """For each boot, bytes read and bytes of different blocks, over time."""
    curves = []
    for boot in np.unique(found.trace['boot'])[:16].tolist():
        rows = found.trace[found.trace['boot'] == boot]
        seconds = rows['time'] / 1e6
        steps = np.linspace(0, float(seconds[-1]), _STEPS)
        stops = np.searchsorted(seconds, steps, side='right')
        total = np.concatenate(
            ([0], np.cumsum(rows['length'], dtype=np.int64)))
        seen = np.zeros(found.block_count, bool)
        unique, done, start = [], 0, 0
        for stop in stops.tolist():
            touched = trace.boot_set(rows[start:stop], size,
                                     found.virtual_size)
            done += int((~seen[touched]).sum())
            seen[touched] = True
            unique.append(done * size)
            start = stop
        curves.append({
            'boot': boot, 'seconds': steps.round(3).tolist(),
            'bytes': total[stops].tolist(), 'unique_bytes': unique})
    return curves


def _sources(one: _Drawn, boot: blocks.Blocks,
             size: int) -> list[dict[str, Any]]:
    """Which images the blocks came with: this one first, then by size.

    :param boot: origin of each block of the boot set.
    """
    whole = one.manifest.extents
    origins = one.origins[whole['pack']]
    rows = [{
        'origin': origin,
        'boot_bytes': int((boot == origin).sum()) * size,
        'data_bytes': int(whole['count'][origins == origin].sum(
            dtype=np.int64)) * size,
    } for origin in np.unique(origins).tolist()]
    return sorted(rows, key=lambda row: (
        row['origin'] != one.image.serial, -row['boot_bytes'],
        -row['data_bytes']))


def _map(one: _Drawn, located: blocks.Blocks, boot: blocks.Blocks,
         size: int) -> dict[str, Any]:
    """The disk in cells: blocks of each, with data, and of the boot set."""
    count = one.manifest.block_count
    cells = min(_CELLS, count)
    edges = np.arange(cells + 1, dtype=np.int64) * count // max(cells, 1)
    whole = one.manifest.extents
    data = Runs(whole['block'].astype(np.int64),
                whole['count'].astype(np.int64))
    return {
        'block_size': size,
        'blocks': np.diff(edges).tolist(),
        'data': np.diff(data.below(edges)).tolist(),
        'boot': {
            str(origin): np.diff(singles(
                located[boot == origin]).below(edges)).tolist()
            for origin in np.unique(boot).tolist()},
    }


def read_boots(path: pathlib.Path) -> list[dict[str, Any]]:
    """Measured boots, as demos, benchmarks and commands write them.

    A JSON list of objects with ``label``, ``phases`` (a list of ``name`` and
    ``seconds``), and if known ``bytes_over_link``, ``missed_reads`` and
    ``disk_used`` (bytes); or what ``vm run -f json`` or ``microvm resume -f
    json`` prints.

    :raises NotFound: there is no such file.
    :raises Invalid: it is something else.
    """
    try:
        return [{
            'label': str(boot['label']),
            'phases': [{'name': str(phase['name']),
                        'seconds': _number(phase['seconds'])}
                       for phase in boot['phases']],
            **{name: None if boot.get(name) is None
               else _number(boot[name])
               for name in ('bytes_over_link', 'missed_reads', 'disk_used')},
        } for boot in _boots(_load(path))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise exception.Invalid(
            f'{path}: no list of measured boots: {error!r}') from error


def _boots(document: Any) -> list[dict[str, Any]]:
    """The list, also of the one guest that a command started."""
    if not isinstance(document, dict):
        return _list(document)
    if 'prompt_seconds' in document:
        return [{'label': f'boot of {document["image"]}', 'phases': [
            {'name': 'acquire', 'seconds': document['acquire_seconds']},
            {'name': 'prompt', 'seconds': document['prompt_seconds']}]}]
    # Those are since the call, at the end of each phase.
    ends = {'begin': 0, **document['seconds']}
    ends.pop('end', None)
    return [{'label': f'resume of {document["name"]}', 'phases': [
        {'name': name, 'seconds': _number(ends[name]) - _number(ends[before])}
        for before, name in itertools.pairwise(ends)]}]


def read_bench(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Results of benchmarks: every ``*.json`` in a directory, by name.

    A list of objects with ``name``, ``value``, ``unit``, and if known
    ``bar`` (a number in that unit), ``op`` (how the value compares to a good
    one) and ``ok``; an object without ``value`` describes the machine.

    :raises NotFound: there is no such directory.
    :raises Invalid: a file is something else.
    """
    if not directory.is_dir():
        raise exception.NotFound(f'there is no directory {directory}')
    found = []
    for path in sorted(directory.glob('*.json')):
        try:
            rows = [row for row in _list(_load(path))
                    if 'machine' not in row]
            found.append({'title': path.stem,
                          'results': [_result(row) for row in rows]})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise exception.Invalid(
                f'{path}: no results of a benchmark: {error!r}') from error
    return found


def _result(row: dict[str, Any]) -> dict[str, Any]:
    bar, ok = row.get('bar'), row.get('ok')
    return {
        'name': str(row['name']), 'value': _number(row['value']),
        'unit': str(row.get('unit') or ''),
        'bar': None if bar is None else _number(bar),
        'op': '≥' if row.get('op') == '>=' else '≤',
        'ok': ok if isinstance(ok, bool) else None,
    }


def _list(document: Any) -> list[dict[str, Any]]:
    if not isinstance(document, list) or not all(
            isinstance(row, dict) for row in document):
        raise ValueError('not a list of objects')
    return document


def _load(path: pathlib.Path) -> Any:
    try:
        if path.stat().st_size > _FILE_LIMIT:
            raise ValueError(f'more than {_FILE_LIMIT} bytes')
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise exception.NotFound(f'there is no file {path}') from None
    except RecursionError:
        raise ValueError('nested too deeply') from None


def _number(value: Any) -> float:
    if not _is_number(value):
        raise ValueError(f'not a number from 0: {value!r}')
    return float(value)


def render(data: dict[str, Any]) -> str:
    """The page: one HTML file that loads nothing else.

    Names in `data` come from users. They are embedded as JSON in which no
    character can end the element, the page's script sets them as text only,
    and the page's policy lets no other script run.
    """
    page = importlib.resources.files('fastboot_common').joinpath(
        'report.html').read_text('utf-8')
    script = page.split('<script>')[1].split('</script>')[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
    embedded = json.dumps(data, allow_nan=False, separators=(',', ':'))
    for character in '<>&':
        embedded = embedded.replace(character, f'\\u{ord(character):04x}')
    before, after = page.split('@DATA@')
    return (before.replace('@SCRIPT@', f'sha256-{digest.decode()}')
            + embedded + after)
