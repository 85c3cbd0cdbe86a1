# SPDX-License-Identifier: Apache-2.0
"""The guests, repository and host that benchmarks measure on; kept."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from oslo_config import cfg

from fastboot_common import (
    chain,
    exception,
    files,
    publish,
    qemu,
    repository,
    trace,
)
from fastboot_common.conf import opts
from fastboot_common.store.local import LocalStore
from fastboot_glance import build
from fastboot_nova import host, node

ROOT = pathlib.Path(__file__).parent.parent
TOOL = ROOT / 'tools' / 'guest-image'

#: Built apart: what separate teams upload.
BUILT = {
    'deb12': ['--suite', 'bookworm'],
    'deb12-web': ['--suite', 'bookworm', '--package', 'nginx',
                  '--package', 'redis-server'],
    'deb13': ['--suite', 'trixie'],
    'deb11': ['--suite', 'bullseye'],
}
#: Derived from deb12 in place: what users make of an image.
DERIVED = {
    'deb12-nginx': ['--package', 'nginx-light'],
    'deb12-git': ['--package', 'git'],
    'deb12-python': ['--package', 'python3-requests'],
    'deb12-motd': ['--run', 'echo "a host of ours" > /etc/motd'],
}
NAMES = (*BUILT, *DERIVED)
#: The one that is booted and replayed alone.
MAIN = 'deb12'


class Lab:
    """Everything in one directory; made when it is asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.conf: Any = opts.register(cfg.ConfigOpts())
        self.conf([], project='fastboot', default_config_files=[])

    def image(self, name: str) -> pathlib.Path:
        """A guest image as a qcow2 file."""
        file = self.path / 'guests' / f'{name}.qcow2'
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            command = (['build', file, *BUILT[name]] if name in BUILT else
                       ['derive', self.image('deb12'), file, *DERIVED[name]])
            subprocess.run([TOOL, *command], check=True,
                           stdout=subprocess.DEVNULL)
        return file

    def raw(self, name: str) -> pathlib.Path:
        """The same as a raw file."""
        file = self.path / 'guests' / f'{name}.raw'
        if not file.exists():
            part = file.with_suffix('.part')
            qemu.convert(str(self.image(name)), str(part), timeout=600)
            part.rename(file)
        return file

    def dense(self, name: str) -> pathlib.Path:
        """What is no hole of the raw file, as one file."""
        file = self.path / 'guests' / f'{name}.dense'
        if not file.exists():
            with self.raw(name).open('rb') as raw, file.open('wb') as out:
                size = os.fstat(raw.fileno()).st_size
                for start, end in files.data_ranges(raw.fileno(), 0, size):
                    raw.seek(start)
                    out.write(raw.read(end - start))
        return file

    def open_repository(self, names: Sequence[str] = NAMES,
                        ) -> repository.Repository:
        """A repository in which these images are registered."""
        store = LocalStore(self.directory('repository'))
        with contextlib.suppress(exception.Exists):
            repository.init(store, self.conf.repository.block_size)
        found = repository.Repository(store)
        for name in names:
            if name not in found.state().images:
                self._register(found, name)
        return found

    def _register(self, target: repository.Repository, name: str) -> None:
        print(f'registering {name}', file=sys.stderr, flush=True)
        # Two boots where misses are counted; one is enough for the rest.
        self.conf.set_override('boots', 2 if name == MAIN else 1, 'capture')
        silent = build.Progress(lambda *_: None, lambda *_: None,
                                lambda *_: None)
        build.build(
            build.Request(self.image(name), name, name),
            publish.Publisher(target, self.directory('cache')),
            target.block_size, self.directory('work', 0o711),
            self.conf.capture, silent)

    def directory(self, name: str, mode: int = 0o750) -> pathlib.Path:
        """A directory of the lab, made if there is none."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True, mode=mode)
        return path

    @contextlib.contextmanager
    def open_host(self, name: str = 'host') -> Iterator[host.Host]:
        """A host that follows the repository, with its export running."""
        run = self.directory('run')
        with host.Host(self.path / name, self.open_repository().store,
                       socket=run / 'nbd.sock') as found:
            with node.Node(found, run, socket=run / 'nbd.sock', wait=25,
                           shield_wait=4, log=run / 'misses.log'):
                yield found

    def disk(self, opened: host.Host, name: str) -> list[str]:
        """qemu-io's arguments for a fresh overlay on the image's slot."""
        room = self.directory('disks')
        link = opened.acquire(name, 'bench')
        stub, disk = room / f'{name}.stub', room / f'{name}.ours'
        chain.make_stub(stub, link)
        chain.make_disk(disk, stub, link.virtual_size)
        return ['-f', 'qcow2', str(disk)]

    def stock(self, name: str) -> list[str]:
        """qemu-io's arguments for a fresh overlay on a local qcow2 base."""
        disk = self.directory('disks') / f'{name}.stock'
        base = self.image(name)
        size = qemu.info(str(base), 'qcow2')['virtual-size']
        qemu.create_overlay(disk, str(base), 'qcow2', size)
        return ['-f', 'qcow2', str(disk)]

    def plain(self, name: str) -> list[str]:
        """qemu-io's arguments for the raw file."""
        return ['-f', 'raw', str(self.raw(name))]

    def reads(self, name: str) -> tuple[trace.Trace, int]:
        """The reads of the image's first boot, and the disk's bytes."""
        found = self.open_repository()
        manifest = found.read_manifest(found.image(name).manifest)
        reads = manifest.trace[manifest.trace['boot'] == 0]
        return np.asarray(reads), manifest.virtual_size


def drop_caches() -> None:
    """Forget the page cache of the whole machine, but for QEMU's program.

    Loading it takes longer than some replays, and is the same for all.
    """
    os.sync()
    pathlib.Path('/proc/sys/vm/drop_caches').write_text('3\n')
    subprocess.run(
        ['qemu-io', '-r', '-c', 'read -q 0 4096', '--image-opts',
         'driver=qcow2,file.driver=file,file.filename=' + str(_SMALL)],
        check=True)


def _small() -> pathlib.Path:
    path = pathlib.Path(tempfile.gettempdir()) / 'fastboot-bench.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '1M'],
                   check=True)
    return path


_SMALL = _small()


def cached() -> int:
    """Bytes in the page cache."""
    for line in pathlib.Path('/proc/meminfo').read_text().splitlines():
        if line.startswith('Cached:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError('/proc/meminfo has no Cached')


def at_once(actions: list[Any]) -> None:
    """Run functions on a thread each, and wait for all."""
    failed: list[BaseException] = []

    def run(action: Any) -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
