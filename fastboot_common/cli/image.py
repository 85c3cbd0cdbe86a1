# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl image list|show|remove``."""

import argparse
from typing import Any

from fastboot_common import extents, trace
from fastboot_common.cli import base


class List(base.Lister):
    """List the registered images."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them by serial."""
        images = self.env.open_repository().state().images.values()
        columns = ('ID', 'Name', 'Serial', 'Size MiB', 'Visibility', 'Owner')
        return columns, [
            (one.image_id, one.name, one.serial, base.mib(one.virtual_size),
             one.visibility, one.owner)
            for one in sorted(images, key=lambda one: one.serial)]


class Show(base.ShowOne):
    """Show what is known of an image."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', help='id, or a name that only one has')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print it."""
        repository = self.env.open_repository()
        image = repository.image(parsed_args.image)
        found = repository.read_manifest(image.manifest)
        size = found.block_size
        return self.dict2columns({
            'id': image.image_id, 'name': image.name,
            'serial': image.serial, 'manifest': image.manifest,
            'virtual_size': image.virtual_size,
            'visibility': image.visibility, 'owner': image.owner,
            'domain': image.domain, 'os_hash': image.os_hash,
            'source': found.source, 'root': found.root,
            'data_bytes': extents.total(found.extents) * size,
            'extents': len(found.extents),
            'packs': len(found.packs),
            'boot_set_bytes': len(found.boot) * size,
            'capture': found.capture,
            'trace': trace.statistics(found.trace, size),
        })


class Remove(base.Command):
    """Deregister images. Hosts drop them once no guest needs them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', nargs='+', help='id or name')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Deregister each."""
        repository = self.env.writable_repository()
        images = [repository.image(name) for name in parsed_args.image]
        for image in images:
            state = repository.remove(image.image_id)
            self.app.stdout.write(f'image {image.image_id} removed, '
                                  f'repository version {state.version}\n')
