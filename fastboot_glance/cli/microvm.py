# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl microvm bake|publish|list|remove``."""

import argparse
import contextlib
import pathlib
from typing import Any

from fastboot_common import exception, files, publish
from fastboot_common.cli import base, progress
from fastboot_common.microvm import artifact, shelf
from fastboot_glance import bakery, microvms, source


class Bake(base.ShowOne):
    """Boot an image once, and save the guest, to be resumed as servers.

    An image that cannot be baked is told with the reason; the status is 0.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', type=pathlib.Path,
                            help='raw, qcow2, vmdk, vdi or vhdx; the disks '
                                 'of all resumed servers need it')
        parser.add_argument('directory', type=pathlib.Path,
                            help='for the result: new, or empty')
        parser.add_argument('--memory', type=int, metavar='MIB',
                            help='overrides [bakery] memory')
        parser.add_argument('--timeout', type=int, metavar='SECONDS',
                            help='overrides [bakery] timeout')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Bake it and say what came of it."""
        env = self.env
        image = parsed_args.image.absolute()
        if not image.is_file():
            raise exception.NotFound(f'there is no file {image}')
        for name in ('memory', 'timeout'):
            value = getattr(parsed_args, name)
            if value is not None:
                env.conf.set_override(name, value, 'bakery')
        workdir = env.state_dir / 'work'
        files.make_directory(workdir)
        options = env.conf.bakery
        with source.open_source(image, workdir, user=options.user) as found:
            done = bakery.bake(
                found.raw_path, found.virtual_size, parsed_args.directory,
                workdir, options, backing=(image, found.format),
                progress=progress.tell)
        return self.dict2columns({
            'state': done.state, 'reason': done.reason,
            'class': done.description and done.description.key.digest,
            **_sizes(parsed_args.directory, done.description),
            'seconds': done.seconds,
        })


class Publish(base.ShowOne):
    """Put a baked guest into the repository, beside its image.

    What the image's boot set has in common with it is not stored again, nor
    is what other guests have.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('directory', type=pathlib.Path,
                            help='what "microvm bake" made')
        parser.add_argument('image', metavar='IMAGE_ID',
                            help='that it was baked from: id or name')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Publish it and say what was new."""
        env = self.env
        images = env.writable_repository()
        image = images.image(parsed_args.image)
        group = env.conf.repository
        # All of it is what every host takes.
        publisher = publish.Publisher(
            env.writable_microvms(), env.cache,
            level=group.boot_compression_level,
            boot_level=group.boot_compression_level,
            threads=group.threads or None)
        workdir = env.state_dir / 'work'
        files.make_directory(workdir)
        with progress.Progress('publishing') as told:
            done = shelf.put(parsed_args.directory, image, images, publisher,
                             workdir, phase=progress.tell, progress=told)
        return self.dict2columns({
            'id': done.published.image.image_id, 'image': done.name.image,
            'class': done.name.group, 'created': done.published.created,
            'pages': done.pages, 'shared_pages': done.shared,
            'blob_bytes': done.blob, 'new_bytes': done.published.new_bytes,
            'stored_bytes': done.published.stored_bytes,
            'seconds': {phase: round(seconds, 2) for phase, seconds
                        in done.seconds.items()}})


class List(base.Lister):
    """List the guests that are in the repository."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them."""
        return ('Image', 'Class', 'Platform', 'Version', 'Visibility',
                'Bytes', 'Origin'), [
            (one.name.image, one.name.group, one.platform, one.entry.serial,
             one.entry.visibility, one.entry.virtual_size, one.origin or '')
            for one in microvms.Microvms(self.env).all()]


class Remove(base.Command):
    """Remove guests of an image from the repository.

    Servers that run need them no more. A builder bakes them anew if the
    image still is to have one.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            'image', metavar='IMAGE_ID',
            help='id or name; the id if it is not registered any more')
        parser.add_argument(
            '--class', dest='group', metavar='CLASS', default='',
            help='only this one; the beginning of its name will do')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Remove them."""
        env = self.env
        images = env.writable_repository()
        reference = parsed_args.image
        with contextlib.suppress(exception.NotFound):
            reference = images.image(reference).image_id
        shelved = microvms.Microvms(env)
        found = [one for one in shelved.of(reference)
                 if one.name.group.startswith(parsed_args.group)]
        if not found:
            raise exception.NotFound(
                f'image {reference} has no µVM'
                + (f' of class {parsed_args.group}'
                   if parsed_args.group else ''))
        for one in found:
            shelved.remove(one)
            self.app.stdout.write(f'removed {one.name.text}\n')


def _sizes(directory: pathlib.Path,
           description: artifact.Description | None) -> dict[str, int]:
    """Bytes of the parts, holes not counted."""
    return {f'{name}_bytes': (directory / name).stat().st_blocks * 512
            for name in (description.parts if description else ())}
