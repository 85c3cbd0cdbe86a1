# SPDX-License-Identifier: Apache-2.0
"""For all tests: a gate must not depend on chance, a developer's run may."""

import os

import pytest
from hypothesis import settings

settings.register_profile('ci', derandomize=True, deadline=None)
settings.register_profile('default', deadline=None)
settings.load_profile('ci' if os.environ.get('CI') else 'default')


@pytest.fixture(autouse=True)
def _umask():
    """A program that a test calls in this process sets its own."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
