# SPDX-License-Identifier: Apache-2.0
"""µVMs in a repository: taken apart, stored, and put together again."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import tempfile

import microvms
import numpy as np
import pytest
from disks import (
    BLOCK,
    disk,
    make_draft,
    make_repository,
    open_repository,
    put,
    write_raw,
)
from hostile import bounded, variants
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import (
    contents,
    exception,
    journal,
    publish,
    repack,
    upkeep,
)
from fastboot_common.microvm import artifact, blob, pages, shelf, stream
from fastboot_nova import mirror

PAGE = 4096
ROOT = 'ab' * 32


def page(seed):
    return random.Random(seed).randbytes(PAGE)


class TestStream:

    @given(st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=40),
           st.integers(1, 9), st.binary(max_size=50))
    def test_all_pages_are_found(self, kinds, per_section, front):
        data, places = microvms.qemu_stream(
            [None if kind is None else page(kind) for kind in kinds],
            per_section)
        found = stream.pages(front + data, len(front))
        assert [at - len(front) for at in found] == places

    @settings(deadline=None)
    @given(st.randoms(use_true_random=False))
    def test_damaged(self, rng):
        data, places = microvms.qemu_stream(
            [page(1), None, page(2), None, page(3)] * 3, 4)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(places))
            at = places[at] - rng.randrange(1, 60)
            changed[at] ^= 1 << rng.randrange(8)
        found = list(stream.pages(bytes(changed), 0))
        ordered_and_inside(found, len(changed))

    @given(st.integers(0, 30_000))
    def test_cut_off(self, length):
        data, places = microvms.qemu_stream([page(1), None, page(2)] * 2, 4)
        found = list(stream.pages(data[:length], 0))
        assert found == [at for at in places if at + PAGE <= length]

    @given(st.binary(max_size=300), st.integers(0, 400))
    def test_anything(self, data, start):
        ordered_and_inside(list(stream.pages(data, start)), len(data))

    @pytest.mark.parametrize('old, new', [
        (b'QEVM\0\0\0\3', b'QEVM\0\0\0\4'),
        (b'\3ram\0\0\0\0', b'\3rom\0\0\0\0'),
        (b'\3ram\0\0\0\0\0\0\0\4', b'\3ram\0\0\0\0\0\0\0\5'),
        (b'\7\0\0\0\2pc', b'\7\0\0\0\2pc\5\0'),
        (b'\4bios', b'\3ram'), (b'\x7e\0\0\0\2', b'\x7e\0\0\0\3')])
    def test_what_is_not_known_has_no_pages(self, old, new):
        data, _ = microvms.qemu_stream([page(1)])
        assert old in data
        assert not stream.pages(data.replace(old, new, 1), 0)

    def test_no_page_behind_its_block(self):
        data, places = microvms.qemu_stream([page(1), page(2)])
        at = places[1] - 8
        changed = data[:at] + b'\0\0\0\0\0\0\x20\x28' + data[at + 8:]
        assert list(stream.pages(changed, 0)) == places[:1]


def ordered_and_inside(found, size):
    ends = [0, *(at + PAGE for at in found)]
    assert all(end <= at for end, at in zip(ends, found, strict=False))
    assert ends[-1] <= size


def reader(data):
    """A function that reads pages of some bytes."""
    def read(numbers):
        return b''.join(
            data[number * PAGE:(number + 1) * PAGE].ljust(PAGE, b'\0')
            for number in numbers.tolist())
    return read


@st.composite
def parts(draw):
    """A file with pages somewhere: its bytes, and where they are."""
    kinds = draw(st.lists(st.integers(0, 6), max_size=30))
    data, known = bytearray(), []
    for kind in kinds:
        data += draw(st.binary(max_size=12))
        if kind == 6:
            data += random.Random(len(data)).randbytes(5000)
            continue
        known.append(len(data))
        data += page(kind) if kind else bytes(PAGE)
    data += draw(st.binary(max_size=20))
    return bytes(data), draw(st.sampled_from((known, known[::2], [])))


class TestBlob:

    @settings(deadline=None)
    @given(parts(), parts(), st.booleans())
    def test_what_is_taken_apart_is_put_together(self, memory, drive, shared):
        image = page(1) + bytes(PAGE) + page(3) if shared else b''
        known = {hashlib.sha256(image[at:at + PAGE]).digest(): at // PAGE
                 for at in range(0, len(image), PAGE)}
        made, data = build({'memory': memory, 'disk.qcow2': drive}, known)
        found = blob.Blob.read(reader(data), len(data))
        assert (found.image, found.root) == ('image', ROOT)
        assert found.description == b'{}'
        skip = len(made.head()) // PAGE
        for name, (whole, _) in {'memory': memory,
                                 'disk.qcow2': drive}.items():
            layout = found.layouts[name]
            assert layout.size == len(whole)
            for piece in (7000, 1 << 20):
                joined = list(layout.join(
                    lambda numbers: reader(data)(numbers + skip),
                    reader(image), piece))
                assert b''.join(joined) == whole
                assert all(len(one) == piece for one in joined[:-1])
        if shared and not made.count:
            assert len(data) == len(made.head())

    def test_many_pages(self, monkeypatch):
        monkeypatch.setattr(pages, '_BATCH', 7)
        whole = b''.join(page(number % 20) for number in range(100))
        whole += bytes(50 * PAGE) + b'end'
        made, data = build({'memory': (whole, []), 'disk.qcow2': (b'', [])})
        assert made.count == 20
        skip = len(made.head()) // PAGE
        assert b''.join(made.layouts['memory'].join(
            lambda numbers: reader(data)(numbers + skip), reader(b''),
            1000)) == whole

    def test_hostile(self):
        whole = b'x' * 10 + page(1) + page(2) + bytes(3 * PAGE) + b'end'
        _, data = build({'memory': (whole, [10, 10 + PAGE]),
                         'disk.qcow2': (page(1), [])})
        with bounded():
            for variant in variants(data):
                read_any(variant)
            for variant in variants(data[:600], 600):
                read_any(variant + data[600:])

    @pytest.mark.parametrize('row', [
        (PAGE, 0, 1, 0), (0, 3, 1, 0), (0, 0, 0, 0), (0, 0, 2, 0),
        (0, 0, 1, 1), (0, 1, 1, 1 << 63), (0, 2, 1, 1), (0, 2, 1 << 26, 0),
        (9, 2, 1 << 20, 0)])
    def test_rows_without_sense(self, row):
        rows = np.array([row], pages.DTYPE).tobytes()
        with pytest.raises(exception.Corrupt):
            pages.Layout.parse(rows, b'abc', 1)

    def test_a_newer_one(self):
        _, data = build({'memory': (b'a', []), 'disk.qcow2': (b'b', [])})
        newer = data[:8] + b'\2' + data[9:]
        with pytest.raises(exception.UnknownVersion):
            blob.Blob.read(reader(newer), len(newer))

    def test_a_source_that_has_less(self):
        made, _ = build({'memory': (page(1), []), 'disk.qcow2': (b'', [])})
        with pytest.raises(exception.Corrupt):
            list(made.layouts['memory'].join(
                lambda numbers: b'', reader(b''), PAGE))


def build(found, known=None):
    """A blob: what it is, and its bytes."""
    builder = blob.Builder(known or {})
    for name, (data, places) in found.items():
        builder.add(name, memoryview(data), places)
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name, 'blob')
        return builder.write(path, 'image', ROOT, b'{}'), path.read_bytes()


def read_any(data):
    try:
        found = blob.Blob.read(reader(data), len(data))
        for layout in found.layouts.values():
            if layout.size < 1 << 24:
                size = sum(map(len, layout.join(
                    reader(data), reader(b''), 1 << 20)))
                assert size == layout.size
    except exception.Corrupt:
        pass


# The repository

SIZE = 60 * BLOCK


class Store:
    """A repository of images, one of µVMs in it, and a µVM of each image."""

    def __init__(self, path, block=4 * BLOCK):
        self.path = path
        self.images = make_repository(path / 'repo', block)
        self.microvms = make_repository(path / 'repo' / 'microvms')
        self.image = disk(SIZE, 1, zeros=.1)

    def add(self, image_id, data=None, memory=(), boot=range(8), **options):
        """An image and its artifact."""
        data = self.image if data is None else data
        put(self.images, self.path / 'work', image_id, data, boot, **options)
        found, _ = microvms.qemu_stream(
            [page(at) for at in range(30)] + [None] * 20
            + [data[at * PAGE:(at + 1) * PAGE] for at in range(24)]
            + list(memory))
        room = self.path / image_id
        microvms.make(room, found, b'x' * 5000 + page(2) + page(77), SIZE)
        return room

    def put(self, image_id, room=None):
        images = open_repository(self.path / 'repo')
        publisher = publish.Publisher(
            open_repository(self.path / 'repo' / 'microvms'),
            self.path / 'work' / 'cache', threads=2, boot_level=1)
        return shelf.put(room or self.path / image_id,
                         images.image(image_id), images, publisher,
                         self.path / 'work')

    def take(self, image_id, target):
        target.mkdir()
        return shelf.take(shelf.find(self.microvms.state(), image_id),
                          self.microvms, self.images.image(image_id),
                          self.images, target)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def same(one, other):
    assert {path.name for path in other.iterdir()} == {
        'memory', 'disk.qcow2', 'microvm.json'}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_what_is_put_is_taken(store, tmp_path):
    one = store.add('one', memory=[page(100)], owner='p',
                    visibility='private')
    done = store.put('one')
    assert done.published.created
    assert done.published.image.domain == 'project-p'
    # Of the 24 pages of the disk, zeros are not looked for.
    assert done.shared == sum(
        any(store.image[at * PAGE:(at + 1) * PAGE]) for at in range(24))
    store.take('one', tmp_path / 'again')
    same(one, tmp_path / 'again')
    assert not list(upkeep.check(store.microvms, deep=True))
    assert not store.put('one').published.created
    assert not [path for path in (tmp_path / 'work').iterdir()
                if path.name.startswith('blob')]


def test_of_another_class_than_the_journal_says(store, tmp_path):
    store.add('one')
    entry = store.put('one').published.image
    name = shelf.Name('one', 'f' * 64)
    entry = dataclasses.replace(entry, image_id=name.id, name=name.text)
    (tmp_path / 'again').mkdir()
    with pytest.raises(exception.Corrupt, match='another class'):
        shelf.take(entry, store.microvms, store.images.image('one'),
                   store.images, tmp_path / 'again')
    assert not list((tmp_path / 'again').iterdir())


def test_a_derived_one_adds_what_is_its_own(store, tmp_path):
    store.add('one')
    changed = store.image[:-BLOCK] + page(5)
    two = store.add('two', changed, [page(200)])
    first = store.put('one').published.new_bytes
    second = store.put('two').published.new_bytes
    # Its head, what is random in it, and a page.
    assert second < first / 2
    store.take('two', tmp_path / 'again')
    same(two, tmp_path / 'again')


def test_what_is_left_when_the_first_is_removed(store, tmp_path):
    store.add('one')
    two = store.add('two', store.image[:-BLOCK] + page(5))
    first = store.put('one').published.image
    store.put('two')
    store.microvms.remove(first.image_id)
    upkeep.collect(store.microvms, 0, 0)
    moved = repack.repack(store.microvms, 1.0, threads=2)
    assert moved.after < moved.before
    upkeep.collect(store.microvms, 0, 0)
    store.take('two', tmp_path / 'again')
    same(two, tmp_path / 'again')
    assert not list(upkeep.check(store.microvms, deep=True))


def test_two_classes(store, tmp_path, monkeypatch):
    store.add('one')
    store.put('one')
    key = microvms.a_key
    monkeypatch.setattr(microvms, 'a_key', lambda: key(qemu='8'))
    other = microvms.make(tmp_path / 'other', size=SIZE)
    store.put('one', tmp_path / 'other')
    state = store.microvms.state()
    with pytest.raises(exception.Invalid, match='choose a class'):
        shelf.find(state, 'one')
    found = shelf.find(state, 'one', other.key.digest[:9])
    assert shelf.Name.of(found).group == other.key.digest
    for words in (('two',), ('one', 'x')):
        with pytest.raises(exception.NotFound):
            shelf.find(state, *words)


def test_names():
    name = shelf.Name('i' * 64, 'ab' * 32)
    image = journal.Image(name.id, name.text, 1, 'ab' * 32, 5, 4096)
    image.check()
    assert shelf.Name.of(image) == name
    for other in ('x', name.text + '0', name.text[1:]):
        with pytest.raises(exception.Corrupt):
            shelf.Name.of(journal.Image(name.id, other, 1, '', 5, 4096))


def test_of_another_image(store, tmp_path):
    store.add('one')
    put(store.images, tmp_path / 'work', 'small', b'x' * 512)
    with pytest.raises(exception.Invalid):
        store.put('small', tmp_path / 'one')


def test_baked_anew(store, tmp_path):
    store.add('one')
    store.put('one')
    store.microvms.remove(shelf.find(
        store.microvms.state(), 'one').image_id)
    room = tmp_path / 'anew'
    microvms.make(room, size=SIZE)
    store.put('one', room)
    store.take('one', tmp_path / 'again')
    same(room, tmp_path / 'again')
    # Not silently in the place of the first.
    with pytest.raises(exception.Exists):
        store.put('one', tmp_path / 'one')


def test_an_image_that_is_another_now(store, tmp_path):
    store.add('one')
    store.put('one')
    store.images.remove('one')
    with pytest.raises(exception.NotFound):
        store.take('one', tmp_path / 'none')
    put(store.images, tmp_path / 'work', 'one',
        store.image[:-512] + b'x' * 512)
    with pytest.raises(exception.Corrupt, match='another content'):
        store.take('one', tmp_path / 'again')
    assert not list((tmp_path / 'again').iterdir())


def test_a_damaged_artifact_is_not_published(store):
    room = store.add('one')
    with (room / 'memory').open('r+b') as file:
        file.seek(100_000)
        file.write(b'!')
    with pytest.raises(exception.Corrupt):
        store.put('one')
    assert not store.microvms.state().images


def test_a_wrong_page_is_noticed(store, tmp_path):
    """The repository's digests prove blocks, the artifact's their order."""
    room = store.add('one')
    builder = blob.Builder({hashlib.sha256(page(3)).digest(): 9})
    for name in blob.PARTS:
        builder.add(name, memoryview((room / name).read_bytes()), [])
    path = tmp_path / 'blob'
    builder.write(path, 'one', ROOT, (room / 'microvm.json').read_bytes())
    data = path.read_bytes()
    found = blob.Blob.read(reader(data), len(data))
    target = tmp_path / 'target'
    target.mkdir()
    wrong = reader(data[::-1])
    with pytest.raises(exception.Corrupt, match='not what was baked'):
        found.unpack(target, wrong, wrong, lambda count: None)
    assert not list(target.iterdir())


def test_hosts_mirror_all_of_it(store, tmp_path):
    store.add('one')
    done = store.put('one')
    source = open_repository(tmp_path / 'repo' / 'microvms').store
    host = mirror.Mirror(tmp_path / 'mirror', source)
    host.refresh()
    assert host.pull(done.published.image) == done.published.stored_bytes
    assert host.ready(done.published.image)


@pytest.mark.parametrize('block', [4096, 16384, 65536])
def test_contents(tmp_path, block):
    repo = make_repository(tmp_path / 'repo', block)
    data = disk(3 << 20, 1, zeros=.4) + page(1) + b'y' * 512
    count = -(-len(data) // block)
    done = put(repo, tmp_path / 'work', 'image', data,
               random.Random(1).sample(range(count), count // 2))
    found = contents.Contents(repo, repo.read_manifest(done.image.manifest))
    for seed in range(5):
        numbers = np.array(random.Random(seed).choices(
            range(len(data) // PAGE + 20), k=300), np.int64)
        assert found.pages(numbers) == reader(data)(numbers)
    assert found.pages(np.array([], np.int64)) == b''
    empty = make_draft('empty', 0)
    empty.extents = empty.extents[:0]
    assert contents.Contents(repo, empty).pages(
        np.array([3], np.int64)) == bytes(PAGE)


def test_sparse_parts_stay_sparse(tmp_path):
    path = write_raw(tmp_path / 'raw', b'a' + bytes(8 << 20))
    fd = os.open(path, os.O_RDONLY)
    part = artifact.copy(fd, tmp_path / 'copy')
    os.close(fd)
    assert part.size == (8 << 20) + 1
    assert (tmp_path / 'copy').stat().st_blocks * 512 < 1 << 20
    assert json.dumps(part.sha256)
