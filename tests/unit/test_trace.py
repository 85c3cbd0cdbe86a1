# SPDX-License-Identifier: Apache-2.0
"""Traces: logs, records and boot sets."""

import contextlib

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import exception, trace

SIZE = 1 << 30
LINE = ('2026-11-21 14:00:{:02d}.{:06d} connection=1 Read id={} '
        'offset=0x{:x} count=0x{:x} ...\n')
DONE = '2026-11-21 14:00:59.000000 connection=1 ...Read id=1 return=0\n'

reads = st.lists(st.tuples(
    st.integers(0, SIZE - trace.LONGEST), st.integers(1, 1 << 20)),
    max_size=40)


def make(pairs, boot=0):
    made = numpy.zeros(len(pairs), trace.DTYPE)
    for number, (offset, length) in enumerate(pairs):
        made[number] = (number, offset, length, boot)
    return made


def write_log(path, pairs):
    path.write_text(''.join(
        LINE.format(number, 5, number, *pair) + DONE
        for number, pair in enumerate(pairs)))
    return path


def test_parse_log(tmp_path):
    log = write_log(tmp_path / 'log', [(0, 512), (1 << 20, 4096)])
    found = trace.parse_log(log)
    assert found.tolist() == [(0, 0, 512, 0), (1000000, 1 << 20, 4096, 0)]


def test_parse_log_last_line_cut(tmp_path):
    log = write_log(tmp_path / 'log', [(0, 512), (4096, 0x30000)])
    whole = log.read_bytes()
    start = whole.rindex(b'2026-11-21 14:00:01')
    end = whole.index(b'\n', start)
    for cut in range(start, end + 1):
        log.write_bytes(whole[:cut])
        assert trace.parse_log(log)['length'].tolist() == [512]
    log.write_bytes(whole[:end + 1])
    assert trace.parse_log(log)['length'].tolist() == [512, 0x30000]


@pytest.mark.parametrize('junk', [
    b'\xff\xfe\0\n', b'Read id=1 offset=0x0 count=0x200 ...\n',
    b'2026-11-21 14:00:00.000001 connection=1 Read id=1 offset=-1 '
    b'count=0x200 ...\n',
    b'2026-11-21 14:00:00.000001 connection=1 Connect export="'
    b'connection=1 Read id=1 offset=0x0 count=0x200 ..." tls=0\n',
    b'2026-11-21 14:00:00.000001 connection=1 Write id=1 offset=0x0 '
    b'count=0x200 ...\n',
    b'x' * 100000 + b'\n',
])
def test_parse_log_passes_over_junk(tmp_path, junk):
    log = write_log(tmp_path / 'log', [(0, 512)])
    log.write_bytes(junk + log.read_bytes() + junk)
    assert trace.parse_log(log)['length'].tolist() == [512]


@pytest.mark.parametrize('line', [
    LINE.format(0, 0, 1, 0, 0),
    LINE.format(0, 0, 1, 0, trace.LONGEST + 1),
    LINE.format(0, 0, 1, (1 << 63) - 1, 1),
    LINE.format(0, 0, 1, (1 << 64) - 1, 512),
    LINE.format(0, 0, 1, 0, 512).replace('-11-', '-13-'),
    LINE.format(0, 0, 1, 0, 512).replace('2026', '1969'),
    LINE.format(0, 0, 1, 0, 512).replace('2026', '0001'),
])
def test_parse_log_impossible(tmp_path, line):
    (tmp_path / 'log').write_text(line)
    with pytest.raises(exception.Corrupt):
        trace.parse_log(tmp_path / 'log')


def test_parse_log_missing(tmp_path):
    with pytest.raises(exception.NotFound):
        trace.parse_log(tmp_path / 'log')


def test_parse_log_too_long(tmp_path, monkeypatch):
    log = write_log(tmp_path / 'log', [(0, 512)] * 9)
    monkeypatch.setattr(trace, 'LOG_LIMIT', log.stat().st_size)
    assert trace.parse_log(log).size == 9
    monkeypatch.setattr(trace, 'LOG_LIMIT', log.stat().st_size - 1)
    with pytest.raises(exception.Corrupt):
        trace.parse_log(log)


def test_parse_log_clock_set_back(tmp_path):
    log = tmp_path / 'log'
    log.write_text(''.join(LINE.format(second, 0, 1, second * 512, 512)
                           for second in (9, 3, 10)))
    found = trace.parse_log(log)
    assert found['time'].tolist() == [0, 0, 1000000]
    assert found['offset'].tolist() == [9 * 512, 3 * 512, 10 * 512]


@given(st.binary(max_size=300))
def test_parse_log_garbage(tmp_path_factory, data):
    log = tmp_path_factory.mktemp('log') / 'log'
    log.write_bytes(data)
    with contextlib.suppress(exception.Corrupt):
        assert trace.parse_log(log).size == 0


def test_log_reader_follows(tmp_path):
    log = tmp_path / 'log'
    reader = trace.LogReader(log)
    assert reader.read().size == 0
    whole = write_log(log, [(0, 512), (512, 1024)]).read_bytes()
    log.write_bytes(b'')
    seen = []
    for byte in range(len(whole)):
        with log.open('ab') as end:
            end.write(whole[byte:byte + 1])
        seen += reader.read()['length'].tolist()
    assert seen == [512, 1024]


@given(reads, reads)
def test_pack_round_trip(first, second):
    made = trace.merge([make(first), make(second)])
    data = trace.pack(made, SIZE)
    assert len(data) == 24 * (len(first) + len(second))
    assert (trace.unpack(data, SIZE) == made).all()


def test_pack_layout():
    made = make([(4096, 512)])
    made['time'] = 7
    assert trace.pack(made, SIZE) == (
        b'\7' + bytes(7) + b'\0\x10' + bytes(6) + b'\0\2\0\0' + bytes(4))


@pytest.mark.parametrize('record', [
    (0, 0, 0, 0), (0, 0, trace.LONGEST + 1, 0), (0, SIZE - 511, 512, 0),
    (0, SIZE, 1, 0), (0, (1 << 64) - 512, 512, 0), (0, (1 << 64) - 1, 512, 0),
])
def test_unpack_impossible(record):
    data = numpy.array([record], trace.DTYPE).tobytes()
    with pytest.raises(exception.Corrupt):
        trace.unpack(data, SIZE)


def test_unpack_behind_the_largest_disk():
    size = (1 << 64) - 1
    data = numpy.array([(0, size - 4, 512, 0)], trace.DTYPE).tobytes()
    with pytest.raises(exception.Corrupt):
        trace.unpack(data, size)


def test_unpack_to_the_last_byte():
    data = make([(SIZE - 512, 512)]).tobytes()
    assert trace.unpack(data, SIZE)['offset'] == [SIZE - 512]


@pytest.mark.parametrize('records', [
    [(5, 0, 1, 0), (4, 0, 1, 0)], [(0, 0, 1, 1), (9, 0, 1, 0)],
])
def test_unpack_not_sorted(records):
    data = numpy.array(records, trace.DTYPE).tobytes()
    with pytest.raises(exception.Corrupt):
        trace.unpack(data, SIZE)


@given(st.binary(max_size=200))
def test_unpack_garbage(data):
    try:
        found = trace.unpack(data, SIZE)
    except exception.Corrupt:
        return
    assert found.tobytes() == data
    ends = found['offset'] + found['length']
    assert (ends <= SIZE).all()


def test_merge_numbers_boots():
    two = trace.merge([make([(0, 1)]), make([(1, 1)])])
    merged = trace.merge([two, make([]), make([(2, 1)], boot=7)])
    assert merged['boot'].tolist() == [0, 1, 2]
    assert merged['offset'].tolist() == [0, 1, 2]


def test_merge_nothing():
    assert trace.merge([]).size == 0
    assert trace.merge([trace.empty()]).size == 0


def naive(pairs, block_size, virtual_size):
    order = {}
    for offset, length in pairs:
        for block in range(offset // block_size,
                           (offset + length - 1) // block_size + 1):
            if block * block_size < virtual_size:
                order[block] = None
    return list(order)


@given(reads, reads, st.sampled_from([4096, 16384, 65536]),
       st.integers(1, SIZE))
def test_boot_set(first, second, block_size, virtual_size):
    merged = trace.merge([make(first), make(second)])
    found = trace.boot_set(merged, block_size, virtual_size)
    assert found.tolist() == naive(first + second, block_size, virtual_size)


@given(reads, st.integers(1, 64))
def test_boot_set_in_strides(pairs, stride):
    whole = trace.boot_set(make(pairs), 65536, SIZE)
    before, trace._STRIDE = trace._STRIDE, stride
    try:
        found = trace.boot_set(make(pairs), 65536, SIZE)
    finally:
        trace._STRIDE = before
    assert found.tolist() == whole.tolist()


def test_boot_set_first_boot_first():
    merged = trace.merge([make([(8192, 1), (0, 1)]),
                          make([(4096, 1), (0, 1)])])
    assert trace.boot_set(merged, 4096, SIZE).tolist() == [2, 0, 1]


def test_statistics():
    made = trace.merge([
        make([(0, 512), (512, 512), (8192, 4096)]), make([(0, 4096)])])
    assert trace.statistics(made, 4096) == {
        'reads': 4, 'bytes': 9216, 'unique_bytes': 8192, 'seconds': 2e-6,
        'sequential': 0.25, 'median_read': 2304}


def test_statistics_of_nothing():
    assert trace.statistics(trace.empty(), 4096)['reads'] == 0


def test_replay_commands_are_clipped():
    made = make([(0, 512), (3584, 1024), (8192, 512)])
    assert trace.replay_commands(made, 4096) == (
        'read -q 0 512\nread -q 3584 512\n')
