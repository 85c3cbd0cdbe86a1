# SPDX-License-Identifier: Apache-2.0
"""What the targets have in common: what one is, and how it takes bytes apart.

Nothing here needs atheris: the unit tests replay the corpus with it, too.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterator

from fastboot_common import exception

CORPUS = pathlib.Path(__file__).parent / 'corpus'


@dataclasses.dataclass(frozen=True)
class Target:
    """Something of ours that reads bytes of others.

    :ivar name: also of the directory of its corpus.
    :ivar run: takes any bytes, and raises `allowed` only.
    :ivar seeds: gives inputs to begin with; `run` takes the first to its end.
    :ivar allowed: what it may say of bytes that make no sense.
    :ivar longest: input that is tried, in bytes.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    allowed: tuple[type[Exception], ...] = (exception.Corrupt,)
    longest: int = 2048

    def __call__(self, data: bytes) -> None:
        """Try an input. Whatever comes out is a bug."""
        with contextlib.suppress(*self.allowed):
            self.run(data)

    @property
    def corpus(self) -> pathlib.Path:
        """The directory of the inputs that are kept."""
        return CORPUS / self.name

    def inputs(self) -> Iterator[tuple[str, bytes]]:
        """Seeds and corpus, with their names."""
        for number, data in enumerate(self.seeds()):
            yield f'seed {number}', data
        for path in sorted(self.corpus.glob('*')):
            yield path.name, path.read_bytes()


class Parts:
    """Takes an input apart, from its beginning; behind its end are zeros."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._stream.read(count).ljust(count, b'\0')

    def number(self, count: int) -> int:
        """The next `count` bytes as a number, little-endian."""
        return int.from_bytes(self.take(count), 'little')

    def rest(self) -> bytes:
        """All that is left."""
        return self._stream.read()


class File:
    """A file without a place, for parsers that want a path."""

    def __init__(self) -> None:
        self.fd = os.memfd_create('fuzz')
        os.fchmod(self.fd, 0o600)
        self.path = pathlib.Path(f'/proc/{os.getpid()}/fd/{self.fd}')

    def holding(self, data: bytes) -> pathlib.Path:
        """The path, once these bytes and no others are there."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, data, 0)
        return self.path
