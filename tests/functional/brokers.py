# SPDX-License-Identifier: Apache-2.0
"""The builders' neighbours, each real and private: redis, RabbitMQ, etcd,
ZooKeeper, MariaDB and a Glance API without Keystone.

Every one is a context manager that takes an empty directory. Ports are free
ones on loopback; nothing is left behind.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

SECONDS = 60
_RABBIT = pathlib.Path('/usr/lib/rabbitmq/bin')
_ZOOKEEPER = [
    pathlib.Path('/usr/share/java', f'{name}.jar') for name in (
        'zookeeper', 'zookeeper-jute', 'slf4j-api', 'slf4j-simple',
        'netty-handler', 'netty-transport', 'netty-buffer', 'netty-common',
        'netty-codec', 'netty-resolver', 'netty-transport-native-epoll',
        'netty-transport-native-unix-common', 'snappy-java', 'metrics-core',
        'commons-cli', 'jline2')]


def free_port():
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def program(name, path=None):
    """The path of a program; the test is skipped if there is none."""
    found = shutil.which(name, path=path or f'{os.environ["PATH"]}:/usr/sbin')
    if found is None:
        pytest.skip(f'{name} is not installed')
    return found


def wait_for(answer, what, seconds=SECONDS, process=None, log=None):
    """Call `answer` until it is true, and return what it says."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = answer()
        if found:
            return found
        if process is not None and process.poll() is not None:
            break
        time.sleep(.05)
    words = log.read_text(errors='replace')[-3000:] if log else ''
    pytest.fail(f'{what}: not within {seconds} s: {words}')


def answers(port):
    """Whether something listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) == 0


class Process:
    """A program in a session of its own, with its log.

    :ivar url: where it can be reached, if it is a server.
    """

    url = None

    def __init__(self, command, log, **options):
        self.log = log
        self._command = command
        self._options = options
        self.start()

    def start(self):
        with self.log.open('ab') as words:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=words,
                stderr=words, start_new_session=True, **self._options)

    def wait(self, answer, what):
        wait_for(answer, what, process=self.process, log=self.log)

    def stop(self, number=signal.SIGTERM, seconds=30, group=True):
        """Stop the program and all that it started.

        :param group: what it started gets the signal, too.
        """
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(seconds)

    def kill(self):
        """Kill the program alone, as a crash would."""
        self.process.kill()
        self.process.wait(30)

    def freeze(self):
        """Let it hang: it listens and does not answer."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self):
        os.killpg(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(command, log, **options):
    """A program that is stopped at the end."""
    found = Process(command, log, **options)
    try:
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            found.thaw()
        found.stop()


@contextlib.contextmanager
def redis(path):
    port = free_port()
    with running([program('redis-server'), '--port', str(port), '--bind',
                  '127.0.0.1', '--save', '', '--dir', str(path)],
                 path / 'redis.log') as found:
        found.wait(lambda: answers(port), 'redis')
        found.url = f'redis://127.0.0.1:{port}/0'
        found.port = port
        yield found


@contextlib.contextmanager
def etcd(path):
    port, peer = free_port(), free_port()
    with running([
            program('etcd'), '--data-dir', str(path / 'data'),
            '--listen-client-urls', f'http://127.0.0.1:{port}',
            '--advertise-client-urls', f'http://127.0.0.1:{port}',
            '--listen-peer-urls', f'http://127.0.0.1:{peer}',
            '--initial-advertise-peer-urls', f'http://127.0.0.1:{peer}',
            '--initial-cluster', f'default=http://127.0.0.1:{peer}',
    ], path / 'etcd.log') as found:
        def healthy():
            with contextlib.suppress(requests.RequestException):
                return requests.get(f'http://127.0.0.1:{port}/health',
                                    timeout=2).ok
            return False

        found.wait(healthy, 'etcd')
        found.url = f'etcd://127.0.0.1:{port}'
        yield found


@contextlib.contextmanager
def zookeeper(path):
    java = program('java')
    if not _ZOOKEEPER[0].exists():
        pytest.skip('zookeeper is not installed')
    port = free_port()
    (path / 'zoo.cfg').write_text(
        f'tickTime=500\ndataDir={path / "data"}\n'
        f'clientPort={port}\nclientPortAddress=127.0.0.1\n'
        f'admin.enableServer=false\n')
    jars = ':'.join(str(jar) for jar in _ZOOKEEPER if jar.exists())
    with running([java, '-Xmx128m', '-cp', jars,
                  'org.apache.zookeeper.server.quorum.QuorumPeerMain',
                  str(path / 'zoo.cfg')], path / 'zookeeper.log') as found:
        found.wait(lambda: answers(port), 'zookeeper')
        found.url = f'zookeeper://127.0.0.1:{port}'
        yield found


@contextlib.contextmanager
def rabbitmq(path):
    if not (_RABBIT / 'rabbitmq-server').exists():
        pytest.skip('rabbitmq-server is not installed')
    program('epmd')
    port, epmd, dist = free_port(), free_port(), free_port()
    name = f'fastboot{port}@localhost'
    env = {
        'PATH': os.environ['PATH'], 'HOME': str(path), 'LC_ALL': 'C.UTF-8',
        'ERL_EPMD_PORT': str(epmd), 'ERL_EPMD_ADDRESS': '127.0.0.1',
        'RABBITMQ_NODENAME': name, 'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1',
        'RABBITMQ_NODE_PORT': str(port), 'RABBITMQ_DIST_PORT': str(dist),
        'RABBITMQ_MNESIA_BASE': str(path / 'mnesia'),
        'RABBITMQ_LOG_BASE': str(path / 'log'),
        'RABBITMQ_CONFIG_FILE': str(path / 'none'),
        'RABBITMQ_CONF_ENV_FILE': str(path / 'none-env'),
        'RABBITMQ_ENABLED_PLUGINS_FILE': str(path / 'plugins'),
        # As many schedulers as a small machine can bear.
        'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '+S 2:2 +sbwt none',
    }
    with running(['epmd', '-address', '127.0.0.1', '-port', str(epmd)],
                 path / 'epmd.log', env=env):
        with running([str(_RABBIT / 'rabbitmq-server')], path / 'rabbit.log',
                     env=env) as found:
            found.wait(lambda: answers(port), 'rabbitmq')
            subprocess.run(
                [str(_RABBIT / 'rabbitmqctl'), '-q', 'await_startup'],
                env=env, check=True, capture_output=True, timeout=SECONDS)
            found.url = f'rabbit://guest:guest@127.0.0.1:{port}/'
            yield found


@contextlib.contextmanager
def mariadb(path):
    """A MariaDB; its URLs are made by :meth:`database`."""
    server = program('mariadbd')
    port = free_port()
    data = path / 'data'
    subprocess.run(
        [program('mariadb-install-db'), '--no-defaults', f'--datadir={data}',
         '--auth-root-authentication-method=normal', '--skip-test-db',
         '--user=root'], check=True, capture_output=True, timeout=120)
    with running([
            server, '--no-defaults', '--user=root', f'--datadir={data}',
            f'--socket={path}/sock', f'--port={port}',
            '--bind-address=127.0.0.1', '--innodb-buffer-pool-size=64M',
            '--innodb-flush-log-at-trx-commit=0', '--skip-log-bin',
            '--character-set-server=utf8mb4',
    ], path / 'mariadb.log') as found:
        def client(statement):
            return subprocess.run(
                [program('mariadb'), '--no-defaults', '-uroot',
                 f'--socket={path}/sock', '-e', statement],
                capture_output=True, timeout=60).returncode == 0

        def database(name):
            assert client(f'CREATE DATABASE {name}')
            return (f'mysql+pymysql://test:test@127.0.0.1:{port}/{name}'
                    f'?charset=utf8mb4')

        found.wait(lambda: client('SELECT 1'), 'mariadb')
        assert client("CREATE USER test@'127.0.0.1' IDENTIFIED BY 'test'; "
                      "GRANT ALL ON *.* TO test@'127.0.0.1'")
        found.database = database
        found.client = client
        yield found


_GLANCE = """
[DEFAULT]
debug = true
log_file = {path}/glance.log
transport_url = {bus}
enabled_backends = fs:file
enabled_import_methods = [glance-direct]
node_staging_uri = file://{path}/staging
worker_self_reference_url = {url}
property_protection_file = {path}/protections.conf
[database]
connection = {database}
[glance_store]
default_backend = fs
[fs]
filesystem_store_datadir = {path}/images
[os_glance_staging_store]
filesystem_store_datadir = {path}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {path}/tasks
[paste_deploy]
config_file = {path}/paste.ini
[oslo_policy]
policy_file = {path}/policy.yaml
enforce_scope = false
enforce_new_defaults = false
[oslo_messaging_notifications]
driver = {driver}
[oslo_concurrency]
lock_path = {path}/lock
[image_format]
require_image_format_match = {match}
"""
_PASTE = """
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[composite:api]
paste.composite_factory = glance.api:pipeline_factory
default = versionnegotiation everybody rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = {negotiation}
[filter:everybody]
paste.filter_factory = brokers:everybody
"""
# As doc/source/admin/openstack.rst has it.
_PROTECTIONS = """
[^fastboot_.*]
create = admin
read = admin
update = admin
delete = admin
[.*]
create = @
read = @
update = @
delete = @
"""
_NEGOTIATION = ('glance.api.middleware.version_negotiation:'
                'VersionNegotiationFilter.factory')


def everybody(global_conf, **local_conf):
    """A filter for Glance's pipeline: who names no roles administers."""
    from glance import context
    from glance.common import wsgi

    class Everybody(wsgi.Middleware):
        def process_request(self, request):
            roles = request.headers.get('X-Roles', 'admin').split(',')
            request.context = context.RequestContext(
                user_id='tester', project_id='test', roles=roles,
                is_admin='admin' in roles)

    return Everybody


class Glance:
    """A client of the running Glance, no more than tests need."""

    def __init__(self, url, process, path, sql):
        self.url = url
        self.process = process
        self.path = path
        self._sql = sql

    def call(self, method, path, **options):
        answer = requests.request(method, f'{self.url}/v2/images{path}',
                                  timeout=60, **options)
        assert answer.ok, f'{method} {path}: {answer.status_code} ' \
                          f'{answer.text[:500]}'
        return answer

    def create(self, name, **values):
        return self.call('POST', '', json={
            'name': name, 'disk_format': 'raw', 'container_format': 'bare',
            'visibility': 'public', **values}).json()['id']

    def upload(self, image_id, file):
        with pathlib.Path(file).open('rb') as data:
            self.call('PUT', f'/{image_id}/file', data=data, headers={
                'Content-Type': 'application/octet-stream'})

    def stage(self, image_id, file):
        with pathlib.Path(file).open('rb') as data:
            self.call('PUT', f'/{image_id}/stage', data=data, headers={
                'Content-Type': 'application/octet-stream'})

    def import_staged(self, image_id):
        self.call('POST', f'/{image_id}/import',
                  json={'method': {'name': 'glance-direct'}})

    def make(self, name, file, **values):
        """Create and upload an image; its id."""
        image_id = self.create(name, **values)
        self.upload(image_id, file)
        return image_id

    def show(self, image_id):
        return self.call('GET', f'/{image_id}').json()

    def patch(self, image_id, *changes):
        self.call('PATCH', f'/{image_id}', json=list(changes), headers={
            'Content-Type': 'application/openstack-images-v2.1-json-patch'})

    def delete(self, image_id):
        self.call('DELETE', f'/{image_id}')

    def smuggle(self, name, file, **values):
        """An image that Glance itself would refuse; its id."""
        image_id = self.make(name, __file__, **values)
        data = pathlib.Path(file).read_bytes()
        self.data_file(image_id).write_bytes(data)
        assert self._sql.client(
            f"UPDATE glance.images SET size = {len(data)}, os_hash_value = "
            f"'{hashlib.sha512(data).hexdigest()}' WHERE id = '{image_id}'")
        return image_id

    def data_file(self, image_id):
        """Where the store keeps an image."""
        return self.path / 'images' / image_id


@contextlib.contextmanager
def glance(path, sql, bus=None, plugins=None, match='true', python_path=''):
    """A Glance API that lets everybody do everything.

    :param sql: a MariaDB, where it makes a database of its own.
    :param bus: transport URL for notifications; None: none are sent.
    :param plugins: text of ``glance-image-import.conf``.
    """
    uwsgi = pathlib.Path(sys.executable).with_name('uwsgi')
    if not uwsgi.exists():
        pytest.skip('uwsgi is not installed beside python')
    port = free_port()
    url = f'http://127.0.0.1:{port}'
    for name in ('images', 'staging', 'tasks'):
        (path / name).mkdir(exist_ok=True)
    (path / 'glance-api.conf').write_text(_GLANCE.format(
        path=path, bus=bus or 'fake://', url=url, match=match,
        database=sql.database('glance'),
        driver='messagingv2' if bus else 'noop'))
    (path / 'paste.ini').write_text(_PASTE.format(
        negotiation=_NEGOTIATION))
    (path / 'protections.conf').write_text(_PROTECTIONS)
    (path / 'policy.yaml').write_text('"default": "@"\n' + ''.join(
        f'"{name}": "@"\n' for name in _policies()))
    if plugins:
        (path / 'glance-image-import.conf').write_text(plugins)
    # uWSGI puts no directory of its own in sys.path.
    env = {**os.environ, 'OS_GLANCE_CONFIG_DIR': str(path),
           'PYTHONPATH': f'{pathlib.Path(__file__).parent}:{python_path}'}
    subprocess.run(
        [sys.executable, '-c', 'import sys\n'
         'from glance.cmd.manage import main\n'
         'sys.argv = ["glance-manage", "--config-file", '
         f'"{path}/glance-api.conf", "db_sync"]\nmain()'],
        env=env, check=True, capture_output=True, timeout=120)
    with running([
            str(uwsgi), '--http-socket', f'127.0.0.1:{port}', '--module',
            'glance.wsgi.api:application', '--processes', '1', '--threads',
            '4', '--enable-threads', '--need-app', '--die-on-term',
            '--buffer-size', '65535', '--http-chunked-input',
            '--chunked-input-limit', '16777216', '--disable-logging',
            '--add-header', 'Connection: close',
            '-H', sys.prefix], path / 'uwsgi.log', env=env) as process:
        process.wait(lambda: answers(port) and requests.get(
            f'{url}/v2/images', timeout=30).ok, 'glance')
        yield Glance(url, process, path, sql)


def _policies():
    from glance import policies

    return [rule.name for rule in policies.list_rules()
            if rule.name != 'default']
