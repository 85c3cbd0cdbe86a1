# SPDX-License-Identifier: Apache-2.0
"""``openstack fastboot host list|show|sync``."""

import argparse
from typing import Any, Final

from osc_lib.command import command

from fastboot_common.osc import columns, image

_SHORT: Final[image.Shape] = (
    ('Name', 'name', None), ('State', 'state', None),
    ('Version', 'version', None), ('Behind', 'behind', None),
    ('Images Ready', 'image_states', columns.Ready),
    ('Reported At', 'reported_at', None), ('Error', 'error', None),
)
_LONG: Final[image.Shape] = (
    *_SHORT, ('Volumes', 'volume_bytes', columns.Size),
    ('Mirror', 'mirror_bytes', columns.Size),
    ('Free', 'free_bytes', columns.Size),
    ('Lazy Guests', 'lazy_guests', columns.Count),
    ('Software', 'software', None),
)
_SHOWN: Final = {
    'volume_bytes': columns.Size, 'mirror_bytes': columns.Size,
    'free_bytes': columns.Size, 'image_states': columns.Ready,
    'images': columns.Places, 'lazy_guests': columns.Lines,
    'platforms': columns.Lines, 'microvms': columns.Microvms,
}


class List(command.Lister):
    """List compute hosts: what they report, and how current they are."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--state', choices=('up', 'stale'),
            help='only hosts in this state; "stale" ones were silent for '
                 'too long')
        parser.add_argument(
            '--long', action='store_true', help='list more of each host')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them."""
        rows = self.app.client_manager.fastboot.hosts(
            state=parsed_args.state)
        return image.table(_LONG if parsed_args.long else _SHORT, rows)


class Show(command.ShowOne):
    """Show a compute host and the state of each image on it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('host', metavar='<host>', help='its name')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print it."""
        return image.fields(self.app.client_manager.fastboot.host(
            parsed_args.host), _SHOWN)


class Sync(command.Command):
    """Tell compute hosts to fetch what they lack, now."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            'host', metavar='<host>', nargs='+', help='its name')
        parser.add_argument(
            '--image', metavar='<image>', action='append', default=[],
            help='only this image, by name or id; may be repeated')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Tell each."""
        api = self.app.client_manager.fastboot
        images = [api.find_image(one)['id'] for one in parsed_args.image]
        for name in parsed_args.host:
            api.sync(name, images or None)
