# SPDX-License-Identifier: Apache-2.0
"""More neighbours of the centre, each real and private: MariaDB, Keystone,
and whatever is served by uWSGI.

As in ``brokers``: context managers that take an empty directory.
"""

import contextlib
import os
import pathlib
import subprocess
import sys

import brokers
import pytest

PASSWORD = 'secret'
_BIN = pathlib.Path(sys.executable).parent

_KEYSTONE = """
[DEFAULT]
log_file = {path}/keystone.log
[database]
connection = sqlite:///{path}/keystone.sqlite?timeout=60
sqlite_synchronous = false
[token]
provider = fernet
[fernet_tokens]
key_repository = {path}/fernet
[credential]
key_repository = {path}/credential
"""


def tool(name):
    """A program of the Python environment; the test is skipped if there is
    none."""
    if not (_BIN / name).exists():
        pytest.skip(f'{name} is not installed')
    return str(_BIN / name)


@contextlib.contextmanager
def mariadb(path):
    """A server on a socket, and the URL of its database ``fastboot``."""
    server = brokers.program('mariadbd')
    user = ['--user=root'] if os.geteuid() == 0 else []
    subprocess.run(
        [brokers.program('mariadb-install-db'), '--no-defaults', *user,
         f'--datadir={path}/data', '--skip-test-db',
         '--auth-root-authentication-method=normal'],
        check=True, capture_output=True, timeout=120)
    socket = path / 'sql.sock'
    with brokers.running(
            [server, '--no-defaults', *user, f'--datadir={path}/data',
             f'--socket={socket}', '--skip-networking',
             f'--pid-file={path}/sql.pid', '--innodb-buffer-pool-size=32M'],
            path / 'mariadb.log') as found:
        found.wait(socket.exists, 'mariadb')
        import pymysql
        with contextlib.closing(pymysql.connect(
                unix_socket=str(socket), user='root')) as connection:
            connection.cursor().execute(
                'create database fastboot character set utf8mb3')
        found.url = (f'mysql+pymysql://root@localhost/fastboot'
                     f'?unix_socket={socket}&charset=utf8')
        yield found


@contextlib.contextmanager
def served(module, path, port=None, **environment):
    """A WSGI application under uWSGI, on a free port."""
    port = port or brokers.free_port()
    with brokers.running(
            [tool('uwsgi'), '--http-socket', f'127.0.0.1:{port}', '--module',
             f'{module}:application', '--need-app', '--die-on-term',
             '--master', '--processes', '1', '--enable-threads', '--threads',
             '4', '--buffer-size', '65535', '--no-orphans',
             # Else clients would use connections again that it closes.
             '--add-header', 'Connection: close'],
            path / f'{module}.uwsgi.log',
            env={**os.environ, **environment}) as found:
        found.wait(lambda: brokers.answers(port), module)
        found.url = f'http://127.0.0.1:{port}'
        found.port = port
        yield found


@contextlib.contextmanager
def keystone(path):
    """Keystone with an administrator ``admin``."""
    (path / 'keystone.conf').write_text(_KEYSTONE.format(path=path))
    for name in ('fernet', 'credential'):
        (path / name).mkdir(mode=0o700)
    port = brokers.free_port()
    manage = [tool('keystone-manage'), '--config-file',
              str(path / 'keystone.conf')]
    for words in (
            ['db_sync'],
            ['fernet_setup', '--keystone-user', 'root', '--keystone-group',
             'root'],
            ['credential_setup', '--keystone-user', 'root',
             '--keystone-group', 'root'],
            ['bootstrap', '--bootstrap-password', PASSWORD,
             '--bootstrap-region-id', 'RegionOne',
             *(word for interface in ('public', 'internal') for word in (
                 f'--bootstrap-{interface}-url',
                 f'http://127.0.0.1:{port}/v3'))]):
        subprocess.run([*manage, *words], check=True, capture_output=True,
                       timeout=120)
    with served('keystone.wsgi.api', path, port,
                OS_KEYSTONE_CONFIG_DIR=str(path)) as found:
        yield found


def register(keystone, url):
    """An account of the service and its endpoint, and a user without
    rights: ``nobody`` of project ``other``."""
    import openstack
    with openstack.connect(
            load_yaml_config=False, load_envvars=False,
            auth_url=f'{keystone.url}/v3', username='admin',
            password=PASSWORD, project_name='admin',
            user_domain_id='default', project_domain_id='default',
            region_name='RegionOne') as cloud:
        for name, project, role in (('fastboot', 'service', 'admin'),
                                    ('nobody', 'other', 'member')):
            owner = cloud.identity.create_project(
                name=project, domain_id='default')
            user = cloud.identity.create_user(
                name=name, password=PASSWORD, domain_id='default')
            cloud.identity.assign_project_role_to_user(
                owner, user, cloud.identity.find_role(role))
        service = cloud.identity.create_service(
            name='fastboot', type='fastboot')
        cloud.identity.create_endpoint(
            service_id=service.id, interface='public', url=url,
            region_id='RegionOne')


def login(url, user='admin', project='admin'):
    """Environment of the command line client."""
    return {
        'OS_AUTH_URL': f'{url}/v3', 'OS_USERNAME': user,
        'OS_PASSWORD': PASSWORD, 'OS_PROJECT_NAME': project,
        'OS_USER_DOMAIN_ID': 'default', 'OS_PROJECT_DOMAIN_ID': 'default',
        'OS_IDENTITY_API_VERSION': '3', 'OS_REGION_NAME': 'RegionOne',
    }
