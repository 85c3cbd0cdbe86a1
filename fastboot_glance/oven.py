# SPDX-License-Identifier: Apache-2.0
"""The process that a guest is baked in: libvirt, and QEMU below it.

Run by :mod:`fastboot_glance.bakery` in a sandbox of its own, where it is the
first process, so that all ends with it. libvirt's embedded driver needs no
service: it lives here, with the rights of an account that owns nothing, and
an uploaded image never meets a libvirt that has more.

It reads one JSON object from stdin and writes one a line to stdout: how far
it is, then ``done``, ``refused`` or ``failed``.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any, Final

import libvirt

from fastboot_common import exception
from fastboot_common.microvm import activation, document, template

_NO_NEW_PRIVS: Final = 38
_PDEATHSIG: Final = 1
_BIND: Final = 4096
_CONFIG: Final = """\
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
security_driver = "none"
seccomp_sandbox = 1
save_image_format = "raw"
max_core = 0
"""
_UNPLUG_SECONDS: Final = 60
_QUIESCE_SECONDS: Final = 60
_END_SECONDS: Final = 5
_TICK: Final = 0.1
#: Why a guest stopped, by libvirt's numbers.
_ENDS: Final = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: 'it shut down or rebooted',
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: 'it rebooted or panicked',
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: 'it crashed',
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: 'QEMU died',
}


class Failed(Exception):
    """The guest was not baked; why."""


class Refused(Failed):
    """The guest is the reason: it would be so again."""


def tell(**message: Any) -> None:
    """Say something to who started us."""
    print(json.dumps(message), flush=True)


def drop(uid: int, gid: int) -> None:
    """Become another user for good, and die with who started us."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    for option, value in ((_NO_NEW_PRIVS, 1),
                          (_PDEATHSIG, signal.SIGKILL)):
        _call('prctl', option, value, 0, 0, 0)


def move_in(request: dict[str, Any]) -> None:
    """Have the room at its home, a short name that its user may reach.

    :raises OSError: it cannot be mounted, or others would see it there.
    """
    room, home = request['room'], request['home']
    if room != home:
        if os.stat('/proc/self/ns/mnt').st_ino == request['mounts']:
            raise OSError(0, 'this host permits no mounts of our own')
        _call('mount', room.encode(), home.encode(), None, _BIND, None)
    os.chdir(home)


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f'{name}: {os.strerror(number)}')


def connect(room: pathlib.Path) -> Any:
    """libvirt's driver, with all of its files in a directory."""
    etc = room / 'root' / 'etc'
    etc.mkdir(parents=True)
    (etc / 'qemu.conf').write_text(_CONFIG)
    libvirt.registerErrorHandler(lambda context, error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def events() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=events, daemon=True).start()
    return libvirt.open(f'qemu:///embed?root={room}/root')


class Port:
    """The activator's port.

    :param path: of its socket.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = activation.Lines()

    def send(self, data: bytes) -> None:
        """Say something; a guest that does not listen loses it."""
        with contextlib.suppress(OSError):
            self._socket.setblocking(False)
            self._socket.send(data)

    def hear(self, seconds: float) -> list[activation.Line] | None:
        """What the guest says within some time; None: it is gone."""
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(4096)
        except TimeoutError:
            return []
        return self._lines.feed(data) if data else None


class Oven:
    """One guest, from its first instruction to its saved memory."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._room = pathlib.Path(request['home'])
        self._end: queue.Queue[int] = queue.Queue()

    def bake(self) -> None:
        """All of it.

        :raises Failed: it came to no good end.
        :raises libvirt.libvirtError: libvirt cannot do its part.
        """
        tell(phase='libvirt')
        connection = connect(self._room)
        tell(phase='boot', libvirt=connection.getLibVersion())
        connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._happened, None)
        self._domain = connection.createXML(self._request['xml'], 0)
        self._port = Port(self._room / self._request['port'])
        # Only now: what libvirt took is none of the image's doing.
        vcpus = self._await(
            activation.READY, self._request['timeout'],
            'its activator did not get ready; does the image have '
            'cloud-init?')
        tell(phase='unplug', vcpus=vcpus)
        self._unplug()
        tell(phase='quiesce')
        self._port.send(activation.QUIESCE)
        self._await(activation.QUIET, _QUIESCE_SECONDS,
                    'it did not come to rest', Failed)
        tell(phase='save')
        self._domain.saveFlags(
            str(self._room / self._request['save']), None,
            libvirt.VIR_DOMAIN_SAVE_RUNNING)

    def _happened(self, connection: Any, domain: Any, event: int,
                  detail: int, opaque: Any) -> None:
        """libvirt tells why a guest stopped, and forgets it."""
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._end.put(detail)

    def _stopped(self) -> Failed:
        """Why there is no guest any more; libvirt knows a moment later."""
        kind: type[Failed] = Failed
        reason = 'it stopped'
        with contextlib.suppress(queue.Empty):
            detail = self._end.get(timeout=_END_SECONDS)
            reason = _ENDS.get(detail, f'it stopped ({detail})')
            # Whatever a guest does, QEMU must not die of it.
            kind = Refused if detail in _ENDS and detail != (
                libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED) else Failed
        log = self._room / 'root' / 'log' / 'qemu' / 'baking.log'
        with contextlib.suppress(OSError):
            for words in log.read_text(errors='replace').splitlines()[-1:]:
                reason += f'; QEMU said last: {words}'
        return kind(reason)

    def _await(self, word: str, seconds: float, otherwise: str,
               kind: type[Failed] = Refused) -> int | None:
        """Wait for a word of the guest; the number with it.

        :param kind: what it is if it does not come: of a guest that was
            ready, a host that is busy is as likely the reason.
        :raises Failed: it did not come in time, or another one did.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            heard = self._port.hear(left)
            if heard is None:
                raise self._stopped()
            for line in heard:
                if line.word == activation.REFUSED:
                    raise Refused('it can neither import cloud-init nor '
                                  'reseed its random numbers')
                if line.word == word:
                    return line.number
        raise kind(f'{otherwise} ({seconds:.0f} seconds)')

    def _unplug(self) -> None:
        """Take the drive away. A guest that does not let go of it would not
        take what is plugged into an instance, either."""
        self._domain.detachDeviceFlags(
            document.text_of(self._drive()),
            libvirt.VIR_DOMAIN_AFFECT_LIVE)
        end = time.monotonic() + _UNPLUG_SECONDS
        while f"'{template.DRIVE}'" in self._domain.XMLDesc():
            if time.monotonic() > end:
                raise Refused('it does not let go of a device that is '
                              'unplugged')
            time.sleep(_TICK)

    def _drive(self) -> document.Element:
        tree = document.parse(self._domain.XMLDesc())
        for disk in tree.iterfind('devices/disk'):
            target = disk.find('target')
            if target is not None and target.get('dev') == template.DRIVE:
                return disk
        raise Failed('the drive is gone')


def reap() -> None:
    """Leave the first process of the name space to bury the dead.

    QEMU leaves libvirt when it is started, and is the first process's child
    then. libvirt asks the kernel whether it is gone, and a dead process that
    nobody waits for is there: each end took 40 seconds.
    """
    worker = os.fork()
    while worker:
        ended, status = os.wait()
        if ended == worker:
            os._exit(os.waitstatus_to_exitcode(status) & 0xff)


def main() -> None:
    """Bake, and say what came of it."""
    request = json.loads(sys.stdin.readline())
    os.umask(0o027)
    os.environ['HOME'] = request['home']
    try:
        move_in(request)
        drop(request['uid'], request['gid'])
        reap()
        Oven(request).bake()
    except Refused as error:
        tell(refused=str(error))
    except (Failed, exception.FastbootError) as error:
        tell(failed=str(error))
    except (libvirt.libvirtError, OSError) as error:
        tell(failed=f'libvirt: {error}')
    else:
        tell(done=True)


if __name__ == '__main__':
    main()
    # libvirt's threads are of no use any more; QEMU ends with us.
    sys.stdout.flush()
    os._exit(0)
