# SPDX-License-Identifier: Apache-2.0
"""tools/guest-image with real packages, loop devices and QEMU.

The first run downloads a Debian and needs a minute or two; later ones take
the image from the tool's cache.
"""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'tools/guest-image'
PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
TOOLS = ('debugfs', 'e2fsck', 'extlinux', 'fstrim', 'losetup', 'mkfs.ext4',
         'mmdebstrap', 'qemu-img', 'qemu-system-x86_64', 'sfdisk', 'unshare')
OFFSET = 1 << 20
BLOCK = 65536

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason='needs root'),
    pytest.mark.skipif(
        not all(shutil.which(tool, path=PATH) for tool in TOOLS),
        reason=f'needs {", ".join(TOOLS)}'),
    pytest.mark.skipif(not os.path.exists('/dev/loop-control'),
                       reason='needs loop devices'),
]


def call(*argv, **options):
    """What a program prints."""
    return subprocess.run(
        argv, check=True, stdout=subprocess.PIPE, text=True,
        **{'env': os.environ | {'PATH': PATH}} | options).stdout


def guest_image(*argv, **options):
    """The last line that the tool prints on standard output."""
    return call(SCRIPT, *argv, **options).rstrip('\n')


def to_raw(image):
    """A raw copy beside an image."""
    raw = image.with_suffix('.as-raw')
    call('qemu-img', 'convert', '-O', 'raw', image, raw)
    return raw


def guest_file(raw, name):
    """The content of a file in an image."""
    return call('debugfs', '-R', f'cat {name}', f'{raw}?offset={OFFSET}',
                stderr=subprocess.DEVNULL)


def different_blocks(one, other):
    """How many blocks of two files differ."""
    different = 0
    with one.open('rb') as first, other.open('rb') as second:
        while block := first.read(BLOCK):
            different += block != second.read(BLOCK)
    return different


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A minimal image."""
    out = tmp_path_factory.mktemp('base') / 'minimal.qcow2'
    printed = guest_image('build', out, '--suite', 'bookworm', '--variant',
                          'minimal', '--size', '1G', '--mark', 'base')
    assert printed == str(out)
    return out


@pytest.fixture(scope='module')
def raw(base):
    """The same image as a raw file."""
    return to_raw(base)


@pytest.fixture(scope='module')
def derived(base):
    """A copy with a marker and a file of the host."""
    out = base.with_name('derived.qcow2')
    source = base.with_name('source.txt')
    source.write_text('from the host\n')
    guest_image('derive', base, out, '--run', 'echo x > /etc/marker',
                '--run', 'id -u > /etc/id',
                '--copy', f'{source}:/var/run/../etc/',
                '--copy', f'{source}:/opt/some/where')
    return out


def test_partition_table(raw):
    table = json.loads(call('sfdisk', '--json', raw))['partitiontable']
    assert table['label'] == 'dos'
    part, = table['partitions']
    assert part['start'] == 2048
    assert part['type'] == '83'
    assert part['bootable']
    assert part['start'] + part['size'] == (1 << 30) // 512
    with raw.open('rb') as file:
        assert any(file.read(440))


def test_file_system(raw):
    with raw.open('rb') as file:
        file.seek(OFFSET + 1024)
        block = file.read(1024)
    magic, state = struct.unpack_from('<HH', block, 0x38)
    assert (magic, state) == (0xef53, 1)
    assert block[0x78:0x88].rstrip(b'\0') == b'cloudroot'
    needs_recovery = 4
    incompatible, = struct.unpack_from('<I', block, 0x60)
    assert not incompatible & needs_recovery
    call('e2fsck', '-fn', f'{raw}?offset={OFFSET}')


def test_guest_files(raw):
    assert guest_file(raw, '/etc/machine-id') == ''
    assert guest_file(raw, '/etc/fastboot-mark') == 'base\n'
    assert guest_file(raw, '/etc/resolv.conf') == ''
    assert 'LABEL=cloudroot' in guest_file(raw, '/etc/fstab')


def test_image_is_sparse(base):
    entries = json.loads(call('qemu-img', 'map', '--output=json', base))
    data = sum(e['length'] for e in entries if e['data'])
    assert data < 400 << 20


def test_second_build_is_a_cache_hit(base):
    again = base.with_name('again.qcow2')
    begin = time.monotonic()
    guest_image('build', again, '--suite', 'bookworm', '--variant',
                'minimal', '--size', '1G', '--mark', 'base')
    assert time.monotonic() - begin < 20
    assert again.read_bytes() == base.read_bytes()
    assert again.stat().st_nlink == 1


def test_derived_image_differs_in_few_blocks(raw, derived):
    changed = to_raw(derived)
    assert guest_file(changed, '/etc/marker') == 'x\n'
    assert guest_file(changed, '/etc/id') == '0\n'
    assert 0 < different_blocks(raw, changed) * BLOCK < 2 << 20
    call('e2fsck', '-fn', f'{changed}?offset={OFFSET}')


def test_copies_stay_inside_the_image(derived):
    changed = to_raw(derived)
    assert guest_file(changed, '/etc/source.txt') == 'from the host\n'
    assert guest_file(changed, '/opt/some/where') == 'from the host\n'
    assert not os.path.exists('/etc/source.txt')
    for name in ('/usr/sbin/policy-rc.d', '/dev/null', '/run/x'):
        assert guest_file(changed, name) == ''


def test_other_formats(base, tmp_path):
    for kind in ('vmdk', 'vhdx'):
        out = tmp_path / f'out.{kind}'
        guest_image('derive', base, out, '--no-cache')
        info = json.loads(call('qemu-img', 'info', '--output=json', out))
        assert info['format'] == kind
        assert info['virtual-size'] == 1 << 30


def test_failed_command_leaves_nothing(base, tmp_path):
    env = os.environ | {'FASTBOOT_CACHE': str(tmp_path / 'cache')}
    done = subprocess.run(
        [SCRIPT, 'derive', base, tmp_path / 'out.raw', '--run',
         'echo this went wrong; exit 7'], env=env, capture_output=True,
        text=True, check=False)
    assert done.returncode == 1
    assert 'this went wrong' in done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''
    assert_clean(tmp_path)


def test_image_without_partitions(tmp_path):
    blank = tmp_path / 'blank.raw'
    blank.touch()
    os.truncate(blank, 1 << 20)
    done = subprocess.run(
        [SCRIPT, 'derive', blank, tmp_path / 'out.raw', '--no-cache'],
        capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'partition table' in done.stderr
    assert not (tmp_path / 'out.raw').exists()


def assert_clean(tmp_path):
    """No image, work directory, mount or loop device is left."""
    assert not (tmp_path / 'out.raw').exists()
    assert not list((tmp_path / 'cache/guests').glob('work-*'))
    assert str(tmp_path) not in pathlib.Path('/proc/mounts').read_text()
    assert str(tmp_path) not in call('losetup', '--list', '--noheadings',
                                     '--output', 'BACK-FILE')


def sleeping_derive(base, tmp_path):
    """The tool while it runs a command that takes long; and its sleeper."""
    env = os.environ | {'FASTBOOT_CACHE': str(tmp_path / 'cache')}
    seconds = f'{1000 + os.getpid() / 1e6}'
    process = subprocess.Popen(
        [SCRIPT, 'derive', base, tmp_path / 'out.raw', '--run',
         f'sleep {seconds}'], env=env)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        if found := sleepers(seconds):
            return process, seconds, found
        time.sleep(.05)
    process.kill()
    pytest.fail('the command was never run')


def sleepers(seconds):
    """The processes `sleep seconds`."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            argv = (path / 'cmdline').read_bytes().split(b'\0')
        except OSError:
            continue
        if argv[:2] == [b'sleep', seconds.encode()]:
            found.append(int(path.name))
    return found


def test_sigterm_leaves_nothing(base, tmp_path):
    process, seconds, _ = sleeping_derive(base, tmp_path)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not sleepers(seconds)
    assert_clean(tmp_path)


def test_sigkill_leaves_only_files_which_the_next_run_sweeps(base, tmp_path):
    process, seconds, found = sleeping_derive(base, tmp_path)
    process.kill()
    process.wait()
    assert str(tmp_path) not in pathlib.Path('/proc/mounts').read_text()
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert list((tmp_path / 'cache/guests').glob('work-*'))
    env = os.environ | {'PATH': PATH,
                        'FASTBOOT_CACHE': str(tmp_path / 'cache')}
    guest_image('derive', base, tmp_path / 'out.qcow2', env=env)
    assert_clean(tmp_path)


def test_boot(derived):
    assert ' s (guest' in guest_image('boot', derived)


def test_boot_gives_up(tmp_path):
    blank = tmp_path / 'blank.raw'
    blank.touch()
    os.truncate(blank, 1 << 20)
    done = subprocess.run([SCRIPT, 'boot', blank, '--timeout', '3'],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'no FASTBOOT-READY within 3 s' in done.stderr
