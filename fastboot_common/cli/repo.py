# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl repo init|check|stats|gc|checkpoint``."""

import argparse
import contextlib
import functools
import importlib
import logging
import pathlib
from typing import Any

from fastboot_common import exception, files, repack, repository, upkeep
from fastboot_common.cli import base, progress
from fastboot_common.store import local

LOG = logging.getLogger(__name__)


class Init(base.Command):
    """Make an empty repository in a directory."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--block-size', type=int, metavar='BYTES',
            help='overrides [repository] block_size')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Make it."""
        location = self.env.location()
        if '://' in location and not location.startswith('file://'):
            raise exception.Invalid(
                f'{location} cannot be written; use its directory')
        path = pathlib.Path(location.removeprefix('file://'))
        self.env.make_state_dir()
        files.make_directory(path)
        base.as_owner(location)
        size = parsed_args.block_size or self.env.conf.repository.block_size
        try:
            repository.init(local.LocalStore(path), size)
        except exception.Exists:
            raise exception.Exists(
                f'{path} is a repository already') from None
        self.app.stdout.write(f'repository made in {path}, '
                              f'blocks of {size} bytes\n')


class Check(base.Lister):
    """Check the repository; lists what is wrong, status 1 if anything is."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--deep', action='store_true',
            help='read and decompress every pack, not only the indexes')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Check and list."""
        found = self.env.open_repository()
        with progress.Progress('checking packs') as told:
            problems = list(upkeep.check(found, parsed_args.deep, told))
        self.failed = bool(problems)
        return ('Object', 'Problem'), [
            (one.name, one.problem) for one in problems]

    def run(self, parsed_args: argparse.Namespace) -> int:
        """The exit status says whether all is well."""
        super().run(parsed_args)
        return int(self.failed)


class Stats(base.ShowOne):
    """Show what the repository holds and how well it is deduplicated."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Print the figures."""
        return self.dict2columns(
            {'location': self.env.location(),
             **upkeep.statistics(self.env.open_repository())})


class Gc(base.ShowOne):
    """Remove what no image needs any more."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--retention-days', type=float, metavar='DAYS',
            help='overrides [repository] retention_days')
        parser.add_argument(
            '--grace-hours', type=float, metavar='HOURS',
            help='overrides [repository] grace_hours')
        parser.add_argument('--dry-run', action='store_true',
                            help='say what would go, and remove nothing')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Collect and say what went."""
        group = self.env.conf.repository
        days, hours = parsed_args.retention_days, parsed_args.grace_hours
        found = self.env.writable_repository()
        # First: to rewrite packs takes room.
        done = upkeep.collect(
            found,
            (group.retention_days if days is None else days) * 86400,
            (group.grace_hours if hours is None else hours) * 3600,
            parsed_args.dry_run, _needed(self.env.conf))
        try:
            moved = repack.repack(
                found, group.repack_below / 100,
                level=group.boot_compression_level,
                threads=group.threads or None, dry_run=parsed_args.dry_run)
        except exception.FastbootError as error:
            LOG.warning('no packs were rewritten: %s', error)
            moved = repack.Repacked()
        return self.dict2columns({
            'dry_run': parsed_args.dry_run, 'images': done.images,
            'kept': done.kept, 'packs': done.packs, 'files': done.files,
            'bytes': done.bytes,
            'repacked': moved.retired, 'repacked_from': moved.before,
            'repacked_to': moved.after})


def _needed(conf: Any) -> upkeep.Needed:
    """What hosts say that they need, where they report.

    :raises ConfigError: there is a database, and what reads it is missing.
    """
    if not conf.database.connection:
        return upkeep.by_nobody
    try:
        # By name, because common imports neither of the others.
        needs, records = (importlib.import_module(f'fastboot_glance.{name}')
                          for name in ('needs', 'records'))
    except ImportError as error:
        raise exception.ConfigError(
            f'[database] connection is set, and cannot be used to see what '
            f'hosts need: {error}') from error
    return functools.partial(
        needs.keep, records.Records(conf.database.connection))


class Checkpoint(base.Command):
    """Note the state of the repository in its journal, and sign it.

    For a repository that was not signed so far, and when keys are exchanged:
    who trusts the newest entry trusts all before it. Its µVMs have a journal
    of their own, which gets one, too.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '--vouch', action='store_true',
            help='also where the newest entry is not signed with a key that '
                 'is trusted here: you know that nobody else wrote it')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Add the entries."""
        signer = self.env.signer()
        by = f'signed with key {signer.key_id}' if signer else 'not signed'
        vouch = parsed_args.vouch
        version = self.env.writable_repository(vouch).checkpoint().version
        self.app.stdout.write(f'version {version}, {by}\n')
        with contextlib.suppress(exception.NotFound):
            version = self.env.open_microvms(vouch).checkpoint().version
            self.app.stdout.write(f'µVMs: version {version}, {by}\n')
