# SPDX-License-Identifier: Apache-2.0
"""The DevStack plugin: its style, and its phases in a real DevStack.

The latter need a checkout of openstack/devstack, which FASTBOOT_DEVSTACK
names. Its own functions run, in a scratch directory, with stand-ins for what
would need a cloud or another machine: sudo, pip, systemctl, the clients.
"""

import configparser
import os
import pathlib
import shutil
import subprocess

import pytest

from fastboot_glance import registry

TOP = pathlib.Path(__file__).parents[2]
PLUGIN = TOP / 'devstack'
SCRIPTS = [PLUGIN / 'settings', PLUGIN / 'override-defaults',
           PLUGIN / 'plugin.sh', PLUGIN / 'lib/fastboot']

#: What notes its arguments, and does no more.
NOTED = ('systemctl', 'pip', 'a2ensite', 'a2dissite', 'a2enmod', 'mysql',
         'systemd-tmpfiles', 'edit-constraints', 'fastbootctl',
         'fastboot-manage', 'fastboot-status', 'usermod', 'service',
         'apt-get', 'systemd-cat', 'dpkg', 'uwsgi')
NOTE = '''\
#!/bin/bash
echo "$(basename "$0") $*" >>"$NOTES"
'''
#: Runs what stays in the scratch directory, and notes the rest.
SUDO = '''\
#!/bin/bash
while [[ "$1" == -* || "$1" == *=* ]]; do shift; done
echo "sudo $*" >>"$NOTES"
program=$1
shift
words=()
while (($#)); do
    if [[ "$program" == install && "$1" =~ ^-[og]$ ]]; then
        shift 2
        continue
    fi
    # A path elsewhere: this is not ours to do. (Not where it
    # may be an expression.)
    if [[ "$1" == /* && "$1" != "$ROOT"/* ]] &&
            [[ ! "$program" =~ ^(sed|grep)$ || $# == 1 ]]; then
        [[ "$program" == tee ]] && cat >/dev/null
        exit 0
    fi
    words+=("$1")
    shift
done
case $program in
    install|tee|sed|grep|rm|find|mkdir|cat) exec "$program" "${words[@]}" ;;
    *)
        # Stand-ins only.
        if [[ -x "$ROOT/bin/${program##*/}" ]]; then
            exec "$ROOT/bin/${program##*/}" "${words[@]}"
        fi
        ;;
esac
'''
OPENSTACK = '''\
#!/bin/bash
[[ "$1" == --os-cloud ]] && shift 2
echo "openstack $*" >>"$NOTES"
case "$*" in
    *' show '*) exit 1 ;;
    *' list '*) ;;
    *) echo 0123456789abcdef0123456789abcdef ;;
esac
'''
CURL = '''\
#!/bin/bash
echo "curl $*" >>"$NOTES"
echo 200
'''
LSB = '''\
#!/bin/bash
case "$1" in
    -i) echo Ubuntu ;;
    -r) echo 24.04 ;;
    -c) echo noble ;;
esac
'''
LOCAL_CONF = '''\
[[local|localrc]]
DEST=@ROOT@/stack
DATA_DIR=@ROOT@/stack/data
SERVICE_DIR=@ROOT@/stack/status
STACK_USER=@USER@
HOST_IP=192.0.2.11
SERVICE_HOST=192.0.2.10
RABBIT_HOST=192.0.2.10
ADMIN_PASSWORD=secret
DATABASE_PASSWORD=secret
RABBIT_PASSWORD=secret
SERVICE_PASSWORD=secret
REQUIREMENTS_DIR=@ROOT@/stack/requirements
GLANCE_CONF_DIR=@ROOT@/etc/glance
APACHE_CONF_DIR=@ROOT@/etc/apache2
FASTBOOT_CONF_DIR=@ROOT@/etc/fastboot
FASTBOOT_APPARMOR=@ROOT@/etc/apparmor.d/local/abstractions/libvirt-qemu
ENABLED_SERVICES=@SERVICES@
enable_plugin fastboot @TOP@
@EXTRA@
'''
#: In the order in which stack.sh and its kin do.
STACK = '''\
set -o errexit
cd "$TOP_DIR"
umask 022
source "$TOP_DIR/inc/meta-config"
extract_localrc_section local.conf localrc .localrc.auto
source "$TOP_DIR/stackrc"
SYSTEMD_DIR=$ROOT/etc/systemd
SYSTEMCTL=systemctl
GetDistro
run_phase override_defaults
for lib in apache tls database rpc_backend infra libraries lvm keystone \\
        glance nova placement etcd3; do
    source "$TOP_DIR/lib/$lib"
done
NOVA_CONF_DIR=$ROOT/etc/nova
NOVA_CONF=$NOVA_CONF_DIR/nova.conf
NOVA_CPU_CONF=$NOVA_CONF_DIR/nova-cpu.conf
SSL_BUNDLE_FILE=$ROOT/ca-bundle.pem
API_WORKERS=2
run_phase source
initialize_database_backends >/dev/null
define_database_baseurl
'''


def test_the_files_of_a_devstack_plugin_are_there() -> None:
    for path in (*SCRIPTS, PLUGIN / 'files/bindep.txt',
                 PLUGIN / 'local.conf.sample'):
        assert path.stat().st_size


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path: pathlib.Path) -> None:
    subprocess.run(['bash', '-n', path], check=True, timeout=30)


@pytest.mark.parametrize('command', [
    ['bashate', '--ignore', 'E006,E005', '--error', 'E042'],
    ['shellcheck'],
], ids=lambda command: command[0])
def test_it_has_the_style_of_devstack(command: list[str]) -> None:
    if not shutil.which(command[0]):
        pytest.skip(f'{command[0]} is not installed')
    found = subprocess.run([*command, *SCRIPTS], capture_output=True,
                           text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    assert not found.stdout


class DevStack:
    """A DevStack below a scratch directory."""

    def __init__(self, root: pathlib.Path, source: pathlib.Path, *,
                 services: str, extra: str = '') -> None:
        self.root = root
        self.top = root / 'devstack'
        self.stack = root / 'stack'
        self.notes = root / 'notes'
        shutil.copytree(source, self.top, symlinks=True,
                        ignore=shutil.ignore_patterns('.git', 'local.conf'))
        bin_directory = root / 'bin'
        venv = self.stack / 'data/venv/bin'
        constraints = self.stack / 'requirements/.venv/bin'
        for directory in (
                bin_directory, venv, constraints, self.stack / 'glance',
                self.stack / 'nova/nova/virt', root / 'etc/nova',
                root / 'etc/glance', root / 'etc/systemd',
                root / 'etc/apache2', self.apparmor.parent):
            directory.mkdir(parents=True)
        for directory in (bin_directory, venv):
            for name in NOTED:
                _write(directory / name, NOTE)
        _write(constraints / 'edit-constraints', NOTE)
        for name, text in (('sudo', SUDO), ('openstack', OPENSTACK),
                           ('lsb_release', LSB), ('curl', CURL),
                           ('a2query', '#!/bin/bash\n')):
            _write(bin_directory / name, text)
        (self.stack / 'requirements/upper-constraints.txt').touch()
        (self.stack / 'requirements/global-requirements.txt').write_text(
            'etcd3gw!=0.2.6  # Apache-2.0\n')
        (self.stack / 'fastboot').symlink_to(TOP)
        (root / 'etc/glance/glance-image-import.conf').write_text(
            '[image_import_opts]\nimage_import_plugins = []\n')
        (root / 'etc/nova/nova.conf').write_text(
            '[DEFAULT]\ncompute_driver = libvirt.LibvirtDriver\n')
        user = subprocess.run(['id', '-un'], capture_output=True, text=True,
                              check=True, timeout=30).stdout.strip()
        text = LOCAL_CONF
        for key, value in (('ROOT', root), ('USER', user), ('TOP', TOP),
                           ('SERVICES', services), ('EXTRA', extra)):
            text = text.replace(f'@{key}@', str(value))
        (self.top / 'local.conf').write_text(text)

    @property
    def apparmor(self) -> pathlib.Path:
        """What AppArmor lets all guests do."""
        return self.root / 'etc/apparmor.d/local/abstractions/libvirt-qemu'

    @property
    def shim(self) -> pathlib.Path:
        """The shim in Nova's tree."""
        return self.stack / 'nova/nova/virt/fastboot'

    def run(self, *phases: str, then: str = 'true') -> str:
        """Run phases, and a command after them.

        :returns: what was noted.
        """
        lines = [STACK, *(f'run_phase {phase}' for phase in phases), then]
        self.notes.write_text('')
        done = subprocess.run(
            ['bash', '-c', '\n'.join(lines)], capture_output=True, text=True,
            timeout=120, stdin=subprocess.DEVNULL, env={
                'PATH': f'{self.root}/bin:/usr/sbin:/usr/bin:/sbin:/bin',
                'HOME': str(self.root), 'ROOT': str(self.root),
                'TOP_DIR': str(self.top), 'NOTES': str(self.notes),
                'LANG': 'C.UTF-8'})
        assert done.returncode == 0, (
            f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
        self.said = done.stdout
        return self.notes.read_text()

    def conf(self, path: str) -> configparser.ConfigParser:
        """A configuration file that was written."""
        found = configparser.ConfigParser(
            interpolation=None, strict=False)
        assert found.read(self.root / path), path
        return found


def _write(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def source() -> pathlib.Path:
    name = os.environ.get('FASTBOOT_DEVSTACK')
    if not name:
        pytest.skip('FASTBOOT_DEVSTACK names no checkout of DevStack')
    return pathlib.Path(name)


PHASES = ('stack pre-install', 'stack install', 'stack post-config',
          'stack extra', 'stack test-config')
ONE_NODE = 'g-api,n-cpu,n-api,mysql,rabbit,etcd3,key'


@pytest.fixture
def one(source: pathlib.Path, tmp_path: pathlib.Path) -> DevStack:
    """One node that has everything."""
    return DevStack(tmp_path, source, services=ONE_NODE)


def test_all_phases_of_one_node(one: DevStack) -> None:
    notes = one.run(*PHASES)

    # Installed beside an editable Nova, which finds the shim.
    assert f'pip install -c {one.stack}/requirements/' in notes
    assert f'-e {one.stack}/fastboot' in notes
    assert 'pip install' in notes and 'etcd3gw' in notes
    assert (one.shim / '__init__.py').read_text() == (
        TOP / 'nova/virt/fastboot/__init__.py').read_text()

    centre = one.conf('etc/fastboot/fastboot.conf')
    state = str(one.stack / 'data/fastboot')
    repository = str(one.stack / 'data/fastboot-repository')
    assert centre['DEFAULT']['state_dir'] == state
    assert centre['DEFAULT']['transport_url'].startswith('rabbit://')
    assert centre['repository']['location'] == repository
    assert centre['jobboard']['connection'] == 'etcd://192.0.2.10:2379'
    assert '/fastboot?' in centre['database']['connection']
    assert centre['glance']['username'] == 'fastboot'
    assert centre['glance']['region_name'] == 'RegionOne'
    assert centre['keystone_authtoken']['username'] == 'fastboot'
    assert centre['capture']['accelerator'] == 'tcg'

    agent = one.conf('etc/fastboot/fastboot-agent.conf')
    assert agent['repository']['location'] == (
        'http://192.0.2.10/fastboot-repository')
    assert agent['export']['group'] == 'kvm'
    assert 'database' not in agent and 'glance' not in agent

    importing = one.conf('etc/glance/glance-image-import.conf')
    assert importing['image_import_opts'][
        'image_import_plugins'] == '[fastboot]'
    assert importing['jobboard']['connection'] == 'etcd://192.0.2.10:2379'

    nova = one.conf('etc/nova/nova.conf')
    assert nova['DEFAULT']['compute_driver'] == (
        'fastboot.FastbootLibvirtDriver')
    assert nova['DEFAULT']['non_inheritable_image_properties'] == ','.join(
        ('cache_in_nova', 'bittorrent', *registry.PROPERTIES))
    assert nova['libvirt']['images_type'] == 'qcow2'
    assert nova['libvirt']['disk_cachemodes'] == 'file=writeback'
    assert nova['fastboot']['agent_socket'] == f'{state}/run/agent.sock'
    assert nova['fastboot']['export_socket'] == f'{state}/run/nbd.sock'

    site = (one.root / 'etc/apache2/fastboot-repository.conf').read_text()
    assert f'Alias "/fastboot-repository" "{repository}"' in site
    api = (one.root / 'etc/apache2/fastboot-api.conf').read_text()
    assert api.startswith('ProxyPass "/fastboot" ')
    uwsgi = one.conf('etc/fastboot/fastboot-uwsgi.ini')['uwsgi']
    assert uwsgi['module'] == 'fastboot_glance.wsgi.api:application'
    assert f'{state}/run/nbd.sock rw,' in one.apparmor.read_text()

    for words in (
            'a2ensite fastboot-repository', 'fastbootctl --config-file',
            'fastboot-manage --config-file', 'db sync',
            'openstack user create fastboot',
            'openstack service create fastboot --name fastboot',
            'public http://192.0.2.10/fastboot ',
            'openstack role add admin --user fastboot',
            f'fastboot-status --config-file {one.root}/etc/fastboot/'
            f'fastboot.conf', f'fastboot-status --config-file '
            f'{one.root}/etc/fastboot/fastboot-agent.conf'):
        assert words in notes, words
    assert notes.index('DATABASE fastboot') < notes.index('db sync')


def test_every_service_of_one_node_runs(one: DevStack) -> None:
    notes = one.run(*PHASES)
    venv = one.stack / 'data/venv'
    conf = one.root / 'etc/fastboot'
    for name, command, user in (
            ('builder', f'{venv}/bin/fastboot-builder --config-file '
                        f'{conf}/fastboot.conf', None),
            ('api', f'uwsgi --procname-prefix fastboot-api --ini '
                    f'{conf}/fastboot-uwsgi.ini --venv {venv}', None),
            ('agent', f'{venv}/bin/fastboot-agent --config-file '
                      f'{conf}/fastboot-agent.conf', 'root')):
        unit = f'devstack@fastboot-{name}.service'
        service = one.conf(f'etc/systemd/{unit}')['Service']
        assert service['ExecStart'].endswith(command)
        assert service['ExecStart'].startswith('/')
        if user:
            assert service['User'] == user
        assert f'systemctl start {unit}' in notes

    notes = one.run('unstack')
    for name in ('builder', 'api', 'agent'):
        assert f'systemctl stop devstack@fastboot-{name}.service' in notes


def test_unstack_and_clean_leave_nothing(one: DevStack) -> None:
    one.apparmor.write_text('  /srv/mine r,\n')
    before = one.apparmor.read_text()
    one.run(*PHASES)
    assert one.apparmor.read_text() != before
    one.run('unstack')
    assert not one.shim.is_symlink()
    one.run('clean')
    assert one.apparmor.read_text() == before
    assert not (one.root / 'etc/fastboot').exists()
    assert not list((one.root / 'etc/apache2').iterdir())
    assert not [path for path in (one.stack / 'data').iterdir()
                if 'fastboot' in path.name]


def test_all_of_it_can_be_repeated(one: DevStack) -> None:
    one.run(*PHASES)
    first = {path: path.read_text() for path in
             (one.root / 'etc/fastboot').iterdir()}
    left = one.stack / 'data/fastboot/host/mirror'
    left.mkdir(parents=True)
    one.run(*PHASES)
    start = 'start-time'  # uWSGI's, from DevStack
    for path, text in first.items():
        assert [line for line in path.read_text().splitlines()
                if start not in line] == [
            line for line in text.splitlines() if start not in line]
    assert one.apparmor.read_text().count('nbd.sock rw,') == 1
    # The repository is a new one, which an old mirror would refuse.
    assert not left.exists()


def test_other_import_plugins_stay(one: DevStack) -> None:
    path = one.root / 'etc/glance/glance-image-import.conf'
    path.write_text('[image_import_opts]\n'
                    "image_import_plugins = ['image_conversion']\n")
    one.run('stack post-config')
    one.run('stack post-config')
    assert one.conf('etc/glance/glance-image-import.conf')[
        'image_import_opts']['image_import_plugins'] == (
            '[image_conversion,fastboot]')


def test_a_second_node_gets_an_agent_only(
        source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    node = DevStack(tmp_path, source, services='n-cpu,q-agt',
                    extra='DATABASE_TYPE=mysql')
    notes = node.run(*PHASES)
    assert 'systemctl start devstack@fastboot-agent.service' in notes
    assert 'fastboot-builder' not in notes
    assert 'openstack service create' not in notes
    assert 'fastboot-manage' not in notes
    assert 'a2ensite' not in notes
    agent = node.conf('etc/fastboot/fastboot-agent.conf')
    assert agent['repository']['location'] == (
        'http://192.0.2.10/fastboot-repository')
    assert '192.0.2.10' in agent['DEFAULT']['transport_url']
    assert not (node.root / 'etc/fastboot/fastboot.conf').exists()
    assert node.shim.is_symlink()
    node.run('unstack', 'clean')
    assert not (node.root / 'etc/fastboot').exists()


def test_redis_is_installed_where_it_is_chosen(
        source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    node = DevStack(tmp_path, source, services='g-api,mysql,rabbit,key',
                    extra='FASTBOOT_JOBBOARD=redis')
    notes = node.run(*PHASES)
    assert 'redis-server' in notes
    assert node.conf('etc/fastboot/fastboot.conf')['jobboard'][
        'connection'] == 'redis://127.0.0.1:6379/0'
    # No nova-compute: Nova is left alone.
    assert not node.shim.is_symlink()
    assert 'fastboot' not in node.conf('etc/nova/nova.conf')


@pytest.mark.parametrize('services, extra, words', [
    ('g-api,mysql,rabbit', '', 'needs the service etcd3'),
    (ONE_NODE, 'FASTBOOT_JOBBOARD=tin', 'must be etcd or redis'),
])
def test_a_jobboard_that_cannot_be_stops_it(
        source: pathlib.Path, tmp_path: pathlib.Path, services: str,
        extra: str, words: str) -> None:
    node = DevStack(tmp_path, source, services=services, extra=extra)
    with pytest.raises(AssertionError, match=words):
        node.run('stack pre-install')


def test_a_service_can_be_left_out(
        source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    node = DevStack(tmp_path, source, services=ONE_NODE,
                    extra='disable_service fastboot-api')
    notes = node.run(*PHASES)
    assert 'fastboot-api' not in notes.replace('disable', '')
    assert 'systemctl start devstack@fastboot-builder.service' in notes
