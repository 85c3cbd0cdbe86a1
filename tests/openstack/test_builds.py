# SPDX-License-Identifier: Apache-2.0
"""What becomes of images: formats, projects, deletion, hostile files."""

import os
import signal
import subprocess

import pytest
from parts import AGENT, configured, tiny_disk

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize('disk_format', ['raw', 'qcow2', 'vmdk', 'vdi',
                                         'vhdx'])
def test_formats(user, clean, disk_format):
    raw = tiny_disk(clean.directory, b'x login: ')
    file = clean.directory / f'disk.{disk_format}'
    if disk_format != 'raw':
        options = ['-o', 'subformat=streamOptimized'] \
            if disk_format == 'vmdk' else []
        subprocess.run(['qemu-img', 'convert', '-O', disk_format, *options,
                        raw, file], check=True, timeout=60)
    else:
        file = raw
    image = clean.image(user.upload(f'format-{disk_format}', file,
                                    disk_format=disk_format))
    user.wait_built(image, 600)


def test_a_hostile_image_ends_in_an_error_that_says_why(user, clean):
    """A qcow2 whose backing file is the host's password file."""
    file = clean.directory / 'hostile.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b',
                    '/etc/passwd', '-F', 'raw', file, '1M'], check=True,
                   timeout=60)
    image = user.cloud.image.create_image(
        'hostile', disk_format='qcow2', container_format='bare',
        wait=False)
    clean.image(image.id)
    # Glance itself may refuse it; then there is nothing to build.
    done = user.openstack('image', 'stage', '--file', file, image.id,
                          check=False)
    user.openstack('image', 'import', image.id, check=False)
    user.wait(lambda: user.cloud.image.get_image(image.id).status
              != 'importing', 120, 'the import to end')
    if user.cloud.image.get_image(image.id).status == 'active':
        user.wait_built(image.id, 300, state='error')
        words = user.cloud.image.get_image(image.id).properties[
            'fastboot_error']
        assert 'backing' in words, done


def test_private_images_have_a_volume_of_their_project(user, clean):
    disk = tiny_disk(clean.directory, b'private login: ')
    image = user.ask('image', 'create', '--disk-format', 'raw', '--private',
                     '--container-format', 'bare', '--file', disk,
                     'private')['id']
    clean.image(image)
    user.wait_built(image, 600)
    user.wait_on_hosts(image)
    found = clean.boot(user.boot('private', image, 'h1', prompt='login:'))
    assert found.log.startswith('hit'), found.log
    home = user.layout.home(user.layout.hosts[0]) / 'fastboot/host/volumes'
    project = user.cloud.current_project_id.replace('-', '')
    holders = [path.parent.parent.name for path in home.glob(
        f'*/images/{image}')]
    assert len(holders) == 1
    assert project in holders[0].replace('-', '')


def test_a_first_boot(user, clean):
    """The first server's reads are the boot set of an image that builders
    could not boot."""
    def properties():
        return user.cloud.image.get_image(image).properties

    text = 'nothing that builders wait for'
    disk = tiny_disk(clean.directory, text.encode())
    with configured(user, 'fastboot-builder', 'fastboot/fastboot.conf',
                    'capture', timeout=5), \
            configured(user, AGENT, 'fastboot/agent-h1.conf', 'agent',
                       observe=10):
        image = clean.image(user.upload('first', disk, disk_format='raw'))
        user.wait_built(image, 600)
        assert 'no boot set' in properties()['fastboot_error']
        first = clean.boot(user.boot('first', image, 'h1', prompt=text))
        assert first.log.startswith('hit'), first.log
        user.wait(lambda: 'fastboot_error' not in properties(), 300,
                  'a boot set')
    found = user.fastboot_image(image)
    assert found['capture']['state'] == 'observed'
    user.wait_on_hosts(image)
    second = clean.boot(user.boot('second', image, 'h2', prompt=text))
    assert second.log.startswith('hit'), second.log
    assert first.traffic.repository > 50 * 4096
    assert second.traffic.repository < first.traffic.repository / 2


def test_deleted_while_it_is_built(user, clean):
    disk = tiny_disk(clean.directory, b'gone login: ')
    image = user.upload('gone', disk, disk_format='raw')
    user.cloud.image.delete_image(image)
    user.wait(lambda: image not in str(user.ask(
        'fastboot', 'image', 'list')), 300, 'the image to be forgotten')


def test_a_builder_dies_and_another_goes_on(user, clean):
    images = []
    for number in range(3):
        disk = tiny_disk(clean.directory, b'%d login: ' % number)
        images.append(clean.image(user.upload(f'crowd-{number}', disk,
                                              disk_format='raw')))
    user.wait(lambda: any(
        user.cloud.image.get_image(image).properties.get('fastboot_state')
        == 'building' for image in images), 120, 'a build')
    for pid in user.pids('fastboot-builder'):
        os.kill(pid, signal.SIGKILL)
    user.sandbox('start', 'fastboot-builder')
    for image in images:
        user.wait_built(image, 900)


def test_what_the_broker_lost_the_audit_finds(user, clean):
    disk = tiny_disk(clean.directory, b'lost login: ')
    user.sandbox('stop', 'rabbitmq')
    try:
        # A plain upload: the import plugin does not see it.
        image = clean.image(user.upload('lost', disk, disk_format='raw'))
    finally:
        user.sandbox('start', 'rabbitmq')
    user.wait_built(image, 900)


def test_redis_is_away(user, clean):
    """An import works without the jobboard, and its image is built later."""
    disk = tiny_disk(clean.directory, b'redis login: ')
    user.sandbox('stop', 'redis')
    try:
        image = clean.image(user.upload('redis', disk, how='import',
                                        disk_format='raw'))
    finally:
        user.sandbox('start', 'redis')
    user.wait_built(image, 900)
