# SPDX-License-Identifier: Apache-2.0
"""The NBD export: slots of volumes as disks, one export name an image.

An nbdkit plugin, run by nbdkit's own Python: standard library only, nothing
of fastboot. It reads what ``doc/source/reference/volume.rst`` describes and
writes nothing; it holds no map. Each request walks the slot's tables: set
entries are read from the volume, unset ones are first asked of the agent.

::

  nbdkit -r python export.py root=<dir> [agent=<socket>] [wait=<seconds>]

The agent is asked by ``POST /v1/ensure`` with ``{"image", "offset",
"length"}`` (bytes) over its UNIX socket; see :mod:`fastboot_common.ensure`.

Why a read never gives wrong bytes:

* an entry is used only if it names a whole cluster behind the slots and
  within the file; anything else is EIO;
* header and entries are looked at again after the data was read. Eviction
  takes the header away before it touches anything else, so what still stands
  there vouches for what was read.

Tables are read through mappings, so that an entry costs no system call. A
volume that is cut short under a running export, or a device that cannot read
a table, ends the process (SIGBUS): reads fail then, they do not lie.
"""

import ctypes
import errno
import http.client
import json
import mmap
import os
import re
import resource
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final

import nbdkit

API_VERSION = 2

_NAME: Final = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')
_SLOT: Final = 65536
#: Everything but headers lies behind the slots.
_SLOTS_END: Final = 64 << 30
_HEADER: Final = struct.Struct('>IIQIIQIIQQIIQQQQII')
#: The part of a header that stays as it is while the slot lives: cluster
#: bits, size, encryption, entries and offset of the L1 table.
_FIXED: Final = slice(20, 48)
_COPIED: Final = 1 << 63
_ENTRY: Final = struct.Struct('>Q').unpack_from
_ZERO: Final = b'\0\0\0\0\0\0\0\x01'
#: Runs of "zeros" entries (group 1), and of all others. (Not possessive: the
#: first releases of Python 3.11 end such a run one entry late.)
_RUNS: Final = re.compile(
    rb'((?:\0{7}\x01)+)|(?:(?!\0{7}\x01).{8})+', re.DOTALL)
#: Runs of equal entries.
_SAME: Final = re.compile(rb'(.{8})\1*', re.DOTALL)

_WINDOW: Final = 1 << 30
_WINDOWS: Final = 64
_TABLES: Final = 4096
_EXTENTS: Final = 4096
_DESCRIPTION_LIMIT: Final = 65536
_ANSWER_LIMIT: Final = 65536
#: How often a request starts over because the tables changed under it.
_ROUNDS: Final = 4


class Settings:
    """What the command line said. Seconds for `wait`."""

    root: str = ''
    agent: str = ''
    wait: float = 25.0


class Gone(Exception):
    """The slot is not the one that was opened any more."""


class Torn(Exception):
    """A table says what no table may say, or changed under a read."""


def failure(number: int, message: str) -> OSError:
    """An error to raise; the client gets `number`, the log `message`."""
    nbdkit.set_error(number)
    return OSError(number, message)


_thread: Final = threading.local()


def _leave_state(_: object) -> None:
    ctypes.pythonapi.PyGILState_Release(0)


#: Called by C as a thread ends.
_LEAVE: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_leave_state)


def _keep_state() -> None:
    """Keep this thread's Python state until the thread ends.

    nbdkit takes a state for each call and gives it back after, and Python
    maps and unmaps memory for each: that halves the reads per second. So
    the first call in a thread enters once more than it leaves, and the
    thread's end leaves for it (through what C++ uses for the destructors of
    ``thread_local``, which run while Python still knows the thread; those
    of pthread keys run too late).
    """
    _thread.keeps = True
    at_exit = getattr(ctypes.CDLL(None), '__cxa_thread_atexit_impl', None)
    if at_exit is None or threading.get_native_id() == os.getpid():
        return  # no glibc, or the main thread, which outlives Python
    enter = ctypes.pythonapi.PyGILState_Ensure
    if not at_exit(_LEAVE, None, ctypes.cast(enter, ctypes.c_void_p)):
        enter()


def get_ready() -> None:
    """Before the first client. Each one takes a few file descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def thread_model() -> int:
    """Requests of a connection run side by side."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """One ``key=value`` of the command line."""
    if key in ('root', 'agent'):
        setattr(Settings, key, os.path.abspath(value))
    elif key == 'wait':
        Settings.wait = float(value)
        if not 0 <= Settings.wait <= 3600:
            raise ValueError('wait= takes 0 to 3600 seconds')
    else:
        raise ValueError(f'unknown parameter {key!r}: '
                         f'there are root=, agent= and wait=')


def config_complete() -> None:
    """After the last parameter."""
    if not Settings.root:
        raise ValueError('root=<directory with volumes/> is required')


def _domains() -> list[str]:
    base = os.path.join(Settings.root, 'volumes')
    try:
        return [os.path.join(base, name) for name in sorted(os.listdir(base))]
    except FileNotFoundError:
        return []


def list_exports(readonly: bool, is_tls: bool) -> list[str]:
    """None: a QEMU that was taken over learns no ids of others' images."""
    return []


def _describe(path: str) -> tuple[int, int]:
    """Serial and virtual size (bytes) of the description at `path`.

    :raises ValueError: it is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, 'rb') as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError('not a regular file')
        text = file.read(_DESCRIPTION_LIMIT)
    try:
        data = json.loads(text)
        serial, size = data['serial'], data['virtual_size']
    except (KeyError, TypeError, RecursionError):
        raise ValueError('serial or virtual_size is missing') from None
    if (type(serial) is not int or type(size) is not int
            or not 0 < serial < _SLOTS_END // _SLOT or size < 0):
        raise ValueError(f'serial {serial!r}, virtual_size {size!r}')
    return serial, size


class Slot:
    """One image in one volume, open for reading.

    :param path: the volume.
    :param image: the image's id.
    :param serial: its serial.
    :param size: the virtual size that its header must say, in bytes.
    :raises Gone: there is no header in the slot.
    :raises Torn: what is there is not the header of this slot.
    """

    __slots__ = ('base', 'bias', 'bits', 'cluster', 'entry_bits', 'fd',
                 'fixed', 'head', 'high', 'image', 'l1', 'l1_at', 'low',
                 'mask', 'size', 'tables', 'windows')

    def __init__(self, path: str, image: str, serial: int, size: int) -> None:
        self.image = image
        self.size = size
        self.base = serial * _SLOT
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._load(os.fstat(self.fd).st_size)
        except BaseException:
            os.close(self.fd)
            raise

    def _load(self, file_size: int) -> None:
        raw = os.pread(self.fd, 512, self.base)
        if not raw.strip(b'\0'):
            raise Gone('the slot is empty')
        if len(raw) < _HEADER.size:
            raise Torn('header cut short')
        (magic, version, _backing, _length, self.bits, size, crypt, entries,
         l1_offset, _refcounts, _clusters, snapshots, _snapshot,
         incompatible, *_rest) = _HEADER.unpack_from(raw)
        if (magic != 0x514649FB or version != 3 or crypt or snapshots
                or incompatible or not 12 <= self.bits <= 16):
            raise Torn('not the qcow2 header of a slot')
        if size != self.size:
            raise Torn(f'header says {size} bytes, description {self.size}')
        self.cluster = 1 << self.bits
        self.mask = self.cluster - 1
        self.entry_bits = self.bits - 3
        #: Where a table or cluster may begin, in the file.
        self.low = _SLOTS_END
        self.high = file_size - self.cluster
        #: Entry minus this is a place in the file.
        self.bias = _COPIED - self.base
        tables = -(-size // (self.cluster << self.entry_bits))
        start = self.base + l1_offset
        if (entries < tables or l1_offset & self.mask
                or start < self.low or start + entries * 8 > file_size):
            raise Torn('L1 table lies outside the volume')
        self.fixed = raw[_FIXED]
        self.head, _ = self._map(self.base, _SLOT)
        self.l1, self.l1_at = self._map(start, max(tables, 1) * 8)
        self.windows: dict[int, mmap.mmap] = {}
        self.tables: dict[bytes, tuple[mmap.mmap, int]] = {}
        self.check()

    def _map(self, start: int, length: int) -> tuple[mmap.mmap, int]:
        """A mapping of a part of the file, and where the part begins in it."""
        skew = start % mmap.ALLOCATIONGRANULARITY
        return mmap.mmap(self.fd, length + skew, mmap.MAP_SHARED,
                         mmap.PROT_READ, offset=start - skew), skew

    def close(self) -> None:
        """Give the file back. Mappings go with the last reference."""
        os.close(self.fd)

    def check(self) -> None:
        """The slot is still what was opened.

        :raises Gone: it is not.
        """
        if self.head[_FIXED] != self.fixed:
            raise Gone('the slot was evicted')

    def table(self, number: int) -> tuple[mmap.mmap, int]:
        """An L2 table: a mapping, and where the table begins in it.

        The L1 entry is read each time; only what it leads to is remembered.

        :raises Torn: the L1 entry names none.
        """
        at = self.l1_at + (number << 3)
        entry = self.l1[at:at + 8]
        return self.tables.get(entry) or self._find(number, entry)

    def _find(self, number: int, entry: bytes) -> tuple[mmap.mmap, int]:
        place = _ENTRY(entry)[0] - self.bias
        if place & self.mask or not self.low <= place <= self.high:
            raise Torn(f'L1 entry {number} leads nowhere')
        if len(self.tables) >= _TABLES or len(self.windows) >= _WINDOWS:
            self.tables.clear()
            self.windows.clear()
        # A table is one aligned cluster, so it never crosses windows.
        start = place - place % _WINDOW
        window = self.windows.get(start)
        if window is None:
            length = min(_WINDOW, self.high + self.cluster - start)
            window, _ = self._map(start, length)
            self.windows[start] = window
        found = self.tables[entry] = window, place - start
        return found

    def raw_entries(self, first: int, last: int) -> bytes:
        """The L2 entries of clusters `first` to `last`, both included.

        :raises Torn: an L1 entry names no table.
        """
        bits = self.entry_bits
        number = first >> bits
        if number == last >> bits:
            window, at = self.table(number)
            at += first - (number << bits) << 3
            return window[at:at + (last - first + 1 << 3)]
        border = number + 1 << bits
        return (self.raw_entries(first, border - 1)
                + self.raw_entries(border, last))

    def places(self, raw: bytes) -> list[int]:
        """Entries as places in the file; 0 for zeros, -1 for not here.

        :raises Torn: an entry is none of these.
        """
        low, high, mask, bias = self.low, self.high, self.mask, self.bias
        places = []
        for entry in struct.unpack(f'>{len(raw) // 8}Q', raw):
            place = entry - bias
            if low <= place <= high and not place & mask:
                places.append(place)
            elif entry > 1:
                raise Torn(f'L2 entry {entry:#x} leads nowhere')
            else:
                places.append(entry - 1)
        return places


def open(readonly: bool) -> Slot:
    """A client asks for an export: an image's id.

    An image may be in several domains (its visibility changed): the same
    bytes, so the first that has its slot will do.
    """
    image = nbdkit.export_name()
    if not _NAME.fullmatch(image):
        raise failure(errno.ENOENT, f'not the id of an image: {image!r:.100}')
    reasons = []
    for domain in _domains():
        try:
            serial, size = _describe(os.path.join(domain, 'images', image))
            return Slot(os.path.join(domain, 'volume'), image, serial, size)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, Gone, Torn) as error:
            reasons.append(f'{domain}: {error}')
    raise failure(errno.ENOENT, f'image {image} is not on this host '
                                f'({"; ".join(reasons) or "unknown"})')


def close(slot: Slot) -> None:
    """The client went."""
    slot.close()


def get_size(slot: Slot) -> int:
    """The virtual size, in bytes."""
    return slot.size


def can_multi_conn(slot: Slot) -> bool:
    """Several connections see one content: it never changes."""
    return True


def pread(slot: Slot, buf: memoryview, offset: int, flags: int) -> None:
    """Fill `buf` from `offset`.

    Most reads lie in clusters that are here and lie one behind another:
    these take one system call. All else goes to :func:`_read`.
    """
    if not hasattr(_thread, 'keeps'):
        _keep_state()
    length = len(buf)
    bits = slot.bits
    first = offset >> bits
    last = (offset + length - 1) >> bits
    try:
        raw = slot.raw_entries(first, last)
        place = _ENTRY(raw)[0] - slot.bias
        if (slot.low <= place <= slot.high and not place & slot.mask
                and (first == last or _adjacent(slot, raw))
                and os.preadv(slot.fd, (buf,), place + (offset & slot.mask))
                == length
                and slot.raw_entries(first, last) == raw
                and slot.head[_FIXED] == slot.fixed):
            return
    except Torn:
        pass
    _read(slot, buf, offset)


def _adjacent(slot: Slot, raw: bytes) -> bool:
    """All entries are set, each one cluster behind the one before."""
    entries = struct.unpack(f'>{len(raw) // 8}Q', raw)
    first = entries[0]
    return (entries == tuple(range(first, first + slot.cluster * len(entries),
                                   slot.cluster))
            and entries[-1] - slot.bias <= slot.high)


def _read(slot: Slot, buf: memoryview, offset: int) -> None:
    """Fill `buf` from `offset`, whatever the tables say."""
    first = offset >> slot.bits
    last = (offset + len(buf) - 1) >> slot.bits
    reason = ''
    for attempt in range(_ROUNDS):
        try:
            raw = slot.raw_entries(first, last)
            places = slot.places(raw)
            slot.check()
            if -1 in places:
                reason = 'the agent said done, and entries are still unset'
                _ensure(slot, first, places)
                continue
            _fill(slot, buf, offset, places)
            slot.check()
            if slot.raw_entries(first, last) == raw:
                return
            reason = 'the tables keep changing'
        except Gone as error:
            raise failure(errno.ESHUTDOWN,
                          f'image {slot.image}: {error}') from None
        except Torn as error:
            # Perhaps caught in the middle of a write; look again.
            reason = str(error)
            time.sleep(0.001 * 2 ** attempt)
    raise failure(errno.EIO, f'image {slot.image}: cannot read {len(buf)} '
                             f'bytes at {offset}: {reason}')


def _fill(slot: Slot, buf: memoryview, offset: int,
          places: list[int]) -> None:
    """Copy clusters that are here, runs of neighbours at once.

    :param places: of the clusters from the one that holds `offset`.
    """
    cluster = slot.cluster
    skip = offset & slot.mask
    done, total = 0, len(buf)
    index, count = 0, len(places)
    while done < total:
        place = places[index]
        step = cluster if place else 0
        index += 1
        span, expected = cluster - skip, place + step
        while index < count and places[index] == expected:
            index += 1
            span += cluster
            expected += step
        part = buf[done:done + span]
        done += span
        if not place:
            part[:] = bytes(len(part))
        elif os.preadv(slot.fd, (part,), place + skip) != len(part):
            _fetch(slot, part, place + skip)
        skip = 0


def _fetch(slot: Slot, part: memoryview, place: int) -> None:
    """Fill `part` from `place` in the file, in as many reads as it takes."""
    done = 0
    while done < len(part):
        count = os.preadv(slot.fd, (part[done:],), place + done)
        if not count:
            raise failure(errno.EIO, f'image {slot.image}: the volume ends '
                                     f'at {place + done}')
        done += count


def _ensure(slot: Slot, first: int, places: list[int]) -> None:
    """Have the agent bring all that is missing, in one call.

    Tries again while there is no agent to be reached, until ``wait`` has
    passed: it may be restarting.

    :param first: the cluster of ``places[0]``.
    """
    start = (first + places.index(-1)) << slot.bits
    stop = (first + len(places) - places[::-1].index(-1)) << slot.bits
    body = json.dumps({'image': slot.image, 'offset': start,
                       'length': min(stop, slot.size) - start})
    deadline = time.monotonic() + Settings.wait
    pause = 0.02
    reason = 'no agent= was given'
    while Settings.agent:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            status, reason = _post(body, left)
        except (OSError, http.client.HTTPException) as error:
            status, reason = 503, f'{Settings.agent}: {error!r}'
        if status == 200:
            return
        if status != 503:
            break
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, 0.5)
    raise failure(errno.EIO, f'image {slot.image}: the agent did not bring '
                             f'{body}: {reason}')


class _Agent(http.client.HTTPConnection):
    """HTTP over the agent's UNIX socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(Settings.agent)


def _post(body: str, seconds: float) -> tuple[int, str]:
    """One call: HTTP status and the agent's words.

    :raises OSError, http.client.HTTPException: there was no good answer.

    A connection a call: beside what a miss costs, connecting costs nothing,
    and there is no idle one that a restart of the agent could break.
    """
    agent = _Agent('localhost', timeout=seconds)
    try:
        agent.request('POST', '/v1/ensure', body,
                      {'Content-Type': 'application/json',
                       'Connection': 'close'})
        answer = agent.getresponse()
        if answer.chunked:
            # No agent does that, and http.client believes any length.
            raise http.client.HTTPException('an answer in chunks')
        words = answer.read(_ANSWER_LIMIT).decode(errors='replace')
        return answer.status, f'status {answer.status}: {words:.500}'
    finally:
        agent.close()


def extents(slot: Slot, count: int, offset: int,
            flags: int) -> list[tuple[int, int, int]]:
    """What of `count` bytes from `offset` is zeros.

    Answers less when there are many extents; the client asks on.
    """
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else _EXTENTS
    end = min(offset + count, slot.size)
    answer: list[tuple[int, int, int]] = []
    start = at = offset
    kind = -1
    for stop, zero in _spans(slot, offset >> slot.bits,
                             (end - 1) >> slot.bits):
        new = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO if zero else 0
        if new != kind and kind >= 0:
            answer.append((start, at - start, kind))
            start = at
            if len(answer) == limit:
                break
        at, kind = min(stop << slot.bits, end), new
    else:
        answer.append((start, end - start, kind))
    try:
        slot.check()
    except Gone as error:
        raise failure(errno.ESHUTDOWN,
                      f'image {slot.image}: {error}') from None
    return answer


def _spans(slot: Slot, first: int, last: int) -> Iterator[tuple[int, bool]]:
    """Spans of clusters, `first` to `last`: where each ends, is it zeros.

    Whatever is not surely zeros is data. Tables that many L1 entries name
    (the one of zeros) are looked at once.
    """
    bits = slot.entry_bits
    at = slot.l1_at
    zeros = _ZERO * (1 << bits)
    l1 = slot.l1[at + (first >> bits) * 8:at + ((last >> bits) + 1) * 8]
    number = first >> bits
    for same in _SAME.finditer(l1):
        stop = number + len(same[0]) // 8
        try:
            known = slot.raw_entries(number << bits,
                                     ((number + 1) << bits) - 1)
        except Torn:
            yield stop << bits, False
        else:
            if known == zeros:
                yield stop << bits, True
            else:
                for table in range(number, stop):
                    yield from _runs(slot, max(first, table << bits),
                                     min(last, ((table + 1) << bits) - 1))
        number = stop


def _runs(slot: Slot, first: int, last: int) -> Iterator[tuple[int, bool]]:
    """:func:`_spans` of clusters of one table."""
    for run in _RUNS.finditer(slot.raw_entries(first, last)):
        yield first + run.end() // 8, run.lastindex == 1
