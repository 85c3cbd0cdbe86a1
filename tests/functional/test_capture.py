# SPDX-License-Identifier: Apache-2.0
"""Captures of guests of one sector, in the real QEMU and the real sandbox."""

import contextlib
import os
import pathlib
import threading
import time

import bootsector
import pytest
from oslo_config import cfg

from fastboot_common import configdrive, exception, qemu, trace
from fastboot_common.conf import capture as conf
from fastboot_glance import capture, guest

SIZE = 16 << 20
LOGIN = b'\r\ntest login: '
#: 32 runs of 4 KiB from 1 MiB on, 64 KiB apart.
READS = {'count': 32, 'first': 2048, 'step': 128}

as_root = pytest.mark.skipif(os.geteuid() != 0, reason='needs root')


def options(**values):
    config = cfg.ConfigOpts()
    config.register_opts(conf.OPTS, group=conf.GROUP)
    config([], default_config_files=[])
    values = {'boots': 1, 'timeout': 60, 'memory': 64, 'settle_seconds': 0,
              'end': ['console'], 'quiet_mib': 0, 'quiet_seconds': 2,
              'config_drive': False, **values}
    for name, value in values.items():
        config.set_override(name, value, group=conf.GROUP)
    return config.capture


def boot(tmp_path, sector, size=SIZE, progress=None, cancel=None, **values):
    work = tmp_path / 'work'
    work.mkdir(exist_ok=True)
    raw = bootsector.disk(tmp_path / 'raw', size, sector)
    before = raw.read_bytes()
    found = capture.capture(raw, size, work, options(**values),
                            progress=progress, cancel=cancel)
    assert list(work.iterdir()) == []
    assert raw.read_bytes() == before
    assert children() == []
    return found


def descendants(pid):
    found = []
    for task in pathlib.Path(f'/proc/{pid}/task').iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended
            for child in (task / 'children').read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def children():
    """The programs that still run below us."""
    found = []
    for pid in descendants(os.getpid()):
        name = pathlib.Path(f'/proc/{pid}/comm').read_text().strip()
        if name in ('unshare', 'setpriv', 'qemu-system-x86', 'nbdkit'):
            found.append((pid, name))
    return found


def test_ends_by_console(tmp_path):
    found = boot(tmp_path, bootsector.sector(LOGIN, **READS))
    assert (found.state, found.reason, found.end) == (
        'booted', None, 'console')
    blocks = trace.boot_set(found.trace, 4096, SIZE).tolist()
    wanted = [256 + 16 * number for number in range(32)]
    assert [block for block in blocks if block >= 256] == wanted
    assert blocks[0] == 0
    trace.unpack(trace.pack(found.trace, SIZE), SIZE)
    header = found.header()
    assert header['boots'] == len(header['seconds']) == 1
    assert header['devices'].startswith('pc, virtio-blk, tcg, QEMU ')


def test_ends_by_quiet(tmp_path):
    found = boot(tmp_path, bootsector.sector(**READS),
                 end=['agent', 'console', 'quiet'])
    assert (found.state, found.end) == ('booted', 'quiet')
    assert len(trace.boot_set(found.trace, 4096, SIZE)) >= 33


def test_boots_are_merged(tmp_path):
    seen = []
    found = boot(tmp_path, bootsector.sector(LOGIN, **READS), boots=2,
                 progress=lambda *now: seen.append(now))
    assert found.header()['boots'] == 2
    assert sorted(set(found.trace['boot'].tolist())) == [0, 1]
    assert {number for number, _, _ in seen} == {0, 1}
    one = found.trace[found.trace['boot'] == 0]
    assert (trace.boot_set(one, 4096, SIZE).tolist()
            == trace.boot_set(found.trace, 4096, SIZE).tolist())


@pytest.mark.parametrize('parallel', [1, 2])
def test_boots_run_at_the_same_time(tmp_path, parallel):
    seen = []
    boot(tmp_path, bootsector.sector(LOGIN, **READS), boots=2,
         settle_seconds=1, parallel=parallel,
         progress=lambda number, *_: seen.append(number))
    assert (seen == sorted(seen)) == (parallel == 1)


def test_none_is_begun_after_one_that_failed(tmp_path):
    seen = []
    found = boot(tmp_path, bootsector.sector(b'hello'), timeout=2, boots=4,
                 parallel=1, progress=lambda number, *_: seen.append(number))
    assert (found.state, set(seen)) == ('failed', {0})


def test_reads_after_the_end_are_recorded(tmp_path):
    sector = bootsector.sector(LOGIN, **READS, more=16)
    found = boot(tmp_path, sector, settle_seconds=5)
    blocks = trace.boot_set(found.trace, 4096, SIZE).tolist()
    wanted = [256 + 16 * number for number in range(32 + 16)]
    assert [block for block in blocks if block >= 256] == wanted


def test_a_guest_that_goes_on_reading_is_listened_to(tmp_path):
    """Longer than it would have to be silent for, and not for ever."""
    found = boot(tmp_path, bootsector.ponderer(LOGIN), settle_seconds=1)
    assert found.state == 'booted'
    blocks = trace.boot_set(found.trace, 4096, SIZE)
    assert (blocks >= 256).sum() > 4


def test_every_second_disk_is_grown(tmp_path, monkeypatch):
    sizes = []
    create = qemu.create_overlay

    def spy(path, backing, backing_format, size):
        sizes.append(size)
        create(path, backing, backing_format, size)

    monkeypatch.setattr(qemu, 'create_overlay', spy)
    found = boot(tmp_path, bootsector.sector(LOGIN), boots=3, grow=1)
    assert sorted(sizes) == [SIZE, SIZE, SIZE + (1 << 30)]
    assert found.header()['boots'] == 3
    trace.pack(found.trace, SIZE)


def test_later_boot_fails(tmp_path, monkeypatch):
    """What the boots before it read is kept."""
    create = qemu.create_overlay

    def spoil(path, backing, backing_format, size):
        create(path, backing if size == SIZE else 'nbd+unix:///?socket=gone',
               backing_format, size)

    monkeypatch.setattr(qemu, 'create_overlay', spoil)
    found = boot(tmp_path, bootsector.sector(LOGIN, **READS), boots=2)
    assert (found.state, found.end) == ('booted', 'console')
    assert found.reason.startswith('boot 2 of 2: ')
    assert found.header()['boots'] == 1
    assert set(found.trace['boot'].tolist()) == {0}


def test_hang_ends_by_timeout(tmp_path):
    found = boot(tmp_path, bootsector.sector(b'hello'), timeout=4,
                 boots=3)
    assert (found.state, found.end) == ('failed', None)
    assert found.reason == 'boot 1 of 3: no end in 4 seconds'
    assert found.trace.size == 0
    assert found.header()['boots'] == 0


def test_image_without_boot_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, 'STALL', 3)
    found = boot(tmp_path, bytes(512), quiet_mib=8, end=['quiet'])
    assert found.state == 'failed'
    assert 'boot loader' in found.reason


def test_machine_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(qemu, 'OVERHEAD', -(60 << 20))
    found = boot(tmp_path, bootsector.sector(LOGIN))
    assert found.state == 'failed'
    assert found.trace.size == 0


def test_guest_that_reads_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, 'LOG_LIMIT', 4096)
    found = boot(tmp_path, bootsector.sector(LOGIN, count=500, first=8))
    assert found.state == 'failed'
    assert 'bytes of log' in found.reason


def test_cancel(tmp_path):
    cancel = threading.Event()
    found = boot(tmp_path, bootsector.sector(b'hello', **READS),
                 cancel=cancel, progress=lambda *now: cancel.set())
    assert (found.state, found.reason) == ('none', 'cancelled')
    assert found.trace.size == 0


def test_size_not_of_whole_sectors(tmp_path):
    raw = bootsector.disk(tmp_path / 'raw', SIZE - 300,
                          bootsector.sector(LOGIN, count=1,
                                            first=SIZE // 512 - 8))
    work = tmp_path / 'work'
    work.mkdir()
    found = capture.capture(raw, SIZE, work, options())
    assert found.state == 'booted'
    trace.pack(found.trace, SIZE)
    assert SIZE // 4096 - 1 in trace.boot_set(found.trace, 4096, SIZE)


def test_every_second_boot_has_no_config_drive(tmp_path, monkeypatch):
    configs = []
    machine = qemu.Machine

    def spy(config, *args):
        configs.append(config)
        return machine(config, *args)

    monkeypatch.setattr(qemu, 'Machine', spy)
    found = boot(tmp_path, bootsector.sector(LOGIN), config_drive=True,
                 boots=4, parallel=1)
    assert found.state == 'booted' and len(found.seconds) == 4
    assert [bool(config.config_drive) for config in configs] == [
        True, False, True, False]
    assert [config.dhcp for config in configs] == [False, True, False, True]


def test_config_drive_content(tmp_path):
    import json

    import pycdlib
    configdrive.build(tmp_path / 'iso', 'name')
    configdrive.build(tmp_path / 'other', 'name')
    found = []
    for name in ('iso', 'other'):
        assert b'config-2' in (tmp_path / name).read_bytes()[32768:34816]
        iso = pycdlib.PyCdlib()
        iso.open(str(tmp_path / name))
        with iso.open_file_from_iso(
                rr_path='/openstack/latest/meta_data.json') as data:
            found.append(json.loads(data.read()))
        with iso.open_file_from_iso(
                joliet_path='/openstack/latest/user_data') as data:
            assert data.read().startswith(b'#cloud-config\n')
        iso.close()
    assert found[0]['hostname'] == 'name'
    assert found[0]['uuid'] != found[1]['uuid']


@as_root
def test_unknown_user():
    with pytest.raises(exception.ConfigError):
        guest.Sandbox('no-such-account')


@as_root
def test_root_is_no_user_for_it():
    with pytest.raises(exception.ConfigError):
        guest.Sandbox('root')


@as_root
def test_sandbox_of_the_machine(tmp_path):
    """What /proc tells of QEMU while it runs a guest."""
    seen = {}

    def look(number, seconds, unique):
        for pid in descendants(os.getpid()):
            proc = pathlib.Path(f'/proc/{pid}')
            if (proc / 'comm').read_text() == 'qemu-system-x86\n':
                seen['status'] = dict(
                    line.split(':\t', 1) for line in
                    (proc / 'status').read_text().splitlines())
                seen['devices'] = (proc / 'net/dev').read_text()
                seen['limits'] = (proc / 'limits').read_text()
                for space in ('net', 'pid', 'ipc'):
                    seen[space] = os.readlink(proc / 'ns' / space)

    boot(tmp_path, bootsector.sector(**READS), end=['quiet'], progress=look)
    status = seen['status']
    assert status['Uid'].split() == ['65534'] * 4
    assert set(status['Gid'].split()) == {'65534'}
    assert status['Groups'].split() in ([], ['65534'])
    for name in ('CapPrm', 'CapEff', 'CapBnd', 'CapAmb'):
        assert int(status[name], 16) == 0
    assert status['NoNewPrivs'] == '1'
    assert status['Seccomp'] == '2'
    assert [line.split(':')[0].strip()
            for line in seen['devices'].splitlines()[2:]] == ['lo']
    for space in ('net', 'pid', 'ipc'):
        assert seen[space] != os.readlink(f'/proc/self/ns/{space}')
    limits = {line[:26].strip(): line[26:].split()[0]
              for line in seen['limits'].splitlines()[1:]}
    assert int(limits['Max address space']) == (64 << 20) + qemu.OVERHEAD
    assert int(limits['Max file size']) == 4 << 30
    assert int(limits['Max open files']) == 256


def sandboxed(tmp_path, script, limits=None):
    room = tmp_path / 'room'
    room.mkdir(0o700)
    (tmp_path / 'secret').write_text('secret')
    (tmp_path / 'secret').chmod(0o600)
    sandbox = guest.Sandbox('nobody')
    sandbox.own(room)
    limits = limits or guest.Limits(1 << 30, 1 << 20, 10)
    return qemu._run([*sandbox.prefix(limits), 'sh', '-c', script], 30, room)


@as_root
def test_sandbox_files(tmp_path):
    assert sandboxed(tmp_path, 'echo hello > mine; cat mine') == b'hello\n'
    (tmp_path / 'room/mine').unlink()
    (tmp_path / 'room').rmdir()
    with pytest.raises(exception.CommandFailed):
        sandboxed(tmp_path, 'cat ../secret')


@as_root
@pytest.mark.parametrize('script', [
    'head -c 2000000 /dev/zero > big',
    'head -c 2000000000 /dev/zero | tail -c 2000000000 > /dev/null',
    'kill -0 1 && kill -0 ' + str(os.getpid()),
], ids=['file', 'memory', 'others'])
def test_sandbox_limits(tmp_path, script):
    with pytest.raises(exception.CommandFailed):
        sandboxed(tmp_path, script)


@as_root
def test_killed_sandbox_takes_its_programs_along(tmp_path):
    with open_machine(tmp_path) as machine:
        inner = descendants(machine.pid)
        assert inner
        os.kill(machine.pid, 9)
        deadline = time.monotonic() + 20
        while any(map(running, inner)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def running(pid):
    try:
        state = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(')')[2].split()[0] != 'Z'


def open_machine(tmp_path, sector=None):
    room = tmp_path / 'room'
    room.mkdir(0o700)
    bootsector.disk(room / 'disk', SIZE, sector or bootsector.sector(LOGIN))
    sandbox = guest.Sandbox('nobody')
    sandbox.own(room)
    config = qemu.Config(disk=qemu.file_disk('disk', 'raw'), memory=64)
    limits = guest.Limits((64 << 20) + qemu.OVERHEAD, 1 << 30, 60)
    return qemu.Machine(config, room, sandbox.prefix(limits))


def test_machine_prints_and_quits(tmp_path):
    with open_machine(tmp_path) as machine:
        said = b''
        deadline = time.monotonic() + 60
        while LOGIN not in said:
            assert machine.alive()
            assert time.monotonic() < deadline
            said += machine.console()
            time.sleep(0.05)
        assert not machine.agent.ping(0.1)
        assert not machine.wait(0.1)
    assert not machine.alive()
    assert children() == []


def test_machine_cannot_open_its_disk(tmp_path):
    (tmp_path / 'room').mkdir()
    config = qemu.Config(disk=qemu.file_disk('gone', 'raw'), memory=64)
    with pytest.raises(exception.CommandFailed, match='gone'):
        with qemu.Machine(config, tmp_path / 'room'):
            pass
    assert children() == []


def test_replay(tmp_path):
    raw = bootsector.disk(tmp_path / 'raw', SIZE,
                          bootsector.sector(LOGIN, **READS))
    work = tmp_path / 'work'
    work.mkdir()
    found = capture.capture(raw, SIZE, work, options())
    took = trace.replay(['-f', 'raw', str(raw)], found.trace, SIZE, 60)
    assert took.cpu_seconds > 0
    assert took.seconds > 0
    with pytest.raises(exception.CommandFailed):
        trace.replay(['-f', 'raw', str(tmp_path / 'gone')], found.trace,
                     SIZE, 60)
    os.truncate(raw, 1 << 20)
    with pytest.raises(exception.CommandFailed, match='read failed'):
        trace.replay(['-f', 'raw', str(raw)], found.trace, SIZE, 60)
