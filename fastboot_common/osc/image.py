# SPDX-License-Identifier: Apache-2.0
"""``openstack fastboot image list|show|build|refresh``."""

import argparse
import sys
import time
from typing import Any, Final

from keystoneauth1 import exceptions as ksa_exceptions
from osc_lib import exceptions
from osc_lib.command import command

from fastboot_common.osc import client, columns

STATES: Final = ('queued', 'building', 'ready', 'error', 'skipped', 'off')
_WORKING: Final = ('queued', 'building')
_POLL_SECONDS: Final = 1.0
#: Answers that a wait outlives.
_PASSING: Final = (
    ksa_exceptions.ConnectFailure, ksa_exceptions.HttpServerError)

#: Title, key, and how the value looks.
Shape = tuple[tuple[str, str, type[Any] | None], ...]

_SHORT: Final[Shape] = (
    ('ID', 'id', None), ('Name', 'name', None), ('State', 'state', None),
    ('Version', 'version', None), ('Boot Set', 'boot_size', columns.Size),
    ('Hosts Ready', 'host_states', columns.Ready), ('µVM', 'microvm', None),
    ('Error', 'error', None),
)
_LONG: Final[Shape] = (
    *_SHORT[:3], ('Stage', 'stage', None),
    ('Progress', 'progress', columns.Share), *_SHORT[3:],
    ('Virtual Size', 'virtual_size', columns.Size),
    ('Visibility', 'visibility', None), ('Owner', 'owner', None),
    ('Builder', 'builder', None), ('Attempts', 'attempts', None),
    ('Updated At', 'updated_at', None),
)
_ACTED: Final[Shape] = (
    *_SHORT[:5], _SHORT[-1],
)
_SHOWN: Final = {
    'virtual_size': columns.Size, 'boot_size': columns.Size,
    'progress': columns.Share, 'host_states': columns.Ready,
    'hosts': columns.Places, 'microvms': columns.Microvms,
}


def table(shape: Shape, rows: list[dict[str, Any]]) -> Any:
    """Titles and rows, as cliff wants them."""
    return [title for title, _, _ in shape], [
        # APIs of before do not say all.
        [kind(row[key]) if kind else _text(row.get(key))
         for _, key, kind in shape] for row in rows]


def fields(row: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """Names and values of one thing, as cliff wants them."""
    return tuple(row), tuple(
        kinds[key](value) if key in kinds else value
        for key, value in row.items())


def _text(value: Any) -> Any:
    return '' if value is None else value


class List(command.Lister):
    """List images: whether their caches are built, and where they are."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--host', metavar='<host>',
            help='show the state of each image on this compute host')
        parser.add_argument(
            '--state', choices=STATES, help='only images in this state')
        parser.add_argument(
            '--name', metavar='<name>', help='only images with this name')
        parser.add_argument(
            '--owner', metavar='<project-id>',
            help='only images of this project')
        parser.add_argument(
            '--long', action='store_true', help='list more of each image')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print them."""
        host = parsed_args.host
        rows = self.app.client_manager.fastboot.images(
            host=host, state=parsed_args.state, name=parsed_args.name,
            owner=parsed_args.owner, hosts='true' if host else 'false')
        shape = _LONG if parsed_args.long else _SHORT
        if not host:
            return table(shape, rows)
        here = (('On Host', 'on_host', None),
                ('Transferred', 'transferred', columns.Share),
                ('Reason', 'reason', None))
        shape = tuple(
            one for one in shape if one[1] not in ('host_states', 'error'))
        return table((*shape, *here), [
            row | {'on_host': columns.described(place),
                   'transferred': place['progress'],
                   'reason': place['error'] or row['error']}
            for row in rows for place in [row['hosts'][host]]])


class Show(command.ShowOne):
    """Show an image: its cache, and its state on each host."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', metavar='<image>', help='name or id')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print it."""
        return fields(self.app.client_manager.fastboot.find_image(
            parsed_args.image), _SHOWN)


class _Act(command.Lister):
    """Asks for builds, and waits if told to."""

    action: str

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            'image', metavar='<image>', nargs='+', help='name or id')
        parser.add_argument(
            '--wait', action='store_true',
            help='wait until the builders are done, and show how far they '
                 'are')
        parser.add_argument(
            '--timeout', metavar='<seconds>', type=float, default=3600.0,
            help='seconds to wait at most (default: 3600)')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Ask for all, then wait for each."""
        api = self.app.client_manager.fastboot
        ids = [self._id(reference) for reference in parsed_args.image]
        rows = [api.act(image_id, self.action) for image_id in ids]
        if parsed_args.wait:
            deadline = time.monotonic() + parsed_args.timeout
            rows = [wait(api, image_id, deadline) for image_id in ids]
            failed = [f'{row["id"]}: {row["state"]}: {row["error"]}'
                      for row in rows if row['state'] != 'ready']
            if failed:
                raise exceptions.CommandError('\n'.join(failed))
        return table(_ACTED, rows)

    def _id(self, reference: str) -> str:
        raise NotImplementedError


class Build(_Act):
    """Build the caches of images that have none yet."""

    action = 'build'

    def _id(self, reference: str) -> str:
        """Images that fastboot never saw are known to Glance only."""
        manager = self.app.client_manager
        try:
            return str(manager.fastboot.find_image(reference)['id'])
        except exceptions.CommandError as unknown:
            try:
                return str(manager.image.find_image(
                    reference, ignore_missing=False).id)
            except Exception as error:
                raise exceptions.CommandError(
                    f'{unknown}, nor does Glance: {error}') from error


class Refresh(_Act):
    """Build the caches of images anew, for instance after an upgrade.

    The old one is used until the new one is there.
    """

    action = 'refresh'

    def _id(self, reference: str) -> str:
        return str(self.app.client_manager.fastboot.find_image(
            reference)['id'])


def wait(api: client.Client, image_id: str, deadline: float,
         poll: float = _POLL_SECONDS) -> dict[str, Any]:
    """The image once no builder works on it; progress goes to stderr.

    :param deadline: of the monotonic clock.
    :param poll: seconds between two looks.
    :raises CommandError: it takes longer, or the image is gone.
    """
    show = Progress()
    try:
        while True:
            try:
                row = api.image(image_id)
                if row['state'] not in _WORKING:
                    return row
                show(row)
            except ksa_exceptions.NotFound as error:
                raise exceptions.CommandError(
                    f'image {image_id} is gone: {error}') from error
            except _PASSING as error:
                show({'id': image_id, 'state': 'unknown',
                      'stage': str(error).partition('\n')[0]})
            if time.monotonic() > deadline:
                raise exceptions.CommandError(
                    f'image {image_id} is not ready yet; the builders go '
                    f'on, see "openstack fastboot image show"')
            time.sleep(poll)
    finally:
        show.end()


class Progress:
    """Says on stderr how far a build is: one line that changes on a
    terminal, else a line for each change of its stage."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last: tuple[str, str] | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Show the state of the build."""
        stage = row['state'], row['stage']
        words = ' '.join(filter(None, (f'{row["id"]}:', *stage)))
        if self._terminal:
            share = f' {row["progress"]:.0%}' if row.get('progress') else ''
            print(f'\r\x1b[K{words}{share}', end='', file=sys.stderr,
                  flush=True)
        elif stage != self._last:
            print(words, file=sys.stderr, flush=True)
        self._last = stage

    def end(self) -> None:
        """Leave the terminal's line."""
        if self._terminal and self._last:
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)
