# SPDX-License-Identifier: Apache-2.0
"""A real Debian guest: built, captured, published, synced, booted."""

import os
import pathlib
import shutil
import subprocess

import pytest
from test_cli import Fastbootctl

from fastboot_common import chain
from fastboot_common.store.http import HttpStore
from fastboot_nova import host, node

TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'guest-image'

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0, reason='building needs root'),
    pytest.mark.skipif(shutil.which('mmdebstrap') is None,
                       reason='mmdebstrap is not installed'),
]


def test_debian_boots_from_the_slot(tmp_path, nginx) -> None:
    image = tmp_path / 'minimal.qcow2'
    subprocess.run([TOOL, 'build', image, '--suite', 'bookworm', '--variant',
                    'minimal', '--size', '1G'], check=True, timeout=900)
    ctl = Fastbootctl(tmp_path / 's')
    (tmp_path / 's' / 'fastboot.conf').write_text('[capture]\nboots = 1\n')
    ctl('repo', 'init')
    added = ctl.json('image', 'add', image, '--id', 'minimal')
    assert added['boot'] == 'booted', added
    assert 30 << 20 < added['boot_set_bytes'] < 150 << 20

    url = nginx(tmp_path / 's' / 'repository').url
    second = Fastbootctl(tmp_path / 'h', '--repository', url)
    (tmp_path / 'h' / 'fastboot.conf').write_text('')
    synced = second.json('host', 'sync')
    assert synced['fetched_bytes'] < added['stored_bytes']
    done = second.json('vm', 'run', 'minimal', '--until-prompt',
                       '--quiet-console')
    # What one boot read is nearly all that another reads.
    assert done['missed_bytes'] < added['boot_set_bytes'] / 10
    assert second.json('volume', 'check')[0]['Problem'] == ''

    with host.Host(tmp_path / 'h' / 'host', HttpStore(url),
                   socket=tmp_path / 'nbd.sock') as found, node.Node(
                       found, tmp_path, socket=tmp_path / 'nbd.sock',
                       wait=20, shield_wait=4):
        link = found.acquire('minimal', 'guest')
        chain.make_stub(tmp_path / 'stub', link)
        chain.make_disk(tmp_path / 'disk', tmp_path / 'stub',
                        link.virtual_size)
        subprocess.run(['qemu-img', 'compare', tmp_path / 'disk', image],
                       check=True, timeout=600)
