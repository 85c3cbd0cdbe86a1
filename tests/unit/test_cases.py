# SPDX-License-Identifier: Apache-2.0
"""What becomes of attempts, and what a build leaves to the bake behind
it."""

import contextlib
import dataclasses
import os
import threading
import time
import types

import pytest

pytest.importorskip('taskflow')

from test_bakes import HERE, OTHER
from test_eligibility import IMAGE

from fastboot_common import exception, journal
from fastboot_glance import cases, logbooks, source, staging, worker


def job(platform, image_id=IMAGE.image_id):
    return types.SimpleNamespace(
        platform=platform, image_id=image_id, force=False)


def build(waiting, *, wanted=True):
    """A build that is over.

    :param waiting: platforms of the jobs on the board.
    """
    def jobs():
        if waiting is None:
            raise exception.Unavailable('away')
        return [job(one) for one in waiting]

    tools = types.SimpleNamespace(
        registry=types.SimpleNamespace(find=lambda image_id: 'registered'),
        bakes=types.SimpleNamespace(
            look=lambda image, found: wanted, platform=HERE.text),
        board=types.SimpleNamespace(jobs=jobs),
        conf=types.SimpleNamespace(
            builder=None, bakery=types.SimpleNamespace(workers=1)))
    return cases.Build(types.SimpleNamespace(job=job('')), tools)


@pytest.mark.parametrize('waiting, keeps', [
    ([HERE.text], True), ([HERE.text] * 2, True), ([HERE.text] * 3, False),
    (['', OTHER.text] * 9 + [HERE.text], True), (None, False)])
def test_files_of_images_that_wait_do_not_fill_the_disk(waiting, keeps):
    assert build(waiting)._have_baked(IMAGE) == keeps


def test_nothing_is_kept_for_no_bake():
    assert not build([], wanted=False)._have_baked(IMAGE)


@pytest.mark.parametrize('others, way', [
    ([], False), ([job(OTHER.text)], False), ([job('', 'another')], False),
    ([job('')], True)])
def test_a_build_of_the_image_does_not_wait_for_its_bake(others, way):
    mine = job(HERE.text)
    tools = types.SimpleNamespace(
        registry=None, conf=types.SimpleNamespace(builder=None),
        board=types.SimpleNamespace(jobs=lambda: [mine, *others]))
    one = cases.Bake(types.SimpleNamespace(job=mine), tools)
    assert one._gives_way() == way


#: Directories are named by it.
WHOLE = dataclasses.replace(
    IMAGE, image_id='11111111-1111-4111-8111-111111111111')


class Book:
    """A logbook; the attempt at hand is the third."""

    def __init__(self):
        self.attempts, self.wait, self.done = 2, 0, False
        self.begun = False

    def begin(self):
        self.attempts += 1

    def take_back(self):
        self.attempts -= 1

    def put_off(self, seconds):
        self.wait = seconds


class Attempt:
    """The third attempt, which is the last, and fails."""

    def __init__(self, path, error):
        self.path = path
        self.noted, self.failed = [], []
        tools = types.SimpleNamespace(
            workdir=path, glance=types.SimpleNamespace(
                get=lambda image_id: WHOLE),
            registry=types.SimpleNamespace(
                note=lambda image, state, **values: self.noted.append(
                    (state, values['error'])),
                tell=lambda image, values: None,
                failed=lambda image, words, passing: self.failed.append(
                    passing)),
            conf=types.SimpleNamespace(
                builder=types.SimpleNamespace(
                    attempts=3, retry_wait=1, workers=1, copy_limit=0),
                bakery=types.SimpleNamespace(workers=2)))
        self.claim = types.SimpleNamespace(
            job=job(''), lost=False, cancel=threading.Event())
        self.claim.cancel.wait = lambda seconds: False
        self.book = Book()
        self.case = cases.Build(self.claim, tools)

        def fail(image, book):
            raise error

        self.case._do = fail

    def run(self):
        return self.case._attempt(WHOLE, self.book)


FULL = exception.NoSpace('the disk is full')


def test_no_room_is_not_the_images_fault(tmp_path):
    one = Attempt(tmp_path, FULL)
    with staging.open_stage(tmp_path, WHOLE.image_id) as stage:
        stage.image.write_bytes(b'x' * 100)
        (stage.image.parent / 'image.part').write_bytes(b'x')
        (stage.image.parent / 'capture').write_bytes(b'x')
    assert one.run() == 30
    assert (one.book.attempts, one.book.wait, one.failed) == (2, 0, [])
    assert one.noted == [('queued', 'no room: the disk is full')]
    # What waits takes none.
    assert [path.name for path in stage.image.parent.iterdir()
            ] == ['capture']


@pytest.mark.parametrize('took, wait', [(1, 30), (20, 40), (3600, 300)])
def test_what_is_large_is_tried_less_often(tmp_path, took, wait):
    """Where there is no room, and where there is again, soon."""
    one = Attempt(tmp_path, FULL)
    assert one.case._crowded(WHOLE, one.book, FULL, took) == wait


def test_no_room_and_another_has_the_job(tmp_path):
    one = Attempt(tmp_path, FULL)
    one.claim.lost = True
    assert one.run() == 10
    assert (one.book.attempts, one.noted) == (3, [])


@pytest.mark.parametrize('error, passing', [
    (exception.Unavailable('away'), True),
    (exception.NotFound('no data'), True),
    (exception.Corrupt('digest'), True), (OSError(5, 'I/O error'), True),
    (exception.ImageRejected('bad'), False), (ValueError('bug'), False),
    (exception.CommandFailed(['qemu-img'], -9, 'too long'), False)])
def test_whose_fault_an_error_is(tmp_path, error, passing):
    one = Attempt(tmp_path, error)
    assert one.run() is None
    assert one.failed == [passing]


def test_builders_may_have_died_of_anything(tmp_path):
    one = Attempt(tmp_path, FULL)
    one.book.attempts = 3
    assert one.run() is None
    assert one.failed == [True]


@pytest.mark.parametrize('limit, passing', [(0, True), (3, False)])
def test_another_builder_may_have_a_larger_disk(tmp_path, limit, passing):
    one = Attempt(tmp_path, source.CopyTooLarge('too large'))
    one.case._options.copy_limit = limit
    assert one.run() is None
    assert one.failed == [passing]


class Looks:
    """A job that is looked at again and again."""

    def __init__(self, path, error, kind=cases.Build, image_id=WHOLE.image_id,
                 get=lambda image_id: WHOLE):
        self.stuck, self.book = [], Book()
        self.book.attempts = 0

        def fail(*arguments):
            raise error

        tools = types.SimpleNamespace(
            workdir=path, glance=types.SimpleNamespace(get=get),
            policies=types.SimpleNamespace(refuse=lambda image: None),
            books=types.SimpleNamespace(open=lambda job: self.book),
            registry=types.SimpleNamespace(
                gone=lambda image_id: None, find=fail,
                repository=types.SimpleNamespace(state=lambda: None),
                stuck=lambda image_id, words: self.stuck.append(words)),
            conf=types.SimpleNamespace(builder=types.SimpleNamespace(
                attempts=3, retry_wait=1, wait_active=3600)))
        self.claim = types.SimpleNamespace(
            job=job('', image_id), lost=False, cancel=threading.Event())
        self.case = kind(self.claim, tools)
        self.case._attempt = fail

    def work(self):
        self.book.wait = 0
        return self.case.work()


def strange(image_id):
    raise KeyError('status')


@pytest.mark.parametrize('kind', [cases.Build, cases.Bake])
@pytest.mark.parametrize('error, get', [
    (exception.NotFound('no manifest'), lambda image_id: WHOLE),
    (exception.Corrupt('digest'), lambda image_id: WHOLE),
    (ValueError('a bug'), lambda image_id: WHOLE), (None, strange)])
def test_a_job_that_always_raises_ends(tmp_path, kind, error, get, caplog):
    one = Looks(tmp_path, error, kind, get=get)
    assert [one.work() for _ in range(3)] == [1, 2, None]
    words = str(error or "'status'")
    assert words in caplog.text
    assert [words in told for told in one.stuck] == (
        [True] if kind is cases.Build else [])


def test_other_workers_wait_as_well(tmp_path):
    one = Looks(tmp_path, ValueError('a bug'))
    one.work()
    assert (one.case.work(), one.book.attempts) == (1, 1)
    one.claim.lost = True
    one.work()
    assert one.book.attempts == 1


@pytest.mark.parametrize('error', [
    exception.Unavailable('away'), exception.NoSpace('full'),
    exception.Busy('others'), exception.ConfigError('no such directory')])
def test_what_is_not_the_jobs_fault_is_not_counted(tmp_path, error):
    one = Looks(tmp_path, error)
    with pytest.raises(type(error)):
        one.work()
    assert (one.book.attempts, one.stuck) == (0, [])


@pytest.mark.parametrize('kind', [cases.Build, cases.Bake])
def test_a_journal_that_is_not_trusted_is_no_images_fault(tmp_path, kind):
    words = 'journal entry 7 is not signed'

    def state():
        raise exception.Corrupt(words)

    one = Looks(tmp_path, exception.Corrupt(words), kind)
    one.case._registry.repository.state = state
    for _ in range(9):
        with pytest.raises(exception.Unavailable, match=words):
            one.work()
    assert (one.book.attempts, one.stuck) == (0, [])


@pytest.mark.parametrize('begun', [False, True])
def test_a_look_that_failed_builds_nothing_anew(tmp_path, begun):
    one, did = Looks(tmp_path, ValueError('a bug')), []
    one.work()
    one.book.begun = begun
    one.case._registry.find = lambda image_id: 'registered'
    one.case._registry.settle = lambda *_: did.append('settled')
    one.case._have_baked = lambda image: False
    one.case._attempt = lambda *_: did.append('built')
    assert one.work() is None
    assert did == ['built' if begun else 'settled']


def test_who_is_not_in_glance_has_no_job(tmp_path):
    """Registered by hand, under any name."""
    def get(image_id):
        raise exception.NotFound('no such image')

    one = Looks(tmp_path, None, image_id='debian-12', get=get)
    assert one.work() is None
    assert one.book.attempts == 0


def test_a_worker_looks_later_if_it_is_not_the_jobs_fault(
        tmp_path, monkeypatch):
    monkeypatch.setattr(cases.Build, 'work', Looks(
        tmp_path, exception.NoSpace('full')).case._attempt)
    released = []
    mine = worker.Worker(lambda: None, 1)
    mine._have(Claim(released), types.SimpleNamespace(
        registry=None, conf=types.SimpleNamespace(builder=None)))
    assert released == [True]
    assert list(mine._later) == ['u']


class Claim(contextlib.AbstractContextManager):
    """A claim of a build."""

    def __init__(self, released):
        self.job, self.lost = job(''), False
        self.job.uuid = 'u'
        self.release = lambda: released.append(True)

    def __exit__(self, *_):
        return None


def test_one_clock_does_not_put_a_job_off_for_years(monkeypatch):
    flow = types.SimpleNamespace(meta={})
    book = logbooks.Logbook(types.SimpleNamespace(save=lambda flow: None),
                            flow)
    book.put_off(logbooks.LONGEST_WAIT)
    now = time.time()
    # Clocks differ a little.
    monkeypatch.setattr(time, 'time', lambda: now - 60)
    assert 600 < book.wait <= 660
    monkeypatch.setattr(time, 'time', lambda: now - 1e8)
    assert book.wait == 0


def test_copies_of_all_workers_fit(tmp_path):
    one = Attempt(tmp_path, FULL)
    space = os.statvfs(tmp_path)
    assert one.case._copy_limit() == space.f_blocks * space.f_frsize // 4
    one.case._options.copy_limit = 3
    assert one.case._copy_limit() == 3 << 30


def test_nothing_is_begun_where_no_image_can_be_registered(tmp_path):
    version = journal.SERIAL_LIMIT - 1
    one = Attempt(tmp_path, FULL)
    del one.case._do
    one.case._registry.find = lambda image_id: None
    one.case._registry.repository = types.SimpleNamespace(
        state=lambda: types.SimpleNamespace(version=version))
    assert one.run() == 30
    assert 'move to a new repository' in one.noted[0][1]


@pytest.mark.parametrize('error', [FULL, exception.ConfigError('no KVM')])
def test_others_come_before_what_cannot_be_done_here(
        tmp_path, monkeypatch, error):
    """Each try takes longer than it is put off for."""
    now, built = [0.0], []
    monkeypatch.setattr(worker, 'time', types.SimpleNamespace(
        monotonic=lambda: now[0]))
    board = [types.SimpleNamespace(uuid=f'u{number}', **vars(job('', name)))
             for number, name in enumerate(['large'] * 3 + ['small'])]

    def work(case):
        one = case._claim.job
        if one.image_id == 'small':
            built.append(now[0])
            board.remove(one)
            return None
        now[0] += 1000
        attempt = Attempt(tmp_path, error)
        wait = attempt.run()
        case.unable = attempt.case.unable
        return wait

    monkeypatch.setattr(cases.Build, 'work', work)
    tools = types.SimpleNamespace(
        registry=None, conf=types.SimpleNamespace(builder=None),
        books=types.SimpleNamespace(remove=lambda uuid: None),
        board=types.SimpleNamespace(
            jobs=lambda: list(board), claim=lambda one, who: Held(one)))
    mine = worker.Worker(lambda: tools, 1)
    for _ in range(6):
        mine._turn(tools)
    assert built == [3000]
    assert mine._unable == {'u0', 'u1', 'u2'}
    del board[1:]
    mine._turn(tools)
    assert mine._unable == {'u0'}


class Held(Claim):
    """A claim of some job."""

    def __init__(self, one):
        super().__init__([])
        self.job, self.finish = one, lambda: None
