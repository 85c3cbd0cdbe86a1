# SPDX-License-Identifier: Apache-2.0
"""tools/guest-image, as far as it needs neither root nor packages."""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import SourceFileLoader

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'tools/guest-image'


def load():
    """The script as a module."""
    loader = SourceFileLoader('guest_image', str(SCRIPT))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look there
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@pytest.fixture(scope='module')
def tool():
    return load()


def recipe(tool, **changes):
    """A recipe that differs from the usual one by `changes`."""
    usual = {'suite': 'bookworm', 'variant': 'minimal', 'packages': (),
             'size': 1 << 30, 'kind': 'qcow2', 'root_password': '',
             'mark': ''}
    return tool.Recipe(**usual | changes)


@pytest.mark.parametrize('argv', [
    '',
    'build',
    'build out.qcow2',
    'build out.qcow2 --suite sid',
    'build out.iso --suite bookworm',
    'build out --suite bookworm',
    'build out.raw --suite bookworm --size 2',
    'build out.raw --suite bookworm --size 0G',
    'build out.raw --suite bookworm --variant tiny',
    'build out.raw --suite bookworm --package -y',
    'build out.raw --suite bookworm --package a,b',
    'derive base.raw',
    'derive base.raw out.raw --copy name',
    'derive base.raw out.raw --copy name:relative',
    'boot',
    'boot image.raw --timeout soon',
])
def test_wrong_arguments(tool, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(argv.split())
    assert caught.value.code == 2
    assert 'guest-image' in capsys.readouterr().err


def test_arguments(tool):
    args = tool.parse(['build', 'a.vhdx', '--suite', 'trixie', '--package',
                       'nginx', '--size', '1536M'])
    assert (args.format, args.size, args.package, args.variant) == (
        'vhdx', 1536 << 20, ['nginx'], 'cloud')
    args = tool.parse(['derive', 'a.qcow2', 'b.img', '--format', 'raw',
                       '--copy', '/a:b:/etc/', '--run', 'x', '--run', 'y'])
    assert args.format == 'raw'
    assert args.copy == [(pathlib.Path('/a:b'), '/etc/')]
    assert args.run == ['x', 'y']


@pytest.mark.parametrize('argv', [
    'build {0}/out.raw --suite bookworm', 'derive {0}/a {0}/out.raw'])
def test_says_that_it_needs_root(tool, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    with signals_kept():
        assert tool.main(argv.format(tmp_path).split()) == 1
    assert 'needs root' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


class signals_kept:
    """Undoes the signal handlers that main() sets."""

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.before = {n: signal.getsignal(n) for n in numbers}
        self.path = os.environ['PATH']
        self.umask = os.umask(0o022)

    def __exit__(self, *_error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.environ['PATH'] = self.path
        os.umask(self.umask)


def test_names_packages_of_missing_programs(tool, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(tool.ToolError) as caught:
        tool.need_tools(('qemu-img', 'mmdebstrap'))
    assert 'missing programs: qemu-img, mmdebstrap' in str(caught.value)
    assert 'apt-get install mmdebstrap qemu-utils' in str(caught.value)


def test_every_program_has_a_package(tool):
    needed = {*tool.BUILD_TOOLS, *tool.DERIVE_TOOLS, *tool.BOOT_TOOLS}
    assert needed == set(tool.DEBIAN_PACKAGES)


def test_failed_program_tells_its_last_lines(tool):
    with pytest.raises(tool.ToolError, match=r'(?s)status 3.*out 40.*err'):
        tool.run('sh', '-c', 'seq -f "out %g" 40; echo err >&2; exit 3')


def test_no_loop_devices(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool.os.path, 'exists', lambda path: False)
    with pytest.raises(tool.ToolError, match='modprobe loop'):
        tool.loop_device(tmp_path / 'raw', 0, 512)


def test_all_loop_devices_busy(tool, monkeypatch, tmp_path):
    losetup = tmp_path / 'losetup'
    losetup.write_text('#!/bin/sh\necho cannot find an unused loop device\n'
                       'exit 1\n')
    losetup.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    monkeypatch.setattr(tool.os.path, 'exists', lambda path: True)
    with pytest.raises(tool.ToolError, match='(?s)all are busy.*unused'):
        tool.loop_device(tmp_path / 'raw', 0, 512)


def test_work_dir_goes_after_a_failure(tool, tmp_path):
    with (pytest.raises(RuntimeError),
          tool.work_dir(tmp_path / 'cache') as work):
        (work / 'deep/er').mkdir(parents=True)
        raise RuntimeError
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['work.lock']


def test_sweeps_dead_work_dirs_only(tool, tmp_path):
    (tmp_path / 'work-dead').mkdir()
    (tmp_path / 'work-dead/disk.raw').touch()
    (tmp_path / 'work-alive').mkdir()
    fd = os.open(tmp_path / 'work-alive', os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with tool.work_dir(tmp_path):
            assert not (tmp_path / 'work-dead').exists()
    finally:
        os.close(fd)
    assert (tmp_path / 'work-alive').exists()


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(')')[2].split()[0] == 'Z'


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_nothing(tmp_path, signum):
    code = """
import pathlib, signal, sys, test_guest_image
tool = test_guest_image.load()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, tool.on_signal)
with tool.work_dir(pathlib.Path(sys.argv[1])) as work:
    tool.run('sh', '-c', 'sleep 60 & echo $! > "$0"/pid.new; '
             'mv "$0"/pid.new "$0"/pid; wait', work)
"""
    process = subprocess.Popen(
        [sys.executable, '-Bc', code, tmp_path],
        env=os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent)})
    try:
        deadline = time.monotonic() + 20
        while not (found := list(tmp_path.glob('work-*/pid'))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(.02)
        pid = int(found[0].read_text())
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum
    finally:
        process.kill()
        process.wait()
    assert gone(pid)
    assert [p.name for p in tmp_path.iterdir()] == ['work.lock']


def test_cache_makes_a_thing_once(tool, tmp_path):
    made = []

    def make(path):
        made.append(path)
        time.sleep(.2)
        path.write_text('content')

    def get(name):
        work = tmp_path / name
        work.mkdir()
        results.append(tool.Cache(tmp_path, True).get('thing', work, make))

    results = []
    threads = [threading.Thread(target=get, args=(f'w{n}',))
               for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert results == [tmp_path / 'thing'] * 3
    assert results[0].read_text() == 'content'


def test_cache_keeps_no_half_made_thing(tool, tmp_path):
    def make(path):
        path.write_text('half')
        raise tool.ToolError

    work = tmp_path / 'work'
    work.mkdir()
    with pytest.raises(tool.ToolError):
        tool.Cache(tmp_path, True).get('thing', work, make)
    assert not (tmp_path / 'thing').exists()


def test_disabled_cache_is_left_alone(tool, tmp_path):
    (tmp_path / 'thing').write_text('old')
    work = tmp_path / 'work'
    work.mkdir()
    result = tool.Cache(tmp_path, False).get(
        'thing', work, lambda path: path.write_text('new'))
    assert result.read_text() == 'new'
    assert (tmp_path / 'thing').read_text() == 'old'


def test_cache_place(tool, monkeypatch):
    monkeypatch.delenv('FASTBOOT_CACHE', raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', '/h')
    assert str(tool.cache_dir()) == '/h/.cache/fastboot/guests'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert str(tool.cache_dir()) == '/x/fastboot/guests'
    monkeypatch.setenv('FASTBOOT_CACHE', '/f')
    assert str(tool.cache_dir()) == '/f/guests'


def test_delivers_a_copy_of_its_own(tool, tmp_path):
    made, out = tmp_path / 'made', tmp_path / 'out'
    made.write_text('content')
    out.write_text('old')
    tool.deliver(made, out)
    assert out.read_text() == 'content'
    assert out.stat().st_ino != made.stat().st_ino


def test_failed_delivery_leaves_the_old_image(tool, tmp_path):
    out = tmp_path / 'out'
    out.write_text('old')
    with pytest.raises(tool.ToolError):
        tool.deliver(tmp_path / 'nothing', out)
    assert out.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize('change', [
    {'suite': 'trixie'}, {'variant': 'cloud'}, {'packages': ('nginx',)},
    {'size': 2 << 30}, {'kind': 'raw'}, {'root_password': 'x'},
    {'mark': 'x'}])
def test_every_option_makes_another_image(tool, change):
    one, other = recipe(tool), recipe(tool, **change)
    assert one.image_key() == recipe(tool).image_key()
    assert one.image_key() != other.image_key()
    assert one.uuid() != other.uuid()


def test_images_share_a_root_tree(tool):
    key = recipe(tool).tree_key()
    assert key == recipe(tool, size=2 << 30, mark='x').tree_key()
    assert key != recipe(tool, variant='cloud').tree_key()


def test_new_recipe_version_makes_another_image(tool, monkeypatch):
    key = recipe(tool).image_key()
    monkeypatch.setattr(tool, 'RECIPE', tool.RECIPE + 1)
    assert key != recipe(tool).image_key()


def test_derived_image_depends_on_content(tool, tmp_path):
    base, source = tmp_path / 'base', tmp_path / 'dir'
    base.write_text('base')
    source.mkdir()
    (source / 'file').write_text('one')

    def key():
        return tool.Change(base, 'raw', (), ('true',),
                           ((source, '/etc/x'),)).key()

    keys = {key()}
    (source / 'file').write_text('two')
    keys.add(key())
    (source / 'file').chmod(0o755)
    keys.add(key())
    (source / 'link').symlink_to('file')
    keys.add(key())
    base.write_text('another base')
    keys.add(key())
    assert len(keys) == 5


def test_minimal_guest_has_no_cloud_files(tool):
    assert not [name for name in tool.guest_files(recipe(tool))
                if 'cloud' in name or 'network' in name]
    marked = tool.guest_files(recipe(tool, mark='x'))
    assert marked['etc/fastboot-mark'] == 'x\n'


@pytest.mark.parametrize(('suite', 'file'), [
    ('bullseye', 'etc/network/interfaces'),
    ('bookworm', 'etc/systemd/network/90-dhcp.network'),
    ('trixie', 'etc/systemd/network/90-dhcp.network')])
def test_cloud_guest_has_a_network(tool, suite, file):
    made = recipe(tool, suite=suite, variant='cloud')
    assert file in tool.guest_files(made)
    assert set(tool.NETWORK_PACKAGES[suite]) < set(made.all_packages())


def test_names_are_found_through_the_link_of_resolved(tool, tmp_path):
    if not pathlib.Path('/etc/resolv.conf').exists():
        pytest.skip('no /etc/resolv.conf')
    (tmp_path / 'etc').mkdir()
    (tmp_path / 'etc/resolv.conf').symlink_to('/run/resolve/stub.conf')
    with contextlib.ExitStack() as stack:
        tool.chroot_resolver(tmp_path, stack)
    assert (tmp_path / 'run/resolve/stub.conf').exists()
    assert (tmp_path / 'etc/resolv.conf').is_symlink()


def test_console_is_given_up_in_time(tool):
    with subprocess.Popen(['sh', '-c', 'echo hello; exec sleep 60'],
                          stdout=subprocess.PIPE) as process:
        begin = time.monotonic()
        try:
            assert b''.join(tool.console_chunks(process, .5)) == b'hello\n'
        finally:
            process.kill()
    assert .4 < time.monotonic() - begin < 10


def test_console_ends_with_the_guest(tool):
    with subprocess.Popen(['echo', 'bye'],
                          stdout=subprocess.PIPE) as process:
        assert b''.join(tool.console_chunks(process, 60)) == b'bye\n'


def test_ready_line(tool):
    text = b'login: \r\nFASTBOOT-READY 17.77\r\n'
    assert tool.READY_LINE.search(text)[1] == b'17.77'
    assert not tool.READY_LINE.search(text[:-4])
