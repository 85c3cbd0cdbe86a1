# SPDX-License-Identifier: Apache-2.0
"""What becomes of attempts, and what a build leaves to the bake behind
it."""

import dataclasses
import os
import threading
import types

import pytest

pytest.importorskip('taskflow')

from test_bakes import HERE, OTHER
from test_eligibility import IMAGE

from fastboot_common import exception, journal
from fastboot_glance import cases, staging


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
    assert one.run() == 300
    assert (one.book.attempts, one.book.wait, one.failed) == (2, 0, [])
    assert one.noted == [('queued', 'no room: the disk is full')]
    # What waits takes none.
    assert [path.name for path in stage.image.parent.iterdir()
            ] == ['capture']


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
    assert one.run() == 300
    assert 'move to a new repository' in one.noted[0][1]
