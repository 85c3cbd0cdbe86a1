# SPDX-License-Identifier: Apache-2.0
"""Where the targets are. Imported first: it makes the others importable."""

import importlib
import pathlib
import resource
import sys

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / 'unit'), str(TESTS / 'fuzz')]

#: Address space that an input may need on top of what the process has.
ROOM = 1 << 30
MODULES = ('formats', 'places', 'peers', 'sleepers')


def find(name):
    """A target; modules behind its own are not loaded, which takes time."""
    for module in MODULES:
        for target in importlib.import_module(module).TARGETS:
            if target.name == name:
                return target
    raise SystemExit(f'there is no target {name}')


def every():
    """All targets."""
    return [target for module in MODULES
            for target in importlib.import_module(module).TARGETS]


def confine():
    """From now on, allocations that a small input does not justify fail."""
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
