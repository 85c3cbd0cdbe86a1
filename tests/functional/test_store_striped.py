# SPDX-License-Identifier: Apache-2.0
"""A repository at several places: conformance, and places that fail."""

import concurrent.futures
import itertools
import shutil
import threading
import time

import pytest
from conftest import free_port
from images import CountingStore, World, disk, fast_directory, verify
from store_conformance import (
    ABSENT,
    CONTENT,
    PACK,
    WHOLE,
    ReadTests,
    digest_of,
    pack_name,
)
from test_store_http import _no_proxy, put_file, stop_hard  # noqa: F401

from fastboot_common import exception, journal, repository, store
from fastboot_common.store import striped
from fastboot_common.store.http import HttpStore
from fastboot_common.store.local import LocalStore
from fastboot_common.store.striped import StripedStore

LARGE = CONTENT * 8


class Place(LocalStore):
    """A copy, and what can be wrong with it.

    :ivar asked: names that were asked for.
    :ivar act: called before each read of bytes.
    :ivar lies: gives other bytes, as many.
    """

    def __init__(self, path):
        path.mkdir(exist_ok=True)
        super().__init__(path)
        self.path = path
        self.asked, self.lies = [], False
        self.act = lambda: None

    def _told(self, name, ask, check):
        self.asked.append(name)
        self.act()
        data = ask()
        if self.lies:
            data = bytes([data[0] ^ 1]) + data[1:] if data else b'x'
        return store.proven(data, check)

    def get(self, name, limit=64 << 20, check=None):
        return self._told(name, lambda: super(Place, self).get(name, limit),
                          check)

    def read(self, name, offset, length, check=None):
        return self._told(name, lambda: super(Place, self).read(
            name, offset, length), check)

    def _pieces(self, name, offset):
        for data in super()._pieces(name, offset):
            yield self._told(name, lambda data=data: data, None)


@pytest.fixture
def places(tmp_path):
    return [Place(tmp_path / name) for name in ('one', 'two')]


def gone():
    raise exception.Unavailable('gone')


def both(*places):
    """Puts bytes at all places."""
    def put(name, data):
        for place in places:
            put_file(place.path, name, data)
    return put


def is_content(data):
    if data != CONTENT[:len(data)]:
        raise exception.Corrupt(PACK)


@pytest.mark.parametrize('kind', ['same', 'each its own', 'one is gone'])
class TestStriped(ReadTests):

    @pytest.fixture
    def readable(self, request, tmp_path_factory, kind):
        root = tmp_path_factory.mktemp('places')
        places = [Place(root / name) for name in ('one', 'two', 'three')]
        subject = StripedStore(places, retries=1)
        if kind == 'each its own':
            turns = itertools.cycle(places)
            return subject, lambda name, data: put_file(
                next(turns).path, name, data)
        if kind == 'one is gone':
            if any(word in request.node.name for word in (
                    'absent', 'behind', 'limit', 'shortened', 'wrong')):
                pytest.skip('the one that is gone may have it, and right')
            nobody = f'http://127.0.0.1:{free_port()}'
            subject = StripedStore(
                [HttpStore(nobody, retries=0), *places[:2]], retries=1)
            return subject, both(*places[:2])
        return subject, both(*places)


@pytest.mark.parametrize('ask', [
    lambda subject: subject.read(ABSENT, 0, 1),
    lambda subject: subject.read(PACK, 0, len(CONTENT) + 1),
    lambda subject: subject.get(PACK, check=is_content)])
def test_what_is_gone_may_be_right(places, ask):
    """No answer that nobody would ask for again."""
    both(*places)(PACK, CONTENT[:9000] + b'?')
    places[1].act = gone
    for _ in range(3):
        with pytest.raises(exception.Unavailable, match='gone'):
            ask(StripedStore(places, retries=0))
    # But the end of the journal is where the others end.
    with pytest.raises(exception.NotFound):
        StripedStore(places, retries=0).get(store.entry_name(9))


def test_both_are_read(places):
    both(*places)(PACK, CONTENT)
    subject = StripedStore(places)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for place in places:
            place.act = lambda: time.sleep(.01)
        assert b''.join(pool.map(
            lambda start: subject.read(PACK, start, 1 << 16),
            range(0, 1 << 20, 1 << 16))) == CONTENT[:1 << 20]
    assert min(len(place.asked) for place in places) >= 4


@pytest.mark.parametrize('way', ['get', 'read', 'fetch'])
def test_one_that_lies(places, tmp_path, way):
    both(*places)(PACK, CONTENT)
    places[0].lies = True
    subject = StripedStore(places)
    for number in range(8):
        if way == 'get':
            assert subject.get(PACK, check=is_content) == CONTENT
        elif way == 'read':
            assert subject.read(PACK, 0, 9000, is_content) == CONTENT[:9000]
        else:
            path = tmp_path / str(number)
            subject.fetch(PACK, path, *WHOLE)
            assert path.read_bytes() == CONTENT
    if way != 'fetch':
        # Caught once, it is not asked again for a while.
        assert len(places[0].asked) <= 1


def test_all_lie(places, tmp_path):
    both(*places)(PACK, CONTENT)
    for place in places:
        place.lies = True
    subject = StripedStore(places)
    for call in (lambda: subject.get(PACK, check=is_content),
                 lambda: subject.read(PACK, 0, 9, is_content),
                 lambda: subject.fetch(PACK, tmp_path / 'f',
                                       *WHOLE)):
        with pytest.raises(exception.Corrupt, match=PACK):
            call()
    assert not (tmp_path / 'f').exists()


def test_one_that_is_slow(places):
    both(*places)(PACK, LARGE)
    places[0].act = lambda: time.sleep(.4)
    subject = StripedStore(places)
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: subject.read(PACK, start, 1 << 17),
                      range(0, 9 << 20, 1 << 17)))
    assert time.monotonic() - begun < 3
    assert len(places[0].asked) < 8 < 60 < len(places[1].asked)


def test_a_slow_one_that_recovers(places, monkeypatch):
    monkeypatch.setattr(striped, '_FORGET', .3)
    both(*places)(PACK, LARGE)
    places[0].act = lambda: time.sleep(.1)
    subject = StripedStore(places)
    deadline = time.monotonic() + 20
    while len(places[0].asked) < 6:
        subject.read(PACK, 0, 1 << 17)
        if places[0].asked:
            places[0].act = lambda: None
        assert time.monotonic() < deadline
        time.sleep(.01)


def test_one_that_is_killed_in_the_middle(nginx, tmp_path):
    servers = []
    for name in ('one', 'two'):
        root = tmp_path / name
        put_file(root, pack_name(LARGE), LARGE)
        servers.append(nginx(root, extra='limit_rate 4m;'))
    subject = StripedStore([HttpStore(server.url, retries=0)
                            for server in servers])
    came, path = [], tmp_path / 'f'

    def tell(count):
        came.append(count)
        if len(came) == 2:
            stop_hard(servers[0])

    begun = time.monotonic()
    subject.fetch(pack_name(LARGE), path, digest_of(LARGE), len(LARGE), tell)
    assert path.read_bytes() == LARGE
    assert sum(came) == len(LARGE), 'nothing came twice'
    assert time.monotonic() - begun < 20
    assert subject._places[0].out_until
    # It is tried again, and comes back.
    servers[0].start()
    log = servers[0].prefix / 'access.log'
    before = len(log.read_text().splitlines())
    deadline = time.monotonic() + 60
    while len(log.read_text().splitlines()) < before + 3:
        subject.read(pack_name(LARGE), 0, 1 << 16)
        assert time.monotonic() < deadline
        time.sleep(.05)


def test_one_that_says_nothing(places, tmp_path):
    import socket
    both(places[1])(PACK, CONTENT)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}'
        subject = StripedStore(
            [HttpStore(url, retries=0, timeout=.3), places[1]])
        begun = time.monotonic()
        for _ in range(50):
            assert subject.read(PACK, 0, 9000) == CONTENT[:9000]
        subject.fetch(PACK, tmp_path / 'f', *WHOLE)
        # Once, or a second time: it is left out longer than this takes.
        assert time.monotonic() - begun < 2


def test_all_gone_and_back(places, monkeypatch):
    monkeypatch.setattr(striped, '_BACKOFF', .01)
    both(*places)(PACK, CONTENT)
    subject = StripedStore(places, retries=3)
    for place in places:
        place.act = gone
    with pytest.raises(exception.Unavailable, match='gone'):
        subject.get(PACK)
    assert [len(place.asked) for place in places] == [4, 4]

    def back():
        places[1].act = lambda: None
        gone()

    places[1].act = back
    assert subject.get(PACK) == CONTENT


def test_failures_at_the_same_time_count_once(places):
    subject = StripedStore(places, retries=0)
    together = threading.Barrier(8)
    for place in places:
        place.act = lambda: (together.wait(10), gone())

    def read(_number):
        with pytest.raises(exception.Unavailable):
            subject.get(PACK)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    # Each of them asked both; a place failed in one or two waves.
    assert all(1 <= place.failures <= 2 for place in subject._places)


def test_bytes_under_way_are_counted_to_zero(places):
    put_file(places[1].path, PACK, CONTENT)
    places[0].act = gone
    subject = StripedStore(places, retries=0)
    for _ in range(5):
        subject.read(PACK, 0, 5000)
        with pytest.raises(exception.Unavailable):
            subject.read(PACK, len(CONTENT), 5000)
    assert [place.waiting for place in subject._places] == [0, 0]


# The repository at several places


@pytest.fixture
def world():
    with fast_directory() as path:
        made = World(path)
        made.publish('image', disk(9000 * 4096, 1, zeros=0), range(80))
        yield made


def copies(world, count=2):
    """The repository as it is now, at several places."""
    made = []
    for number in range(count):
        path = world.path / f'copy-{number}'
        shutil.copytree(world.path / 'repo', path)
        made.append(CountingStore(path))
    return made


def test_a_copy_that_is_behind(world):
    behind, = copies(world, 1)
    image = world.publish('new', disk(90 * 4096, 2), range(9))
    ahead = CountingStore(world.path / 'repo')
    for _ in range(6):
        subject = StripedStore([behind, ahead])
        found = repository.Repository(subject)
        assert found.state().version == 2
        found.read_manifest(image.manifest)
        # With the one that is ahead gone, what is known stays.
        ahead.broken = None
        assert found.state().version == 2
        ahead.broken = ()


@pytest.mark.parametrize('name', ['head.json', 'config.json',
                                  store.entry_name(1), 'states'])
def test_a_copy_with_a_damaged_journal(world, name):
    world.repository.checkpoint()
    for _ in range(6):
        damaged, whole = copies(world)
        if name == 'states':
            path, = (world.path / 'copy-0' / 'states').glob('*/*')
        else:
            path = world.path / 'copy-0' / name
        path.chmod(0o640)
        path.write_bytes(b'{"version": "x"}')
        found = repository.Repository(StripedStore([damaged, whole]))
        assert found.state().version == 2
        for path in world.path.glob('copy-*'):
            shutil.rmtree(path)


def damage(copy, pack, frame):
    """Another byte in a frame."""
    path = copy._root / store.object_name('packs', pack.ref.digest)
    path.chmod(0o640)
    offset, length = pack.extent(frame)
    with path.open('r+b') as file:
        file.seek(offset + length // 2)
        byte = file.read(1)
        file.seek(offset + length // 2)
        file.write(bytes([byte[0] ^ 1]))


def whole(world, served):
    served.sync()
    served.acquire('image', 'guest')
    assert served.hydrate('image')
    one, here = served.find('image')
    image = journal.Image('image', '', here.serial, here.manifest, 0,
                          here.virtual_size)
    assert verify(one.path, image, world.data['image']) == 0


def test_hydration_from_two_damaged_copies(world):
    """Neighbouring frames, each whole at one place only."""
    one, two = made = copies(world)
    with world.host(LocalStore(world.path / 'repo')) as reader:
        reader.mirror.refresh()
        found = reader.mirror.read_manifest(reader.image('image').manifest)
        packs = [reader.mirror.pack_index(ref) for ref in found.packs]
    shutil.rmtree(world.path / 'host')
    pack = max(packs, key=lambda index: len(index.frames))
    assert len(pack.frames) > 40
    damage(one, pack, 20)
    damage(two, pack, 21)
    with world.host(StripedStore(made)) as served:
        whole(world, served)


def test_hydration_while_one_copy_goes(world):
    one, two = copies(world)
    real = one.read

    def read(*words):
        if one.bytes > 4 << 20:
            one.broken = None
        return real(*words)

    one.read = read
    with world.host(StripedStore([one, two])) as served:
        whole(world, served)
    assert one.broken is None and two.bytes > one.bytes


def test_neighbours_come_in_one_request(world):
    """Of at least 512 KiB, where frames follow each other."""
    source = CountingStore(world.path / 'repo')
    lengths, real = [], source.read

    def read(name, offset, length, check=None):
        if name.startswith('packs/'):
            lengths.append(length)
        return real(name, offset, length, check)

    source.read = read
    with world.host(source) as served:
        served.sync()
        served.acquire('image', 'guest')
        lengths.clear()
        assert served.hydrate('image')
    large = [length for length in lengths if length >= 512 << 10]
    assert sum(large) > .9 * sum(lengths)
    assert max(lengths) < (512 << 10) + (1 << 20)
