# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl host sync|status|detach``."""

import argparse
import pathlib
from typing import Any

from fastboot_common import exception
from fastboot_common.cli import base, progress
from fastboot_nova import detach
from fastboot_nova.cli.base import open_host
from fastboot_nova.microvm import artifacts


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
                   'Leases', 'Pinned', 'µVMs')
        unpacked = artifacts.counted(self.env.host_path / 'microvms')
        with open_host(self.env, writable=False) as host:
            return columns, [
                (row.image_id, row.name, row.serial, row.domain, row.state,
                 round(100 * row.progress, 1), row.leases, row.pinned,
                 unpacked[row.image_id])
                for row in host.status()]


class Detach(base.Lister):
    """Make plain disks of all disks of this host that lie on local blocks.

    Guests keep running. Agent, export and driver must be as they were; no
    server on local blocks must come meanwhile ([fastboot] enabled = false).
    May be stopped, and run again: what is done stays done.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--instances', type=pathlib.Path, metavar='DIR',
            default=pathlib.Path('/var/lib/nova/instances'),
            help="Nova's instances_path (default: %(default)s)")
        parser.add_argument(
            '--uri', default='qemu:///system',
            help='of libvirt (default: %(default)s)')
        parser.add_argument(
            '--server', action='append', metavar='ID',
            help='only the disks of this server, may be repeated')
        parser.add_argument(
            '--rate', type=int, default=0, metavar='MIB',
            help="MiB a second into a running guest's disk (default: any)")
        parser.add_argument(
            '--dry-run', action='store_true',
            help='only say which disks they are')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Detach them, and say how it went.

        :raises NotFound: there is no such directory.
        """
        if not parsed_args.instances.is_dir():
            raise exception.NotFound(
                f'{parsed_args.instances} is not there; see --instances')
        disks = [disk for server in sorted(set(parsed_args.server or ['']))
                 for disk in detach.find(parsed_args.instances, server)]
        self.app.stderr.write(f'{len(disks)} disks on local blocks in '
                              f'{parsed_args.instances}\n')
        work = detach.Detacher(
            parsed_args.instances, detach.connect(parsed_args.uri),
            parsed_args.rate)
        rows = [(disk.server, disk.path.name,
                 *self._row(work, disk, parsed_args.dry_run))
                for disk in disks]
        self.failed = any(row[3].startswith('failed') for row in rows)
        return ('Server', 'Disk', 'Guest', 'State'), rows

    @staticmethod
    def _row(work: detach.Detacher, disk: detach.Disk,
             dry_run: bool) -> tuple[str, str]:
        """Guest and state; no disk stands in the way of the next."""
        guest = 'unknown'
        try:
            guest = 'running' if work.domain(disk) else 'off'
            if dry_run:
                return guest, 'on local blocks'
            with progress.Progress(f'{disk.server}/{disk.path.name}') as told:
                work.detach(disk, told)
        except (exception.FastbootError, OSError) as error:
            return guest, f'failed: {error}'
        return guest, 'plain'

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Status 1 if a disk could not be detached."""
        super().run(parsed_args)
        return int(self.failed)
