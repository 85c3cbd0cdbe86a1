# SPDX-License-Identifier: Apache-2.0
"""The fuzzer's seeds and the inputs that it found, once more; no fuzzer."""

import gc
import logging
import pathlib
import sys

import pytest
from hostile import bounded

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'fuzz'))

import kit  # noqa: E402
import targets  # noqa: E402


@pytest.fixture
def no_log():
    """Pytest keeps it all."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize('target', targets.every(),
                         ids=lambda target: target.name)
def test_inputs(target):
    """What is no sense is said so, and nothing else comes out."""
    # What it loads once may be large.
    target.run(target.seeds()[0])
    for name, data in target.inputs():
        with bounded():
            try:
                target(data)
            except Exception as error:
                pytest.fail(f'{target.name}, {name}: {error!r}')


@pytest.mark.parametrize('target', targets.every(),
                         ids=lambda target: target.name)
def test_nothing_stays_in_memory(target, no_log):
    """Under the fuzzer it cannot be seen: its instruments keep objects."""
    inputs = [data for _, data in target.inputs()]

    def kept():
        for data in inputs:
            target(data)
        gc.collect()
        return sys.getallocatedblocks()
    # Python's own free lists grow, too, by less and less.
    assert any(kept() + len(inputs) > kept() for _ in range(30))


def test_the_corpus_is_of_targets_and_small():
    assert {path.name for path in kit.CORPUS.iterdir()} <= {
        target.name for target in targets.every()}
    assert sum(path.stat().st_size for path in kit.CORPUS.rglob('*')
               if path.is_file()) < 300 << 10
