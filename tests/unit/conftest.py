# SPDX-License-Identifier: Apache-2.0
"""What every test leaves as it was."""

import os

import pytest


@pytest.fixture(autouse=True)
def _same_umask():
    """Programs that are run in this process set theirs."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
