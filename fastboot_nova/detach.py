# SPDX-License-Identifier: Apache-2.0
"""Makes plain disks of disks on local blocks, so that fastboot can go.

The disk of a server that is off is set on Nova's own kind of base, which is
made from local blocks: no data of the disk moves. The disk of one that runs
pulls what it lacks and stands alone then, which costs the size of its image.
Both may be stopped at any moment and begun again.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from oslo_concurrency import lockutils

from fastboot_common import exception, files, overlay, qemu

#: What a file system must keep free (bytes).
_SPARE: Final = 1 << 30
_POLL_SECONDS: Final = 0.5
#: Longest that a base may take to be made or compared.
_COPY_SECONDS: Final = 3600
#: What Nova has of a server that is in rescue, beside its disks.
_UNRESCUE: Final = 'unrescue.xml'
#: Nova's, for files that hosts share (nova.utils.synchronized).
_LOCK_PREFIX: Final = 'nova-'

#: Called with bytes that were done since the last call.
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk on local blocks.

    :ivar stub: what it lies on.
    """

    path: pathlib.Path
    stub: pathlib.Path

    @property
    def server(self) -> str:
        """The id of its server: Nova names directories so."""
        return self.path.parent.name

    @property
    def base(self) -> pathlib.Path:
        """Where Nova's own driver would have the base."""
        return self.stub.with_name(self.stub.name.removesuffix(overlay.SUFFIX))


def find(instances: pathlib.Path, server: str = '') -> Iterator[Disk]:
    """The disks of a host that lie on local blocks.

    :param instances: Nova's ``instances_path``.
    :param server: the directory of one of them; '': all.
    :raises OSError: what a server has cannot be read.
    """
    for path in overlay.disks(instances, server):
        with contextlib.suppress(exception.FastbootError, OSError):
            found = overlay.read_backing(path)
            if not found or not found[0]:
                continue
            stub = pathlib.Path(found[0])
            if (stub.name.endswith(overlay.SUFFIX)
                    and overlay.needs_stub(path, stub)):
                yield Disk(path, stub)


class Detacher:
    """Detaches the disks of one host.

    :param instances: Nova's ``instances_path``.
    :param connection: libvirt's; its guests keep running.
    :param rate: MiB a second that a running guest's disk is filled with;
        0: any.
    """

    def __init__(self, instances: pathlib.Path, connection: Any,
                 rate: int = 0) -> None:
        self._locks = instances / 'locks'
        self._connection = connection
        self._rate = rate

    def domain(self, disk: Disk) -> Any:
        """The running guest of a disk; None: it is off.

        :raises Unavailable: it is suspended, or libvirt does not tell.
        """
        try:
            found = [domain for domain in self._connection.listAllDomains()
                     if domain.UUIDString() == disk.server]
            for domain in found:
                if domain.isActive():
                    return domain
            suspended = any(domain.hasManagedSaveImage() for domain in found)
        except _libvirt_error() as error:
            raise exception.Unavailable(
                f'server {disk.server}: {error}') from error
        if suspended:
            raise exception.Unavailable(
                f'server {disk.server} is suspended, and would be resumed '
                f'on local blocks; resume it first')
        return None

    @staticmethod
    def _check_not_rescued(disk: Disk) -> None:
        """:raises Unavailable: the server waits for its definition, in which
        Nova keeps the whole chain."""
        if (disk.path.parent / _UNRESCUE).exists():
            raise exception.Unavailable(
                f'server {disk.server} is in rescue, and would be unrescued '
                f'on local blocks; unrescue it first')

    def detach(self, disk: Disk, told: Progress) -> None:
        """Make one disk plain.

        :raises CommandFailed: qemu-img could not.

        :raises NotFound: its stub is gone; what Nova's own driver made in
            its place may be another image's.
        :raises NoSpace: the copy has no room.
        :raises Corrupt: the base that is there has other content.
        :raises Unavailable: the guest, or the export, does not let us.
        """
        if not disk.stub.exists() or overlay.read_stub(disk.stub) is None:
            raise exception.NotFound(
                f'{disk.stub} is not there, or is no stub; start the server '
                f'once, with agent and driver as they were')
        self._check_not_rescued(disk)
        domain = self.domain(disk)
        if domain is not None:
            self._pull(disk, domain, told)
        else:
            self._rebase(disk, told)
        if _is_on_blocks(disk):
            raise exception.Unavailable(f'{disk.path} is not plain yet; '
                                        f'try again')

    def _rebase(self, disk: Disk, told: Progress) -> None:
        _provide_lock(self._locks, f'{_LOCK_PREFIX}{disk.base.name}')
        with lockutils.lock(disk.base.name, _LOCK_PREFIX, external=True,
                            lock_path=str(self._locks)):
            if disk.base.exists():
                self._compare(disk)
            else:
                self._make_base(disk, told)
        # The content is the same, so only the name is exchanged. QEMU's
        # lock on the file keeps a guest out that starts meanwhile.
        qemu.rename_backing(disk.path, disk.base, 'raw')

    @staticmethod
    def _compare(disk: Disk) -> None:
        if not qemu.same_content(
                _image(disk.stub, 'qcow2'), _image(disk.base, 'raw'),
                timeout=_COPY_SECONDS):
            raise exception.Corrupt(
                f'{disk.base} is not what {disk.stub} reads as; it is left '
                f'alone, and so is the disk')

    def _make_base(self, disk: Disk, told: Progress) -> None:
        _check_room(disk.base.parent, overlay.follow(disk.stub).virtual_size)
        new = disk.base.with_name(f'.{disk.base.name}.detach')
        qemu.convert(_image(disk.stub, 'qcow2'), str(new),
                     timeout=_COPY_SECONDS)
        told(new.stat().st_blocks * 512)
        status = disk.stub.stat()
        os.chown(new, status.st_uid, status.st_gid)
        new.chmod(0o644)
        fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
        try:
            files.sync(fd)
        finally:
            os.close(fd)
        new.rename(disk.base)
        files.sync_directory(disk.base.parent)

    def _pull(self, disk: Disk, domain: Any, told: Progress) -> None:
        _check_room(disk.path.parent,
                    overlay.follow(disk.stub).virtual_size)
        name = str(disk.path)
        try:
            if not domain.blockJobInfo(name):
                domain.blockPull(name, self._rate)
            seen = 0
            while job := domain.blockJobInfo(name):
                now = int(job['cur'])
                told(max(0, now - seen))
                seen = max(seen, now)
                time.sleep(_POLL_SECONDS)
        except _libvirt_error() as error:
            raise exception.Unavailable(f'{disk.path}: {error}') from error


def _provide_lock(directory: pathlib.Path, name: str) -> None:
    """Have a lock file as Nova makes it: it must open the file, too.

    It comes under its name when it is Nova's, so that neither a kill nor a
    server that starts meanwhile finds one that is not.
    """
    if not directory.is_dir():
        directory.mkdir(exist_ok=True)
        _give(directory, directory.parent.stat(), 0o755)
    path, new = directory / name, directory / f'.{name}.detach'
    new.unlink(missing_ok=True)
    if path.exists():
        return
    new.touch(exist_ok=False)
    _give(new, directory.stat(), 0o644)
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(new)
    new.unlink()


def _give(path: pathlib.Path, like: os.stat_result, mode: int) -> None:
    os.chown(path, like.st_uid, like.st_gid, follow_symlinks=False)
    path.chmod(mode)


def _is_on_blocks(disk: Disk) -> bool:
    found = overlay.read_backing(disk.path)
    return bool(found and found[0] == str(disk.stub))


def _image(path: pathlib.Path, image_format: str) -> str:
    return qemu.image(qemu.file_disk(str(path), image_format))


def _check_room(directory: pathlib.Path, wanted: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < wanted + _SPARE:
        raise exception.NoSpace(
            f'{directory} has {free >> 20} MiB free; up to {wanted >> 20} '
            f'MiB are needed, and {_SPARE >> 20} MiB are kept')


def connect(uri: str) -> Any:
    """A connection to libvirt.

    :raises ConfigError: libvirt-python is not installed.
    :raises Unavailable: libvirt does not answer.
    """
    try:
        import libvirt
    except ImportError as error:
        raise exception.ConfigError(
            'libvirt-python is needed in this Python: install it') from error
    # It prints every error by itself otherwise.
    libvirt.registerErrorHandler(lambda *words: None, None)
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise exception.Unavailable(f'{uri}: {error}') from error


def _libvirt_error() -> type[Exception]:
    import libvirt
    found: type[Exception] = libvirt.libvirtError
    return found
