# SPDX-License-Identifier: Apache-2.0
"""What programs say of a configuration that cannot be read."""

import os

import pytest

from fastboot_common.upgradecheck import status
from fastboot_glance.cli import manage


@pytest.fixture(autouse=True)
def mask():
    """Programs set their own."""
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize(('words', 'said'), [
    (None, 'Failed to find'), ('rubbish\n', 'Failed to parse')])
@pytest.mark.parametrize(('program', 'command', 'code'), [
    (manage.main, ['db', 'version'], 1),
    (status.main, ['upgrade', 'check'], 255)])
def test_files_that_cannot_be_read(tmp_path, capsys, program, command, code,
                                   words, said):
    path = tmp_path / 'fastboot.conf'
    if words is not None:
        path.write_text(words)
    assert program(['--config-file', str(path), *command]) == code
    assert said in capsys.readouterr().err


def test_an_option_of_another_type(tmp_path, capsys):
    path = tmp_path / 'fastboot.conf'
    path.write_text('[DEFAULT]\nuse_stderr = perhaps\n')
    assert manage.main(['--config-file', str(path), 'db', 'version']) == 1
    assert 'use_stderr' in capsys.readouterr().err
