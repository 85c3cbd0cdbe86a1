# SPDX-License-Identifier: Apache-2.0
"""The store in a directory: conformance, crashes, full and sealed devices."""

import contextlib
import fcntl
import os
import pathlib
import resource
import shutil
import stat
import subprocess

import pytest
from store_conformance import (
    ABSENT,
    CONTENT,
    PACK,
    WHOLE,
    PruneTests,
    ReadTests,
    WriteTests,
    digest_of,
    part_of,
    scratch_file,
)

from fastboot_common import exception, store
from fastboot_common.store.local import LocalStore

ENTRY = store.entry_name(1)


@pytest.fixture
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('store')


@pytest.fixture
def subject(root):
    return LocalStore(root)


def put_file(root, name, data):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class TestConformance(ReadTests, WriteTests, PruneTests):

    @pytest.fixture
    def readable(self, root):
        return (LocalStore(root),
                lambda name, data: put_file(root, name, data))

    @pytest.fixture
    def writable(self, root):
        return LocalStore(root)

    @pytest.fixture
    def prunable(self, root):
        return LocalStore(root)


# What only directories have


def test_modes_and_no_litter(root, subject):
    old = os.umask(0)
    try:
        subject.create(ENTRY, b'1')
        subject.replace('head.json', b'1')
        source = scratch_file(subject, CONTENT)
        source.chmod(0o666)
        subject.put(PACK, source)
    finally:
        os.umask(old)
    assert os.listdir(root / 'tmp') == []
    for path in root.rglob('*'):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path


def test_the_group_is_handed_down(root, subject):
    root.chmod(0o2750)
    subject.put(PACK, scratch_file(subject, CONTENT))
    assert (root / PACK).parent.stat().st_mode & stat.S_ISGID


def test_a_store_that_is_not_there(root, subject, tmp_path):
    source = tmp_path / 's'
    source.write_bytes(b'x')
    root.rmdir()
    for call in (lambda: subject.get('config.json'),
                 lambda: subject.size(PACK),
                 lambda: subject.read(PACK, 0, 1),
                 lambda: subject.fetch(PACK, tmp_path / 'f', 'ab' * 32, 9),
                 lambda: subject.create(ENTRY, b''),
                 lambda: subject.put(PACK, source),
                 lambda: subject.replace('head.json', b''),
                 subject.scratch,
                 lambda: list(subject.list('packs')),
                 lambda: subject.delete(PACK)):
        with pytest.raises(exception.Unavailable, match=str(root)):
            call()
    assert not root.exists()


def test_a_relative_store_stays_where_it_was(root, monkeypatch):
    monkeypatch.chdir(root)
    subject = LocalStore('.')
    monkeypatch.chdir('/')
    subject.create('config.json', b'here')
    assert (root / 'config.json').read_bytes() == b'here'


@pytest.mark.parametrize('kind', ['link', 'pipe', 'directory'])
def test_an_object_that_is_no_file(root, subject, tmp_path, kind):
    (root / 'secret').write_bytes(b'secret')
    path = root / 'config.json'
    {'link': lambda: path.symlink_to(root / 'secret'),
     'pipe': lambda: os.mkfifo(path),
     'directory': path.mkdir}[kind]()
    for call in (lambda: subject.get('config.json'),
                 lambda: subject.size('config.json'),
                 lambda: subject.fetch(
                     'config.json', tmp_path / 'f', 'ab' * 32, 9)):
        with pytest.raises(exception.Invalid, match='config.json'):
            call()


@pytest.mark.parametrize('kind', ['link', 'pipe', 'directory'])
def test_put_of_what_is_no_file(subject, tmp_path, kind):
    path = tmp_path / 'source'
    {'link': lambda: path.symlink_to(__file__),
     'pipe': lambda: os.mkfifo(path),
     'directory': path.mkdir}[kind]()
    with pytest.raises(exception.Invalid, match=PACK):
        subject.put(PACK, path)
    with pytest.raises(exception.NotFound):
        subject.size(PACK)


def test_strangers_are_not_listed(root, subject):
    subject.put(PACK, scratch_file(subject, CONTENT))
    put_file(root, 'packs/README', b'')
    put_file(root, f'{PACK}.part', b'')
    put_file(root, f'packs/zz/{"zz" * 32}', b'')
    put_file(root, f'packs/ff/{"ab" * 32}', b'')
    (root / ABSENT).mkdir(parents=True)
    (root / store.object_name('packs', 'ac' * 32)).parent.mkdir()
    (root / store.object_name('packs', 'ac' * 32)).symlink_to(root / PACK)
    assert [row[0] for row in subject.list('packs')] == [PACK]


def test_no_hard_links(subject, monkeypatch):
    def link(source, target):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', link)
    with pytest.raises(exception.Invalid, match='hard links'):
        subject.create(ENTRY, b'1')


def test_a_link_whose_answer_was_lost(root, subject, monkeypatch):
    """NFS repeats the request, and is told that the name is taken."""
    real = os.link

    def link(source, target):
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, 'link', link)
    subject.create(ENTRY, b'1')
    assert subject.get(ENTRY) == b'1'
    assert os.listdir(root / 'tmp') == []
    with pytest.raises(exception.Exists):
        subject.create(ENTRY, b'1')


@pytest.mark.parametrize(('number', 'kind'), [
    (5, exception.Unavailable), (116, exception.Unavailable),
    (28, exception.NoSpace), (122, exception.NoSpace),
    (30, exception.Invalid), (13, exception.Invalid)])
@pytest.mark.parametrize('call', ['fsync', 'rename', 'open', 'write'])
def test_errors_of_the_device(root, subject, monkeypatch, tmp_path, call,
                              number, kind):
    source = scratch_file(subject, CONTENT)

    def fail(*_args, **_options):
        raise OSError(number, 'injected')

    actions = {
        'replace': lambda: subject.replace('head.json', b'1'),
        'put': lambda: subject.put(PACK, source),
        'fetch': lambda: LocalStore(root).fetch(
            'config.json', tmp_path / 'f', digest_of(b'x'), 1)}
    if call == 'write':
        del actions['put']  # moves
    subject.create('config.json', b'x')
    for action in actions.values():
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(kind, match='injected'):
                action()
    assert list(subject.list('packs')) == []
    assert not (tmp_path / 'f').exists()
    actions = dict(actions)
    for action in actions.values():
        action()
    assert (tmp_path / 'f').read_bytes() == b'x'


def test_a_failed_sync_leaves_nothing_to_continue(subject, monkeypatch,
                                                  tmp_path):
    """The page cache may then have what the disk has not."""
    subject.put(PACK, scratch_file(subject, CONTENT))

    def fail(_file):
        raise OSError(5, 'injected')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        with pytest.raises(exception.Unavailable):
            subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    assert os.listdir(tmp_path) == []


def test_a_part_that_is_published_while_we_open_it(subject, monkeypatch,
                                                   tmp_path):
    """Its lock is free then, but it is the finished file of another."""
    subject.put(PACK, scratch_file(subject, CONTENT))
    path, real = tmp_path / 'f', fcntl.flock
    part_of(path).write_bytes(b'finished')

    def flock(file, how):
        if part_of(path).read_bytes() == b'finished':
            os.rename(part_of(path), path)
            os.link(path, tmp_path / 'watch')
        real(file, how)

    monkeypatch.setattr(fcntl, 'flock', flock)
    descriptors = os.listdir('/proc/self/fd')
    subject.fetch(PACK, path, *WHOLE)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / 'watch').read_bytes() == b'finished'
    assert len(os.listdir('/proc/self/fd')) == len(descriptors)


# The order of things: what is synced before a name appears, and after


class Recorder:
    """Records syncs and names, by wrapping functions of os."""

    def __init__(self, patch):
        self.events = []
        for name in ('fsync', 'rename', 'link'):
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, function):
        def call(*args):
            if name == 'fsync':
                path = os.readlink(f'/proc/self/fd/{args[0]}')
                self.events.append((name, path))
            else:
                self.events.append((name, str(args[0]), str(args[1])))
            return function(*args)
        return call

    def check(self, target):
        """`target` was synced before it got its name, its directory after."""
        (at,) = [n for n, event in enumerate(self.events)
                 if event[-1] == str(target) and event[0] != 'fsync']
        source = self.events[at][1]
        assert ('fsync', source) in self.events[:at]
        assert ('fsync', str(target.parent)) in self.events[at:]


def test_write_order(root, subject, monkeypatch, tmp_path):
    source = scratch_file(subject, CONTENT)
    recorder = Recorder(monkeypatch)
    subject.create(ENTRY, b'1')
    recorder.check(root / ENTRY)
    subject.replace('head.json', b'1')
    recorder.check(root / 'head.json')
    subject.put(PACK, source)
    recorder.check(root / PACK)
    assert ('fsync', str(root / 'packs')) in recorder.events
    assert recorder.events[-1] == ('fsync', str(root))
    subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    recorder.check(tmp_path / 'f')


def test_a_taken_name_is_synced_again(root, subject, monkeypatch):
    """Who took it may have died before it was."""
    subject.put(PACK, scratch_file(subject, CONTENT))
    recorder = Recorder(monkeypatch)
    subject.put(PACK, scratch_file(subject, CONTENT))
    assert recorder.events == [
        ('fsync', str(path)) for path in
        ((root / PACK).parent, root / 'packs', root)]


# Crashes


STEPS = ('open', 'write', 'fsync', 'rename', 'link', 'mkdir', 'unlink',
         'fchmod', 'close', 'ftruncate')


class Countdown:
    """Ends the process at its n-th step, before or after doing it."""

    def __init__(self, steps, after):
        self.left, self.after = steps, after
        for name in STEPS:
            setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, function):
        def call(*args, **options):
            self.left -= 1
            if self.left == 0 and not self.after:
                os._exit(9)
            result = function(*args, **options)
            if self.left == 0:
                os._exit(9)
            return result
        return call


def crash(action, step, after):
    """Whether a child process died within `action`, at its n-th step."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            Countdown(step, after)
            action()
            status = 0
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def crash_everywhere(prepare, action, check):
    """Crash `action` at every step, each time on a fresh store.

    :param check: called with the store after the crash.
    :returns: how many crashes there were.
    """
    crashes = 0
    for after in (False, True):
        for step in range(1, 200):
            arguments = prepare()
            died = crash(lambda: action(*arguments), step, after)
            check(*arguments)
            if not died:
                break
            crashes += 1
        else:
            pytest.fail('the action never ends')
    assert crashes > 8
    return crashes


@pytest.fixture
def fresh(tmp_path):
    """A function that makes new stores, each in its own directory."""
    count = iter(range(10_000))

    def make():
        path = tmp_path / f'store{next(count)}'
        path.mkdir()
        return LocalStore(path)

    return make


def state(subject, name):
    try:
        return subject.get(name)
    except exception.NotFound:
        return None


def test_crash_in_create(fresh):
    def check(subject):
        before = state(subject, ENTRY)
        assert before in (None, b'one')
        if before is None:
            subject.create(ENTRY, b'two')
            assert subject.get(ENTRY) == b'two'
        else:
            with pytest.raises(exception.Exists):
                subject.create(ENTRY, b'two')
            assert subject.get(ENTRY) == b'one'

    crash_everywhere(lambda: (fresh(),),
                     lambda subject: subject.create(ENTRY, b'one'), check)


def test_crash_in_replace(fresh):
    def prepare():
        subject = fresh()
        subject.replace('head.json', b'old')
        return (subject,)

    def check(subject):
        assert subject.get('head.json') in (b'old', b'new')
        subject.replace('head.json', b'newer')
        assert subject.get('head.json') == b'newer'

    crash_everywhere(
        prepare, lambda subject: subject.replace('head.json', b'new'), check)


def test_crash_in_put(fresh):
    def prepare():
        subject = fresh()
        return subject, scratch_file(subject, CONTENT)

    def check(subject, _path):
        assert state(subject, PACK) in (None, CONTENT)
        subject.put(PACK, scratch_file(subject, CONTENT))
        assert subject.get(PACK) == CONTENT
        assert [row[0] for row in subject.list('packs')] == [PACK]

    crash_everywhere(
        prepare, lambda subject, path: subject.put(PACK, path), check)


def test_crash_in_put_across_devices(fresh, shm):
    def prepare():
        path = shm / 'source'
        path.write_bytes(CONTENT)
        return fresh(), path

    def check(subject, path):
        assert path.read_bytes() == CONTENT
        assert state(subject, PACK) in (None, CONTENT)
        subject.put(PACK, path)
        assert subject.get(PACK) == CONTENT

    crash_everywhere(
        prepare, lambda subject, path: subject.put(PACK, path), check)


@pytest.mark.parametrize('part', [None, CONTENT[:1000], b'\0' * 1000],
                         ids=['new', 'continued', 'bad part'])
def test_crash_in_fetch(subject, tmp_path, part):
    subject.put(PACK, scratch_file(subject, CONTENT))
    count = iter(range(10_000))

    def prepare():
        path = tmp_path / str(next(count))
        path.write_bytes(b'old')
        if part is not None:
            part_of(path).write_bytes(part)
        return (path,)

    def fetch(path):
        subject.fetch(PACK, path, *WHOLE)

    def check(path):
        assert path.read_bytes() in (b'old', CONTENT)
        fetch(path)
        assert path.read_bytes() == CONTENT
        assert not part_of(path).exists()

    crash_everywhere(prepare, fetch, check)


def test_crash_in_delete(fresh):
    def prepare():
        subject = fresh()
        subject.put(PACK, scratch_file(subject, CONTENT))
        return (subject,)

    def check(subject):
        assert state(subject, PACK) in (None, CONTENT)
        subject.delete(PACK)
        assert state(subject, PACK) is None

    for after in (False, True):
        for step in (1, 2, 3, 4):
            arguments = prepare()
            assert crash(lambda: arguments[0].delete(PACK), step, after)
            check(*arguments)


# Full, sealed and foreign devices


@pytest.fixture
def shm():
    """A directory on another file system than pytest's."""
    path = pathlib.Path(f'/dev/shm/fastboot-test-{os.getpid()}')
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f'no second file system: {error}')
    yield path
    shutil.rmtree(path)


@pytest.fixture
def small(tmp_path):
    """A file system of 4 MiB, and a function that makes it read-only."""
    if os.geteuid() != 0:
        pytest.skip('only root can mount')
    path = tmp_path / 'small'
    path.mkdir()

    def mount(*options):
        return subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', ','.join(('size=4m', *options)),
             'fastboot-test', str(path)],
            capture_output=True, text=True, timeout=60)

    done = mount()
    if done.returncode != 0:
        pytest.skip(f'cannot mount: {done.stderr}')
    yield path, lambda: mount('remount', 'ro').check_returncode()
    subprocess.run(['umount', str(path)], check=True, timeout=60)


@contextlib.contextmanager
def full(path):
    """No room in the file system of `path`."""
    filler = path / 'filler'
    with open(filler, 'wb', buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    yield
    filler.unlink()


def test_a_full_store(small, tmp_path):
    subject = LocalStore(small[0])
    subject.replace('head.json', b'old')
    source = tmp_path / 'source'
    source.write_bytes(CONTENT)
    with full(small[0]):
        for name, call in (
                (ENTRY, lambda: subject.create(ENTRY, b'1' * 10_000)),
                ('head.json', lambda: subject.replace(
                    'head.json', b'new' * 10_000)),
                (PACK, lambda: subject.put(PACK, source))):
            with pytest.raises(exception.NoSpace, match=name):
                call()
        assert subject.get('head.json') == b'old'
        assert list(subject.list('packs')) == []
        assert os.listdir(small[0] / 'tmp') == []
    assert source.read_bytes() == CONTENT
    subject.create(ENTRY, b'1')
    subject.replace('head.json', b'new')
    subject.put(PACK, source)
    assert subject.get(PACK) == CONTENT


def test_fetch_to_a_full_device_is_continued(small, subject, tmp_path):
    data = os.urandom(3 << 20)
    name = store.object_name('packs', digest_of(data))
    subject.put(name, scratch_file(subject, data))
    path = small[0] / 'f'
    (small[0] / 'ballast').write_bytes(bytes(2 << 20))
    with pytest.raises(exception.NoSpace, match=name):
        subject.fetch(name, path, digest_of(data), len(data))
    kept = part_of(path).stat().st_size
    assert kept > 1 << 20 and not path.exists()
    (small[0] / 'ballast').unlink()
    steps = []
    subject.fetch(name, path, digest_of(data), len(data), steps.append)
    assert path.read_bytes() == data
    assert sum(steps) == len(data) - kept


def test_a_limit_of_file_sizes(subject, tmp_path):
    subject.put(PACK, scratch_file(subject, CONTENT))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(exception.NoSpace, match=PACK):
            subject.fetch(PACK, tmp_path / 'f', *WHOLE)
        with pytest.raises(exception.NoSpace, match=ENTRY):
            subject.create(ENTRY, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert part_of(tmp_path / 'f').stat().st_size == 100_000
    subject.fetch(PACK, tmp_path / 'f', *WHOLE)
    subject.create(ENTRY, CONTENT)
    assert subject.get(ENTRY) == CONTENT


def test_a_read_only_store(small, tmp_path):
    subject = LocalStore(small[0])
    subject.create('config.json', b'x')
    subject.put(PACK, scratch_file(subject, CONTENT))
    source = tmp_path / 'source'
    source.write_bytes(b'y')
    small[1]()
    other = store.object_name('packs', digest_of(b'y'))
    for name, call in ((ENTRY, lambda: subject.create(ENTRY, b'1')),
                       ('head.json', lambda: subject.replace(
                           'head.json', b'1')),
                       (other, lambda: subject.put(other, source)),
                       (PACK, lambda: subject.delete(PACK))):
        with pytest.raises(exception.Invalid, match=name) as raised:
            call()
        assert 'mount options' in str(raised.value)
    assert subject.get(PACK) == CONTENT
    subject.fetch(PACK, tmp_path / 'f', *WHOLE)


def test_a_directory_of_another_user(root, subject):
    """As nobody, whom modes bind."""
    subject.create('config.json', b'x')
    root.chmod(0o500)
    outcome = as_nobody(lambda: subject.create(ENTRY, b'1'))
    root.chmod(0o700)
    assert 'Invalid' in outcome and ENTRY in outcome
    assert 'check owner, modes' in outcome
    assert state(subject, ENTRY) is None


def as_nobody(action):
    """What `action` raises in a child without privileges, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        words = 'nothing'
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            action()
        except BaseException as error:
            words = f'{type(error).__name__}: {error}'
        os.write(writing, words.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        words = answer.read()
    os.waitpid(child, 0)
    return words


def test_put_across_devices(root, subject, shm):
    source = shm / 'source'
    source.write_bytes(CONTENT)
    assert source.stat().st_dev != root.stat().st_dev
    subject.put(PACK, source)
    assert subject.get(PACK) == CONTENT
    assert stat.S_IMODE((root / PACK).stat().st_mode) == 0o640
    assert os.listdir(root / 'tmp') == []


def test_fetch_across_devices(subject, shm):
    subject.put(PACK, scratch_file(subject, CONTENT))
    subject.fetch(PACK, shm / 'f', *WHOLE)
    assert (shm / 'f').read_bytes() == CONTENT
