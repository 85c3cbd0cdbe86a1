# SPDX-License-Identifier: Apache-2.0
"""Traces: the reads of a boot, as records and as the set of blocks they touch.

Reads the log of nbdkit's log filter, packs and unpacks the records of a
manifest (``doc/source/reference/trace.rst``), and replays them for
benchmarks. Recording itself is :mod:`fastboot_glance.capture`.
"""

import datetime
import os
import pathlib
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy
import numpy.typing

from fastboot_common import exception

#: One read; the fields are those of the format's page.
DTYPE: Final = numpy.dtype([
    ('time', '<u8'), ('offset', '<u8'), ('length', '<u4'), ('boot', '<u4'),
])
#: The longest read that a trace may hold, in bytes: NBD's own limit.
LONGEST: Final = 32 << 20
#: The longest log that is read, in bytes (two million reads or so).
LOG_LIMIT: Final = 256 << 20

Trace = numpy.typing.NDArray[numpy.void]
Blocks = numpy.typing.NDArray[numpy.int64]

_READ: Final = re.compile(
    rb'^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.(\d{6}) connection=\d{1,9} Read '
    rb'id=\d{1,19} offset=0x([0-9a-f]{1,16}) count=0x([0-9a-f]{1,8}) \.\.\.$',
    re.MULTILINE | re.ASCII,
)
#: Blocks that are looked at in one go, so that memory stays bounded.
_STRIDE: Final = 1 << 21


class Replayed(NamedTuple):
    """What one replay took, in seconds, process start and end included."""

    seconds: float
    cpu_seconds: float


class LogReader:
    """Follows the log of nbdkit's log filter while it is written.

    :param path: the log; it need not be there yet.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._position = 0
        self._seconds: dict[bytes, int] = {}

    def read(self) -> Trace:
        """The reads that were logged since the last call.

        A line that is not whole yet is left for the next call, and lines that
        are no reads are passed over. Times are microseconds of the host's
        clock, boot is 0.

        :raises Corrupt: a read makes no sense, or the log is too long.
        """
        try:
            with self._path.open('rb') as log:
                log.seek(self._position)
                data = log.read(LOG_LIMIT + 1 - self._position)
        except FileNotFoundError:
            return empty()
        if self._position + len(data) > LOG_LIMIT:
            raise exception.Corrupt(
                f'{self._path}: more than {LOG_LIMIT} bytes of log'
            )
        data = data[:data.rfind(b'\n') + 1]
        self._position += len(data)
        return self._parse(data)

    def _parse(self, data: bytes) -> Trace:
        lines = _READ.findall(data)
        trace = numpy.zeros(len(lines), DTYPE)
        if not lines:
            return trace
        counts = [int(line[3], 16) for line in lines]
        offsets = [int(line[2], 16) for line in lines]
        if (min(counts) < 1 or max(counts) > LONGEST
                or max(offsets) + LONGEST >= 1 << 63):
            raise exception.Corrupt(
                f'{self._path}: a read of an impossible offset or length'
            )
        trace['time'] = [
            self._second(line[0]) + int(line[1]) for line in lines
        ]
        trace['offset'] = offsets
        trace['length'] = counts
        return trace

    def _second(self, text: bytes) -> int:
        """The microseconds at the start of a second, remembered."""
        if text not in self._seconds:
            try:
                moment = datetime.datetime.fromisoformat(text.decode())
            except ValueError as error:
                raise exception.Corrupt(
                    f'{self._path}: no such time: {text!r}'
                ) from error
            since = moment - datetime.datetime(1970, 1, 1)
            if since < datetime.timedelta(0):
                raise exception.Corrupt(
                    f'{self._path}: no such time: {text!r}')
            self._seconds[text] = since // datetime.timedelta(microseconds=1)
        return self._seconds[text]


def empty() -> Trace:
    """A trace without reads."""
    return numpy.zeros(0, DTYPE)


def parse_log(path: pathlib.Path) -> Trace:
    """The reads of one boot, from the whole log of nbdkit's log filter.

    A last line that is cut short is ignored.

    :raises NotFound: there is no log.
    :raises Corrupt: a read makes no sense, or the log is too long.
    """
    if not path.exists():
        raise exception.NotFound(f'{path}: no such log')
    trace = LogReader(path).read()
    if trace.size:
        # The log's own order counts; a clock that was set back must not
        # change it.
        times = numpy.maximum.accumulate(trace['time'])
        trace['time'] = times - times[0]
    return trace


def merge(traces: Sequence[Trace]) -> Trace:
    """One trace of several, their boots numbered one after another.

    An empty trace takes no number.
    """
    merged = []
    boot = 0
    for trace in traces:
        if not trace.size:
            continue
        numbers, boots = numpy.unique(trace['boot'], return_inverse=True)
        copy = trace.copy()
        copy['boot'] = boots + boot
        boot += len(numbers)
        merged.append(copy)
    return numpy.concatenate(merged) if merged else empty()


def boot_set(trace: Trace, block_size: int, virtual_size: int) -> Blocks:
    """The numbers of the blocks that were touched, in order of first touch.

    :param block_size: bytes, a power of two.
    :param virtual_size: bytes; what lies behind it is left out.
    """
    total = -(-virtual_size // block_size)
    seen = numpy.zeros(total, bool)
    parts = [numpy.zeros(0, numpy.int64)]
    for blocks in _touched(trace, block_size):
        blocks = blocks[blocks < total]
        blocks = blocks[~seen[blocks]]
        _, first = numpy.unique(blocks, return_index=True)
        blocks = blocks[numpy.sort(first)]
        seen[blocks] = True
        parts.append(blocks)
    return numpy.concatenate(parts)


def _touched(trace: Trace, block_size: int) -> Iterator[Blocks]:
    """The blocks of all reads in order, in runs of bounded length."""
    first = trace['offset'].astype(numpy.int64) // block_size
    end = trace['offset'].astype(numpy.int64) + trace['length']
    counts = -(-end // block_size) - first
    sums = numpy.cumsum(counts)
    start = 0
    while start < len(trace):
        done = int(sums[start - 1]) if start else 0
        stop = int(numpy.searchsorted(sums, done + _STRIDE, 'right'))
        stop = max(stop, start + 1)
        run = counts[start:stop]
        behind = numpy.arange(run.sum()) - numpy.repeat(
            sums[start:stop] - run - done, run)
        yield numpy.repeat(first[start:stop], run) + behind
        start = stop


def statistics(trace: Trace, block_size: int) -> dict[str, Any]:
    """Figures for people.

    :returns: ``reads``, ``bytes``, ``unique_bytes`` (in whole blocks),
        ``seconds`` (of the longest boot, first to last read), ``sequential``
        (the share of reads that start where the one before ended) and
        ``median_read`` (bytes).
    """
    if not trace.size:
        return {'reads': 0, 'bytes': 0, 'unique_bytes': 0, 'seconds': 0.0,
                'sequential': 0.0, 'median_read': 0}
    ends = trace['offset'] + trace['length']
    follows = ((trace['offset'][1:] == ends[:-1])
               & (trace['boot'][1:] == trace['boot'][:-1]))
    blocks = boot_set(trace, block_size, int(ends.max()))
    return {
        'reads': len(trace),
        'bytes': int(trace['length'].sum(dtype=numpy.uint64)),
        'unique_bytes': len(blocks) * block_size,
        'seconds': int(trace['time'].max()) / 1e6,
        'sequential': float(follows.sum()) / len(trace),
        'median_read': int(numpy.median(trace['length'])),
    }


def pack(trace: Trace, virtual_size: int) -> bytes:
    """The section of a manifest.

    :param virtual_size: bytes of the image.
    :raises Corrupt: the trace breaks a rule of the format.
    """
    _check(trace, virtual_size)
    return trace.astype(DTYPE).tobytes()


def unpack(data: bytes, virtual_size: int) -> Trace:
    """Read what :func:`pack` made.

    :param virtual_size: bytes of the image.
    :raises Corrupt: the bytes break a rule of the format.
    """
    if len(data) % DTYPE.itemsize:
        raise exception.Corrupt('trace: not a whole number of records')
    trace = numpy.frombuffer(data, DTYPE)
    _check(trace, virtual_size)
    return trace


def _check(trace: Trace, virtual_size: int) -> None:
    lengths = trace['length'].astype(numpy.uint64)
    if ((lengths < 1) | (lengths > LONGEST)).any():
        raise exception.Corrupt('trace: a read of an impossible length')
    # No sum: that of two hostile numbers may wrap.
    size = numpy.uint64(virtual_size)
    if (lengths > size).any() or (trace['offset'] > size - lengths).any():
        raise exception.Corrupt('trace: a read behind the end of the image')
    boot, when = trace['boot'], trace['time']
    later = (boot[1:] > boot[:-1]) | (
        (boot[1:] == boot[:-1]) & (when[1:] >= when[:-1]))
    if not later.all():
        raise exception.Corrupt('trace: not sorted by boot and time')


def replay_commands(trace: Trace, virtual_size: int) -> str:
    """The reads as commands for the standard input of ``qemu-io``.

    :param virtual_size: bytes; reads behind it are clipped.
    """
    offsets = trace['offset'].tolist()
    ends = numpy.minimum(
        trace['offset'] + trace['length'], numpy.uint64(virtual_size)
    ).tolist()
    return ''.join(
        f'read -q {offset} {end - offset}\n'
        for offset, end in zip(offsets, ends, strict=True) if end > offset
    )


def replay(image_options: Sequence[str], trace: Trace, virtual_size: int,
           timeout: float) -> Replayed:
    """Read an image as the boots did, through QEMU's own block layer.

    :param image_options: how ``qemu-io`` is to open it, such as ``['-f',
        'raw', path]`` or ``['--image-opts', …]``. It is opened read-only.
    :param timeout: seconds after which it is killed.
    :raises CommandFailed: the image cannot be opened or a read failed.
    """
    command = ['qemu-io', '-r', *image_options]
    with (tempfile.TemporaryFile('w+') as commands,
          tempfile.TemporaryFile('w+') as words):
        commands.write(replay_commands(trace, virtual_size))
        commands.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=commands, stdout=words, stderr=words)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            # wait4, because only it tells the CPU time of this one process.
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            timer.cancel()
            timer.join()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            said = words.read(65536).replace('qemu-io> ', '')
            raise exception.CommandFailed(
                command, process.returncode, said)
    return Replayed(seconds, usage.ru_utime + usage.ru_stime)
