# SPDX-License-Identifier: Apache-2.0
"""What the tests in the cloud share."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'functional'))

import bootsector  # noqa: E402

HOSTS = ('h1', 'h2')
AGENT = 'fastboot-agent@h1'


def tiny_disk(directory, text):
    """A disk that boots in a second and prints a text; random content."""
    file = directory / f'tiny-{os.urandom(4).hex()}.raw'
    sector = bootsector.sector(text, count=50, first=2048, step=64)
    file.write_bytes(sector + os.urandom((4 << 20) - len(sector)))
    return file


#: What the firmware's own shell does with the disk, and says as a witness.
_SHELL = r"""@echo -off
fs0:
echo login:
:again
cp -q proof.bin copy.bin
comp proof.bin copy.bin > null
if %lasterror% == 0x0 then
  echo 1 passed
else
  echo BAD copy
endif
stall 500000
goto again
"""


def efi_disk(directory):
    """A disk that UEFI's shell reads, writes and compares files on."""
    file = directory / f'efi-{os.urandom(4).hex()}.raw'
    # What boots it in a builder, which has no UEFI.
    bootsector.disk(file, 64 << 20, bootsector.sector(b'login: '))
    subprocess.run(['sfdisk', '-q', file], input='2048,,ef\n', text=True,
                   check=True)
    files = {'startup.nsh': _SHELL.replace('\n', '\r\n').encode(),
             'proof.bin': os.urandom(1 << 20)}
    partition = f'{file}@@1M'
    subprocess.run(['mformat', '-i', partition, '-T', str(63 << 11), '-h',
                    '255', '-s', '63', '::'], check=True)
    for name, content in files.items():
        subprocess.run(['mcopy', '-i', partition, '-', f'::{name}'],
                       input=content, check=True)
    return file


def small_image(user, name, file, **more):
    """An image that is ready on both hosts."""
    image = user.upload(name, file, **more)
    user.wait_built(image, 900)
    user.wait_on_hosts(image)
    return image


def check_disk(user, server, disk, kind='qcow2'):
    """Look at the disk of a server that is off, through its chain.

    :param disk: a ``witness.Witness``.
    :param kind: the format of the disk's file.
    """
    host = server.hypervisor_hostname
    raw = user.instance_path(server).parent / f'{server.id}.check'
    place = f'/var/lib/nova/instances/{server.id}'
    try:
        user.inside(host, 'qemu-img', 'convert', '-U', '-f', kind, '-O',
                    'raw', f'{place}/disk', f'{place}.check')
        with raw.open('rb') as file:
            def read(offset, length):
                file.seek(offset)
                return file.read(length)
            return disk.check(read)
    finally:
        raw.unlink(missing_ok=True)


@contextlib.contextmanager
def configured(user, service, file, section, **values):
    """A service with other settings.

    :param file: below the directory of configurations.
    """
    path = user.layout.etc / file
    before = path.read_text()
    # Of an option that stands there twice, the last counts.
    path.write_text('\n'.join([before, f'[{section}]', *(
        f'{name} = {value}' for name, value in values.items()), '']))
    try:
        user.sandbox('restart', service)
        yield
    finally:
        path.write_text(before)
        user.sandbox('restart', service)


def settings(user, host, section, **values):
    """A nova-compute with other settings."""
    return configured(user, f'nova-compute@{host}',
                      f'nova/compute-{host}.conf', section, **values)


@contextlib.contextmanager
def shared_instances(user):
    """Both hosts keep their servers in the same directory, that of h1.

    libvirt migrates between hosts that share a file system of a kind that
    it knows. This one calls itself GlusterFS.
    """
    shared = user.home('h1') / 'nova/instances'
    place = user.home('h2') / 'nova/instances'
    own = place.with_name('instances.own')
    place.rename(own)
    place.symlink_to(shared)
    mounts = {'h1': '/var/lib/nova/instances', 'h2': shared}
    try:
        for host, mount in mounts.items():
            user.inside(host, 'bindfs', '--multithreaded',
                        '--forward-odirect=4096', '-o',
                        'subtype=glusterfs,fsname=shared,direct_io,nonempty',
                        shared, mount)
        yield
    finally:
        for host, mount in mounts.items():
            user.inside(host, 'umount', '--lazy', mount, check=False)
        place.unlink()
        own.rename(place)


def stock(user, host):
    """A host with Nova's own driver."""
    return settings(user, host, 'DEFAULT',
                    compute_driver='libvirt.LibvirtDriver')


@contextlib.contextmanager
def agent_down(user):
    user.sandbox('stop', AGENT)
    try:
        yield
    finally:
        user.sandbox('start', AGENT)


@contextlib.contextmanager
def agent_hangs(user):
    (pid,) = user.pids(AGENT)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


FALLBACKS = {'agent-down': agent_down, 'agent-hangs': agent_hangs}
