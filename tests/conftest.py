# SPDX-License-Identifier: Apache-2.0
"""For all tests: a gate must not depend on chance, a developer's run may."""

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

settings.register_profile('ci', derandomize=True, deadline=None)
settings.register_profile('default', deadline=None)
settings.load_profile('ci' if os.environ.get('CI') else 'default')


@pytest.fixture(autouse=True)
def _same_umask():
    """Programs that a test runs in this process set theirs."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def pytest_configure(config):
    """Names of sockets have 107 bytes, and the directories of pytest-xdist's
    workers take too many of them."""
    if config.option.basetemp is None and getattr(
            config.option, 'numprocesses', None):
        config.option.basetemp = tempfile.mkdtemp(prefix='fb')


def pytest_sessionfinish(session, exitstatus):
    """What failed can be looked at; the rest goes."""
    option = session.config.option
    if not hasattr(session.config, 'workerinput') and getattr(
            option, 'numprocesses', None) and exitstatus == 0:
        shutil.rmtree(option.basetemp, ignore_errors=True)
