# SPDX-License-Identifier: Apache-2.0
"""Publishes one raw disk in a process of its own: ``RAW DIRECTORY``."""

import json
import pathlib
import resource
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
    usage = resource.getrusage(resource.RUSAGE_SELF)
    (room / 'memory.json').write_text(json.dumps(usage.ru_maxrss * 1024))


if __name__ == '__main__':
    main()
