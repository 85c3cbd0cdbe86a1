# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl microvm resume|fetch``."""

import argparse
import contextlib
import pathlib
import time
import uuid
from typing import Any

from fastboot_common import configdrive, exception, files, journal
from fastboot_common.cli import base, progress
from fastboot_common.microvm import activation, artifact, shelf


class Resume(base.ShowOne):
    """Resume a copy of a baked guest as a new server of libvirt's.

    A reboot from inside ends it: its own definition is another machine, and
    "virsh start" boots that, from the same disk.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('directory', type=pathlib.Path,
                            help='what "microvm bake" made')
        parser.add_argument('--name', required=True, help='of the server')
        parser.add_argument('--memory', type=int, metavar='MIB',
                            help='default: that of the baked guest')
        parser.add_argument('--vcpus', type=int, default=1, metavar='N')
        parser.add_argument('--disk-gib', type=float, metavar='GIB',
                            help='size of the disk, if larger than the image')
        parser.add_argument('--user-data', type=pathlib.Path, metavar='FILE',
                            help='for cloud-init')
        parser.add_argument('--network', metavar='NAME',
                            help='of libvirt; default: none')
        parser.add_argument('--uri', default='qemu:///system',
                            help='of libvirt (default: qemu:///system)')
        parser.add_argument('--deadline', type=float, metavar='SECONDS',
                            help='from the call to the stage (default: 10)')
        parser.add_argument('--stage', default=activation.IDENTITY,
                            choices=activation.STAGES,
                            help='to wait for (default: IDENTITY)')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Resume it and say how long each phase took."""
        # Only here is libvirt needed.
        from fastboot_nova.microvm import (
            compatible,
            connection,
            disk,
            lane,
            resume,
        )
        args = parsed_args
        name = journal.validate_image_id(args.name)
        home = self.env.state_dir / 'microvms' / name
        if home.exists():
            raise exception.Exists(f'there is a server in {home}')
        description = artifact.read(args.directory)
        server = self._server(args, home, description)
        size = max(description.virtual_size, int(
            (args.disk_gib or 0) * 2**30))
        with contextlib.ExitStack() as undo, \
                connection.opened(args.uri) as libvirt:
            compatible.check(description.key, libvirt)
            _make(home)
            undo.callback(_remove, home)
            disk.make(args.directory, server.disk, size)
            configdrive.build(
                server.config_drive, activation.hostname(name),
                args.user_data.read_bytes() if args.user_data
                else b'#cloud-config\n{}\n', plain=True)
            one = lane.Lane.create(args.directory, home / 'lane')
            undo.callback(one.remove)
            options = {'deadline': args.deadline} if args.deadline else {}
            done = resume.resume(libvirt, one, resume.Spec(
                server.xml(), activation.hostname(name), size,
                stage=args.stage, **options), told=progress.tell)
            undo.pop_all()
            one.remove()
        return self.dict2columns({
            'name': name, 'uuid': server.uuid, 'disk': str(server.disk),
            'seconds': done.seconds})

    @staticmethod
    def _server(args: argparse.Namespace, home: pathlib.Path,
                description: artifact.Description) -> Any:
        from fastboot_nova.microvm import definition
        return definition.Server(
            name=args.name, uuid=str(uuid.uuid4()), disk=home / 'disk.qcow2',
            console=home / 'console.log',
            memory=args.memory or description.machine.memory,
            vcpus=args.vcpus, config_drive=home / 'config.iso',
            network=args.network, virt_type=description.key.virt_type)


class Fetch(base.ShowOne):
    """Get a baked guest from the repository, as it was published.

    Its disk still names the image where it was baked.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument('image', metavar='IMAGE_ID', help='id or name')
        parser.add_argument('directory', type=pathlib.Path,
                            help='for the result: new, or empty')
        parser.add_argument('--class', dest='group', metavar='CLASS',
                            help='of hosts: the beginning of its name, if '
                                 'there are several')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Fetch it, compare it with its digests, and say what it is."""
        images = self.env.open_repository()
        image = images.image(parsed_args.image)
        microvms = self.env.open_microvms()
        entry = shelf.find(microvms.state(), image.image_id,
                           parsed_args.group)
        directory = parsed_args.directory
        files.make_directory(directory)
        if any(directory.iterdir()):
            raise exception.Exists(f'{directory} is not empty')
        begun = time.monotonic()
        with progress.Progress('fetching') as told:
            found = shelf.take(entry, microvms, image, images, directory,
                               told)
        return self.dict2columns({
            'image': image.image_id, 'class': found.key.digest,
            **{f'{name}_bytes': part.size
               for name, part in found.parts.items()},
            'seconds': round(time.monotonic() - begun, 2)})


def _make(home: pathlib.Path) -> None:
    """Directories that libvirt's QEMU, which has an account, can pass."""
    files.make_directory(home.parent)
    for path in (home.parent, home):
        path.mkdir(exist_ok=True)
        path.chmod(0o711)


def _remove(home: pathlib.Path) -> None:
    for name in ('disk.qcow2', 'config.iso', 'console.log', 'lane'):
        (home / name).unlink(missing_ok=True)
    home.rmdir()
