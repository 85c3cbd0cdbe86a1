# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl vm run``."""

import argparse
import pathlib
import re
import shutil
import sys
import tempfile
import time
from typing import Any, Final

from fastboot_common import (
    chain,
    configdrive,
    exception,
    files,
    journal,
    qemu,
    trace,
)
from fastboot_common.cli import base
from fastboot_nova.cli.base import open_host, open_node

_DISK: Final = 'disk.qcow2'
#: The id of the image that a disk is of, beside it.
_IMAGE: Final = 'image'


class Run(base.ShowOne):
    """Boot a guest of an image from the volume; its console is printed.

    Without --keep the guest's disk is thrown away when it ends; one that was
    kept is not touched.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', help='id, or a name that only one has')
        parser.add_argument('--name', help='of the guest (default: vm)',
                            default='vm')
        parser.add_argument('--memory', type=int, metavar='MIB',
                            help='overrides [capture] memory')
        parser.add_argument('--vcpus', type=int, metavar='N',
                            help='overrides [capture] vcpus')
        parser.add_argument('--disk-gib', type=float, metavar='GIB',
                            help='size of the disk, if larger than the image')
        parser.add_argument('--cache', default='writeback',
                            choices=['writeback', 'none', 'unsafe'],
                            help='cache mode of the disk (default: '
                                 'writeback)')
        parser.add_argument('--timeout', type=float, default=600,
                            metavar='SECONDS', help='end of the guest')
        parser.add_argument('--until-prompt', action='store_true',
                            help='end when the login prompt is there')
        parser.add_argument('--no-config-drive', action='store_true',
                            help='boot without a config drive')
        parser.add_argument('--keep', action='store_true',
                            help='keep the disk, and use one of the image '
                                 'that was kept')
        parser.add_argument('--quiet-console', action='store_true',
                            help='do not print what the guest prints')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Run it and say what it cost."""
        env = self.env
        name = journal.validate_image_id(parsed_args.name)
        directory = env.state_dir / 'vms' / name
        with open_host(env) as host:
            image = host.image(parsed_args.image)
            # Whoever has the volume has the directory, too.
            host.open_volume(image.domain)
            _check_kept(directory, image.image_id, parsed_args.keep)
            files.make_directory(directory)
            log = directory / 'misses.log'
            log.unlink(missing_ok=True)
            try:
                with open_node(env, host, log):
                    return self._run_guest(parsed_args, image.image_id, host,
                                           directory, log)
            finally:
                if not parsed_args.keep:
                    shutil.rmtree(directory, ignore_errors=True)

    def _run_guest(self, args: argparse.Namespace, image_id: str, host: Any,
                   directory: pathlib.Path, log: pathlib.Path) -> Any:
        begun = time.monotonic()
        link = host.acquire(image_id, args.name)
        acquired = time.monotonic() - begun
        try:
            disk = _disk(directory, link, args.disk_gib)
            config = self._config(args, directory, disk)
            with tempfile.TemporaryDirectory(dir=directory) as room, \
                    qemu.Machine(config, pathlib.Path(room)) as machine:
                prompt = self._follow(machine, args)
        finally:
            if not args.keep:
                host.release(image_id, args.name)
        missed = trace.parse_log(log)
        return self.dict2columns({
            'image': image_id,
            'complete': link.complete is not None,
            'acquire_seconds': round(acquired, 3),
            'prompt_seconds': prompt and round(prompt, 1),
            'missed_reads': len(missed),
            'missed_bytes': int(missed['length'].sum()),
        })

    def _config(self, args: argparse.Namespace, directory: pathlib.Path,
                disk: pathlib.Path) -> qemu.Config:
        options = self.env.conf.capture
        drive = None
        if options.config_drive and not args.no_config_drive:
            drive = str(directory / 'config.iso')
            configdrive.build(pathlib.Path(drive), args.name)
        return qemu.Config(
            disk=qemu.file_disk(str(disk), 'qcow2'),
            memory=args.memory or options.memory,
            vcpus=args.vcpus or options.vcpus,
            accelerator=options.accelerator, cache=args.cache,
            config_drive=drive)

    def _follow(self, machine: qemu.Machine,
                args: argparse.Namespace) -> float | None:
        """Print the console; the seconds to the prompt, if it came."""
        begun = time.monotonic()
        pattern = re.compile(self.env.conf.capture.console_pattern.encode())
        seen, prompt = b'', None
        while time.monotonic() - begun < args.timeout:
            running = machine.alive()
            piece = machine.console()
            if not args.quiet_console:
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            seen = (seen + piece)[-4096:]
            if prompt is None and pattern.search(seen):
                prompt = time.monotonic() - begun
                if args.until_prompt:
                    break
            if not running:
                break
            time.sleep(0.05)
        if args.until_prompt and prompt is None:
            raise exception.Unavailable(
                f'no login prompt within {args.timeout:.0f} seconds; QEMU '
                f'said: {machine.words() or "nothing"}')
        return prompt


def _check_kept(directory: pathlib.Path, image_id: str, keep: bool) -> None:
    """:raises Exists: there is a disk that is not for this run."""
    if not (directory / _DISK).exists():
        return
    known = directory / _IMAGE
    # Disks of older versions do not say.
    found = known.read_text() if known.exists() else image_id
    if not keep or found != image_id:
        raise exception.Exists(
            f'{directory} has a disk of image {found} that was kept; boot '
            f'it with --keep, take another --name, or remove the directory')


def _disk(directory: pathlib.Path, link: chain.Link,
          gib: float | None) -> pathlib.Path:
    """The guest's overlay and its stub, new or kept."""
    disk, stub = directory / _DISK, directory / 'stub.qcow2'
    if not disk.exists():
        size = max(link.virtual_size, int((gib or 0) * 2**30))
        files.write_atomically(directory / _IMAGE, link.image_id.encode())
        chain.make_stub(stub, link)
        chain.make_disk(disk, stub, size)
    return disk
