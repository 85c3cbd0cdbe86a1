# SPDX-License-Identifier: Apache-2.0
"""What a build leaves to the bake behind it."""

import types

import pytest

pytest.importorskip('taskflow')

from test_bakes import HERE, OTHER
from test_eligibility import IMAGE

from fastboot_common import exception
from fastboot_glance import cases


def build(waiting, *, wanted=True):
    """A build that is over.

    :param waiting: platforms of the jobs on the board.
    """
    def jobs():
        if waiting is None:
            raise exception.Unavailable('away')
        return [types.SimpleNamespace(platform=one) for one in waiting]

    tools = types.SimpleNamespace(
        registry=types.SimpleNamespace(find=lambda image_id: 'registered'),
        bakes=types.SimpleNamespace(
            look=lambda image, found: wanted, platform=HERE.text),
        board=types.SimpleNamespace(jobs=jobs),
        conf=types.SimpleNamespace(
            builder=None, bakery=types.SimpleNamespace(workers=1)))
    claim = types.SimpleNamespace(job=types.SimpleNamespace(force=False))
    return cases.Build(claim, tools)


@pytest.mark.parametrize('waiting, keeps', [
    ([HERE.text], True), ([HERE.text] * 2, True), ([HERE.text] * 3, False),
    (['', OTHER.text] * 9 + [HERE.text], True), (None, False)])
def test_files_of_images_that_wait_do_not_fill_the_disk(waiting, keeps):
    assert build(waiting)._have_baked(IMAGE) == keeps


def test_nothing_is_kept_for_no_bake():
    assert not build([], wanted=False)._have_baked(IMAGE)
