# SPDX-License-Identifier: Apache-2.0
"""A guest that proves its disk, and boots in a second.

Its disk has runs of eight pages (4 KiB). Every page is filled with one word
that follows from its number, so that a page in a wrong place is seen, too.
The guest reads the runs over and over, and in each run rewrites one page
with a word of the pass it is in: a small write into a larger block. Before
the next run it notes how far it came (page ``first - 1``). When it starts
again it checks all runs against that note: a write that was acknowledged
and lost is found, and so is one that came back.

Some runs are read only on disks of a server's size. A builder's disk is
smaller or larger, so they are never in a boot set.

What it says on the console: three lines, ``login:`` after it has looked at
everything once, a dot after every eight runs (or ``every``), ``<pass>
passed`` after each pass, ``off`` when the power button was pressed, and
``BAD <page> <found> <expected>`` or ``EIO <page>``, after which it does
nothing any more.
"""

import dataclasses
import os
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable

import bootsector

PAGE = 4096
RUN = 8
WRITTEN = 3
PROMPT = 'login:'
#: Sectors of the largest disk that a server has.
_LARGE = (8 << 30) // 512
_MAGIC = 0x5357
_HEADER = struct.Struct('<HHIHHQQH')
_SOURCE = pathlib.Path(__file__).with_name('witness.S')


@dataclasses.dataclass(frozen=True)
class Witness:
    """What a disk is like.

    :ivar seed: makes its content another than that of other disks.
    :ivar size: of the disk in bytes.
    :ivar eager: runs that every boot reads.
    :ivar lazy: runs that only servers read.
    :ivar rest: ticks (1/18 s) between two runs, which leave the processor
        to others.
    :ivar every: runs that make a dot, a power of two.
    """

    seed: int = dataclasses.field(
        default_factory=lambda: int.from_bytes(os.urandom(2)) | 1)
    size: int = 64 << 20
    eager: int = 64
    lazy: int = 64
    first: int = 257
    rest: int = 0
    every: int = 8

    def word(self, page: int, generation: int = 0) -> int:
        """What fills a page."""
        word = page * 40503 + self.seed
        if page % RUN == WRITTEN:
            word += generation * 31
        return word & 0xffff

    @property
    def runs(self) -> range:
        """The first pages of all runs."""
        begin = self.first * RUN
        return range(begin, begin + (self.eager + self.lazy) * RUN, RUN)

    def make(self, path: pathlib.Path) -> pathlib.Path:
        """Write the disk's raw image."""
        with path.open('wb') as image:
            image.write(self._code())
            for run in self.runs:
                image.seek(run * PAGE)
                image.write(b''.join(self._page(page)
                                     for page in range(run, run + RUN)))
            image.truncate(self.size)
        return path

    def _page(self, page: int, generation: int = 0) -> bytes:
        return self.word(page, generation).to_bytes(2, 'little') * (PAGE // 2)

    def _code(self) -> bytes:
        header = _HEADER.pack(self.seed, self.rest, self.first * RUN,
                              self.eager, self.lazy, self.size // 512,
                              _LARGE, self.every - 1)
        code = assemble()
        return (bootsector.signed(code[:440]) + header
                + code[512 + len(header):])

    def check(self, read: Callable[[int, int], bytes]) -> tuple[int, int]:
        """Look at a server's disk whose guest does not run.

        :param read: returns the bytes at an offset.
        :returns: the pass and the run that it came to.
        :raises AssertionError: a byte is wrong.
        """
        note = read((self.first * RUN - 1) * PAGE, 6)
        magic, passed, at = struct.unpack('<HHH', note)
        if magic != _MAGIC:
            passed, at = 1, 0
        for number, run in enumerate(self.runs):
            data = read(run * PAGE, RUN * PAGE)
            may = {passed} if number < at else (
                {passed, passed - 1} if number == at else {passed - 1})
            for page in range(run, run + RUN):
                found = data[(page - run) * PAGE:(page - run + 1) * PAGE]
                assert any(found == self._page(page, generation)
                           for generation in may), (
                    f'page {page} of pass {passed}, run {at}: '
                    f'{found[:4].hex()}')
        return passed, at


def assemble(source: pathlib.Path = _SOURCE) -> bytes:
    """A program that begins with a boot sector; this one has four."""
    with tempfile.TemporaryDirectory() as name:
        there, code = pathlib.Path(name, 'o'), pathlib.Path(name, 'bin')
        subprocess.run(['as', '--32', source, '-o', there], check=True)
        subprocess.run(['ld', '-m', 'elf_i386', '-Ttext', '0x7c00',
                        '--oformat', 'binary', there, '-o', code],
                       check=True)
        return code.read_bytes()


def passes(console: str) -> int:
    """How often a guest has looked at everything since it started.

    :raises AssertionError: it found something wrong.
    """
    found = re.search(r'(BAD|EIO).*', console)
    assert not found, found[0]
    return console.count(' passed')


def steps(console: str) -> int:
    """How often it got on by eight runs (``Witness.every``).

    :raises AssertionError: it found something wrong.
    """
    passes(console)
    return console.count('.')
