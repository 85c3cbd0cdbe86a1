# SPDX-License-Identifier: Apache-2.0
"""Publishes one raw disk in a process of its own: ``RAW DIRECTORY``."""

import json
import pathlib
import sys

import numpy as np

from fastboot_common import extents, manifest, publish, repository
from fastboot_common.blocks import DEFAULT_BLOCK_SIZE
from fastboot_common.store.local import LocalStore


def main() -> None:
    """Publish, and note the memory that it took."""
    raw, room = map(pathlib.Path, sys.argv[1:])
    path = room / 'repository'
    path.mkdir()
    store = LocalStore(path)
    repository.init(store, DEFAULT_BLOCK_SIZE)
    found = repository.Repository(store)
    publish.Publisher(found, room / 'cache').publish(
        raw, manifest.Manifest(
            'image', 'image', raw.stat().st_size, found.block_size, '', [],
            np.empty(0, extents.DTYPE)))
    (room / 'memory.json').write_text(json.dumps(_peak_memory()))


def _peak_memory() -> int:
    """Bytes at most. (getrusage() counts the parent's before exec, too.)"""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError('/proc/self/status has no VmHWM')


if __name__ == '__main__':
    main()
