# SPDX-License-Identifier: Apache-2.0
"""What builds leave for each other on one machine."""

import dataclasses
import os
import subprocess
import sys
import uuid

import numpy as np
import pytest

from fastboot_common import exception, trace
from fastboot_glance import capture, staging

IMAGE = str(uuid.UUID(int=7))


@pytest.fixture
def captured():
    reads = np.zeros(3, trace.DTYPE)
    reads['offset'] = (0, 4096, 1 << 20)
    return capture.Capture(reads, 'booted', None, 'console', [1.5], 'pc')


def test_capture_is_kept(tmp_path, captured):
    with staging.open_stage(tmp_path, IMAGE) as stage:
        assert stage.read_capture('digest') is None
        stage.keep_capture('digest', captured)
    with staging.open_stage(tmp_path, IMAGE) as stage:
        found = stage.read_capture('digest')
        assert (found.trace == captured.trace).all()
        assert dataclasses.replace(found, trace=None) == dataclasses.replace(
            captured, trace=None)
        assert stage.read_capture('another') is None


@pytest.mark.parametrize('damage', [
    lambda data: data[:100], lambda data: b'', lambda data: b'x' * 1000,
    lambda data: data[:-40] + b'?' * 40])
def test_damaged_capture_is_not_used(tmp_path, captured, damage):
    with staging.open_stage(tmp_path, IMAGE) as stage:
        stage.keep_capture('digest', captured)
        path = stage.image.with_name('capture')
        path.write_bytes(damage(path.read_bytes()))
        assert stage.read_capture('digest') is None


def test_one_at_a_time(tmp_path):
    with staging.open_stage(tmp_path, IMAGE):
        with pytest.raises(exception.Busy, match='another builder'):
            with staging.open_stage(tmp_path, IMAGE):
                pass
        with staging.open_stage(tmp_path, str(uuid.UUID(int=8))):
            pass
    with staging.open_stage(tmp_path, IMAGE) as stage:
        stage.discard()
    with staging.open_stage(tmp_path, IMAGE):
        pass


def test_temporary_files_go_with_the_context(tmp_path):
    with staging.open_stage(tmp_path, IMAGE) as stage:
        (stage.work / 'overlay').write_bytes(b'x')
        stage.image.write_bytes(b'image')
    assert [path.name for path in tmp_path.iterdir()] == ['staging']
    with staging.open_stage(tmp_path, IMAGE) as stage:
        assert stage.image.read_bytes() == b'image'


def test_no_image_id_leads_elsewhere(tmp_path):
    for name in ('../x', 'x', '', '/etc'):
        with pytest.raises(ValueError):
            with staging.open_stage(tmp_path, name):
                pass


def test_sweep(tmp_path):
    """The dead's go, the living's and the wanted stay."""
    wanted, dead, living = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
    subprocess.run(
        [sys.executable, '-c', 'import os, sys, pathlib\n'
         'from fastboot_glance import staging\n'
         'found = [staging.open_stage(pathlib.Path(sys.argv[1]), one)\n'
         '         for one in sys.argv[2:]]\n'
         'for one in found:\n'
         '    one.__enter__().image.write_bytes(b"x")\n'
         'os.kill(os.getpid(), 9)\n', str(tmp_path), wanted, dead],
        check=False, timeout=60, env={**os.environ, 'PYTHONPATH': os.pathsep.
                                      join(sys.path)})
    assert len(list(tmp_path.glob('t-*'))) == 2
    other = tmp_path / 'other'
    other.mkdir()
    with staging.open_stage(tmp_path, living) as stage:
        assert staging.sweep(tmp_path, {wanted}) == 3
        assert stage.work.is_dir()
        assert {path.name for path in (tmp_path / 'staging').iterdir()} == {
            wanted, living}
    assert other.is_dir()
    assert staging.sweep(tmp_path / 'none', set()) == 0


def test_remove(tmp_path):
    with staging.open_stage(tmp_path, IMAGE) as stage:
        stage.image.write_bytes(b'x')
        staging.remove(tmp_path, IMAGE)  # in use
        assert stage.image.exists()
    staging.remove(tmp_path, IMAGE)
    assert not list((tmp_path / 'staging').iterdir())
    # It cannot have anything here, and is not to stop who tidies up.
    staging.remove(tmp_path, 'debian-12')


def test_what_commands_left_that_died(tmp_path):
    for name in ('blob-old', 'bake-old', 'blob-new', 'other-old'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_bytes(b'x')
        if name.endswith('old'):
            os.utime(tmp_path / name, (1, 1))
    assert staging.sweep(tmp_path, set()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        'blob-new', 'other-old'}
