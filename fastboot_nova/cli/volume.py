# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl volume show|check|hydrate|evict|pin|unpin``."""

import argparse
from typing import Any

from fastboot_common.cli import base, progress
from fastboot_nova import host
from fastboot_nova.cli.base import open_host


class _OnImages(base.Command):
    """A command on one image or more."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', nargs='+',
                            help='id, or a name that only one has')
        return parser


def _ids(opened: host.Host, names: list[str]) -> list[str]:
    """Ids of images in the volumes, registered or not."""
    here = {row.image_id: row.name for row in opened.status()
            if row.state in ('thawed', 'complete')}
    return [name if name in here else opened.image(name).image_id
            for name in names] or list(here)


class Show(base.Lister):
    """List the volumes of this host."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them."""
        columns = ('Domain', 'Path', 'Images', 'Complete', 'Disk MiB',
                   'Cluster')
        with open_host(self.env, writable=False) as opened:
            return columns, [
                (one.path.name, str(one.file), len(one.images()),
                 sum(one.is_complete(image_id) for image_id
                     in one.images()),
                 base.mib(one.disk_used()), one.block_size)
                for one in opened.volumes()]


class Check(base.Lister):
    """Prove every byte against the manifests; status 1 if any is wrong."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', nargs='*',
                            help='id, or a name that only one has '
                                 '(default: all)')
        parser.add_argument('--repair', action='store_true',
                            help='write damaged blocks anew, from the mirror '
                                 'or the repository; guests may run, the '
                                 'agent may not')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Check and list."""
        rows: list[tuple[str, int, int, str]] = []
        with open_host(self.env, writable=parsed_args.repair) as opened:
            for image_id in _ids(opened, parsed_args.image):
                with progress.Progress(f'checking {image_id}') as told:
                    repaired = (opened.repair(image_id, told)
                                if parsed_args.repair else 0)
                    proven, problems = opened.check(image_id, told)
                rows += [(image_id, proven, repaired, problem) for problem
                         in problems or ['']]
            if not parsed_args.image:
                rows += [(f'all of {domain}', 0, 0, words) for domain, words
                         in opened.damaged().items()]
        self.failed = any(problem for *_, problem in rows)
        return ('Image', 'Blocks proven', 'Repaired', 'Problem'), rows

    def run(self, parsed_args: argparse.Namespace) -> int:
        """The exit status says whether all is well."""
        super().run(parsed_args)
        return int(self.failed)


class Hydrate(_OnImages):
    """Bring whole images here, so that they need nothing else."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Hydrate one after the other."""
        with open_host(self.env) as opened:
            for image in map(opened.image, parsed_args.image):
                opened.thaw(image)
                with progress.Progress(f'hydrating {image.name}',
                                       opened.data_bytes(image)) as told:
                    opened.hydrate(image.image_id, told)


class Evict(_OnImages):
    """Remove images from the volumes; what is leased or pinned stays."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Evict and say what was freed."""
        with open_host(self.env) as opened:
            freed = opened.evict(_ids(opened, parsed_args.image))
        self.app.stdout.write(f'{base.mib(freed)} MiB freed\n')


class Pin(_OnImages):
    """Keep images in the volumes, whoever uses them."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Thaw and pin each."""
        with open_host(self.env) as opened:
            for image in map(opened.image, parsed_args.image):
                opened.open_volume(image.domain).pin(image.image_id)
                opened.thaw(image)


class Unpin(_OnImages):
    """Let images be evicted again."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Unpin each."""
        with open_host(self.env) as opened:
            for image_id in _ids(opened, parsed_args.image):
                opened.find(image_id)[0].unpin(image_id)
