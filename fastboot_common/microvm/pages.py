# SPDX-License-Identifier: Apache-2.0
"""Files as pages, and the few bytes between them.

A file is cut where its own structure has pages, wherever they lie, and every
page's length where it has none. A page is then told by where else it is; all
other bytes are kept as they are, in order. Rows say how they alternate::

    u16 gap      bytes in front of each page of the row
    u16 source   0: the blob, 1: the image, 2: a page of zeros
    u32 count    pages, each behind its gap
    u64 place    number of the first page in its source; the others follow
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fastboot_common import blocks, exception
from fastboot_common.blocks import PAGE

BLOB: Final = 0
IMAGE: Final = 1
ZEROS: Final = 2
DTYPE: Final = np.dtype([('gap', '<u2'), ('source', '<u2'),
                         ('count', '<u4'), ('place', '<u8')])
#: Bytes of a file: guests that are baked have less memory than this.
LIMIT: Final = 1 << 37
#: Pages that are put together at once.
_BATCH: Final = 4096
_PLACES: Final = 1 << 40

#: Reads pages of a source by their numbers, one behind the other.
Read = Callable[[blocks.Blocks], bytes]
#: Where a page is: source and number.
Place = tuple[int, int]
_Starts = npt.NDArray[np.int64]


def cut(size: int, known: Sequence[int]) -> _Starts:
    """Where a file is cut into pages, in bytes, ascending.

    :param size: of the file.
    :param known: where pages are, ascending, not overlapping, inside.
    """
    inner = np.asarray(known, np.int64)
    begins = np.concatenate(([0], inner + PAGE))
    room = (np.concatenate((inner, [size])) - begins) // PAGE
    between = np.repeat(begins, room) + PAGE * (
        np.arange(room.sum()) - np.repeat(np.cumsum(room) - room, room))
    return np.sort(np.concatenate((inner, between)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file consists of.

    :ivar rows: where its pages are.
    :ivar rest: the bytes that are no pages.
    """

    rows: Any
    rest: bytes

    @classmethod
    def of(cls, data: memoryview, starts: _Starts,
           find: Callable[[memoryview], Place]) -> Self:
        """Take a file apart.

        :param starts: of its pages; see :func:`cut`.
        :param find: says where else a page is.
        """
        rest, rows = bytearray(), _Rows()
        done = 0
        for start in starts.tolist():
            rest += data[done:start]
            done_page = start + PAGE
            rows.add(start - done, find(data[start:done_page]))
            done = done_page
        rest += data[done:]
        return cls(rows.array(), bytes(rest))

    @classmethod
    def parse(cls, rows: bytes, rest: bytes, blob_pages: int) -> Self:
        """Read it from bytes that may be any.

        :param blob_pages: the pages that the blob has.
        :raises Corrupt: they make no sense.
        """
        found = np.frombuffer(rows, DTYPE)
        counts, places = found['count'].astype(np.uint64), found['place']
        limits = np.array([blob_pages, _PLACES, 0], np.uint64)
        if (found['source'] > ZEROS).any() or (found['gap'] >= PAGE).any() \
                or not counts.all() or (places > _PLACES).any():
            raise exception.Corrupt('pages: a row has no sense')
        ends = np.where(found['source'] == ZEROS, places, places + counts)
        if (ends > limits[found['source']]).any():
            raise exception.Corrupt('pages: one is behind its source')
        layout = cls(found, rest)
        # Python's integers: 2**32 rows of 2**32 pages are more than 64 bits.
        if sum(counts.tolist()) * PAGE > LIMIT:
            raise exception.Corrupt('pages: more than a file can have')
        if not 0 <= layout._behind < PAGE:
            raise exception.Corrupt('pages: bytes lack between them')
        return layout

    @property
    def _behind(self) -> int:
        """Bytes that are behind the last page."""
        gaps = self.rows['count'].astype(np.int64) * self.rows['gap']
        return len(self.rest) - int(gaps.sum())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.count() * PAGE + len(self.rest)

    def count(self, source: int | None = None) -> int:
        """Pages; of one source only, if that is given."""
        counts = self.rows['count'] if source is None else \
            self.rows['count'][self.rows['source'] == source]
        return int(counts.sum(dtype=np.int64))

    def join(self, blob: Read, image: Read, piece: int) -> Iterator[bytes]:
        """The file again, in pieces of `piece` bytes, the last shorter.

        :raises Corrupt: a source has less than was asked for.
        """
        made, done = bytearray(), 0
        for gaps, batch in self._batches(blob, image):
            for number, gap in enumerate(gaps):
                made += self.rest[done:done + gap]
                made += batch[number * PAGE:(number + 1) * PAGE]
                done += gap
            whole = len(made) - len(made) % piece
            for at in range(0, whole, piece):
                yield bytes(made[at:at + piece])
            del made[:whole]
        made += self.rest[done:]
        for at in range(0, len(made), piece):
            yield bytes(made[at:at + piece])

    def _batches(self, blob: Read, image: Read
                 ) -> Iterator[tuple[list[int], bytes]]:
        """Gaps and pages, a bounded number at a time."""
        for rows in _bounded(self.rows):
            counts = rows['count'].astype(np.int64)
            sources = np.repeat(rows['source'], counts)
            inner = np.arange(len(sources)) - np.repeat(
                np.cumsum(counts) - counts, counts)
            places = np.repeat(rows['place'].astype(np.int64), counts) + inner
            found = np.zeros((len(sources), PAGE), np.uint8)
            for source, read in ((BLOB, blob), (IMAGE, image)):
                which = sources == source
                if which.any():
                    found[which] = _read(read, places[which])
            yield np.repeat(rows['gap'], counts).tolist(), found.tobytes()


class _Rows:
    """Rows, those that go on merged."""

    def __init__(self) -> None:
        self._done: list[tuple[int, int, int, int]] = []
        self._last: tuple[int, int, int, int] | None = None

    def add(self, gap: int, place: Place) -> None:
        source, number = place
        if self._last is not None:
            last_gap, last_source, count, first = self._last
            follows = first if source == ZEROS else first + count
            if (last_gap, last_source, follows) == (gap, source, number):
                self._last = gap, source, count + 1, first
                return
            self._done.append(self._last)
        self._last = gap, source, 1, number

    def array(self) -> Any:
        last = [] if self._last is None else [self._last]
        return np.array(self._done + last, DTYPE)


def _bounded(rows: Any) -> Iterator[Any]:
    """The same rows in groups of at most so many pages."""
    group: list[tuple[int, int, int, int]] = []
    room = _BATCH
    for gap, source, count, place in rows.tolist():
        while count:
            part = min(count, room)
            group.append((gap, source, part, place))
            room, count = room - part, count - part
            place += part if source != ZEROS else 0
            if not room:
                yield np.array(group, DTYPE)
                group, room = [], _BATCH
    if group:
        yield np.array(group, DTYPE)


def _read(read: Read, numbers: blocks.Blocks) -> Any:
    data = read(numbers)
    if len(data) != len(numbers) * PAGE:
        raise exception.Corrupt(
            f'pages: {len(data)} bytes for {len(numbers)} pages')
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE)
