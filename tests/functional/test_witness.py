# SPDX-License-Identifier: Apache-2.0
"""The guest that proves disks: what it finds, and that it finds it."""

import contextlib
import shutil
import subprocess
import time

import pytest
import witness

pytestmark = pytest.mark.skipif(
    not shutil.which('qemu-system-x86_64'), reason='needs QEMU')


@contextlib.contextmanager
def machine(disk, console, size='2G', kind='pc'):
    console.write_bytes(b'')
    subprocess.run(['qemu-img', 'resize', '-q', '-f', 'raw', disk, size],
                   check=True)
    with subprocess.Popen([
            'qemu-system-x86_64', '-M', kind, '-accel', 'tcg', '-m', '64',
            '-nodefaults', '-display', 'none', '-monitor', 'stdio',
            '-drive', f'if=none,id=d,file={disk},format=raw',
            '-device', 'virtio-blk-pci,drive=d',
            '-serial', f'file:{console}'], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def says(console, words, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if words in console.read_text():
            return console.read_text()
        time.sleep(0.1)
    raise AssertionError(f'{words!r} never came: {console.read_text()!r}')


def reader(disk):
    data = disk.read_bytes()
    return lambda offset, length: data[offset:offset + length]


@pytest.fixture
def small():
    return witness.Witness(eager=8, lazy=8)


@pytest.fixture
def disk(small, tmp_path):
    return small.make(tmp_path / 'disk.raw')


@pytest.fixture
def console(tmp_path):
    return tmp_path / 'console'


@pytest.mark.parametrize('kind', ['pc', 'q35'])
def test_it_goes_on_where_it_was(small, disk, console, kind):
    with machine(disk, console, kind=kind) as process:
        says(console, '0002 passed')
        process.kill()  # the machine's end, not the guest's
        process.wait(10)
    first = small.check(reader(disk))
    assert first[0] >= 2
    with machine(disk, console, kind=kind) as process:
        text = says(console, f'{first[0]:04x} passed')
        assert witness.passes(text) >= 1
        process.stdin.write('system_powerdown\n')
        process.stdin.flush()
        assert process.wait(20) == 0
    assert says(console, 'off')
    assert small.check(reader(disk)) > first


def test_a_builders_disk_is_not_read_whole(small, disk, console):
    with disk.open('r+b') as file:  # where only servers read
        file.seek(small.runs[small.eager] * witness.PAGE)
        file.write(bytes(witness.PAGE))
    with machine(disk, console, size=str(small.size)):
        assert witness.passes(says(console, '0002 passed')) == 2
    with machine(disk, console):
        says(console, 'BAD')


@pytest.mark.parametrize(('page', 'words'), [
    (0, 'BAD'), (witness.WRITTEN, 'BAD'), (7, 'BAD')])
def test_a_wrong_byte(small, disk, console, page, words):
    place = (small.runs[5] + page) * witness.PAGE + 4094
    with disk.open('r+b') as file:
        file.seek(place)
        file.write(b'!!')
    with machine(disk, console):
        text = says(console, words)
    assert f'{small.runs[5] + page:04x}' in text
    with pytest.raises(AssertionError, match='BAD'):
        witness.passes(text)
    with pytest.raises(AssertionError, match='page'):
        small.check(reader(disk))


def test_a_lost_write(small, disk, console):
    """The note says that it was written; the page says otherwise."""
    before = disk.read_bytes()
    with machine(disk, console):
        says(console, '0001 passed')
    page = (small.runs[2] + witness.WRITTEN) * witness.PAGE
    with disk.open('r+b') as file:
        file.seek(page)
        file.write(before[page:page + witness.PAGE])
    with pytest.raises(AssertionError, match='page'):
        small.check(reader(disk))
    with machine(disk, console):
        says(console, 'BAD')
