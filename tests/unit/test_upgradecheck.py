# SPDX-License-Identifier: Apache-2.0
"""``fastboot-status upgrade check``, without any service."""

import json
import os
import pwd
import socket
import threading

import pytest
from disks import make_repository
from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code

from fastboot_common import exception, journal
from fastboot_common.conf import agent, database, jobboard, opts
from fastboot_common.upgradecheck import common, result, status
from fastboot_glance import records
from fastboot_glance import upgradecheck as centre
from fastboot_nova import upgradecheck as host

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason='gives files to others')


class Machine:
    """A configuration of files below a directory."""

    def __init__(self, path):
        self.path = path
        self.conf = opts.register(cfg.ConfigOpts())
        for module in (agent, database, jobboard):
            self.conf.register_opts(module.OPTS, group=module.GROUP)
        self.conf.register_cli_opts(status.CLI_OPTS)
        self.conf([], default_config_files=[])
        self.set('state_dir', str(path))
        self.set('nova_config_file', [str(path / 'nova.conf'),
                                      str(path / 'nova-compute.conf')])
        self.set('glance_config_dir', str(path))
        self.set('qemu_config', str(path / 'qemu.conf'))

    def set(self, name, value, group=None):
        self.conf.set_override(name, value, group=group)

    def write(self, name, words):
        (self.path / name).write_text(words)

    def __call__(self, check):
        """Result and words of a check."""
        found = result.guarded(check)(self.conf)
        return found.code, found.details


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def installed(monkeypatch):
    """Glance and Nova can be imported here."""
    errors = {}
    monkeypatch.setattr(result, 'import_error', errors.get)
    return errors


def skipped(answer):
    code, words = answer
    return code == Code.SUCCESS and words.startswith('Skipped')


def test_repository(machine, tmp_path):
    code, words = machine(common.repository)
    assert code == Code.FAILURE
    assert 'repo init' in words
    make_repository(tmp_path / 'repository')
    code, words = machine(common.repository)
    assert code == Code.SUCCESS
    assert 'version 0 with 0 images' in words


@pytest.mark.parametrize('limit, expected', [
    (3, Code.SUCCESS), (2, Code.WARNING), (1, Code.FAILURE)])
def test_numbers_of_the_repository(machine, tmp_path, monkeypatch, limit,
                                   expected):
    make_repository(tmp_path / 'repository').checkpoint()
    monkeypatch.setattr(journal, 'SERIAL_WARNING', limit - 1)
    monkeypatch.setattr(journal, 'SERIAL_LIMIT', limit + (limit > 1))
    code, words = machine(common.repository)
    assert code == expected
    assert ('new repository' in words) == (expected != Code.SUCCESS)


def test_bus_that_nobody_set(machine):
    code, words = machine(common.bus)
    assert code == Code.WARNING
    assert 'transport_url' in words


def test_database(machine, tmp_path):
    assert skipped(machine(centre.database))
    url = f'sqlite:///{tmp_path}/x.db'
    machine.set('connection', url, 'database')
    code, words = machine(centre.database)
    assert code == Code.FAILURE
    assert 'fastboot-manage db sync' in words
    records.Records(url).create()
    assert machine(centre.database)[0] == Code.SUCCESS
    machine.set('connection', f'sqlite:///{tmp_path}/no/x.db', 'database')
    assert machine(centre.database)[0] == Code.FAILURE


def test_jobboard_away(machine, tmp_path):
    assert skipped(machine(centre.jobboard))
    machine.set('connection', f'sqlite:///{tmp_path}/x.db', 'database')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        machine.set('connection', f'redis://127.0.0.1:'
                    f'{probe.getsockname()[1]}/0', 'jobboard')
        code, words = machine(centre.jobboard)
    assert code == Code.FAILURE
    assert 'jobboard' in words


def test_import_plugin(machine, installed):
    assert skipped(machine(centre.import_plugin))
    machine.write('glance-api.conf', '[DEFAULT]\n')
    code, words = machine(centre.import_plugin)
    assert code == Code.WARNING
    assert 'image_import_plugins' in words
    machine.write('glance-image-import.conf',
                  '[image_import_opts]\n'
                  'image_import_plugins = [no_op, fastboot]\n')
    assert machine(centre.import_plugin)[0] == Code.SUCCESS
    installed['fastboot_glance.import_plugin'] = 'ImportError: no'
    code, words = machine(centre.import_plugin)
    assert code == Code.FAILURE
    assert 'ImportError: no' in words
    installed['glance'] = 'ModuleNotFoundError'
    assert skipped(machine(centre.import_plugin))


def test_import_plugin_with_another_jobboard(machine, installed):
    machine.write('glance-image-import.conf',
                  '[image_import_opts]\nimage_import_plugins = [fastboot]\n'
                  '[jobboard]\nconnection = redis://elsewhere:1/0\n')
    assert machine(centre.import_plugin)[0] == Code.SUCCESS
    machine.set('connection', 'sqlite://', 'database')
    code, words = machine(centre.import_plugin)
    assert code == Code.WARNING
    assert 'another jobboard' in words


def test_driver(machine, installed):
    assert skipped(machine(host.driver))
    machine.write('nova.conf', '[DEFAULT]\n')  # a controller's
    assert skipped(machine(host.driver))
    machine.write('nova.conf', '[DEFAULT]\n'
                               'compute_driver = libvirt.LibvirtDriver\n')
    code, words = machine(host.driver)
    assert code == Code.FAILURE
    assert 'fastboot.FastbootLibvirtDriver' in words
    # What nova-compute reads last counts.
    machine.write('nova-compute.conf', '[DEFAULT]\ncompute_driver = '
                                       'fastboot.FastbootLibvirtDriver\n')
    assert machine(host.driver)[0] == Code.SUCCESS
    installed['nova.virt.fastboot'] = 'ModuleNotFoundError: no'
    code, words = machine(host.driver)
    assert code == Code.FAILURE
    assert 'link the directory' in words
    installed['nova'] = 'ModuleNotFoundError'
    assert skipped(machine(host.driver))


@pytest.mark.parametrize('modes, loop, expected', [
    ('', False, Code.WARNING), ('', True, Code.SUCCESS),
    ('file=writeback', False, Code.SUCCESS),
    ('block=none, file=writethrough', False, Code.SUCCESS),
    ('network=writeback', False, Code.WARNING),
    ('file=none', False, Code.WARNING),
    ('file=directsync', True, Code.SUCCESS)])
def test_cache_mode(machine, modes, loop, expected):
    assert skipped(machine(host.cache_mode))
    words = f'[libvirt]\ndisk_cachemodes = {modes}\n'
    machine.write('nova.conf', words)  # a controller's
    assert skipped(machine(host.cache_mode))
    machine.write('nova.conf', f'[DEFAULT]\ncompute_driver = x\n{words}')
    machine.set('loop', loop, 'agent')
    code, words = machine(host.cache_mode)
    assert code == expected
    if code == Code.WARNING:
        assert 'file=writeback' in words


@pytest.fixture
def volume(machine, tmp_path):
    """A volume that everybody may read. pytest's own directories are
    closed to others, so those above do not count here."""
    path = tmp_path / 'host/volumes/public/volume'
    path.parent.mkdir(parents=True)
    path.touch()
    for one in (path, *path.parents[:3]):
        one.chmod(0o755)
    machine.write('qemu.conf', '# user = "root"\nuser = "nobody"\n')
    return path


@pytest.fixture
def below(monkeypatch, tmp_path):
    real = host._allowed
    monkeypatch.setattr(
        host, '_allowed', lambda path, user, bit:
        path in tmp_path.parents or path == tmp_path
        or real(path, user, bit))


@needs_root
def test_volumes(machine, volume, below):
    assert machine(host.volumes) == (
        Code.SUCCESS, 'QEMU (user nobody) can read 1 volumes')
    volume.chmod(0o640)
    code, words = machine(host.volumes)
    assert code == Code.FAILURE
    assert f'cannot read {volume}: its mode is -rw-r-----' in words
    nobody = pwd.getpwnam('nobody')
    os.chown(volume, -1, nobody.pw_gid)
    assert machine(host.volumes)[0] == Code.SUCCESS
    volume.chmod(0o604)  # of a group that may less than others
    assert machine(host.volumes)[0] == Code.FAILURE
    os.chown(volume, nobody.pw_uid, -1)
    assert machine(host.volumes)[0] == Code.SUCCESS


def test_closed_directory(machine, volume, below):
    volume.parents[1].chmod(0o750)
    code, words = machine(host.volumes)
    assert code == Code.FAILURE
    assert f'the directory {volume.parents[1]} is closed' in words
    machine.write('qemu.conf', 'user = "+0"\n')
    assert machine(host.volumes)[0] == Code.SUCCESS


@needs_root
def test_group_of_qemu(machine, volume, below):
    volume.chmod(0o640)
    os.chown(volume, -1, 4242)
    assert machine(host.volumes)[0] == Code.FAILURE
    machine.write('qemu.conf', "user = 'nobody'\ngroup = '+4242'\n")
    assert machine(host.volumes)[0] == Code.SUCCESS
    machine.write('qemu.conf', 'user = "no-such-account"\n')
    code, words = machine(host.volumes)
    assert code == Code.FAILURE
    assert 'no-such-account' in words


def test_no_volume_yet(machine):
    assert skipped(machine(host.volumes))
    assert skipped(machine(host.shield))


def serve(path, greeting):
    """One client is greeted at a socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer():
        with listener, listener.accept()[0] as client:
            client.sendall(greeting)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_shield(machine, volume, below, tmp_path):
    code, words = machine(host.shield)
    assert code == Code.FAILURE
    assert 'fastboot-agent' in words
    path = tmp_path / 'run/nbd.sock'
    path.parent.mkdir(mode=0o755)
    for mode, expected in ((0o666, Code.SUCCESS), (0o660, Code.FAILURE)):
        path.unlink(missing_ok=True)
        thread = serve(path, b'NBDMAGICIHAVEOPT\0\3')
        path.chmod(mode)
        assert machine(host.shield)[0] == expected
        thread.join(10)


class Agent:
    """Answers at a socket as an agent does, again and again."""

    def __init__(self, path):
        path.parent.mkdir(mode=0o755)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen()
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self):
        while True:
            with self.socket.accept()[0] as client:
                client.recv(4096)
                client.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"images": []}')


@needs_root
def test_agent(machine, volume, below, tmp_path):
    assert skipped(machine(host.agent))
    path = tmp_path / 'run/agent.sock'
    machine.write('nova.conf', f'[DEFAULT]\ncompute_driver = {host._DRIVER}\n'
                               f'[fastboot]\nagent_socket = {path}\n')
    machine.set('nova_user', 'nobody')
    code, words = machine(host.agent)
    assert code == Code.FAILURE
    assert 'start fastboot-agent' in words and str(path) in words
    Agent(path)
    path.chmod(0o666)
    assert machine(host.agent) == (
        Code.SUCCESS, f'{path} answers, and nobody may ask')
    path.chmod(0o660)
    code, words = machine(host.agent)
    assert code == Code.FAILURE and '[agent] group' in words
    path.chmod(0o666)
    volume.chmod(0o640)
    code, words = machine(host.agent)
    assert code == Code.FAILURE and f'cannot read {volume}' in words
    machine.set('nova_user', 'no-such-account')
    assert skipped(machine(host.agent))
    machine.write('nova.conf', '[DEFAULT]\ncompute_driver = other\n')
    assert skipped(machine(host.agent))


def test_broken_config_is_named(machine):
    machine.write('nova.conf', 'no section\n')
    code, words = machine(host.cache_mode)
    assert code == Code.FAILURE
    assert 'nova.conf' in words


def test_import_errors_are_found():
    assert result.import_error('json') is None
    assert 'no_such_module' in result.import_error('no_such_module')


def test_broken_check_does_not_hide_others():
    def broken(conf):
        return 1 / 0

    def refused(conf):
        raise exception.Unavailable('away')

    found = result.guarded(broken)(None)
    assert found.code == Code.FAILURE
    assert 'ZeroDivisionError' in found.details
    assert result.guarded(refused)(None).details == 'away'


def test_all_of_it(tmp_path, capsys, monkeypatch):
    """The command, on a machine that has nothing yet."""
    real = opts.register

    def register(conf):
        for module in (agent, database, jobboard):
            conf.register_opts(module.OPTS, group=module.GROUP)
        return real(conf)

    monkeypatch.setattr(opts, 'register', register)
    (tmp_path / 'fastboot.conf').write_text(
        f'[DEFAULT]\nstate_dir = {tmp_path}\n')
    code = status.main([
        '--config-file', str(tmp_path / 'fastboot.conf'),
        '--nova-config-file', str(tmp_path / 'none'),
        '--glance-config-dir', str(tmp_path),
        'upgrade', 'check', '--json'])
    found = json.loads(capsys.readouterr().out)['checks']
    assert code == Code.FAILURE
    assert [row['check'] for row in found if row['result'] == 2] == [
        'Repository']
    assert len(found) == 11
    assert all(row['details'] for row in found)


def test_a_package_that_is_not_here(monkeypatch):
    monkeypatch.setattr(status, '_MODULES', ('fastboot_nowhere.checks',))
    (name, check), = status._checks()
    found = check(None)
    assert name == 'fastboot_nowhere'
    assert found.code == Code.SUCCESS
    assert 'Skipped' in found.details
