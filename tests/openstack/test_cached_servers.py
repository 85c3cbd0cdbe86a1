# SPDX-License-Identifier: Apache-2.0
"""From an upload to a server on local blocks, in the real cloud."""

import hashlib
import os
import pathlib
import signal
import subprocess
import time

import pytest
from parts import FALLBACKS, HOSTS, small_image, tiny_disk

pytestmark = pytest.mark.timeout(1800)


def raw_of(user, server):
    """The digest of what a server's disk reads as, through the chain."""
    disk = user.instance_path(server) / 'disk'
    return digest(user, server.hypervisor_hostname, disk)


def digest(user, host, disk):
    inside = pathlib.Path('/var/lib/nova/instances') / disk.parent.name \
        / disk.name
    done = subprocess.run(
        [pathlib.Path('tools/sandbox').resolve(), '--state-dir',
         user.layout.state, 'exec', host, 'sh', '-c',
         f'qemu-img convert -U -f qcow2 -O raw {inside} /dev/stdout '
         f'| sha256sum'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


@pytest.mark.smoke
def test_upload_to_prompt(user, guest, clean):
    """The main job: import, build, sync, a server on a host that never held
    the image, its bytes, and the end of the image."""
    image = clean.image(user.upload('e2e', guest, how='import'))
    user.wait_built(image, 900)
    user.wait_on_hosts(image)
    shown = user.fastboot_image(image)
    assert shown['state'] == 'ready'
    properties = user.cloud.image.get_image(image).properties
    assert int(properties['fastboot_version']) > 0
    assert int(properties['fastboot_boot_size']) > 10 << 20

    found = clean.boot(user.boot('e2e', image, 'h2'))
    assert found.log.startswith('hit'), found.log
    assert found.traffic.glance == 0
    # A first boot reads next to nothing else. One block that both boots of
    # the capture did without is a megabyte: the index of its pack.
    assert found.traffic.repository < 4 << 20
    # Nothing of the stock path was made.
    base = user.home('h2') / 'nova/instances/_base'
    name = hashlib.sha1(image.encode()).hexdigest()
    assert [path.name for path in base.glob(name + '*')] == [name + '_sm']

    user.cloud.image.delete_image(image)
    user.wait(lambda: 'deregister' in journal(user, image), 120,
              'the image to be deregistered')
    # A guest keeps what it needs, also when the host has heard of it.
    user.wait(lambda: user.agent_state('h2', image) == 'stale', 120,
              'the host to hear of it')
    volumes = user.home('h2') / 'fastboot/host/volumes'
    assert list(volumes.glob(f'*/images/{image}'))
    assert user.cloud.compute.get_server(
        found.server.id).status == 'ACTIVE'


def journal(user, image):
    """The kinds of the journal's entries about an image."""
    directory = user.layout.home(
        user.layout.control) / 'fastboot/repository/journal'
    return [kind for path in sorted(directory.glob('*'))
            for text in [path.read_text()] if image in text
            for kind in ('register', 'deregister')
            if f'"{kind}"' in text]


@pytest.fixture(scope='module')
def image(user, guest):
    """A guest in Glance that is ready on both hosts."""
    found = small_image(user, 'servers', guest)
    yield found
    user.cloud.image.delete_image(found, ignore_missing=True)


@pytest.mark.parametrize('host', HOSTS)
def test_the_bytes_are_stocks(user, image, guest, clean, host):
    """A guest that never ran: what its disk reads as, is the image."""
    found = clean.boot(user.boot('bytes', image, host, prompt=''))
    assert found.log.startswith('hit'), found.log
    user.cloud.compute.stop_server(found.server.id)
    user.wait(lambda: user.cloud.compute.get_server(
        found.server.id).status == 'SHUTOFF', 120, 'the server to stop')
    stub = user.home(host) / 'nova/instances/_base'
    name = hashlib.sha1(image.encode()).hexdigest() + '_sm'
    read = digest(user, host, stub / name)
    raw = subprocess.run(
        ['sh', '-c', f'qemu-img convert -O raw {guest} /dev/stdout '
                     f'| sha256sum'], capture_output=True, text=True,
        check=True, timeout=300).stdout.split()[0]
    assert read == raw


@pytest.mark.parametrize('reason', sorted(FALLBACKS))
def test_fallbacks(user, image, clean, reason):
    """Whatever is broken, the server becomes ACTIVE, the stock way."""
    with FALLBACKS[reason](user):
        found = clean.boot(user.boot(f'miss-{reason}', image, 'h1',
                                     prompt=''))
    assert found.log.startswith('miss'), found.log
    assert found.traffic.glance >= 0
    # And once it is whole again, a hit.
    user.wait(lambda: bool(user.ask_agent('h1', 'GET', '/v1/status')), 60,
              'the agent')
    found = clean.boot(user.boot('hit', image, 'h1', prompt=''))
    assert found.log.startswith('hit'), found.log


def test_an_image_that_is_not_ours(user, clean):
    disk = tiny_disk(clean.directory, b'never login: ')
    image = clean.image(user.upload('off', disk, disk_format='raw',
                                    fastboot='off'))
    found = clean.boot(user.boot('off', image, 'h1', prompt='login:'))
    assert found.log.startswith('miss'), found.log


@pytest.mark.parametrize('service', [
    'fastboot-agent@h1', 'fastboot-builder', 'nova-compute@h1', 'rabbitmq',
    'redis', 'glance', 'repository', 'libvirtd@h1'])
def test_restart_under_a_running_server(user, image, clean, service):
    """Each service in the middle of a guest's boot."""
    found = clean.boot(user.boot('restart', image, 'h1', prompt=''))
    time.sleep(5)
    user.sandbox('restart', service)
    user.wait(lambda: 'login:' in user.console(found.server), 300,
              'the prompt')
    server = user.cloud.compute.get_server(found.server.id)
    assert server.status == 'ACTIVE'


def test_the_export_dies_under_a_running_server(user, image, clean):
    found = clean.boot(user.boot('export', image, 'h1', prompt=''))
    time.sleep(3)
    for pid in user.processes('h1', 'nbdkit'):
        os.kill(pid, signal.SIGKILL)
    user.wait(lambda: 'login:' in user.console(found.server), 300,
              'the prompt')


def test_a_snapshot_becomes_a_cached_image(user, image, clean):
    """Live snapshot of a server on local blocks; a server of the snapshot."""
    found = clean.boot(user.boot('origin', image, 'h1'))
    snapshot = user.cloud.compute.create_server_image(
        found.server.id, 'snapshot', wait=False)
    snapshot = clean.image(snapshot.id)
    assert not [name for name in user.cloud.image.get_image(
        snapshot).properties if name.startswith('fastboot_')]
    user.wait(lambda: user.cloud.image.get_image(snapshot).status == 'active',
              300, 'the snapshot')
    user.wait_built(snapshot, 900)
    user.wait_on_hosts(snapshot)
    other = clean.boot(user.boot('copy', snapshot, 'h2'))
    assert other.log.startswith('hit'), other.log
