# SPDX-License-Identifier: Apache-2.0
"""The plugin's reading of tables, against a simple model; no nbdkit."""

import errno
import importlib.util
import os
import pathlib
import struct
import sys
import types

import hypothesis
import pytest
from hypothesis import strategies as st

import fastboot_common
from fastboot_common import qcow2

LOW = 64 << 30
CLUSTER = 4096
BLOCKS = 40
PER = CLUSTER // 8
#: Where a wide image's clusters are: about the border of two L2 tables.
START = PER - BLOCKS // 2
SERIAL = 3
BASE = SERIAL * 65536
L1 = LOW
TABLES = LOW + 65536
DATA = TABLES + 65536
ROOM = 64
IMAGE = 'image-1'


class Nbdkit(types.ModuleType):
    """What the plugin uses of nbdkit."""

    THREAD_MODEL_PARALLEL = 3
    FLAG_REQ_ONE = 8
    EXTENT_HOLE = 1
    EXTENT_ZERO = 2

    def __init__(self):
        super().__init__('nbdkit')
        self.error = None
        self.name = IMAGE

    def set_error(self, number):
        self.error = number

    def debug(self, message):
        pass

    def export_name(self):
        return self.name


@pytest.fixture(scope='module')
def plugin():
    path = pathlib.Path(fastboot_common.__file__).with_name('export.py')
    spec = importlib.util.spec_from_file_location('plugin', path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get('nbdkit')
    sys.modules['nbdkit'] = Nbdkit()
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules['nbdkit']
        if before:
            sys.modules['nbdkit'] = before
    # Keeping the state of pytest's thread is nothing to try here.
    module._keep_state = lambda: setattr(module._thread, 'keeps', True)
    return module


class Model:
    """A volume of one image whose L2 entries are given."""

    def __init__(self, root, size=(START + BLOCKS) * CLUSTER, place=BASE):
        self.size = size
        self.place = place
        domain = root / 'volumes' / 'public'
        (domain / 'images').mkdir(parents=True, exist_ok=True)
        (domain / 'images' / IMAGE).write_text(
            f'{{"serial": {SERIAL}, "virtual_size": {size}}}')
        self.path = domain / 'volume'
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, DATA + ROOM * CLUSTER)
        self.clusters = [bytes([number + 1]) * (CLUSTER - 8)
                         + struct.pack('>Q', number)
                         for number in range(ROOM)]
        self.write(DATA, b''.join(self.clusters))
        self.tables(0, 1)
        self.entries([0] * (2 * PER), 0)
        self.header()

    def close(self):
        os.close(self.fd)

    def write(self, place, data):
        assert os.pwrite(self.fd, data, place) == len(data)

    def header(self):
        self.write(BASE, qcow2.Header(
            self.size, 12, L1 - BASE, qcow2.l1_entries(self.size, CLUSTER),
            0, 'nbd+unix:///x').pack())

    def tables(self, *numbers):
        self.write(L1, b''.join(
            struct.pack('>Q', qcow2.COPIED | TABLES + number * CLUSTER - BASE)
            for number in numbers))

    def entries(self, entries, first=START):
        self.write(TABLES + first * 8, struct.pack(
            f'>{len(entries)}Q', *entries))

    def content(self, entry):
        """What a cluster reads as; None: it is missing or an error.

        Any whole cluster behind the slots may hold data.
        """
        if entry == 1:
            return bytes(CLUSTER)
        place = entry - qcow2.COPIED + BASE
        end = DATA + ROOM * CLUSTER
        if place % CLUSTER or not LOW <= place <= end - CLUSTER:
            return None
        return os.pread(self.fd, CLUSTER, place)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    made = Model(tmp_path_factory.mktemp('root'))
    yield made
    made.close()


@pytest.fixture
def slot(plugin, model):
    model.tables(0, 1)
    model.header()
    plugin.nbdkit.error = None
    plugin.nbdkit.name = IMAGE
    plugin.Settings.root = str(model.path.parents[2])
    plugin.Settings.agent = ''
    plugin._post = None
    opened = plugin.open(True)
    yield opened
    plugin.close(opened)


def data(number):
    return qcow2.COPIED | DATA + number * CLUSTER - BASE


good = st.one_of(st.just(1), st.integers(0, ROOM - 1).map(data))
hostile = st.one_of(
    st.integers(2, (1 << 64) - 1),
    st.integers(0, 1 << 24).map(lambda more: data(0) + more * 512),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.sampled_from([qcow2.COPIED, data(ROOM), data(-100), data(0) | 1,
                     data(0) | 1 << 62, data(0) & ~qcow2.COPIED, 0]))
runs = st.tuples(st.integers(0, ROOM - 1), st.integers(1, 20)).map(
    lambda run: [data(number) for number in range(
        run[0], min(sum(run), ROOM))])
tables = st.lists(st.one_of(good.map(lambda one: [one]), runs,
                            st.integers(1, 9).map(lambda n: [1] * n)),
                  min_size=BLOCKS, max_size=BLOCKS).map(
    lambda parts: sum(parts, [])[:BLOCKS])
extents = st.tuples(st.integers(0, BLOCKS * CLUSTER - 1),
                    st.integers(1, BLOCKS * CLUSTER)).map(
    lambda pair: (pair[0], min(pair[1], BLOCKS * CLUSTER - pair[0])))
relaxed = hypothesis.settings(
    deadline=None, max_examples=100,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow])


def read(plugin, slot, offset, length):
    buffer = bytearray(b'\xdb' * length)
    plugin.pread(slot, memoryview(buffer), START * CLUSTER + offset, 0)
    return bytes(buffer)


@relaxed
@hypothesis.given(tables, extents)
def test_reads_are_those_of_the_model(plugin, model, slot, table, extent):
    model.entries(table)
    offset, length = extent
    whole = b''.join(map(model.content, table))
    assert (read(plugin, slot, offset, length)
            == whole[offset:offset + length])


@relaxed
@hypothesis.given(tables, st.integers(0, BLOCKS - 1), hostile, extents)
def test_hostile_entries_never_give_bytes(plugin, model, slot, table, index,
                                          entry, extent):
    hypothesis.assume(model.content(entry) is None)
    table[index] = entry
    model.entries(table)
    offset, length = extent
    if offset // CLUSTER <= index <= (offset + length - 1) // CLUSTER:
        with pytest.raises(OSError) as caught:
            read(plugin, slot, offset, length)
        assert caught.value.errno == plugin.nbdkit.error == errno.EIO
    else:
        whole = b''.join(model.content(one) or bytes(CLUSTER)
                         for one in table)
        assert (read(plugin, slot, offset, length)
                == whole[offset:offset + length])


@relaxed
@hypothesis.given(tables, st.lists(st.tuples(
    st.integers(0, BLOCKS - 1), hostile), max_size=4), extents,
    st.booleans())
def test_extents_are_those_of_the_model(plugin, model, slot, table, bad,
                                        extent, one):
    for index, entry in bad:
        table[index] = entry
    model.entries(table)
    offset, length = extent
    offset += START * CLUSTER
    answer = plugin.extents(slot, length, offset,
                            plugin.nbdkit.FLAG_REQ_ONE if one else 0)
    at = offset
    kinds = []
    for start, count, kind in answer:
        assert start == at
        assert count > 0
        at += count
        kinds.append(kind)
        for block in range(start // CLUSTER, (start + count - 1)
                           // CLUSTER + 1):
            assert (kind == 3) == (table[block - START] == 1)
    assert all(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    if one:
        assert len(answer) == 1
    else:
        assert at == offset + length


@relaxed
@hypothesis.given(st.binary(min_size=16, max_size=16))
def test_hostile_l1(plugin, model, slot, words):
    model.write(L1, words)
    sizes = []
    for length in (1, CLUSTER, BLOCKS * CLUSTER):
        try:
            sizes.append(len(read(plugin, slot, 0, length)))
        except OSError as error:
            assert error.errno == errno.EIO
    plugin.extents(slot, BLOCKS * CLUSTER, START * CLUSTER, 0)


def test_extents_are_bounded(plugin, model, slot, monkeypatch):
    monkeypatch.setattr(plugin, '_EXTENTS', 5)
    model.entries([1, data(0)] * (BLOCKS // 2))
    answer = plugin.extents(slot, BLOCKS * CLUSTER, START * CLUSTER, 0)
    assert len(answer) == 5
    assert answer[-1][0] + answer[-1][1] == (START + 5) * CLUSTER


def test_shared_zero_table_is_a_hole(plugin, model, slot):
    model.entries([1] * 2 * PER, 0)
    model.tables(0, 0)
    answer = plugin.extents(slot, slot.size - 5, 5, 0)
    assert answer == [(5, slot.size - 5, 3)]


# What is missing

def test_one_call_for_all_that_is_missing(plugin, model, slot, monkeypatch):
    calls = []

    def post(body, seconds):
        calls.append(body)
        model.entries([data(n) for n in range(BLOCKS)])
        return 200, 'fine'

    monkeypatch.setattr(plugin.Settings, 'agent', '/x')
    monkeypatch.setattr(plugin, '_post', post)
    table = [data(n) for n in range(BLOCKS)]
    table[2] = table[5] = 0
    model.entries(table)
    assert read(plugin, slot, 10, 8 * CLUSTER) == b''.join(
        model.clusters)[10:10 + 8 * CLUSTER]
    assert calls == [f'{{"image": "{IMAGE}", "offset": '
                     f'{(START + 2) * CLUSTER}, "length": {4 * CLUSTER}}}']


def test_the_last_cluster_ends_with_the_disk(plugin, tmp_path, monkeypatch):
    model = Model(tmp_path, size=5 * CLUSTER + 512)
    model.entries([1, 1, 1, 1, 0, 0], 0)
    bodies = []

    def post(body, seconds):
        bodies.append(body)
        return 404, 'none'

    monkeypatch.setattr(plugin.Settings, 'root', str(tmp_path))
    monkeypatch.setattr(plugin.Settings, 'agent', '/x')
    monkeypatch.setattr(plugin, '_post', post)
    plugin.nbdkit.name = IMAGE
    slot = plugin.open(True)
    with pytest.raises(OSError, match='none'):
        plugin.pread(slot, memoryview(bytearray(CLUSTER)),
                     4 * CLUSTER + 512, 0)
    assert f'"length": {CLUSTER + 512}' in bodies[0]
    plugin.close(slot)
    model.close()


@pytest.mark.parametrize('status, calls', [
    (404, 1), (400, 1), (500, 1), (409, 1), (200, 4)])
def test_answers_that_do_not_help(plugin, model, slot, monkeypatch, status,
                                  calls):
    made = []

    def post(body, seconds):
        made.append(body)
        return status, 'words'

    monkeypatch.setattr(plugin.Settings, 'agent', '/x')
    monkeypatch.setattr(plugin, '_post', post)
    model.entries([0])
    with pytest.raises(OSError) as caught:
        read(plugin, slot, 0, 1)
    assert caught.value.errno == errno.EIO
    assert IMAGE in str(caught.value)
    assert len(made) == calls


@pytest.mark.parametrize('trouble', [
    503, ConnectionRefusedError(), FileNotFoundError(), ConnectionResetError(),
    TimeoutError()])
def test_trouble_that_passes(plugin, model, slot, monkeypatch, trouble):
    answers = [trouble] * 3 + [200]

    def post(body, seconds):
        assert 0 < seconds <= 25
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == 200:
            model.entries([data(7)])
        return answer, ''

    monkeypatch.setattr(plugin.Settings, 'agent', '/x')
    monkeypatch.setattr(plugin, '_post', post)
    model.entries([0])
    assert read(plugin, slot, 0, CLUSTER) == model.clusters[7]
    assert not answers


# Changes under a read

@pytest.mark.parametrize('table', [
    [data(0)], [data(0), data(1)], [data(0), data(5)], [1, data(0)]])
def test_slot_that_goes_while_it_is_read(plugin, model, slot, monkeypatch,
                                         table):
    model.entries(table)
    real = os.preadv

    def preadv(*arguments):
        done = real(*arguments)
        model.write(BASE, bytes(512))
        return done

    monkeypatch.setattr(os, 'preadv', preadv)
    with pytest.raises(OSError) as caught:
        read(plugin, slot, 0, len(table) * CLUSTER)
    assert caught.value.errno == plugin.nbdkit.error == errno.ESHUTDOWN
    with pytest.raises(OSError):
        plugin.extents(slot, CLUSTER, 0, 0)


def test_slot_that_is_made_anew_elsewhere(plugin, model, slot):
    model.entries([data(0)])
    model.write(BASE + 40, struct.pack('>Q', L1 + CLUSTER - BASE))
    with pytest.raises(OSError) as caught:
        read(plugin, slot, 0, CLUSTER)
    assert caught.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize('table', [
    [data(0)], [data(0), data(1), data(2)], [data(0), data(9)],
    [1, data(0)]])
def test_entry_that_changes_while_it_is_read(plugin, model, slot,
                                             monkeypatch, table):
    """Bytes read by an entry that then is another one do not count."""
    model.entries(table)
    after = [data(20 + n) for n in range(len(table))]
    real = os.preadv
    done = []

    def preadv(*arguments):
        if not done:
            model.entries(after)
        done.append(real(*arguments))
        return done[-1]

    monkeypatch.setattr(os, 'preadv', preadv)
    assert read(plugin, slot, 0, len(table) * CLUSTER) == b''.join(
        map(model.content, after))


def test_tables_that_never_rest(plugin, model, slot, monkeypatch):
    model.entries([data(0), data(7)])
    real = os.preadv
    turn = []

    def preadv(*arguments):
        turn.append(model.entries([data(10 + len(turn)), data(7)]))
        return real(*arguments)

    monkeypatch.setattr(os, 'preadv', preadv)
    with pytest.raises(OSError, match='keep changing'):
        read(plugin, slot, 0, 2 * CLUSTER)


def test_header_may_lose_its_backing(plugin, model, slot):
    model.entries([data(3)])
    model.write(BASE, qcow2.Header(
        model.size, 12, L1 - BASE, qcow2.l1_entries(model.size, CLUSTER),
        0).pack())
    assert read(plugin, slot, 0, CLUSTER) == model.clusters[3]


def test_short_reads_go_on(plugin, model, slot, monkeypatch):
    model.entries([data(n) for n in range(4)])
    real = os.preadv
    monkeypatch.setattr(os, 'preadv', lambda fd, parts, place: real(
        fd, (parts[0][:1000],), place))
    assert read(plugin, slot, 0, 4 * CLUSTER) == b''.join(model.clusters[:4])
    monkeypatch.setattr(os, 'preadv', lambda *_: 0)
    with pytest.raises(OSError) as caught:
        read(plugin, slot, 0, CLUSTER)
    assert caught.value.errno == plugin.nbdkit.error == errno.EIO


# Opening and parameters

@pytest.mark.parametrize('name', [
    '', '.', '..', '../public/images/image-1', 'image-1\n', 'x' * 65, '-a',
    'image-1/', 'ımage-1', 'image-2'])
def test_names(plugin, slot, name):
    plugin.nbdkit.name = name
    with pytest.raises(OSError) as caught:
        plugin.open(True)
    assert caught.value.errno == plugin.nbdkit.error == errno.ENOENT


@pytest.mark.parametrize('text', [
    b'', b'[' * 9000, b'[]', b'{"serial": 3}', b'\xff',
    b'{"serial": 1e999, "virtual_size": 512}'])
def test_descriptions_without_sense(plugin, tmp_path, text, monkeypatch):
    made = Model(tmp_path)
    made.close()
    (made.path.parent / 'images' / IMAGE).write_bytes(text)
    monkeypatch.setattr(plugin.Settings, 'root', str(tmp_path))
    plugin.nbdkit.name = IMAGE
    with pytest.raises(OSError) as caught:
        plugin.open(True)
    assert caught.value.errno == errno.ENOENT


@hypothesis.settings(relaxed, max_examples=300)
@hypothesis.given(st.binary(max_size=112), st.integers(0, 111))
def test_hostile_headers(plugin, model, slot, garbage, at):
    """Opening fails cleanly, or what is there is harmless."""
    model.header()
    model.write(BASE + at, garbage[:112 - at])
    try:
        other = plugin.open(True)
    except OSError as error:
        assert error.errno == errno.ENOENT
        return
    assert plugin.get_size(other) == model.size
    plugin.close(other)


def test_list_exports(plugin):
    assert plugin.list_exports(True, False) == []


def test_config(plugin, monkeypatch):
    for key in ('root', 'agent', 'wait'):
        monkeypatch.setattr(plugin.Settings, key, '')
    with pytest.raises(ValueError, match='root='):
        plugin.config_complete()
    plugin.config('root', 'x')
    plugin.config('wait', '0.5')
    plugin.config_complete()
    assert os.path.isabs(plugin.Settings.root)
    for key, value in [('other', '1'), ('wait', '-1'), ('wait', 'nan'),
                       ('wait', 'x')]:
        with pytest.raises(ValueError):
            plugin.config(key, value)
    assert plugin.thread_model() == 3
