# SPDX-License-Identifier: Apache-2.0
"""What every store must pass, by capability.

A test module for a store subclasses what its store can do, and gives the
fixtures:

``readable``
    (store, function that puts bytes under a name by other means).
``writable``, ``prunable``
    the store. Reading is done through it too, so that a store whose writers
    are elsewhere (an object store with conditional puts) needs no directory.
"""

import contextlib
import hashlib
import os
import stat
import threading
import time

import pytest

from fastboot_common import exception, store

CONTENT = bytes(range(256)) * 5000 + b'the end'


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def pack_name(data):
    return store.object_name('packs', digest_of(data))


PACK = pack_name(CONTENT)
#: What `fetch` must bring.
WHOLE = digest_of(CONTENT), len(CONTENT)
ABSENT = store.object_name('packs', 'ab' * 32)
BAD_NAMES = ['', '.', '..', '/etc/passwd', '../config.json', 'tmp/x',
             'packs/../config.json', 'config.json/', f'{PACK}.part']


def part_of(path):
    return path.with_name(f'{path.name}.part')


class ReadTests:
    """For every store."""

    def test_get(self, readable):
        subject, put = readable
        put('config.json', b'{"a": 1}')
        assert subject.get('config.json') == b'{"a": 1}'

    def test_get_of_an_empty_object(self, readable):
        subject, put = readable
        put('config.json', b'')
        assert subject.get('config.json') == b''
        assert subject.size('config.json') == 0

    def test_get_keeps_to_its_limit(self, readable):
        subject, put = readable
        put(PACK, CONTENT)
        assert subject.get(PACK, len(CONTENT)) == CONTENT
        with pytest.raises(exception.Corrupt, match=PACK):
            subject.get(PACK, len(CONTENT) - 1)

    def test_size(self, readable):
        subject, put = readable
        put(PACK, CONTENT)
        assert subject.size(PACK) == len(CONTENT)

    @pytest.mark.parametrize(('offset', 'length'), [
        (0, 1), (0, 512), (1, 1), (511, 70000), (len(CONTENT) - 1, 1),
        (len(CONTENT) - 7, 7), (0, len(CONTENT)), (1, len(CONTENT) - 1),
        (0, 0), (5, 0)])
    def test_read(self, readable, offset, length):
        subject, put = readable
        put(PACK, CONTENT)
        assert (subject.read(PACK, offset, length)
                == CONTENT[offset:offset + length])

    @pytest.mark.parametrize(('offset', 'length'), [
        (len(CONTENT), 1), (len(CONTENT) - 1, 2), (0, len(CONTENT) + 1),
        (1 << 40, 1), (0, 1 << 40)])
    def test_read_behind_the_end(self, readable, offset, length):
        subject, put = readable
        put(PACK, CONTENT)
        with pytest.raises(exception.Corrupt, match=PACK):
            subject.read(PACK, offset, length)

    @pytest.mark.parametrize(('offset', 'length'), [(-1, 1), (1, -1)])
    def test_read_of_no_range(self, readable, offset, length):
        subject, put = readable
        put(PACK, CONTENT)
        with pytest.raises(exception.Invalid):
            subject.read(PACK, offset, length)

    def test_absent(self, readable, tmp_path):
        subject, put = readable
        put('config.json', b'')
        for call in (lambda: subject.get(ABSENT),
                     lambda: subject.read(ABSENT, 0, 1),
                     lambda: subject.read(ABSENT, 0, 0),
                     lambda: subject.size(ABSENT),
                     lambda: subject.fetch(
                         ABSENT, tmp_path / 'f', 'ab' * 32, 9)):
            with pytest.raises(exception.NotFound, match=ABSENT):
                call()
        assert not (tmp_path / 'f').exists()
        assert not part_of(tmp_path / 'f').exists()

    @pytest.mark.parametrize('name', BAD_NAMES)
    def test_no_name(self, readable, tmp_path, name):
        subject, _put = readable
        path = tmp_path / 'f'
        for call in (lambda: subject.get(name),
                     lambda: subject.read(name, 0, 1),
                     lambda: subject.size(name),
                     lambda: subject.fetch(name, path, 'ab' * 32, 9)):
            with pytest.raises(exception.Invalid):
                call()
        assert not part_of(path).exists()

    def test_fetch(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        path, steps = tmp_path / 'f', []
        subject.fetch(PACK, path, *WHOLE, steps.append)
        assert path.read_bytes() == CONTENT
        assert sum(steps) == len(CONTENT)
        assert os.listdir(tmp_path) == ['f']
        assert stat.S_IMODE(path.stat().st_mode) & ~0o640 == 0

    def test_fetch_over_an_older_file(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        path = tmp_path / 'f'
        path.write_bytes(b'older')
        subject.fetch(PACK, path, *WHOLE)
        assert path.read_bytes() == CONTENT

    def test_fetch_of_wrong_bytes(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT[:-1] + b'?')
        path = tmp_path / 'f'
        path.write_bytes(b'older')
        with pytest.raises(exception.Corrupt, match=PACK):
            subject.fetch(PACK, path, *WHOLE)
        assert path.read_bytes() == b'older'
        assert not part_of(path).exists()

    def test_fetch_of_a_shortened_object(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT[:-1])
        with pytest.raises(exception.Corrupt, match=PACK):
            subject.fetch(PACK, tmp_path / 'f', *WHOLE)
        assert os.listdir(tmp_path) == []

    def test_fetch_of_a_lengthened_object(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT + bytes(9 << 20))
        path, steps = tmp_path / 'f', []
        with contextlib.suppress(exception.Corrupt):
            subject.fetch(PACK, path, *WHOLE, steps.append)
            assert path.read_bytes() == CONTENT
        assert sum(steps) <= len(CONTENT)
        assert not part_of(path).exists()

    @pytest.mark.parametrize('kept', [1, 4096, 700_001, len(CONTENT) - 1])
    def test_fetch_continues(self, readable, tmp_path, kept):
        subject, put = readable
        put(PACK, CONTENT)
        path, steps = tmp_path / 'f', []
        part_of(path).write_bytes(CONTENT[:kept])
        subject.fetch(PACK, path, *WHOLE, steps.append)
        assert path.read_bytes() == CONTENT
        assert sum(steps) == len(CONTENT) - kept

    @pytest.mark.parametrize('more', [b'', b'more'])
    def test_fetch_finds_all_there(self, readable, tmp_path, more):
        subject, put = readable
        put(PACK, CONTENT)
        path, steps = tmp_path / 'f', []
        part_of(path).write_bytes(CONTENT + more)
        subject.fetch(PACK, path, *WHOLE, steps.append)
        assert path.read_bytes() == CONTENT
        assert steps == []

    @pytest.mark.parametrize('part', [
        b'\0' * 70_000, b'\0' * len(CONTENT), CONTENT + b'more',
        b'\0' * (len(CONTENT) + 70_000)],
        ids=['short', 'whole', 'longer', 'longer and wrong'])
    def test_fetch_begins_anew_after_a_bad_part(self, readable, tmp_path,
                                                part):
        subject, put = readable
        put(PACK, CONTENT)
        path = tmp_path / 'f'
        part_of(path).write_bytes(part)
        subject.fetch(PACK, path, *WHOLE)
        assert path.read_bytes() == CONTENT
        assert os.listdir(tmp_path) == ['f']

    def test_fetch_cancelled_is_continued(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        path = tmp_path / 'f'

        def cancel(count):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            subject.fetch(PACK, path, *WHOLE, cancel)
        kept = part_of(path).stat().st_size
        assert kept > 0 and not path.exists()
        steps = []
        subject.fetch(PACK, path, *WHOLE, steps.append)
        assert path.read_bytes() == CONTENT
        assert sum(steps) == len(CONTENT) - kept

    def test_fetch_to_nowhere(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        with pytest.raises(exception.Invalid, match=PACK):
            subject.fetch(PACK, tmp_path / 'no' / 'f', *WHOLE)

    def test_fetch_does_not_follow_a_link(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        victim = tmp_path / 'victim'
        victim.write_bytes(b'precious')
        part_of(tmp_path / 'f').symlink_to(victim)
        with pytest.raises(exception.Invalid, match=PACK):
            subject.fetch(PACK, tmp_path / 'f', *WHOLE)
        assert victim.read_bytes() == b'precious'

    def test_only_one_fetches_to_a_path(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        path, met = tmp_path / 'f', []

        def another(count):
            if not met:
                with pytest.raises(exception.Busy) as raised:
                    subject.fetch(PACK, path, *WHOLE)
                met.append(raised.value)

        subject.fetch(PACK, path, *WHOLE, another)
        assert met and path.read_bytes() == CONTENT

    def test_many_fetch_to_a_path(self, readable, tmp_path):
        subject, put = readable
        put(PACK, CONTENT)
        path = tmp_path / 'f'

        def fetch():
            for _ in range(5):
                with contextlib.suppress(exception.Busy):
                    subject.fetch(PACK, path, *WHOLE)
                    assert path.read_bytes() == CONTENT

        together(fetch, 6)
        assert path.read_bytes() == CONTENT
        assert os.listdir(tmp_path) == ['f']

    def test_many_threads(self, readable, tmp_path):
        subject, put = readable
        datas = [CONTENT[n:] + bytes([n]) * n for n in range(1, 9)]
        for data in datas:
            put(pack_name(data), data)

        def read(number):
            data = datas[number]
            name = pack_name(data)
            assert subject.size(name) == len(data)
            assert subject.get(name) == data
            for offset in range(0, len(data) - 9000, 200_003):
                assert (subject.read(name, offset, 9000)
                        == data[offset:offset + 9000])
            path = tmp_path / str(number)
            subject.fetch(name, path, digest_of(data), len(data))
            assert path.read_bytes() == data

        together(read, len(datas), numbered=True)


class WriteTests:
    """For stores that publishers write to."""

    def test_create(self, writable):
        writable.create('config.json', b'one')
        assert writable.get('config.json') == b'one'

    @pytest.mark.parametrize('data', [b'one', b'two', b''])
    def test_create_is_exclusive(self, writable, data):
        name = store.entry_name(1)
        writable.create(name, b'one')
        with pytest.raises(exception.Exists, match=name):
            writable.create(name, data)
        assert writable.get(name) == b'one'

    def test_one_of_many_creates(self, writable):
        won, lost = [], []

        def create(number):
            for entry in range(1, 11):
                try:
                    writable.create(store.entry_name(entry), b'%d' % number)
                    won.append((entry, number))
                except exception.Exists:
                    lost.append((entry, number))

        together(create, 6, numbered=True)
        assert sorted(entry for entry, _number in won) == list(range(1, 11))
        assert len(lost) == 50
        for entry, number in won:
            assert writable.get(store.entry_name(entry)) == b'%d' % number

    def test_put(self, writable):
        path = scratch_file(writable, CONTENT)
        writable.put(PACK, path)
        assert writable.get(PACK) == CONTENT

    def test_put_from_elsewhere(self, writable, tmp_path):
        path = tmp_path / 'source'
        path.write_bytes(CONTENT)
        writable.put(PACK, path)
        assert writable.get(PACK) == CONTENT

    def test_put_leaves_what_is_there(self, writable):
        writable.put(PACK, scratch_file(writable, CONTENT))
        writable.put(PACK, scratch_file(writable, b'another'))
        assert writable.get(PACK) == CONTENT

    def test_put_anew(self, writable):
        writable.put(PACK, scratch_file(writable, b'damaged'))
        writable.put(PACK, scratch_file(writable, CONTENT), anew=True)
        assert writable.get(PACK) == CONTENT

    def test_many_put_the_same(self, writable):
        paths = [scratch_file(writable, CONTENT) for _ in range(6)]
        together(lambda n: writable.put(PACK, paths[n]), 6, numbered=True)
        assert writable.get(PACK) == CONTENT

    def test_put_of_an_absent_file(self, writable, tmp_path):
        with pytest.raises(exception.Invalid, match=PACK):
            writable.put(PACK, tmp_path / 'none')
        with pytest.raises(exception.NotFound):
            writable.size(PACK)

    @pytest.mark.parametrize(
        'name', ['config.json', 'head.json', store.entry_name(1)])
    def test_put_only_where_the_name_says_the_content(self, writable, name):
        with pytest.raises(exception.Invalid, match=name):
            writable.put(name, scratch_file(writable, b'x'))
        with pytest.raises(exception.NotFound):
            writable.size(name)

    def test_replace(self, writable):
        writable.replace('head.json', b'1')
        writable.replace('head.json', b'two')
        assert writable.get('head.json') == b'two'

    @pytest.mark.parametrize('name', ['config.json', store.entry_name(1)])
    def test_replace_of_a_write_once_name(self, writable, name):
        writable.create(name, b'one')
        with pytest.raises(exception.Invalid, match=name):
            writable.replace(name, b'two')
        assert writable.get(name) == b'one'

    def test_readers_see_old_or_new(self, writable):
        states = {b'%d' % n * 3000 for n in range(10)}
        writable.replace('head.json', b'0' * 3000)
        done = threading.Event()

        def write():
            for _ in range(5):
                for state in states:
                    writable.replace('head.json', state)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set() and writer.is_alive():
            assert writable.get('head.json') in states
        writer.join(60)
        assert done.is_set()

    @pytest.mark.parametrize('name', BAD_NAMES)
    def test_no_name_to_write(self, writable, name):
        for call in (lambda: writable.create(name, b''),
                     lambda: writable.replace(name, b''),
                     lambda: writable.put(
                         name, scratch_file(writable, b''))):
            with pytest.raises(exception.Invalid):
                call()

    def test_scratch_is_no_object(self, writable):
        assert writable.scratch().is_dir()


class PruneTests:
    """For stores that ``gc`` works on."""

    def test_list(self, prunable):
        datas = [bytes([n]) * (n + 1) for n in range(20)]
        before = time.time() - 60
        for data in datas:
            prunable.put(pack_name(data), scratch_file(prunable, data))
        prunable.create(store.entry_name(2), b'22')
        prunable.create(store.entry_name(1), b'1')
        prunable.create('config.json', b'')
        rows = list(prunable.list('packs'))
        assert sorted((name, size) for name, size, _time in rows) == sorted(
            (pack_name(data), len(data)) for data in datas)
        assert all(before < when < time.time() + 60
                   for _name, _size, when in rows)
        assert [row[:2] for row in prunable.list('journal')] == [
            (store.entry_name(1), 1), (store.entry_name(2), 2)]
        assert list(prunable.list('manifests')) == []

    @pytest.mark.parametrize('kind', ['', 'tmp', '..', 'config.json'])
    def test_list_of_no_kind(self, prunable, kind):
        with pytest.raises(exception.Invalid):
            prunable.list(kind)

    def test_delete(self, prunable):
        prunable.put(PACK, scratch_file(prunable, CONTENT))
        prunable.delete(PACK)
        with pytest.raises(exception.NotFound):
            prunable.size(PACK)
        assert list(prunable.list('packs')) == []
        prunable.put(PACK, scratch_file(prunable, CONTENT))
        assert prunable.get(PACK) == CONTENT

    def test_delete_of_what_is_not_there(self, prunable):
        prunable.delete(ABSENT)
        prunable.delete(ABSENT)

    def test_delete_while_listing(self, prunable):
        for n in range(10):
            data = bytes([n])
            prunable.put(pack_name(data), scratch_file(prunable, data))
        for name, _size, _time in prunable.list('packs'):
            prunable.delete(name)
        assert list(prunable.list('packs')) == []

    @pytest.mark.parametrize('name', BAD_NAMES)
    def test_delete_of_no_name(self, prunable, name):
        with pytest.raises(exception.Invalid):
            prunable.delete(name)


def scratch_file(subject, data):
    """A new file in the store's scratch directory."""
    path = subject.scratch() / f'test-{time.monotonic_ns()}-{len(data)}'
    path.write_bytes(data)
    return path


def together(work, count, numbered=False):
    """Run `work` in `count` threads and raise what any of them raised."""
    failures = []

    def run(number):
        try:
            work(*[number] * numbered)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]
