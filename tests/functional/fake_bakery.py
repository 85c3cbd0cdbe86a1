# SPDX-License-Identifier: Apache-2.0
"""A builder whose bakery boots nothing, and does what a file says.

The file, named by ``FAKE_BAKERY``, is a JSON object: ``state``, ``reason``,
``seconds`` that a bake takes, and ``qemu``, the version that the builder's
platform has. Each bake adds a line to the file beside it.
"""

import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'unit'))

import microvms  # noqa: E402

from fastboot_glance import bakery, builder  # noqa: E402

PLAN = pathlib.Path(os.environ['FAKE_BAKERY'])
DONE = PLAN.with_name('baked')


def plan():
    return {'state': 'baked', 'reason': None, 'seconds': 0,
            'qemu': '7.2.22 (Debian)'} | json.loads(PLAN.read_text())


def platform(options):
    return microvms.a_key(qemu=plan()['qemu']).platform


def bake(raw_path, virtual_size, directory, workdir, options, *, backing,
         progress, cancel):
    found = plan()
    with DONE.open('a') as file:
        print(virtual_size, raw_path.stat().st_size, *backing, file=file)
    progress('boot')
    end = time.monotonic() + found['seconds']
    while time.monotonic() < end:
        if cancel.is_set():
            return bakery.Bake('none', 'cancelled', None, {})
        time.sleep(.05)
    if found['state'] != 'baked':
        return bakery.Bake(found['state'], found['reason'], None, {})
    key = microvms.a_key
    microvms.a_key = lambda: key(qemu=found['qemu'])
    try:
        description = microvms.make(directory, os.urandom(1 << 20),
                                    size=virtual_size)
    finally:
        microvms.a_key = key
    return bakery.Bake('baked', None, description, {'boot': 1.5})


if __name__ == '__main__':
    bakery.platform, bakery.bake = platform, bake
    sys.exit(builder.main())
