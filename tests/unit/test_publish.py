# SPDX-License-Identifier: Apache-2.0
"""Publishing: what is read back is what was published."""

import concurrent.futures
import hashlib
import pathlib
import random
import resource
import sqlite3
import tempfile

import numpy as np
import pytest
from disks import (
    BLOCK,
    data_blocks,
    disk,
    make_draft,
    make_repository,
    put,
    read_back,
    replace_pack,
    write_raw,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastboot_common import (
    blocks,
    exception,
    manifest,
    publish,
    store,
    trace,
    upkeep,
)
from fastboot_common.store.local import LocalStore


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / 'repo')


@st.composite
def disks(draw):
    """A disk of few different blocks, and a boot set."""
    count = draw(st.integers(0, 80))
    kinds = draw(st.lists(st.sampled_from('0abcdr'), min_size=count,
                          max_size=count))
    rng = random.Random(draw(st.integers(0, 5)))
    parts = [{'0': bytes(BLOCK), 'r': rng.randbytes(BLOCK)}.get(
        kind, kind.encode() * BLOCK) for kind in kinds]
    data = b''.join(parts)
    cut = draw(st.integers(0, 7)) * 512
    data = data[:max(len(data) - cut, 0)]
    numbers = list(range(-(-len(data) // BLOCK)))
    boot = draw(st.lists(st.sampled_from(numbers), unique=True)) \
        if numbers else []
    return data, boot


@settings(max_examples=25, deadline=None)
@given(st.lists(disks(), min_size=1, max_size=3))
def test_what_is_read_back(images):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        repo = make_repository(path / 'repo')
        known = set()
        for number, (data, boot) in enumerate(images):
            done = put(repo, path / 'work', f'image-{number}', data, boot)
            assert read_back(repo, done.image) == data
            found = repo.read_manifest(done.image.manifest)
            here = set(data_blocks(data))
            assert found.boot.tolist() == [
                block for block in boot if block in here]
            padded = data.ljust(found.block_count * BLOCK, b'\0')
            blocks_of = {padded[at * BLOCK:(at + 1) * BLOCK] for at in here}
            assert done.new_bytes == len(blocks_of - known) * BLOCK
            known |= blocks_of
        assert not list(upkeep.check(repo, deep=True))
        assert not list((path / 'repo' / 'tmp').iterdir())


@pytest.mark.parametrize('size', blocks.BLOCK_SIZES)
def test_large_enough_for_several_batches(tmp_path, size):
    repo = make_repository(tmp_path / 'repo', size)
    data = disk(9 << 20, 1, zeros=0.5, block=size) + disk(
        4 << 20, 2, zeros=0.9, pool=40, block=size) + b'x' * 512
    count = -(-len(data) // size)
    boot = random.Random(3).sample(range(count), count // 3)
    done = put(repo, tmp_path / 'work', 'image', data, boot)
    assert read_back(repo, done.image) == data


def test_the_boot_set_lies_in_order(tmp_path, repo):
    data = disk(400 * BLOCK, 1)
    boot = random.Random(2).sample(range(400), 200)
    done = put(repo, tmp_path / 'work', 'image', data, boot)
    found = repo.read_manifest(done.image.manifest)
    from fastboot_common import extents
    numbers, packs, ordinals = extents.locate(found.extents, found.boot)
    assert len(set(packs.tolist())) == 1
    assert ordinals.tolist() == list(range(len(numbers)))


def test_packs_of_bounded_size(tmp_path, repo, monkeypatch):
    monkeypatch.setattr(publish, 'PACK', 1 << 20)
    data = disk(5 << 20, 1, zeros=0.1)
    done = put(repo, tmp_path / 'work', 'image', data, boot=range(300))
    found = repo.read_manifest(done.image.manifest)
    assert len(found.packs) >= 5
    assert all(ref.blocks <= 256 for ref in found.packs)
    assert read_back(repo, done.image) == data


def test_a_derived_image_adds_only_what_is_new(tmp_path, repo):
    data = disk(300 * BLOCK, 1, zeros=0.2)
    put(repo, tmp_path / 'work', 'base', data)
    changed = bytearray(data)
    for number in (5, 100, 299):
        changed[number * BLOCK:(number + 1) * BLOCK] = b'%4d' % number * (
            BLOCK // 4)
    done = put(repo, tmp_path / 'work', 'derived', bytes(changed),
               boot=[100, 7])
    assert done.new_bytes == 3 * BLOCK
    assert read_back(repo, done.image) == bytes(changed)


def test_again(tmp_path, repo):
    data = disk(50 * BLOCK, 1)
    first = put(repo, tmp_path / 'work', 'image', data)
    version = repo.state().version
    again = put(repo, tmp_path / 'work', 'image', data, boot=[3, 1])
    assert first.created and not again.created
    assert again.image == first.image
    assert repo.state().version == version
    for other in (disk(50 * BLOCK, 2), data[:-512], data + bytes(512)):
        with pytest.raises(exception.Exists):
            put(repo, tmp_path / 'work', 'image', other)
    assert repo.state().version == version
    assert not list((repo.store._root / 'tmp').iterdir())


def test_bytes_behind_the_end_are_no_part(tmp_path, repo):
    raw = write_raw(tmp_path / 'raw', b'x' * (3 * BLOCK))
    publisher = publish.Publisher(repo, tmp_path / 'cache')
    done = publisher.publish(raw, make_draft('image', 2 * BLOCK + 512))
    assert read_back(repo, done.image) == b'x' * (2 * BLOCK + 512)


def test_a_file_that_ends_early_is_zeros(tmp_path, repo):
    raw = write_raw(tmp_path / 'raw', b'x' * 700)
    publisher = publish.Publisher(repo, tmp_path / 'cache')
    done = publisher.publish(raw, make_draft('image', 1 << 20, boot=[200]))
    assert read_back(repo, done.image) == b'x' * 700 + bytes(
        (1 << 20) - 700)


@pytest.mark.parametrize('draft', [
    make_draft('image', 700), make_draft('image', -512),
    make_draft('image', 1 << 60), make_draft('image', 512, 8192),
    make_draft('image', 8192, boot=[2]), make_draft('image', 8192, boot=[-1]),
    make_draft('image', 8192, boot=[1, 0, 1]), make_draft('../x', 512),
])
def test_drafts_without_sense(tmp_path, repo, draft):
    raw = write_raw(tmp_path / 'raw', b'x' * 8192)
    with pytest.raises(exception.Invalid):
        publish.Publisher(repo, tmp_path / 'cache').publish(raw, draft)
    assert repo.state().version == 0


def test_a_disk_that_no_manifest_can_describe(tmp_path, repo, monkeypatch):
    put(repo, tmp_path / 'work', 'ok', disk(40 * BLOCK, 2))
    monkeypatch.setattr(manifest, 'LIMIT', 1500)
    with pytest.raises(exception.ImageRejected, match='big'):
        put(repo, tmp_path / 'work', 'big', disk(400 * BLOCK, 1, zeros=0.5),
            boot=range(0, 300, 2))
    assert repo.state().version == 1
    assert len(list(repo.store.list('packs'))) == 1
    assert not list((repo.store._root / 'tmp').iterdir())
    repo.remove('ok')
    assert upkeep.collect(repo, 0, 0).images == 1


def test_a_trace_for_which_the_manifest_has_no_room(
        tmp_path, repo, monkeypatch):
    data = disk(40 * BLOCK, 1, zeros=0)
    raw = write_raw(tmp_path / 'raw', data)
    draft = make_draft('image', len(data), boot=[3])
    rng = random.Random(1)
    draft.trace = np.array(
        [(at, rng.randrange(40) * BLOCK, BLOCK, 0) for at in range(900)],
        trace.DTYPE)
    monkeypatch.setattr(manifest, 'LIMIT', 1500)
    done = publish.Publisher(repo, tmp_path / 'cache').publish(raw, draft)
    assert read_back(repo, done.image) == data
    found = repo.read_manifest(done.image.manifest)
    assert found.boot.tolist() == [3]
    assert not len(found.trace)


def test_full_store(tmp_path, repo):
    data = disk(2 << 20, 1, zeros=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    raw = write_raw(tmp_path / 'raw', data)
    publisher = publish.Publisher(repo, tmp_path / 'cache', threads=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(exception.NoSpace):
            publisher.publish(raw, make_draft('image', len(data)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert repo.state().version == 0
    assert not list((repo.store._root / 'tmp').iterdir())
    assert not list(repo.store.list('packs'))
    done = publisher.publish(raw, make_draft('image', len(data)))
    assert read_back(repo, done.image) == data


def index_file(tmp_path):
    [path] = (tmp_path / 'work' / 'cache').glob('dedup-*.sqlite')
    return path


def test_a_lost_index(tmp_path, repo):
    data = disk(50 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'one', data)
    index_file(tmp_path).unlink()
    assert put(repo, tmp_path / 'work', 'two', data).new_bytes == 0


@pytest.mark.parametrize('harm', ['all', 'page'])
def test_a_damaged_index(tmp_path, repo, harm):
    data = disk(600 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'one', data)
    path = index_file(tmp_path)
    content = bytearray(path.read_bytes())
    if harm == 'all':
        content[:] = b'garbage!' * (len(content) // 8)
    else:
        content[3 * 4096:] = b'\xa5' * (len(content) - 3 * 4096)
    path.write_bytes(content)
    done = put(repo, tmp_path / 'work', 'two', data)
    assert read_back(repo, done.image) == data
    assert done.new_bytes == 0


@pytest.mark.parametrize('harm', [
    'UPDATE blocks SET ordinal = (ordinal + 1) % 20',
    'UPDATE blocks SET ordinal = 0 WHERE ordinal = 7',
    'UPDATE blocks SET ordinal = ordinal + 10000',
    'UPDATE packs SET index_digest = digest',
    'UPDATE packs SET size = size + 1',
])
def test_an_index_that_lies(tmp_path, repo, harm):
    data = disk(50 * BLOCK, 1)
    for image_id in ('one', 'two'):
        put(repo, tmp_path / 'work', image_id, data)
    with sqlite3.connect(index_file(tmp_path)) as db:
        assert db.execute(harm).rowcount
    db.close()
    done = put(repo, tmp_path / 'work', 'three', data)
    assert read_back(repo, done.image) == data
    assert done.new_bytes == 0


def test_an_index_of_an_older_version(tmp_path, repo):
    data = disk(50 * BLOCK, 1)
    put(repo, tmp_path / 'work', 'one', data)
    path = index_file(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.executescript('''
            CREATE TABLE packs (
                id INTEGER PRIMARY KEY, digest TEXT UNIQUE NOT NULL);
            CREATE TABLE blocks (
                digest BLOB PRIMARY KEY, pack INTEGER NOT NULL,
                ordinal INTEGER NOT NULL) WITHOUT ROWID;''')
        db.execute('INSERT INTO packs (digest) VALUES (?)',
                   tuple(repo.state().packs))
    db.close()
    for image_id in ('two', 'three'):
        assert put(repo, tmp_path / 'work', image_id, data).new_bytes == 0


@pytest.mark.parametrize('cache', ['work', 'elsewhere'])
def test_nobody_vouches_for_a_pack_that_was_replaced(tmp_path, repo, cache):
    data = disk(50 * BLOCK, 1, zeros=0)
    for image_id in ('one', 'two'):
        image = put(repo, tmp_path / 'work', image_id, data).image
    [ref] = repo.read_manifest(image.manifest).packs
    path = repo.store._root / store.object_name('packs', ref.digest)
    right = path.read_bytes()
    replace_pack(repo, ref, tmp_path)
    more = disk(10 * BLOCK, 2, zeros=0) + data
    done = put(repo, tmp_path / cache, 'three', more)
    assert read_back(repo, done.image) == more
    assert done.new_bytes == len(more)
    assert path.read_bytes() != right
    path.write_bytes(right)
    done = put(repo, tmp_path / cache, 'four', disk(
        5 * BLOCK, 3, zeros=0) + data)
    assert done.new_bytes == 5 * BLOCK


def spoiled(repo, image, harm):
    """Damage the only pack of an image; its reference and file."""
    [ref] = repo.read_manifest(image.manifest).packs
    path = repo.store._root / store.object_name('packs', ref.digest)
    if harm == 'gone':
        path.unlink()
    elif harm == 'replaced':
        replace_pack(repo, ref, repo.store._root)
    else:
        content = bytearray(path.read_bytes())
        content[ref.index_offset + 40] ^= 1
        path.write_bytes(content)
    return ref, path


@pytest.mark.parametrize('cache', ['work', 'elsewhere'])
@pytest.mark.parametrize('harm', ['gone', 'index', 'replaced'])
def test_the_same_image_mends_a_damaged_pack(tmp_path, repo, cache, harm):
    data = disk(50 * BLOCK, 1, zeros=0)
    for image_id in ('one', 'two'):
        image = put(repo, tmp_path / 'work', image_id, data).image
    ref, path = spoiled(repo, image, harm)
    done = put(repo, tmp_path / cache, 'three', data)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == ref.digest
    for image in (image, done.image):
        assert read_back(repo, image) == data


@pytest.mark.parametrize('harm', ['gone', 'index'])
def test_a_damaged_pack_does_not_stop_others(tmp_path, repo, caplog, harm):
    data = disk(50 * BLOCK, 1, zeros=0)
    for image_id in ('one', 'two'):
        image = put(repo, tmp_path / 'work', image_id, data).image
    spoiled(repo, image, harm)
    for number, cache in enumerate(('work', 'work', 'elsewhere')):
        caplog.clear()
        other = disk(20 * BLOCK, 7 + number, zeros=0)
        done = put(repo, tmp_path / cache, f'other-{number}', other + data[
            :BLOCK])
        assert read_back(repo, done.image) == other + data[:BLOCK]
        assert caplog.text.count('nothing is deduplicated') == 1


class Away(LocalStore):
    """A store whose reads of some kinds fail."""

    kinds = ()

    def _open(self, name):
        if name.startswith(self.kinds):
            raise exception.Unavailable(f'{name}: I/O error')
        return super()._open(name)


@pytest.mark.parametrize('kind', ['packs/', 'manifests/'])
def test_bad_sectors_and_a_store_that_is_away(tmp_path, repo, kind):
    data = disk(50 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'one', data)
    repo.store = Away(repo.store._root)
    repo.store.kinds = (kind, 'journal/')
    for cache in ('work', 'elsewhere'):
        with pytest.raises(exception.Unavailable, match='journal'):
            put(repo, tmp_path / cache, 'two', data)
    repo.store.kinds = (kind,)
    more = disk(10 * BLOCK, 2, zeros=0) + data
    repo._manifests.clear()
    done = put(repo, tmp_path / 'elsewhere', 'two', more)
    assert done.new_bytes == len(more)


def test_blocks_of_images_whose_manifest_is_lost(tmp_path, repo):
    data = disk(50 * BLOCK, 1, zeros=0)
    image = put(repo, tmp_path / 'work', 'one', data).image
    (repo.store._root / store.object_name(
        'manifests', image.manifest)).unlink()
    done = put(repo, tmp_path / 'elsewhere', 'two', data)
    assert done.new_bytes == len(data)
    assert read_back(repo, done.image) == data


def test_publishers_in_threads_with_one_cache(tmp_path, repo):
    images = {f'image-{number}': disk(150 * BLOCK, number, pool=200)
              for number in range(4)}
    from disks import open_repository

    def run(item):
        put(open_repository(tmp_path / 'repo'), tmp_path / 'work', *item)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, images.items()))
    state = repo.state()
    for image_id, data in images.items():
        assert read_back(repo, state.images[image_id]) == data
