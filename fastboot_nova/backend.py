# SPDX-License-Identifier: Apache-2.0
"""Nova's image backend: disks on stubs, or Nova's own way.

A subclass of Nova's ``Qcow2``, so that whatever Nova decides by class, name
or format stays as it is. Imports nova; only nova-compute loads it.

The base of a disk that lies on local blocks is a stub, named as an old
Nova named resized bases (``<sha1>_sm``): the image cache manager counts it
as a base of the image, and a stock base can lie beside it.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Final
from xml.etree import ElementTree

import nova.conf
from lxml import etree
from nova import exception as nova_exception
from nova import utils
from nova.compute import task_states
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import imagebackend
from oslo_log import log as logging
from oslo_utils import fileutils, strutils

from fastboot_common import chain, exception, nbdkit, overlay
from fastboot_common.conf import nova as options
from fastboot_nova import client, notice

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF
CONF.register_opts(options.OPTS, group=options.GROUP)

#: Property of images and extra spec of flavors; "no": a server starts only
#: when all of its image is on the host.
LAZY: Final = 'fastboot:lazy'
_RETRY_SECONDS: Final = 0.5
#: Longest that nobody waits after a wait that was in vain.
_VAIN_SECONDS: Final = 300.0
_BUSY_SECONDS: Final = 0.05


def agent(seconds: float | None = None) -> client.Agent:
    """The agent of this host, as nova.conf names it.

    :param seconds: that a call may take; None: as nova.conf says.
    """
    return client.Agent(CONF.fastboot.agent_socket,
                        seconds or CONF.fastboot.timeout)


def export_answers(path: pathlib.Path, seconds: float) -> bool:
    """Whether guests would be served at the export's socket `path`."""
    try:
        nbdkit.greet(path, seconds)
    except OSError as error:
        LOG.debug('The export %s does not answer: %s', path, error)
        return False
    return True


class _Waits:
    """The waits of all servers for what serves them: agent and export.

    Nova starts the servers of a host that was booted one after the other, and
    hears no calls meanwhile: what stays away is waited for once, not by each.
    """

    def __init__(self) -> None:
        #: Until when nobody waits (monotonic).
        self._vain = 0.0

    def is_over(self, deadline: float) -> bool:
        """Whether who has no answer is to give up.

        :param deadline: until when it would wait; 0: it only asks.
        """
        now = time.monotonic()
        if now < self._vain or not deadline:
            return True
        if now > deadline:
            self._vain = now + _VAIN_SECONDS
        return now > deadline

    def answered(self) -> None:
        """It is worth while to wait again."""
        self._vain = 0.0


_waits = _Waits()


def check_enabled() -> None:
    """See whether new servers of this host may lie on local blocks.

    :raises Invalid: they may not, and why.
    """
    if not CONF.fastboot.enabled:
        raise exception.Invalid('[fastboot] enabled is off')
    if CONF.glance.verify_glance_signatures:
        raise exception.Invalid('[glance] verify_glance_signatures is on')


def stub_of(disk: str) -> pathlib.Path | None:
    """The stub that a disk's overlay names, whether it is there or not."""
    path = pathlib.Path(disk)
    try:
        found = overlay.read_backing(path)
        if not found or not found[0]:
            return None
        base = pathlib.Path(found[0])
        is_ours = base.is_absolute() and base.parent == base_directory() \
            and base.name.endswith(overlay.SUFFIX)
        if is_ours and overlay.needs_stub(path, base):
            return base
    except exception.NotFound:
        pass
    except (exception.FastbootError, OSError) as error:
        LOG.warning('fastboot: what %s lies on cannot be read, so nothing is '
                    'done for it: %s', disk, error)
    return None


def _is_stub(path: pathlib.Path) -> bool:
    with contextlib.suppress(exception.FastbootError):
        return overlay.read_stub(path) is not None
    return False


def base_directory() -> pathlib.Path:
    """Where Nova keeps bases, and we our stubs."""
    return pathlib.Path(CONF.instances_path,
                        CONF.image_cache.subdirectory_name)


class ChainedDisk(vconfig.LibvirtConfigGuestDisk):
    """A disk whose backing chain stands in the domain's XML.

    Nova parses ``<backingStore>``, but never writes it.
    """

    chain: Any = None

    def format_dom(self) -> Any:
        """The ``<disk>`` element."""
        disk = super().format_dom()
        disk.append(self.chain)
        _pause_rather_than_fail(disk)
        return disk


class FastbootQcow2(imagebackend.Qcow2):
    """A qcow2 disk, on local blocks where they are."""

    def __init__(self, instance: Any = None, disk_name: str | None = None,
                 path: str | None = None,
                 disk_info_mapping: dict[str, Any] | None = None) -> None:
        super().__init__(instance, disk_name, path, disk_info_mapping)
        self._instance = instance

    # Making disks

    def cache(self, fetch_func: Any, filename: str,
              size: int | None = None, safe: bool = False, *args: Any,
              **kwargs: Any) -> None:
        """Make the disk and its base; see Nova's ``Image.cache``.

        :param filename: of the base that Nova wants.
        :raises InvalidDiskInfo: the disk lies on local blocks that do not
            come.
        """
        stub = self._choose(filename, kwargs)
        super().cache(fetch_func, stub.name if stub else filename, size,
                      safe, *args, **kwargs)

    def _choose(self, filename: str,
                kwargs: dict[str, Any]) -> pathlib.Path | None:
        """The stub that the disk is to lie on; None: Nova's own base."""
        image_id = kwargs.get('image_id')
        below = stub_of(self.path)
        if below and filename in (below.name,
                                  below.name.removesuffix(overlay.SUFFIX)):
            return self.restore(below, image_id)
        base = base_directory() / filename
        if filename.endswith(overlay.SUFFIX) and not (
                _is_stub(base) or (self.exists() and base.exists())):
            # The destination of a migration: the disk is not made yet. What
            # Nova's own driver left there is not what it lies on.
            return self.restore(base, image_id)
        if image_id is None or filename != overlay.base_name(image_id):
            return None
        if self._is_migrating() or (
                self.exists() and self._lies_on(filename)):
            return None
        return self._hit(image_id, kwargs)

    def _is_migrating(self) -> bool:
        """Whether the server runs elsewhere, with the base that Nova names.

        Its chain comes with it, and ours would be another one.
        """
        return (self._instance is not None and bool(
            self._instance.task_state == task_states.MIGRATING))

    def _lies_on(self, filename: str) -> bool:
        with contextlib.suppress(exception.FastbootError):
            found = overlay.read_backing(pathlib.Path(self.path))
            return bool(found and found[0]
                        and os.path.basename(found[0]) == filename)
        return False

    def _hit(self, image_id: str,
             kwargs: dict[str, Any]) -> pathlib.Path | None:
        """A stub for a new disk, or None and the reason in the log."""
        began = time.monotonic()
        stub = base_directory() / (
            overlay.base_name(image_id) + overlay.SUFFIX)
        try:
            self._check_eligible(kwargs)
            lease = self._acquire(image_id, stub)
            self._check_usable(lease)
            self._write_stub(stub, lease.link)
        except (exception.FastbootError, OSError) as error:
            seconds = time.monotonic() - began
            LOG.info('fastboot: miss for image %s after %.0f ms, stock path: '
                     '%s', image_id, seconds * 1000, error,
                     instance=self._instance)
            notice.emit('miss', image_id, self._instance, seconds=seconds,
                        reason=str(error))
            return None
        seconds = time.monotonic() - began
        LOG.info('fastboot: hit for image %s in %.0f ms (agent %.0f ms, '
                 '%d bytes thawed), %s', image_id, seconds * 1000,
                 lease.seconds * 1000, lease.thawed,
                 'complete' if lease.link.complete else 'rest on demand',
                 instance=self._instance)
        notice.emit('hit', image_id, self._instance, seconds=seconds,
                    thawed=lease.thawed)
        return stub

    def _acquire(self, image_id: str, stub: pathlib.Path) -> client.Lease:
        """A lease; patient where the stock path is no quick way out.

        While a boot set is being thawed, a host that has a stock base is
        faster with it. One that has none would download the image.

        :raises Unavailable: the image is not whole in time, and the server
            wants that.
        """
        if not self._is_lazy():
            return self._acquire_whole(image_id, stub)
        base = base_directory() / overlay.base_name(image_id)
        deadline = time.monotonic() + (
            0 if base.exists() else CONF.fastboot.thaw_timeout)
        while True:
            try:
                return agent().acquire(image_id, stub)
            except exception.Busy:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_BUSY_SECONDS)

    def _is_lazy(self) -> bool:
        """Whether the guest may start before its image is whole here."""
        instance = self._instance
        if instance is None:
            return True
        words = instance.flavor.extra_specs.get(LAZY) or \
            instance.system_metadata.get(f'image_{LAZY}')
        return bool(strutils.bool_from_string(words, default=True))

    @staticmethod
    def _acquire_whole(image_id: str, stub: pathlib.Path) -> client.Lease:
        seconds = CONF.fastboot.complete_timeout
        deadline = time.monotonic() + seconds
        agent().prepare(image_id)
        while time.monotonic() < deadline:
            with contextlib.suppress(exception.Busy):
                lease = agent().acquire(image_id, stub)
                if lease.link.complete:
                    return lease
            time.sleep(_RETRY_SECONDS)
        raise exception.Unavailable(
            f'{LAZY} is no, and the image is not complete after '
            f'{seconds:.0f} s')

    def _check_eligible(self, kwargs: dict[str, Any]) -> None:
        """Leave to Nova what only Nova can do.

        :raises Invalid: and why.
        """
        check_enabled()
        mapping = self.disk_info_mapping or {}
        instance = self._instance
        reasons = (
            (kwargs.get('trusted_certs'), 'the server has trusted '
                                          'certificates'),
            (mapping.get('encrypted'), 'the disk is encrypted'),
            (instance is not None and (instance.kernel_id
                                       or instance.ramdisk_id),
             'the image has a kernel or ramdisk of its own'),
        )
        for applies, words in reasons:
            if applies:
                raise exception.Invalid(words)

    @staticmethod
    def _check_usable(lease: client.Lease) -> None:
        """A chain that cannot be opened is no hit.

        :raises Unavailable: and why.
        """
        place = lease.link.complete or lease.link.volume
        if not os.access(place, os.R_OK):
            raise exception.Unavailable(f'{place} cannot be read')
        if not lease.link.complete and not export_answers(
                lease.socket, CONF.fastboot.timeout / 2):
            raise exception.Unavailable(
                f'the export does not answer at {lease.socket}')

    def _write_stub(self, stub: pathlib.Path, link: chain.Link) -> None:
        """Make the stub, or renew one that says something else.

        :raises Invalid: another's base is in its place.
        """
        fileutils.ensure_tree(str(stub.parent))

        # The lock that Nova's cache manager holds when it removes a base.
        @utils.synchronized(stub.name, external=True,
                            lock_path=self.lock_path)
        def write() -> None:
            found = overlay.read_backing(stub) if stub.exists() else None
            if found is None and stub.exists():
                _put_aside(stub)
            if not found or found[0] != link.backing:
                chain.make_stub(stub, link)
                return
            # As Nova does, for its cache manager; but the file is ours, and
            # the first call of a privsep daemon costs a second.
            with contextlib.suppress(PermissionError):
                os.utime(stub)

        write()

    def restore(self, stub: pathlib.Path, image_id: str | None = None,
                deadline: float | None = None) -> pathlib.Path:
        """See to it that a stub which a disk needs is there, and leased.

        :param image_id: a guess.
        :param deadline: until when to wait; None: :func:`patience`.
        :raises InvalidDiskInfo: it is not there by then.
        """
        deadline = patience() if deadline is None else deadline
        while True:
            try:
                lease = agent().acquire(
                    self._image_of(stub, image_id), stub, removed=True)
                self._write_stub(stub, lease.link)
                return stub
            except (exception.FastbootError, OSError) as error:
                if self._usable(stub):
                    LOG.warning('fastboot: %s cannot be leased, but is '
                                'there: %s', stub, error,
                                instance=self._instance)
                    return stub
                if self._is_over(error, deadline):
                    raise nova_exception.InvalidDiskInfo(
                        reason=f'{self.path} lies on {stub}, which is '
                               f'missing and cannot be made: '
                               f'{error}') from error
            time.sleep(_RETRY_SECONDS)

    @staticmethod
    def _is_over(error: Exception, deadline: float) -> bool:
        # Other errors are of one image.
        if isinstance(error, exception.Unavailable):
            return _waits.is_over(deadline)
        return time.monotonic() > deadline

    @staticmethod
    def _usable(stub: pathlib.Path) -> bool:
        """Whether it can be opened, and stays so while the agent is away.

        Where hosts share their stubs, another one may have made it, and here
        nothing keeps what it names.
        """
        with contextlib.suppress(exception.FastbootError, OSError):
            link = overlay.follow(stub)
            leases = link.volume.parent / 'leases' / link.image_id
            return any(name[0] != '.' for name in os.listdir(leases))
        return False

    @staticmethod
    def _image_of(stub: pathlib.Path, image_id: str | None) -> str:
        if image_id and stub.name.startswith(overlay.base_name(image_id)):
            return image_id
        with contextlib.suppress(exception.NotFound):
            return overlay.follow(stub).image_id
        # A rescue image, or one that the server was rebuilt from.
        for known in agent().image_ids():
            if stub.name.startswith(overlay.base_name(known)):
                return known
        raise exception.NotFound(f'no image is known whose base would be '
                                 f'{stub.name}')

    def create_image(self, prepare_template: Any, base: str,
                     size: int | None, safe: bool = False, *args: Any,
                     **kwargs: Any) -> None:
        """Make the disk on its base; see Nova's ``Qcow2.create_image``."""
        stub = pathlib.Path(base)
        found = overlay.read_stub(stub) if stub.exists() else None
        if found is None:
            super().create_image(prepare_template, base, size, safe, *args,
                                 **kwargs)
            return
        self.verify_base_size(base, size, found.virtual_size)
        if not self.exists():
            with fileutils.remove_path_on_error(self.path):
                # Not Nova's helper: it refuses a base that has a backing,
                # and opens the chain.
                chain.make_disk(pathlib.Path(self.path), stub,
                                size or found.virtual_size)

    # Describing them to libvirt

    def libvirt_info(self, cache_mode: str, *args: Any,
                     **kwargs: Any) -> Any:
        """The disk's part of the domain; see Nova's ``libvirt_info``.

        :raises InvalidDiskInfo: its stub is not there.
        """
        info = super().libvirt_info(cache_mode, *args, **kwargs)
        stub = stub_of(self.path)
        if stub is None:
            return info
        disk = ChainedDisk()
        disk.__dict__.update(info.__dict__)
        disk.chain = self._backing_store(stub, cache_mode)
        return disk

    def _backing_store(self, stub: pathlib.Path, cache_mode: str) -> Any:
        try:
            link = overlay.follow(stub)
        except exception.FastbootError as error:
            raise nova_exception.InvalidDiskInfo(
                reason=f'{self.path}: {error}') from error
        return _element(stub, link, _device(stub, link, cache_mode))


def _put_aside(base: pathlib.Path) -> None:
    """Make room for a stub where a raw base is.

    Under a name that Nova's cache manager knows, and removes. Who has it open
    keeps it.

    :raises Invalid: a disk lies on it as it is.
    """
    for disk in overlay.lying_on(base):
        if overlay.backing_format(disk) != 'qcow2':
            raise exception.Invalid(
                f'{disk} lies on {base}, which is no stub')
    aside = base.with_name(base.name.removesuffix(overlay.SUFFIX) + '_raw')
    base.rename(aside)
    LOG.warning('fastboot: %s was no stub; it is %s now', base, aside)


def _device(stub: pathlib.Path, link: chain.Link,
            cache_mode: str) -> pathlib.Path | None:
    """What to read the volume through, so that guests share memory.

    With O_DIRECT they would not: the agent may have a loop device.
    """
    if cache_mode not in ('none', 'directsync'):
        return None
    with contextlib.suppress(exception.FastbootError):
        device = agent().acquire(
            link.image_id, stub, removed=True).device
        if device and device.is_block_device():
            return device
    return None


def _element(stub: pathlib.Path, link: chain.Link,
             device: pathlib.Path | None = None) -> Any:
    return etree.fromstring(ElementTree.tostring(chain.backing_store(
        stub, link, pathlib.Path(CONF.fastboot.export_socket), device)))


def _pause_rather_than_fail(disk: Any) -> None:
    """A guest waits for an export that is away, and sees no error.

    The agent resumes it. A write that fills a part of a cluster reads the
    rest of it from below, and fails as a write. A chain without an export
    fails as stock ones do, also if it had one before.
    """
    options = disk.find('driver').attrib
    for policy in ('error_policy', 'rerror_policy'):
        if disk.find(".//source[@protocol='nbd']") is not None:
            options[policy] = 'stop'
        else:
            options.pop(policy, None)


def portable(domain: str, complete: bool = False) -> str:
    """The XML of a domain in the form that another host can start.

    Complete names and block devices are one host's affair; the volume and
    the export are on all of them.

    :param domain: the XML of a domain on this host.
    :param complete: the other host has all images of its disks complete.
    """
    def other(stub: pathlib.Path, disk: Any) -> Any:
        link = overlay.follow(stub)
        name = link.volume.parent / chain.COMPLETE / link.image_id
        return _element(stub, dataclasses.replace(
            link, complete=name if complete else None))

    return _rechained(domain, other)[0]


def renewed(domain: str) -> str | None:
    """The XML of a domain that is off, with its chains as they are now.

    :returns: None: they are still as the XML says.
    :raises Corrupt: stub and volume contradict each other.
    """
    def current(stub: pathlib.Path, disk: Any) -> Any:
        link = overlay.follow(stub)
        mode = disk.find('driver').get('cache', '')
        return _element(stub, link, _device(stub, link, mode))

    found, changed = _rechained(domain, current)
    return found if changed else None


def _rechained(domain: str, make: Callable[[pathlib.Path, Any], Any],
               ) -> tuple[str, bool]:
    """The XML of a domain with other chains, and whether they differ.

    :param make: gives the chain from a stub on, for a ``<disk>``.
    """
    tree, changed = etree.fromstring(domain), False
    for layer in tree.findall('./devices/disk/backingStore'):
        source = layer.find('source')
        name = source.get('file') if source is not None else None
        if name is None or not name.endswith(overlay.SUFFIX):
            continue
        disk = layer.getparent()
        with contextlib.suppress(exception.NotFound):
            other = make(pathlib.Path(name), disk)
            changed |= _places(other) != _places(layer)
            disk.replace(layer, other)
            _pause_rather_than_fail(disk)
    return str(etree.tostring(tree, encoding='unicode')), changed


def _places(layer: Any) -> list[tuple[str | None, ...]]:
    names = 'file', 'dev', 'name', 'socket', 'offset', 'size'
    return [tuple(map(found.get, names))
            for found in layer.iter('source', 'host', 'slice')]


def patience() -> float:
    """Until when what disks need is waited for from now on (monotonic)."""
    return time.monotonic() + float(CONF.fastboot.patience)


def check_chain(disk: str, deadline: float = 0) -> None:
    """Prove that a disk on a stub could be opened now.

    Asked before a running guest is destroyed for a new start.

    :param deadline: until when the export is waited for.
    :raises InvalidDiskInfo: it could not, and why.
    """
    stub = stub_of(disk)
    if stub is None:
        return
    try:
        link = overlay.follow(stub)
        place = link.complete or link.volume
        if not os.access(place, os.R_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES),
                          str(place))
    except (exception.FastbootError, OSError) as error:
        raise nova_exception.InvalidDiskInfo(
            reason=f'{disk}: {error}') from error
    path = pathlib.Path(CONF.fastboot.export_socket)
    while not link.complete:
        if export_answers(path, CONF.fastboot.timeout):
            _waits.answered()
            return
        if _waits.is_over(deadline):
            raise nova_exception.InvalidDiskInfo(
                reason=f'{disk}: blocks that are not on this host yet come '
                       f'from {path}, where nobody answers; start '
                       f'fastboot-agent')
        time.sleep(_RETRY_SECONDS)
