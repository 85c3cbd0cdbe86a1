# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl trace show``."""

import argparse
import io
import pathlib
from typing import Any

import numpy as np

from fastboot_common import files, trace
from fastboot_common.cli import base


class Show(base.ShowOne):
    """Show what the boots of an image read."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', help='id, or a name that only one has')
        parser.add_argument(
            '--output', type=pathlib.Path, metavar='FILE',
            help='write the reads there as CSV, too')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print the figures."""
        repository = self.env.open_repository()
        image = repository.image(parsed_args.image)
        found = repository.read_manifest(image.manifest)
        if parsed_args.output:
            files.write_atomically(parsed_args.output.absolute(),
                                   _csv(found.trace))
        return self.dict2columns({
            'id': image.image_id, 'name': image.name,
            'boot_set_bytes': len(found.boot) * found.block_size,
            'capture': found.capture,
            **trace.statistics(found.trace, found.block_size),
        })


def _csv(reads: trace.Trace) -> bytes:
    """Times in microseconds, offsets and lengths in bytes."""
    text = io.StringIO('time_us,offset,length,boot\n')
    text.seek(0, io.SEEK_END)
    np.savetxt(text, reads, '%d', ',')
    return text.getvalue().encode()
