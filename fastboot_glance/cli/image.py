# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl image add``."""

import argparse
import pathlib
import sys
import time
import uuid
from typing import Any

from fastboot_common import exception, files, journal, publish
from fastboot_common.cli import base, progress
from fastboot_glance import build


class Add(base.ShowOne):
    """Register an image: boot it, record what it reads, publish it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('file', type=pathlib.Path,
                            help='raw, qcow2, vmdk, vdi or vhdx')
        parser.add_argument('--id', help='default: a new UUID')
        parser.add_argument('--name', help='default: the name of the file')
        parser.add_argument('--disk-format', metavar='FORMAT',
                            help='the file must have this format')
        parser.add_argument('--visibility', default='public',
                            choices=journal.VISIBILITIES)
        parser.add_argument('--owner', default='', metavar='PROJECT',
                            help='project of a private image')
        parser.add_argument('--no-boot', action='store_true',
                            help='publish without a boot set')
        parser.add_argument('--boots', type=int, metavar='N',
                            help='overrides [capture] boots')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Build it and say what came of it."""
        env = self.env
        if not parsed_args.file.is_file():
            raise exception.NotFound(f'there is no file {parsed_args.file}')
        image_id = journal.validate_image_id(
            parsed_args.id or str(uuid.uuid4()))
        if parsed_args.boots:
            env.conf.set_override('boots', parsed_args.boots, 'capture')
        repository = env.writable_repository()
        group = env.conf.repository
        publisher = publish.Publisher(
            repository, env.cache, level=group.compression_level,
            boot_level=group.boot_compression_level,
            threads=group.threads or None)
        workdir = env.state_dir / 'work'
        files.make_directory(workdir)
        request = build.Request(
            parsed_args.file.absolute(), image_id,
            parsed_args.name or parsed_args.file.stem,
            parsed_args.visibility, parsed_args.owner, parsed_args.disk_format,
            not parsed_args.no_boot)
        begun = time.monotonic()
        with _Phases() as phases:
            done = build.build(
                request, publisher, repository.block_size, workdir,
                env.conf.capture, phases.progress())
        found = repository.read_manifest(done.image.manifest)
        return self.dict2columns({
            'id': done.image.image_id, 'name': done.image.name,
            'serial': done.image.serial, 'created': done.created,
            'virtual_size': done.image.virtual_size,
            'boot': found.capture['state'],
            'reason': found.capture['reason'],
            'boot_seconds': found.capture.get('seconds'),
            'boot_set_bytes': len(found.boot) * found.block_size,
            'new_bytes': done.new_bytes, 'stored_bytes': done.stored_bytes,
            'seconds': round(time.monotonic() - begun, 1),
        })


class _Phases:
    """Shows one phase after the other."""

    def __init__(self) -> None:
        self._shown: progress.Progress | None = None
        self._told = 0.0

    def progress(self) -> build.Progress:
        return build.Progress(self._phase, self._bytes, self._boot)

    def _phase(self, name: str, total: int | None) -> None:
        self._end()
        if total is None:
            print(f'{name} ...', file=sys.stderr, flush=True)
        else:
            self._shown = progress.Progress(name, total)

    def _bytes(self, count: int) -> None:
        if self._shown:
            self._shown(count)

    def _boot(self, number: int, seconds: float, unique: int) -> None:
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if now - self._told < (0.5 if terminal else 15):
            return
        self._told = now
        print(f'boot {number + 1}: {seconds:.0f} s, '
              f'{unique / 2**20:.0f} MiB read', file=sys.stderr,
              end='    \r' if terminal else '\n', flush=True)

    def _end(self) -> None:
        if self._shown:
            self._shown.__exit__(None, None, None)
            self._shown = None

    def __enter__(self) -> '_Phases':
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
