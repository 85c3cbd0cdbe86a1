# SPDX-License-Identifier: Apache-2.0
"""The mirror: nothing unchecked is kept or given out."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import threading

import pytest
from disks import BLOCK, data_blocks, disk, make_repository, put

from fastboot_common import exception, store, upkeep
from fastboot_common.store.local import LocalStore
from fastboot_nova.mirror import Mirror


class Source(LocalStore):
    """Counts reads of packs, and can be out of reach."""

    def __init__(self, path):
        super().__init__(path)
        self.gone = False
        self.packs = 0

    def _count(self, name):
        if self.gone:
            raise exception.Unavailable('out of reach')
        self.packs += name.startswith('packs/')

    def get(self, name, limit=64 << 20, check=None):
        self._count(name)
        return super().get(name, limit, check)

    def read(self, name, offset, length, check=None):
        self._count(name)
        return super().read(name, offset, length, check)

    def fetch(self, name, *args, **options):
        self._count(name)
        super().fetch(name, *args, **options)


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / 'repo')


@pytest.fixture
def source(repo, tmp_path):
    return Source(tmp_path / 'repo')


@pytest.fixture
def mirror(source, tmp_path):
    return Mirror(tmp_path / 'mirror', source)


def plain_of(mirror, image, numbers):
    """Blocks through the mirror, by number."""
    import numpy as np
    found = mirror.read_manifest(image.manifest)
    blocks = {}
    for frame in mirror.frames(found, np.array(numbers, np.int64)):
        plain = mirror.plain(frame)
        for number, position in zip(frame.numbers.tolist(),
                                    frame.positions.tolist(), strict=True):
            blocks[number] = plain[position * BLOCK:(position + 1) * BLOCK]
    return blocks


def same(mirror, image, data):
    here = data_blocks(data)
    blocks = plain_of(mirror, image, range(-(-len(data) // BLOCK)))
    assert sorted(blocks) == here
    for number, block in blocks.items():
        assert block == data[number * BLOCK:(number + 1) * BLOCK].ljust(
            BLOCK, b'\0')


def local(mirror, kind):
    return sorted(path for path in (mirror.path / kind).glob('??/*'))


def test_whole_packs_and_without_the_source(tmp_path, repo, source, mirror):
    data = disk(200 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(200)).image
    mirror.refresh()
    assert not mirror.ready(image)
    assert mirror.pull(image) > 0
    assert mirror.ready(image)
    (mirror.path / 'ready' / 'image').write_bytes(b'\xff')
    assert not mirror.ready(image)
    assert not mirror.pull(image)
    assert mirror.ready(image)
    assert len(local(mirror, 'packs')) == 1
    assert not local(mirror, 'partial')
    before = source.packs
    source.gone = True
    again = Mirror(tmp_path / 'mirror', source)
    assert again.state == mirror.state
    assert again.pull(image) == 0
    same(again, image, data)
    assert source.packs == before
    with pytest.raises(exception.Unavailable):
        again.refresh()


def test_never_synced(tmp_path, repo, source):
    source.gone = True
    with pytest.raises(exception.Unavailable):
        Mirror(tmp_path / 'mirror', source)


def test_partial_packs(tmp_path, repo, source, mirror):
    """Of a pack that is mostly others', some frames only."""
    data = disk(3000 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'large', data, range(3000))
    small = data[700 * BLOCK:710 * BLOCK]
    image = put(repo, tmp_path / 'work', 'small', small, range(10)).image
    mirror.refresh()
    fetched = mirror.pull(image)
    [path] = local(mirror, 'partial')
    assert not local(mirror, 'packs')
    assert fetched < path.stat().st_size / 4
    source.gone = True
    again = Mirror(tmp_path / 'mirror', source)
    same(again, image, small)
    with pytest.raises(exception.Unavailable):
        plain_of(again, mirror.state.images['large'], [0])
    source.gone = False
    same(again, mirror.state.images['large'], data)
    # Nothing of that was kept, and pulling it takes the pack whole.
    source.gone = True
    with pytest.raises(exception.Unavailable):
        plain_of(again, mirror.state.images['large'], [0])
    source.gone = False
    again.pull(mirror.state.images['large'])
    assert local(mirror, 'packs') and not local(mirror, 'partial')
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, small)


@pytest.mark.parametrize('place', ['frame', 'index', 'cut', 'empty'])
def test_a_damaged_local_pack_heals(tmp_path, repo, source, mirror, place):
    data = disk(100 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(100)).image
    mirror.refresh()
    mirror.pull(image)
    [path] = local(mirror, 'packs')
    good = path.read_bytes()
    bad = bytearray(good)
    if place == 'frame':
        bad[1000] ^= 1
    elif place == 'index':
        bad[-100] ^= 1
    else:
        bad = bad[:2000] if place == 'cut' else b''
    path.chmod(0o600)
    path.write_bytes(bad)
    again = Mirror(tmp_path / 'mirror', source)
    same(again, image, data)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, data)


class BadSector:
    """The disk cannot read some files, by what they are and not by name."""

    def __init__(self, monkeypatch):
        self._held = []  # or another file would get the number
        for owner, name in ((os, 'pread'), (os, 'read')):
            monkeypatch.setattr(owner, name, self._guarded(
                getattr(owner, name)))
        real = pathlib.Path.read_bytes
        monkeypatch.setattr(
            pathlib.Path, 'read_bytes',
            lambda path: self._look(path) or real(path))

    def hit(self, path):
        self._held.append(os.open(path, os.O_RDONLY))

    def _guarded(self, real):
        def call(fd, *args):
            self._look(fd)
            return real(fd, *args)
        return call

    def _look(self, which):
        if os.path.exists(which) and os.stat(which).st_ino in [
                os.fstat(fd).st_ino for fd in self._held]:
            raise OSError(errno.EIO, 'Input/output error')

    def close(self):
        for fd in self._held:
            os.close(fd)


@pytest.fixture
def bad_sector(monkeypatch):
    with contextlib.closing(BadSector(monkeypatch)) as one:
        yield one


@pytest.mark.parametrize('kind', ['packs', 'partial', 'manifests', 'ready'])
def test_a_bad_sector_heals(tmp_path, repo, source, mirror, kind,
                            bad_sector):
    data = disk(3000 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'large', data, range(3000))
    if kind == 'partial':
        data = data[700 * BLOCK:710 * BLOCK]
    image = put(repo, tmp_path / 'work', 'image', data,
                range(len(data) // BLOCK)).image
    mirror.refresh()
    mirror.pull(image)
    path = (mirror.path / 'ready' / 'image' if kind == 'ready'
            else local(mirror, kind)[0])
    bad_sector.hit(path)
    again = Mirror(tmp_path / 'mirror', source)
    assert again.ready(image) == (kind != 'ready')
    same(again, image, data)
    assert not again.ready(image), 'what was lost must come'
    again.pull(image)
    assert again.ready(image)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, data)


def test_a_bad_sector_in_a_partial_pack_that_grows(
        tmp_path, repo, source, mirror, bad_sector):
    data = disk(3000 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'large', data, range(3000))
    images = [put(repo, tmp_path / 'work', f'image-{at}',
                  data[at * BLOCK:(at + 10) * BLOCK], range(10)).image
              for at in (700, 705)]
    mirror.refresh()
    mirror.pull(images[0])
    bad_sector.hit(local(mirror, 'partial')[0])
    mirror.pull(images[1])
    same(mirror, images[1], data[705 * BLOCK:715 * BLOCK])


def test_a_bad_sector_in_what_came_of_a_pack(
        tmp_path, repo, source, mirror, bad_sector):
    data = disk(300 * BLOCK, 1, zeros=0)
    image = put(repo, tmp_path / 'work', 'image', data, range(300)).image
    mirror.refresh()
    [ref] = mirror.read_manifest(image.manifest).packs
    part = mirror._path('packs', ref.digest).with_name(f'{ref.digest}.part')
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(9999))
    bad_sector.hit(part)
    with pytest.raises(exception.Corrupt, match='fetched again'):
        mirror.pull(image)
    mirror.pull(image)
    same(mirror, image, data)


@pytest.mark.parametrize('number', [errno.EIO, errno.EROFS])
def test_what_cannot_be_mended_is_given_out(tmp_path, repo, source, mirror,
                                            monkeypatch, number):
    """After an error the kernel may let nobody write."""
    data = disk(100 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(100)).image
    mirror.refresh()
    mirror.pull(image)
    [path] = local(mirror, 'packs')
    os.truncate(path, 2000)

    def fail(*_args):
        raise OSError(number, 'injected')

    monkeypatch.setattr(os, 'fdatasync', fail)
    same(mirror, image, data)


def test_a_damaged_source_gives_nothing(tmp_path, repo, source, mirror):
    data = disk(100 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(9)).image
    mirror.refresh()
    for path in (tmp_path / 'repo' / 'packs').glob('*/*'):
        path.chmod(0o600)
        bad = bytearray(path.read_bytes())
        bad[500] ^= 1
        path.write_bytes(bad)
    with pytest.raises(exception.Corrupt, match='pack'):
        mirror.pull(image)
    assert not mirror.ready(image)
    with pytest.raises(exception.Corrupt, match='pack'):
        same(mirror, image, data)
    assert not local(mirror, 'packs')


def test_a_damaged_manifest(tmp_path, repo, source, mirror):
    data = disk(30 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data).image
    mirror.refresh()
    remote = tmp_path / 'repo' / store.object_name(
        'manifests', image.manifest)
    good = remote.read_bytes()
    remote.chmod(0o600)
    remote.write_bytes(good[:-1])
    with pytest.raises(exception.Corrupt, match=image.manifest):
        mirror.pull(image)
    assert not local(mirror, 'manifests')
    remote.write_bytes(good)
    mirror.pull(image)
    [path] = local(mirror, 'manifests')
    path.write_bytes(good[:50])
    same(Mirror(tmp_path / 'mirror', source), image, data)
    assert path.read_bytes() == good


@pytest.mark.parametrize('text', [b'', b'{}', b'<html>sign in</html>'])
def test_a_configuration_that_is_none_is_not_kept(tmp_path, repo, source,
                                                  text):
    path = tmp_path / 'repo' / 'config.json'
    good = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(text)
    with pytest.raises(exception.Corrupt):
        Mirror(tmp_path / 'mirror', source)
    path.write_bytes(good)
    Mirror(tmp_path / 'mirror', source)


@pytest.mark.parametrize('text', [b'', b'{}', b'[]', b'{"version":1e999}'])
def test_a_damaged_state_is_read_again(tmp_path, repo, source, mirror, text):
    data = disk(30 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data).image
    mirror.refresh()
    (tmp_path / 'mirror' / 'state.json').write_bytes(text)
    again = Mirror(tmp_path / 'mirror', source)
    assert again.refresh().images == {'image': image}


def test_another_repository(tmp_path, repo, mirror):
    make_repository(tmp_path / 'other')
    with pytest.raises(exception.Invalid):
        Mirror(tmp_path / 'mirror', LocalStore(tmp_path / 'other')).refresh()


def test_prune(tmp_path, repo, source, mirror):
    one, two = disk(100 * BLOCK, 1), disk(100 * BLOCK, 2)
    kept = put(repo, tmp_path / 'work', 'one', one, range(100)).image
    gone = put(repo, tmp_path / 'work', 'two', two, range(100)).image
    mirror.refresh()
    mirror.pull(kept)
    mirror.pull(gone)
    assert mirror.prune({kept.manifest, gone.manifest}) == 0
    repo.remove('two')
    mirror.refresh()
    assert mirror.prune({kept.manifest}) > 0
    assert len(local(mirror, 'packs')) == len(local(mirror, 'manifests')) == 1
    assert not mirror.ready(gone)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), kept, one)


def aside(action, seconds=1.0):
    """Do something beside, for so long; gives what waits for its end."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(seconds)
    return thread.join


def test_prune_while_an_image_comes(tmp_path, repo, source, mirror,
                                    monkeypatch):
    """One with a pack that is here, and was nobody's until now."""
    data = disk(100 * BLOCK, 1)
    old = put(repo, tmp_path / 'work', 'old', data, range(100)).image
    mirror.refresh()
    mirror.pull(old)
    image = put(repo, tmp_path / 'work', 'new', data, range(100)).image
    repo.remove('old')
    mirror.refresh()
    unlink, waits = pathlib.Path.unlink, []

    def slow(path, **options):
        if path.parent.parent.name == 'packs' and not waits:
            waits.append(aside(lambda: mirror.pull(image)))
        unlink(path, **options)

    monkeypatch.setattr(pathlib.Path, 'unlink', slow)
    mirror.prune({image.manifest})
    waits[0]()
    assert mirror.ready(image)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, data)


def test_prune_when_an_image_just_came(tmp_path, repo, source, mirror,
                                       monkeypatch):
    """After the look whether its manifest is here."""
    data = disk(100 * BLOCK, 1)
    old = put(repo, tmp_path / 'work', 'old', data, range(100)).image
    other = put(repo, tmp_path / 'work', 'other', b'x' * BLOCK).image
    mirror.refresh()
    mirror.pull(old)
    mirror.pull(other)
    image = put(repo, tmp_path / 'work', 'new', data, range(100)).image
    repo.remove('old')
    mirror.refresh()
    read = mirror.read_manifest

    class Keep(set):
        def __iter__(self):
            return iter([image.manifest, other.manifest])

    def slow(digest):
        monkeypatch.setattr(mirror, 'read_manifest', read)
        mirror.pull(image)
        return read(digest)

    monkeypatch.setattr(mirror, 'read_manifest', slow)
    mirror.prune(Keep([image.manifest, other.manifest]))
    assert mirror.ready(image)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, data)


def test_a_pack_that_goes_while_it_is_mended(tmp_path, repo, source, mirror,
                                             monkeypatch):
    """It does not come back as one of holes that is called whole."""
    data = disk(100 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(100)).image
    mirror.refresh()
    mirror.pull(image)
    [path] = local(mirror, 'packs')
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    real = os.open

    def slow(name, flags, *mode):
        if flags & os.O_RDWR and name == path:
            path.unlink(missing_ok=True)
        return real(name, flags, *mode)

    monkeypatch.setattr(os, 'open', slow)
    again = Mirror(tmp_path / 'mirror', source)
    same(again, image, data)
    assert not local(mirror, 'packs')


def test_what_was_pruned_is_not_known_any_more(tmp_path, repo, source,
                                               mirror):
    """The same image comes again: all that it needs is here then."""
    large = disk(3000 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'large', large, range(3000))
    data = large[700 * BLOCK:710 * BLOCK]
    image = put(repo, tmp_path / 'work', 'small', data, range(10)).image
    mirror.refresh()
    mirror.pull(image)
    (mirror.path / 'ready' / 'small').unlink()
    assert mirror.prune(set()) > 0
    mirror.pull(image)
    source.gone = True
    same(Mirror(tmp_path / 'mirror', source), image, data)


def test_prune_spares_what_is_being_written(tmp_path, repo, source, mirror):
    """Another thread's temporary; one that a crash left is removed."""
    for kind in ('manifests/ab', 'ready'):
        directory = mirror.path / kind
        directory.mkdir(parents=True, exist_ok=True)
        (directory / '.name.7.tmp').write_bytes(b'new')
        (directory / '.name.8.tmp').write_bytes(b'left')
        os.utime(directory / '.name.8.tmp', (0, 0))
    mirror.prune(set())
    assert sorted(path.name for path in mirror.path.rglob('*.tmp')) == [
        '.name.7.tmp', '.name.7.tmp']


def test_many_threads(tmp_path, repo, source, mirror):
    data = disk(400 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data, range(30)).image
    mirror.refresh()

    def run(number):
        if number % 3 == 0:
            try:
                mirror.pull(image)
            except exception.Busy:
                return
        same(mirror, image, data)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(12)))
    assert not list(pathlib.Path(mirror.path).glob('**/.*.tmp'))


def test_packs_that_were_dropped(tmp_path, repo, mirror):
    """Packs that the repository dropped are named, not looked for."""
    data = disk(30 * BLOCK, 1)
    image = put(repo, tmp_path / 'work', 'image', data).image
    mirror.refresh()
    repo.remove('image')
    upkeep.collect(repo, 0, 0)
    with pytest.raises(exception.NotFound):
        same(mirror, image, data)


def test_a_host_that_was_away_for_long(tmp_path, repo, source, mirror):
    """It takes what is new; what it has and what others share, it keeps."""
    base = disk(200 * BLOCK, 1, zeros=0)
    put(repo, tmp_path / 'work', 'kept', base, range(200))
    put(repo, tmp_path / 'work', 'gone', disk(100 * BLOCK, 2), range(100))
    mirror.refresh()
    for image in mirror.state.images.values():
        mirror.pull(image)
    repo.remove('gone')
    data = base[:150 * BLOCK] + disk(20 * BLOCK, 3, zeros=0)
    new = put(repo, tmp_path / 'work', 'new', data, range(170)).image
    [(_, size)] = repo.state().packs.items() - mirror.state.packs.items()
    repo.checkpoint()
    assert upkeep.collect(repo, 0, 0).packs == 1
    again = Mirror(tmp_path / 'mirror', source)
    again.refresh()
    assert sorted(again.state.images) == ['kept', 'new']
    assert sum(map(again.pull, again.state.images.values())) == size
    assert size < 40 * BLOCK
    same(again, new, data)
    assert again.prune({image.manifest for image
                        in again.state.images.values()}) > 0
    assert {path.name for path in local(again, 'packs')} == set(
        again.state.packs)
    source.gone = True
    same(again, again.state.images['kept'], base)
    same(again, new, data)
