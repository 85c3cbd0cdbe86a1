# SPDX-License-Identifier: Apache-2.0
"""What a build leaves to the bake behind it."""

import types

import pytest

pytest.importorskip('taskflow')

from test_bakes import HERE, OTHER
from test_eligibility import IMAGE

from fastboot_common import exception
from fastboot_glance import cases


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
