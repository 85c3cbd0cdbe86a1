# SPDX-License-Identifier: Apache-2.0
"""New servers that are resumed instead of booted, where a µVM is.

Nova has made all that an ordinary boot needs, and its own definition says
what the server is. So whatever speaks against a resume, or goes wrong in
one, ends in that boot, from a disk that is made anew. Imports nova; only
nova-compute loads it.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

import libvirt
import nova.conf
from nova.virt.libvirt import guest as libvirt_guest
from oslo_log import log as logging
from oslo_utils import strutils

from fastboot_common import chain, exception, overlay
from fastboot_common.microvm import activation, clone, document, template
from fastboot_nova import backend, notice
from fastboot_nova.microvm import disk as baked
from fastboot_nova.microvm import remote, resume

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

#: Extra spec of flavors; "no": servers are not resumed.
MICROVM: Final = 'fastboot:microvm'
#: Traits of a processor, which the template may not have.
_PROCESSOR: Final = 'HW_CPU_'
#: Extra specs that ask for one, of all resources or of a group of them.
_TRAITS: Final = re.compile(f'trait[^:]*:{_PROCESSOR}')
_BUSY_SECONDS: Final = 0.05
#: Within which a QEMU is gone that takes no more orders.
_ENDING_SECONDS: Final = 2.0
#: Of the deadline, for what comes after a resume in vain: until its machine
#: is gone and the fresh disk is there. 0.3 to 0.6 were measured.
_CLEARING_SECONDS: Final = 0.75
_NEW: Final = '.new'


class Guest(libvirt_guest.Guest):
    """A guest that runs, with interfaces that have no link yet.

    To Nova it is one that was started paused.
    """

    def __init__(self, resumed: resume.Resumed, instance: Any) -> None:
        super().__init__(resumed.domain)
        self._resumed = resumed
        self._instance = instance

    def resume(self) -> None:
        """Raise the links.

        A guest that has ended meanwhile is started, with the machine that
        Nova defined, which has them: others begin to run only now.

        :raises libvirt.libvirtError: it runs, and has no links.
        """
        try:
            self._resumed.link()
        except libvirt.libvirtError as error:
            if not self._has_ended():
                raise
            LOG.info('fastboot: the guest ended before its links came, and '
                     'is started: %s', error, instance=self._instance)
            self._start()

    def _has_ended(self) -> bool:
        """Whether it runs no more, or soon will not."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while self.is_active():
            if time.monotonic() > deadline:
                return False
            time.sleep(_BUSY_SECONDS)
        return True

    def _start(self) -> None:
        leave(self._instance)
        try:
            self._domain.create()
        except libvirt.libvirtError:
            # The agent may have been quicker.
            if not self.is_active():
                raise


@dataclasses.dataclass(frozen=True)
class Disk:
    """The root disk that Nova made, on a stub (bytes)."""

    path: pathlib.Path
    stub: pathlib.Path
    image_id: str
    size: int

    @classmethod
    def of(cls, xml: str) -> Self:
        """That of a definition.

        :raises NotFound: it lies on no stub, something was written to it,
            or it is on another bus than a µVM's.
        :raises Corrupt: the definition makes no sense.
        """
        tree = document.parse(xml)
        try:
            source = template.root_disk(tree).find('source')
        except exception.Corrupt as error:
            raise exception.NotFound(str(error)) from error
        path = pathlib.Path((source is not None and source.get('file')) or '')
        stub = backend.stub_of(str(path)) if path.is_absolute() else None
        if stub is None or not overlay.is_empty(path):
            raise exception.NotFound(f'{path} is no new disk on local blocks')
        found = overlay.read_backing(path)
        return cls(path, stub, overlay.follow(stub).image_id,
                   found[1] if found else 0)

    def bake(self, directory: pathlib.Path) -> None:
        """Have on it what the µVM's first boot wrote."""
        with self._anew() as path:
            baked.make(directory, path, self.size,
                       backing=(self.stub, 'qcow2'))

    def renew(self) -> None:
        """Have nothing on it."""
        with self._anew() as path:
            chain.make_disk(path, self.stub, self.size)

    @contextlib.contextmanager
    def _anew(self) -> Iterator[pathlib.Path]:
        path = self.path.with_name(self.path.name + _NEW)
        path.unlink(missing_ok=True)
        yield path
        # libvirt may leave it to root, and Nova reads it then as others do. A
        # resume that failed may have removed the old one.
        with contextlib.suppress(FileNotFoundError):
            path.chmod(stat.S_IMODE(self.path.stat().st_mode))
        os.replace(path, self.path)


def attempt(host: Any, xml: str, instance: Any,
            prepare: Callable[[], None]) -> Guest | None:
    """Resume a server whose disks Nova has just made.

    :param host: Nova's.
    :param xml: its definition.
    :param prepare: what Nova does when the domain is defined.
    :returns: None: it is to be booted, and all is as it was before.
    """
    try:
        _check_wishes(instance)
        disk = Disk.of(xml)
        lane = _take(disk.image_id, instance.uuid)
    except exception.NotFound as error:
        LOG.debug('fastboot: not resumed: %s', error, instance=instance)
        return None
    except (exception.FastbootError, OSError) as error:
        LOG.info('fastboot: not resumed: %s', error, instance=instance)
        return None
    return _Attempt(host.get_connection(), xml, instance, disk, lane).run(
        prepare)


def leave(instance: Any) -> None:
    """Have the agent not start a server that reboots just now."""
    try:
        backend.agent().leave(instance.uuid)
    except exception.FastbootError as error:
        LOG.debug('fastboot: the agent hears nothing: %s', error,
                  instance=instance)


def is_resumed(xml: str) -> bool:
    """Whether what runs is a template's machine.

    :param xml: of the running domain.
    """
    tree = document.parse(xml)
    return tree.find(
        f"devices/channel/target[@name='{template.PORT}']") is not None


def with_disk(defined: str, live: str, device: str) -> str:
    """A definition whose disk has the source of the one that runs.

    :param defined: of a server that was resumed.
    :param live: what runs, which is another machine.
    :param device: the disk's name.
    :raises Corrupt: one of them has no such disk.
    """
    tree = document.parse(defined)
    ours = _disk(tree, device)
    for child in list(ours):
        if child.tag not in ('target', 'address', 'alias', 'boot'):
            ours.remove(child)
    theirs = _disk(document.parse(live), device)
    ours.set('type', theirs.get('type', 'file'))
    for child in theirs:
        if child.tag not in ('target', 'address', 'alias', 'boot',
                             'backingStore', 'mirror'):
            child.attrib.pop('index', None)
            ours.append(child)
    return document.text_of(tree)


def _disk(tree: document.Element, device: str) -> document.Element:
    for disk in tree.iterfind('devices/disk'):
        target = disk.find('target')
        if target is not None and target.get('dev') == device:
            return disk
    raise exception.Corrupt(f'there is no disk {device}')


def _check_wishes(instance: Any) -> None:
    """:raises NotFound: the owner, or the operator, wants no resume."""
    if not CONF.fastboot.resume:
        raise exception.NotFound('[fastboot] resume is off')
    specs = instance.flavor.extra_specs
    if not strutils.bool_from_string(specs.get(MICROVM), default=True):
        raise exception.NotFound(f'the flavor has {MICROVM}='
                                 f'{specs[MICROVM]}')
    for name in specs:
        if _TRAITS.match(name):
            raise exception.NotFound(f'the flavor has {name}')
    for name in instance.image_meta.properties.get('traits_required', []):
        if name.startswith(_PROCESSOR):
            raise exception.NotFound(f'the image requires {name}')


def _take(image_id: str, holder: str) -> remote.Lane:
    """A lane; others may be about to give one back.

    :raises FastbootError: there is none.
    """
    deadline = time.monotonic() + CONF.fastboot.resume_wait
    while True:
        try:
            return remote.take(backend.agent(), image_id, holder)
        except exception.Busy:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_BUSY_SECONDS)


class _Attempt:
    """One server."""

    def __init__(self, connection: Any, xml: str, instance: Any, disk: Disk,
                 lane: remote.Lane) -> None:
        self._connection = connection
        self._xml = xml
        self._instance = instance
        self._disk = disk
        self._lane = lane
        self._began = time.monotonic()

    def run(self, prepare: Callable[[], None]) -> Guest | None:
        """See :func:`attempt`."""
        try:
            done = self._resume(prepare)
        except resume.ResumeFailed as error:
            if isinstance(error.__cause__, clone.Unsuitable):
                self._refuse(error.phase, error.reason)
                self._disk.renew()
                return None
            self._lane.give_back(remote.FAILED, error.phase, error.reason)
            self._fall_back(error)
            return None
        except exception.FastbootError as error:
            # Before anything was done: it cannot be, or is not understood.
            self._refuse('begin', str(error))
            return None
        except BaseException as error:
            self._lane.give_back(remote.FAILED, 'prepare', repr(error))
            raise
        self._lane.give_back(remote.RESUMED, seconds=done.seconds)
        LOG.info('fastboot: resumed from the µVM of image %s: %s',
                 self._disk.image_id, ', '.join(
                     f'{name} {moment:.2f} s'
                     for name, moment in done.seconds.items()),
                 instance=self._instance)
        self._emit('resumed', phases=done.seconds)
        return Guest(done, self._instance)

    def _resume(self, prepare: Callable[[], None]) -> resume.Resumed:
        def prepared() -> None:
            prepare()
            if self._instance.device_metadata:
                # Nova has told, and tells the guest, where they are in the
                # machine that is defined; this one has other places.
                raise clone.Unsuitable('it has devices with tags or VLANs')
            self._disk.bake(self._lane.directory)

        return resume.resume(
            self._connection, self._lane, resume.Spec(
                self._xml, activation.hostname(self._instance.hostname or ''),
                self._disk.size,
                deadline=CONF.fastboot.resume_deadline - _CLEARING_SECONDS,
                linked=False), prepare=prepared)

    def _refuse(self, phase: str, reason: str) -> None:
        self._lane.give_back(remote.REFUSED, phase, reason)
        LOG.info('fastboot: booted, not resumed: %s', reason,
                 instance=self._instance)

    def _fall_back(self, failure: resume.ResumeFailed) -> None:
        if failure.phase != resume.BEGIN:
            # What was loaded wrong may have reset itself.
            leave(self._instance)
            # Else it may be the disk of the domain that is there.
            self._disk.renew()
        LOG.warning('fastboot: %s; booted from a fresh disk after %.1f s',
                    failure, time.monotonic() - self._began,
                    instance=self._instance)
        self._emit('fallback', phase=failure.phase, reason=failure.reason)

    def _emit(self, event: str, **payload: Any) -> None:
        notice.emit(event, self._disk.image_id, self._instance,
                    seconds=round(time.monotonic() - self._began, 3),
                    **payload)
