# SPDX-License-Identifier: Apache-2.0
"""Resumes a copy of a baked guest as a new server.

The persistent domain is the instance's own definition, as its owner gave it;
only the running one is the baked machine. So whatever ends this run, a
reboot from inside included, the next start is an ordinary boot of the same
disk. On any failure nothing is left but the lane; the disk is removed, too:
it may have been written to, and the instance must be booted from a fresh one.
Only where the domain was there before, it and its disk are left alone.
"""

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import libvirt

from fastboot_common import exception
from fastboot_common.microvm import (
    activation,
    artifact,
    clone,
    document,
    template,
)

#: Seconds until a guest must be somebody: 1.2 are usual until its first
#: instruction. Under TCG, with both processors of the host busy, the most
#: were 6 and 8 more.
DEADLINE: Final = 10.0
#: The phase in which nothing was done yet; the disk is as it was.
BEGIN: Final = 'begin'
_POLL: Final = 0.005
_SEND_SECONDS: Final = 2.0
#: Between two attempts to end what takes too long.
_AGAIN: Final = 0.25
#: How libvirt says no. Its message has QEMU's last words, which may be what
#: QEMU found in a damaged stream; where that is no text, libvirt-python (9.0)
#: fails to decode it, and the call with it.
_REFUSALS: Final = (libvirt.libvirtError, SystemError, UnicodeError)


class Lane(Protocol):
    """A private copy of a saved guest, here or in the agent's hands.

    See :mod:`fastboot_nova.microvm.lane` and
    :mod:`fastboot_nova.microvm.remote`.
    """

    path: pathlib.Path
    description: artifact.Description

    def dress(self, instance: clone.Instance) -> None: ...


class ResumeFailed(exception.FastbootError):
    """The instance was not resumed, and nothing of it is left. Boot it.

    :ivar phase: that it failed in.
    """

    def __init__(self, phase: str, reason: str) -> None:
        self.phase = phase
        self.reason = reason
        super().__init__(f'resume failed ({phase}): {reason}')


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is resumed.

    :ivar xml: the persistent definition. Its root disk is there already
        (:func:`fastboot_nova.microvm.disk.make`), and is no other's.
    :ivar hostname: until cloud-init sets one.
    :ivar disk_size: bytes of the root disk.
    :ivar stage: that it is waited for: one of
        :data:`fastboot_common.microvm.activation.STAGES`.
    :ivar deadline: seconds from the call to that stage. libvirt itself
        waits for a QEMU without end.
    :ivar entropy: see :func:`fastboot_common.microvm.activation.request`.
    :ivar linked: whether the interfaces get their links at IDENTITY; else
        who has the result raises them.
    """

    xml: str
    hostname: str
    disk_size: int
    stage: str = activation.IDENTITY
    deadline: float = DEADLINE
    entropy: bytes | None = None
    linked: bool = True


@dataclasses.dataclass
class Resumed:
    """A server that runs.

    :ivar domain: libvirt's.
    :ivar seconds: since the call, at the end of each phase and stage.
    """

    domain: Any
    seconds: dict[str, float]
    interfaces: list[document.Element]

    def link(self) -> None:
        """Raise the links of its interfaces.

        :raises libvirt.libvirtError: it ended.
        """
        for interface in self.interfaces:
            _set_link(self.domain, interface, 'up')


def resume(connection: Any, lane: Lane, spec: Spec, *,
           told: Callable[[str], None] | None = None,
           prepare: Callable[[], None] | None = None) -> Resumed:
    """Resume a copy of the guest in `lane` as the instance of `spec`.

    :param connection: to libvirt; :func:`compatible.check` has seen that
        this host can run what is in the lane.
    :param told: called at the end of each phase with its name.
    :param prepare: called when the domain is defined.
    :raises Unsuitable: the instance cannot be such a copy; nothing was done.
    :raises ResumeFailed: it did not come up.
    """
    try:
        instance = clone.instance(spec.xml, lane.description.machine)
    except exception.FastbootError:
        raise
    except Exception as error:
        # What is not foreseen in a definition is no reason for an error
        # (26 volumes and a CD were, once).
        raise clone.Unsuitable(f'not foreseen: {error!r}') from error
    kind = lane.description.key.virt_type
    if instance.tree.get('type') != kind:
        raise clone.Unsuitable(f'it was baked for {kind}')
    return _Resume(connection, lane, spec, instance,
                   told or (lambda phase: None)).run(prepare)


class _Resume:
    """One attempt."""

    def __init__(self, connection: Any, lane: Lane, spec: Spec,
                 instance: clone.Instance,
                 told: Callable[[str], None]) -> None:
        self._connection = connection
        self._lane = lane
        self._spec = spec
        self._instance = instance
        self._told = told
        self._begun = time.monotonic()
        self._deadline = self._begun + spec.deadline
        self._phase = BEGIN
        self._seconds: dict[str, float] = {}

    def run(self, prepare: Callable[[], None] | None) -> Resumed:
        with self._failing(), contextlib.ExitStack() as undo:
            self._see_that_it_is_new()
            self._enter('define')
            undo.callback(_remove, self._instance.disk)
            domain = self._connection.defineXML(self._spec.xml)
            undo.callback(_undefine, domain)
            if prepare:
                prepare()
            self._enter('dress')
            self._lane.dress(self._instance)
            undo.callback(_destroy, domain)
            with contextlib.ExitStack() as ports:
                with _bounded(domain, self._deadline):
                    self._load(domain)
                    self._enter('activate')
                    port = ports.enter_context(
                        _port(self._connection, domain))
                    self._wake(domain, port)
                self._enter('wait')
                done = Resumed(domain, self._seconds,
                               self._instance.interfaces)
                self._wait(port, done)
            undo.pop_all()
            self._mark('end')
            return done

    def _see_that_it_is_new(self) -> None:
        """Asked before anything else: the disk would be that server's.

        :raises Exists: the domain is there; it and its disk stay.
        """
        known = str(self._instance.uuid)
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.lookupByUUIDString(known)
            raise exception.Exists(f'there is a domain {known}')

    def _load(self, domain: Any) -> None:
        """Until all is there, and nothing has run yet."""
        self._enter('load')
        self._connection.restoreFlags(
            str(self._lane.path), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        self._enter('plug')
        self._plug(domain)

    def _wake(self, domain: Any, port: '_Port') -> None:
        """From here on, the guest runs."""
        port.send(self._request(), _SEND_SECONDS)
        domain.resume()
        # The disk has this size; the guest is told. QEMU 10 resizes
        # nothing before, as its disks are inactive until then.
        domain.blockResize(template.ROOT, self._spec.disk_size,
                           libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Every failure has one type, with the phase it happened in."""
        try:
            yield
        except (*_REFUSALS, exception.FastbootError, OSError) as error:
            if isinstance(error, ResumeFailed):
                raise
            raise ResumeFailed(self._phase, str(error)) from error

    def _enter(self, phase: str) -> None:
        if self._phase != BEGIN:
            self._mark(self._phase)
        if time.monotonic() > self._deadline:
            raise ResumeFailed(self._phase, f'it was not done within '
                               f'{self._spec.deadline:.0f} seconds')
        self._phase = phase

    def _mark(self, name: str) -> None:
        self._seconds[name] = round(time.monotonic() - self._begun, 3)
        self._told(name)

    def _plug(self, domain: Any) -> None:
        """All that the instance has more, before the first instruction."""
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE
        one = self._instance
        if one.vcpus > 1:
            domain.setVcpusFlags(one.vcpus, live)
        for device in one.plugged:
            domain.attachDeviceFlags(document.text_of(device), live)
        for interface in one.interfaces:
            # No packet of somebody who is nobody yet. Not plugged without a
            # link: libvirt leaves the tap of an "ethernet" down then, also
            # when the link comes (9.0).
            domain.attachDeviceFlags(
                document.text_of(clone.linked(interface, 'up')), live)
            _set_link(domain, interface, 'down')

    def _request(self) -> bytes:
        return activation.request(
            str(self._instance.uuid), self._spec.hostname, time.time(),
            vcpus=self._instance.vcpus, memory=self._instance.memory,
            interfaces=len(self._instance.interfaces),
            entropy=self._spec.entropy)

    def _wait(self, port: '_Port', done: Resumed) -> None:
        """Follow the guest to the stage that is asked for.

        :raises ResumeFailed: it does not come there in time.
        """
        due = list(activation.STAGES)
        for line in port.lines(self._deadline):
            if line.word == activation.FAILED:
                raise ResumeFailed(
                    self._phase, f'the guest gave up before {due[0]}')
            if line.word != due[0]:
                continue
            del due[0]
            self._mark(line.word)
            if line.word == activation.IDENTITY and self._spec.linked:
                done.link()
            if line.word == self._spec.stage:
                return
        raise ResumeFailed(
            self._phase, f'the guest did not come to {due[0]} within '
            f'{self._spec.deadline:.0f} seconds')


class _Port:
    """The activator's port, through libvirt.

    :param connection: it is asked something now and then, as streams of a
        remote libvirt move only with other calls, or by an event loop that
        this process may lack.
    """

    def __init__(self, connection: Any, stream: Any) -> None:
        self._connection = connection
        self._stream = stream

    def send(self, data: bytes, seconds: float) -> None:
        """Say something, also to a guest that sleeps.

        :raises Unavailable: nothing takes it.
        """
        deadline = time.monotonic() + seconds
        while data:
            sent = self._stream.send(data)
            if sent > 0:
                data = data[sent:]
            elif time.monotonic() > deadline:
                raise exception.Unavailable('the port takes nothing')
            else:
                time.sleep(_POLL)

    def lines(self, deadline: float) -> Iterator[activation.Line]:
        """What the guest says, until the deadline or its end."""
        lines = activation.Lines()
        while time.monotonic() < deadline:
            data = self._stream.recv(4096)
            if data == -2:
                time.sleep(_POLL)
                self._connection.getLibVersion()
            elif data:
                yield from lines.feed(data)
            else:
                raise exception.Unavailable('the guest stopped')


@contextlib.contextmanager
def _port(connection: Any, domain: Any) -> Iterator[_Port]:
    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    domain.openChannel(template.PORT, stream,
                       libvirt.VIR_DOMAIN_CHANNEL_FORCE)
    try:
        yield _Port(connection, stream)
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            stream.abort()


@contextlib.contextmanager
def _bounded(domain: Any, deadline: float) -> Iterator[None]:
    """Destroy the domain if it is not done in time: what waits for it then
    fails.

    Again and again: the first time there may be no QEMU yet. And never when
    this is over: another machine may have been started of the domain.
    """
    over = threading.Event()

    def watch() -> None:
        seconds = max(0.0, deadline - time.monotonic())
        while not over.wait(seconds):
            _destroy(domain)
            seconds = _AGAIN

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _remove(disk: document.Element) -> None:
    source = disk.find('source')
    if source is not None and (name := source.get('file')):
        pathlib.Path(name).unlink(missing_ok=True)


def _destroy(domain: Any) -> None:
    with contextlib.suppress(*_REFUSALS):
        domain.destroy()


def _undefine(domain: Any) -> None:
    with contextlib.suppress(*_REFUSALS):
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                             | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def _set_link(domain: Any, interface: document.Element, state: str) -> None:
    domain.updateDeviceFlags(
        document.text_of(clone.linked(interface, state)),
        libvirt.VIR_DOMAIN_AFFECT_LIVE)
