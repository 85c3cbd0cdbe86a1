# SPDX-License-Identifier: Apache-2.0
"""Nodes: sets of namespaces, each held by a process that only sleeps.

That process is the first of its PID namespace. When it ends the kernel
kills all others in there, and with them go mounts, links and network
namespaces: nothing can be left behind, however the sandbox ends.
"""

import contextlib
import hashlib
import os
import pathlib
import shlex
import signal

from cloud.layout import FASTBOOT_DIR, NOVA_DIR, PASSWORD, Layout, Node
from cloud.process import Record, Records, members, namespace, spawn
from cloud.process import stop as stop_process
from cloud.steps import Clock, StepError

#: Over these, libvirt's packages' directories, each host has its own.
_LIBVIRT = {
    'libvirt-etc': '/etc/libvirt', 'libvirt': '/run/libvirt',
    'libvirt-lib': '/var/lib/libvirt', 'libvirt-log': '/var/log/libvirt',
    'libvirt-cache': '/var/cache/libvirt',
}
_HOME = pathlib.Path('/root/.ssh')
#: Mount points that a machine may lack; removed again by `remove_points`.
_POINTS = (FASTBOOT_DIR, NOVA_DIR, _HOME)
_UNSHARE = ('unshare', '--mount', '--uts', '--ipc', '--net', '--pid',
            '--fork', '--kill-child', '--mount-proc', '--propagation',
            'private')


def keeper(node: Node) -> str:
    """The name under which its first process is recorded."""
    return f'node@{node.name}'


def make_points(layout: Layout) -> None:
    """Make the mount points that this machine lacks, and note which."""
    note = layout.run / 'points'
    made = set(note.read_text().split()) if note.exists() else set()
    made |= {str(path) for path in _POINTS if not path.exists()}
    note.write_text('\n'.join(sorted(made)) + '\n')
    for path in _POINTS:
        path.mkdir(parents=True, exist_ok=True)


def remove_points(layout: Layout) -> None:
    """Remove the mount points that `make_points` made."""
    note = layout.run / 'points'
    if note.exists():
        for name in note.read_text().split():
            with contextlib.suppress(OSError):
                os.rmdir(name)
        note.unlink()


def _binds(layout: Layout, node: Node) -> dict[pathlib.Path, str]:
    home = layout.home(node)
    binds = {
        home / 'fastboot': str(FASTBOOT_DIR),
        home / 'hosts': '/etc/hosts',
        layout.key.parent: str(_HOME),
    }
    if node.number:
        binds |= {home / name: path for name, path in _LIBVIRT.items()}
        binds[home / 'nova'] = str(NOVA_DIR)
    return binds


def setup_script(layout: Layout, node: Node) -> str:
    """What a node's first process does before it sleeps.

    /run is new, so that sockets, locks, process ids and named network
    namespaces are the node's own and gone with it.

    /dev is a copy without `kvm`: where QEMU's probe, with all
    capabilities, can open it and the user libvirt-qemu cannot, libvirt
    probes anew at every call, four seconds each. It must not be a mount
    over the old /dev or below it, since libvirt moves every mount that it
    finds there.
    """
    dev = layout.home(node) / 'dev'
    lines = [
        ['hostname', node.name],
        ['mount', '-t', 'sysfs', 'sysfs', '/sys'],
        ['mount', '-t', 'tmpfs', '-o', 'mode=755', 'tmpfs', '/run'],
        ['mkdir', '-p', '/run/netns', '/run/libvirt', '/run/openvswitch',
         '/run/lock', '/run/sshd'],
        *(['mount', '--bind', str(source), target]
          for source, target in _binds(layout, node).items()),
        ['mount', '-t', 'tmpfs', '-o', 'mode=755', 'tmpfs', str(dev)],
        ['cp', '-ax', '/dev/.', str(dev)],
        ['rm', '-f', str(dev / 'kvm')],
        ['mkdir', '-p', *(str(dev / name)
                          for name in ('pts', 'shm', 'mqueue'))],
        ['mount', '--bind', '/dev/pts', str(dev / 'pts')],
        ['mount', '-t', 'tmpfs', 'tmpfs', str(dev / 'shm')],
        ['mount', '-t', 'mqueue', 'mqueue', str(dev / 'mqueue')],
        ['umount', '-lR', '/dev'],
        ['mount', '--move', str(dev), '/dev'],
    ]
    script = ['set -e', *map(shlex.join, lines),
              # The kernel makes nodes for new loop devices elsewhere.
              'for n in $(seq 0 63); do '
              '[ -e /dev/loop$n ] || mknod -m 660 /dev/loop$n b 7 $n; done',
              'ip link set lo up',
              shlex.join(['touch', str(_ready(layout, node))]),
              # Orphans become its children: ignoring the signal reaps them.
              'exec env --ignore-signal=CHLD sleep infinity']
    return '\n'.join(script) + '\n'


def _ready(layout: Layout, node: Node) -> pathlib.Path:
    return layout.home(node) / 'ready'


def _directories(layout: Layout, node: Node) -> None:
    home = layout.home(node)
    for name in ('fastboot', 'dev', 'nova/instances', *_LIBVIRT,
                 'libvirt-lib/qemu'):
        (home / name).mkdir(parents=True, exist_ok=True)
    hosts = [f'{other.address} {other.name}' for other in layout.nodes]
    (home / 'hosts').write_text('\n'.join(['127.0.0.1 localhost', *hosts,
                                           '']))


def start(layout: Layout, records: Records, node: Node,
          clock: Clock) -> None:
    """Make a node, unless it is there.

    :raises StepError: it does not come up.
    """
    old = records.get(keeper(node))
    if old and old.alive:
        return
    _directories(layout, node)
    _ready(layout, node).unlink(missing_ok=True)
    script = layout.home(node) / 'setup.sh'
    script.write_text(setup_script(layout, node))
    record = spawn(records, keeper(node), [*_UNSHARE, 'sh', str(script)],
                   layout.log / f'{keeper(node)}.log', env=os.environ,
                   fingerprint=fingerprint(layout, node))
    if not clock.wait(
            lambda: _ready(layout, node).exists() or not record.alive, 30) \
            or not record.alive:
        raise StepError(f'{node.name} has no namespaces: {record.said()}')


def fingerprint(layout: Layout, node: Node) -> str:
    """Changes with what a node is made of."""
    text = setup_script(layout, node) + repr(layout.nodes) + PASSWORD
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def intact(layout: Layout, records: Records) -> bool:
    """Whether exactly this layout's nodes run, made as they would be."""
    kept = {record.name: record.fingerprint for record in records
            if record.name.startswith('node@') and _child(record)}
    return kept == {keeper(node): fingerprint(layout, node)
                    for node in layout.nodes}


def _child(record: Record) -> int:
    """The process that a keeper holds; 0: it has ended."""
    file = f'/proc/{record.pid}/task/{record.pid}/children'
    if record.alive:
        with contextlib.suppress(OSError, IndexError):
            first = int(pathlib.Path(file).read_text().split()[0])
            # While it ends it waits for all others in there, without
            # namespaces that one could enter.
            os.stat(f'/proc/{first}/ns/net')
            return first
    return 0


def first_process(record: Record) -> int:
    """The id of the first process of a node, as this machine counts.

    :raises StepError: the node does not run.
    """
    first = _child(record)
    if not first:
        raise StepError(f'{record.name.partition("@")[2]} is not up: '
                        'tools/sandbox up')
    return first


def target(records: Records, name: str) -> int:
    """The process whose namespaces are the node `name`.

    :raises StepError: the node does not run.
    """
    record = records.get(f'node@{name}')
    if record is None:
        raise StepError(f'{name} is not up: tools/sandbox up')
    return first_process(record)


def guests(record: Record) -> list[int]:
    """The QEMU processes of a node."""
    first = _child(record)
    return members(namespace(first), 'qemu-system') if first else []


def stop(record: Record) -> None:
    """End a node, and all processes in it with it."""
    first = _child(record)
    if first:
        os.kill(first, signal.SIGKILL)
    # The kernel ends all others in there, then unshare(1) ends by itself.
    if not Clock().wait(lambda: not record.alive, 10):
        stop_process(record, signal.SIGKILL)
