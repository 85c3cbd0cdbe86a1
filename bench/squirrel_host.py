# SPDX-License-Identifier: Apache-2.0
"""Serves the state that bench.squirrel made; prints memory and disk used."""

import os
import pathlib
import sys

from bench.squirrel import IN_USE
from fastboot_common import volume
from fastboot_common.store.local import LocalStore
from fastboot_nova import host, node


def main() -> None:
    """Give the images in use their slots, look around, and measure."""
    room = pathlib.Path(sys.argv[1])
    run = room / 'run'
    with host.Host(room / 'host', LocalStore(room / 'repository'),
                   socket=run / 'nbd.sock') as served, node.Node(
                       served, run, socket=run / 'nbd.sock', wait=5,
                       shield_wait=2):
        for image in list(served.mirror.state.images.values())[:IN_USE]:
            found = served.mirror.read_manifest(image.manifest)
            served.open_volume(image.domain).make_slot(
                volume.Image(image.image_id, image.serial, image.manifest,
                             image.virtual_size), host.data_blocks(found))
            served.mirror.frames(found, found.boot)
        assert len(served.status()) == len(served.mirror.state.images)
        used = served.open_volume('public').disk_used()
        print(sum(map(_memory, [os.getpid(), *_children()])), used)


def _children() -> list[int]:
    path = pathlib.Path(f'/proc/self/task/{os.getpid()}/children')
    return [int(pid) for pid in path.read_text().split()]


def _memory(pid: int) -> int:
    """Proportional set size (bytes): shared libraries count once."""
    path = pathlib.Path(f'/proc/{pid}/smaps_rollup')
    for line in path.read_text().splitlines():
        if line.startswith('Pss:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'{path} has no Pss')


if __name__ == '__main__':
    main()
