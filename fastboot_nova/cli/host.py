# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl host sync|status``."""

import argparse
from typing import Any

from fastboot_common.cli import base, progress
from fastboot_nova.cli.base import open_host


class Sync(base.ShowOne):
    """Bring the boot sets of all images to this host."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--image', action='append', metavar='ID',
            help='only this image (id or name), may be repeated')
        parser.add_argument(
            '--thaw', action='store_true',
            help='also put the boot sets into the volumes now, not when the '
                 'first guest comes')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Sync and say what came."""
        with open_host(self.env) as host:
            host.mirror.refresh()
            images = [host.image(name) for name in parsed_args.image or ()]
            with progress.Progress('syncing') as told:
                done = host.sync(
                    [one.image_id for one in images] or None,
                    lambda name, count: told(count))
            thawed = 0
            if parsed_args.thaw:
                for image in images or host.mirror.state.images.values():
                    if image.image_id not in done.failed:
                        thawed += host.thaw(image)
            self.failed = bool(done.failed)
        return self.dict2columns({
            'version': done.version, 'images': done.images,
            'fetched_bytes': done.fetched, 'thawed_bytes': thawed,
            'freed_bytes': done.freed, 'failed': done.failed})


    def run(self, parsed_args: argparse.Namespace) -> int:
        """The exit status says whether all images came."""
        super().run(parsed_args)
        return int(self.failed)


class Status(base.Lister):
    """List the images of this host and how far each is."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them by serial."""
        columns = ('ID', 'Name', 'Serial', 'Domain', 'State', 'Present %',
                   'Leases', 'Pinned')
        with open_host(self.env, writable=False) as host:
            return columns, [
                (row.image_id, row.name, row.serial, row.domain, row.state,
                 round(100 * row.progress, 1), row.leases, row.pinned)
                for row in host.status()]
