# SPDX-License-Identifier: Apache-2.0
"""Servers of a libvirt of our own, booted as defined or resumed, timed.

libvirt's embedded driver runs them, whose guests outlive the program: the
next run finds what an interrupted one left, as it looks in the same place.
"""

import base64
import contextlib
import json
import pathlib
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Final

import libvirt
import libvirt_qemu

from bench import times
from fastboot_common import configdrive, qemu
from fastboot_common.microvm import activation
from fastboot_nova.microvm import connection, definition, disk, lane, resume

#: Of libvirt; the same in all runs.
ROOT: Final = pathlib.Path('/run/fastboot-bench')
DISK_SIZE: Final = 10 << 30
#: Seconds that anything may take: guests are emulated, and there may be
#: many of them.
PATIENCE: Final = 600
_TICK: Final = 0.02


@contextlib.contextmanager
def hypervisor() -> Iterator[Any]:
    """A connection to a libvirt that has no guests, and has none left."""
    with connection.opened(connection.embedded(ROOT)) as found:
        clear(found)
        # It asks QEMU what it can do, which takes seconds, only once.
        found.getCapabilities()
        try:
            yield found
        finally:
            clear(found)
    shutil.rmtree(ROOT, ignore_errors=True)


def clear(found: Any) -> None:
    """Stop and forget all guests."""
    for domain in found.listAllDomains():
        _remove(domain)


def _remove(domain: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        domain.destroy()
    with contextlib.suppress(libvirt.libvirtError):
        domain.undefine()


class Server:
    """A server with a disk of its own; all of it is gone on leaving.

    :ivar domain: libvirt's, once it was started.
    """

    def __init__(self, found: Any, room: pathlib.Path, name: str) -> None:
        self._libvirt = found
        self._room = room
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.domain: Any = None
        self._disk = room / 'disk'

    def __enter__(self) -> 'Server':
        self._room.mkdir(parents=True)
        configdrive.build(self._room / 'config.iso', self.name, plain=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.domain:
            _remove(self.domain)
        shutil.rmtree(self._room, ignore_errors=True)

    def xml(self) -> str:
        """Its definition: what Nova's is like, and QEMU's own network."""
        text = definition.Server(
            name=self.name, uuid=self.uuid, disk=self._disk,
            console=self._room / 'console',
            config_drive=self._room / 'config.iso').xml()
        return text.replace('</devices>', (
            f"<interface type='user'><mac address='{times.mac(self.uuid)}'/>"
            f"<model type='virtio'/></interface></devices>"))

    def boot(self, image: pathlib.Path) -> times.Times:
        """Boot it from an overlay on an image, until cloud-init is over."""
        qemu.create_overlay(self._disk, str(image), 'qcow2', DISK_SIZE)
        xml = self.xml()
        begun = time.monotonic()
        self.domain = self._libvirt.defineXML(xml)
        self.domain.create()
        return times.ordered(self._watched(begun))

    def _watched(self, begun: float) -> times.Times:
        found: times.Times = {}
        console = self._room / 'console'
        while len(found) < len(times.OF_BOOTS):
            reached = times.printed(console.read_bytes())
            if times.ANSWER not in found and answers(self.domain, 5):
                reached.add(times.ANSWER)
            now = time.monotonic() - begun
            found = dict.fromkeys(reached, now) | found
            if now > PATIENCE:
                raise RuntimeError(f'{self.name} came no further than '
                                   f'{found}: see its console')
            time.sleep(_TICK)
        return found

    def furnish(self, artifact: pathlib.Path) -> lane.Lane:
        """What it can be resumed from: a disk and a lane, made ahead."""
        disk.make(artifact, self._disk, DISK_SIZE)
        return lane.Lane.create(artifact, self._room / 'lane')

    def resume(self, one: lane.Lane, **changes: Any) -> times.Times:
        """Resume it, and ask its agent as soon as it runs.

        :param changes: members of the :class:`resume.Spec`.
        """
        spec = resume.Spec(**{
            'xml': self.xml(), 'hostname': self.name, 'disk_size': DISK_SIZE,
            'stage': activation.DONE, 'deadline': PATIENCE, **changes})
        found: times.Times = {}
        over = threading.Event()

        def ask() -> None:
            domain = self._libvirt.lookupByUUIDString(self.uuid)
            while not over.is_set():
                if answers(domain, PATIENCE):
                    found[times.ANSWER] = time.monotonic() - begun
                    return

        asking = threading.Thread(target=ask, daemon=True)

        def told(phase: str) -> None:
            if phase == 'activate':
                asking.start()

        begun = time.monotonic()
        try:
            done = resume.resume(self._libvirt, one, spec, told=told)
        except resume.ResumeFailed:
            over.set()
            raise
        self.domain = done.domain
        asking.join(PATIENCE)
        found |= done.seconds
        del found['end']
        return times.ordered(found)

    def run(self, script: str) -> str:
        """What a script in the guest prints."""
        known = self._ask('guest-exec', path='/bin/sh', arg=['-c', script],
                          **{'capture-output': True})['pid']
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = self._ask('guest-exec-status', pid=known)
            if found['exited']:
                return base64.b64decode(found.get('out-data', '')).decode()
            time.sleep(0.2)
        raise RuntimeError(f'{self.name}: {script} does not end')

    def _ask(self, command: str, **arguments: Any) -> Any:
        return json.loads(libvirt_qemu.qemuAgentCommand(
            self.domain, json.dumps({'execute': command,
                                     'arguments': arguments}), 60, 0)
            )['return']

    def resident(self) -> int:
        """Bytes of its QEMU in memory."""
        number = int((ROOT / 'run/qemu' / f'{self.name}.pid').read_text())
        text = pathlib.Path(f'/proc/{number}/status').read_text()
        found = re.search(r'VmRSS:\s*(\d+) kB', text)
        assert found
        return int(found[1]) << 10


def answers(domain: Any, seconds: int) -> bool:
    """Whether a guest's agent does; refused at once while it has none.

    :param seconds: that it may take.
    """
    try:
        libvirt_qemu.qemuAgentCommand(
            domain, '{"execute": "guest-ping"}', seconds, 0)
    except libvirt.libvirtError:
        time.sleep(_TICK / 4)
        return False
    return True
