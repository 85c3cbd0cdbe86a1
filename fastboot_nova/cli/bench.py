# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl bench replay``."""

import argparse
import os
import pathlib
import statistics
import tempfile
from typing import Any

from fastboot_common import chain, exception, trace
from fastboot_common.cli import base
from fastboot_nova.cli.base import open_host, open_node

_HOLDER = 'bench'
_TIMEOUT = 600


class Replay(base.ShowOne):
    """Replay the reads of an image's boot through QEMU's block layer.

    Says what this host's disk and volume give, without a guest's CPU.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', help='id, or a name that only one has')
        parser.add_argument('--runs', type=int, default=5, metavar='N',
                            help='how often (default: 5)')
        parser.add_argument('--cold', action='store_true',
                            help='drop the page cache of the whole machine '
                                 'before each run; needs root')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Replay and print the seconds."""
        if parsed_args.runs < 1:
            raise exception.Invalid('--runs takes 1 or more')
        if parsed_args.cold and os.geteuid():
            raise exception.Invalid('--cold needs root')
        env = self.env
        with open_host(env) as opened, open_node(env, opened):
            image = opened.image(parsed_args.image)
            found = opened.mirror.read_manifest(image.manifest)
            reads = found.trace[found.trace['boot'] == 0]
            if not len(reads):
                raise exception.NotFound(
                    f'image {image.image_id} has no trace: '
                    f'{found.capture["reason"]}')
            link = opened.acquire(image.image_id, _HOLDER)
            try:
                runs = _replay(link, reads, parsed_args)
            finally:
                opened.release(image.image_id, _HOLDER)
        return self.dict2columns({
            'image': image.image_id, 'reads': len(reads),
            'read_bytes': int(reads['length'].sum()),
            'cold': parsed_args.cold, 'runs': len(runs),
            'median_seconds': round(statistics.median(
                run.seconds for run in runs), 3),
            'fastest_seconds': round(min(run.seconds for run in runs), 3),
            'median_cpu_seconds': round(statistics.median(
                run.cpu_seconds for run in runs), 3),
        })


def _replay(link: chain.Link, reads: trace.Trace,
            args: argparse.Namespace) -> list[trace.Replayed]:
    with tempfile.TemporaryDirectory(prefix='fastboot-') as name:
        stub, disk = pathlib.Path(name, 'stub'), pathlib.Path(name, 'disk')
        chain.make_stub(stub, link)
        chain.make_disk(disk, stub, link.virtual_size)
        runs = []
        for _ in range(args.runs):
            if args.cold:
                os.sync()
                pathlib.Path('/proc/sys/vm/drop_caches').write_text('3\n')
            runs.append(trace.replay(['-f', 'qcow2', str(disk)], reads,
                                     link.virtual_size, _TIMEOUT))
        return runs
