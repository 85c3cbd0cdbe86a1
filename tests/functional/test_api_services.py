# SPDX-License-Identifier: Apache-2.0
"""The API under uWSGI behind a real Keystone, with a real redis, asked by the
real ``openstack`` client; and the commands of an operator."""

import configparser
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import time

import brokers
import identity
import pytest
import requests
from disks import BLOCK, disk, make_repository, put

from fastboot_glance import centre, jobs, records

pytest.importorskip('keystone')
pytest.importorskip('openstackclient')

ROOT = pathlib.Path(__file__).resolve().parents[2]
ONE = '11111111-1111-4111-8111-111111111111'
NEW = '33333333-3333-4333-8333-333333333333'
#: The newest migration: a release adds one without a word here.
TABLES = max(path.name[:4] for path in (
    ROOT / 'fastboot_glance/migrations/versions').glob('r*.py'))

_CONF = """
[DEFAULT]
state_dir = {path}
log_file = {path}/api.log
[database]
connection = sqlite:///{path}/fastboot.sqlite
[jobboard]
connection = {redis}
[keystone_authtoken]
www_authenticate_uri = {keystone}
auth_url = {keystone}
auth_type = password
username = fastboot
password = {password}
project_name = service
user_domain_id = default
project_domain_id = default
"""


def run(words, check=True, **environment):
    """A program of this environment, with the checkout's code."""
    found = subprocess.run(
        [identity.tool(words[0]), *words[1:]], capture_output=True,
        text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment})
    if check and found.returncode:
        pytest.fail(f'{words}: {found.stderr}')
    return found


def command(module, *words):
    """A console script of ours, without its wrapper."""
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c',
         f'import sys; from {module} import main; '
         f'sys.exit(main(sys.argv[1:]))', *words],
        capture_output=True, text=True, timeout=120, cwd=ROOT)


class Cloud:
    """All of it, and an ``openstack`` that knows our plugin."""

    def __init__(self, path, keystone, api, redis, conf):
        self.path = path
        self.keystone = keystone
        self.api = api
        self.redis = redis
        self.conf = conf
        self.records = records.Records(
            f'sqlite:///{path}/fastboot.sqlite')
        self.plugin = path / 'site'

    def openstack(self, *words, user='admin', project='admin', check=True):
        return run(['openstack', *words], check,
                   PYTHONPATH=f'{self.plugin}:{ROOT}',
                   PYTHONWARNINGS='ignore',
                   XDG_CACHE_HOME=str(self.path / 'cache'),
                   **identity.login(self.keystone.url, user, project))

    def rows(self, *words):
        return json.loads(self.openstack(*words, '-f', 'json').stdout)


def install_plugin(path):
    """Entry points as setup.cfg has them, as if fastboot were installed."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    info = path / 'fastboot_plugin-1.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: fastboot-plugin\nVersion: 1\n')
    (info / 'entry_points.txt').write_text(''.join(
        f'[{group}]\n{lines.strip()}\n'
        for group, lines in parser['entry_points'].items()))


@pytest.fixture(scope='module')
def cloud(tmp_path_factory):
    path = tmp_path_factory.mktemp('cloud')
    repository = make_repository(path / 'repository')
    put(repository, path / 'work', ONE, disk(20 * BLOCK, 'one'),
        boot=(1, 2, 3), visibility='private', owner='p1')
    for name in ('keystone', 'redis', 'etc'):
        (path / name).mkdir()
    install_plugin(path / 'site')
    with (identity.keystone(path / 'keystone') as keystone,
          brokers.redis(path / 'redis') as redis):
        conf = path / 'etc/fastboot.conf'
        conf.write_text(_CONF.format(
            path=path, redis=redis.url, keystone=keystone.url,
            password=identity.PASSWORD))
        done = command('fastboot_glance.cli.manage', '--config-file',
                       str(conf), 'db', 'sync')
        assert done.returncode == 0, done.stderr
        with identity.served(
                'fastboot_glance.wsgi.api', path, PYTHONPATH=str(ROOT),
                OS_FASTBOOT_CONFIG_DIR=str(conf.parent)) as api:
            found = Cloud(path, keystone, api, redis, conf)
            identity.register(keystone, api.url)
            yield found


def report(cloud, host, state, age=0):
    centre.Endpoint(cloud.records).report({}, {
        'host': host, 'version': 1, 'at': time.time() - age,
        'software': '1', 'volume_bytes': 1 << 30, 'mirror_bytes': 0,
        'free_bytes': 0,
        'images': [{'id': ONE, 'state': state, 'progress': .5}]})


def test_lists(cloud):
    report(cloud, 'h1', 'thawed')
    report(cloud, 'h2', 'transferring')
    row, = cloud.rows('fastboot', 'image', 'list')
    assert (row['ID'], row['State'], row['Version']) == (ONE, 'ready', 1)
    assert row['Hosts Ready'] == {'ready': 1, 'transferring': 1}
    assert '1/2' in cloud.openstack('fastboot', 'image', 'list').stdout
    shown = cloud.rows('fastboot', 'image', 'show', f'name of {ONE}')
    assert shown['hosts']['h2']['progress'] == .5
    one, two = cloud.rows('fastboot', 'host', 'list', '--long')
    assert (one['Name'], one['State'], one['Volumes']) == (
        'h1', 'up', 1 << 30)
    assert cloud.rows('fastboot', 'host', 'show', 'h1')['images'][ONE][
        'detail'] == 'thawed'


def test_build_reaches_the_jobboard(cloud):
    cloud.openstack('fastboot', 'image', 'refresh', ONE)
    from oslo_config import cfg

    from fastboot_common.conf import opts
    conf = opts.register(cfg.ConfigOpts())
    conf([], default_config_files=[str(cloud.conf)])
    board = jobs.Board(conf)
    try:
        job, = board.jobs()
        assert (job.image_id, job.force, job.reason) == (ONE, True, 'api')
    finally:
        board.close()
    row, = cloud.rows('fastboot', 'image', 'list')
    assert row['State'] == 'queued'
    # A builder answers, and whoever waits is told.
    cloud.records.note_build(ONE, state='ready', version=1)
    assert cloud.rows('fastboot', 'image', 'list')[0]['State'] == 'ready'


def test_jobboard_away(cloud):
    cloud.redis.stop()
    try:
        done = cloud.openstack('fastboot', 'image', 'refresh', ONE,
                               check=False)
        assert done.returncode != 0
        assert 'jobboard' in done.stderr
    finally:
        cloud.redis.start()
        cloud.redis.wait(lambda: brokers.answers(cloud.redis.port), 'redis')
    assert cloud.rows('fastboot', 'image', 'list')[0]['State'] == 'ready'


def test_who_may_not(cloud):
    done = cloud.openstack('fastboot', 'image', 'list', user='nobody',
                           project='other', check=False)
    assert done.returncode != 0
    assert '403' in done.stderr
    for headers in ({}, {'X-Auth-Token': 'made up'},
                    {'X-Identity-Status': 'Confirmed', 'X-Roles': 'admin'}):
        assert requests.get(f'{cloud.api.url}/v1/images', headers=headers,
                            timeout=30).status_code == 401
    assert requests.get(cloud.api.url, timeout=30).json()['versions']
    assert requests.get(f'{cloud.api.url}/healthcheck', timeout=30).ok


def test_error_names_its_request(cloud):
    done = cloud.openstack('fastboot', 'host', 'show', 'h9', check=False)
    assert done.returncode != 0
    assert 'h9 has never reported' in done.stderr
    assert 'req-' in done.stderr


def test_manage(cloud):
    def manage(*words):
        return command('fastboot_glance.cli.manage', '--config-file',
                       str(cloud.conf), *words)

    assert manage('db', 'sync').returncode == 0
    assert manage('db', 'version').stdout.strip() == TABLES
    with sqlite3.connect(cloud.path / 'fastboot.sqlite') as database:
        found = {row[0] for row in database.execute(
            'select name from sqlite_master')}
    assert {'builds', 'hosts', 'logbooks', 'flowdetails'} <= found
    assert (cloud.path / 'fastboot.sqlite').stat().st_mode & 0o7 == 0
    report(cloud, 'gone', 'ready')
    assert manage('host', 'forget', 'gone').returncode == 0
    done = manage('host', 'forget', 'gone')
    assert done.returncode == 1
    assert done.stderr.startswith('fastboot-manage: host gone')
    assert manage('db').returncode == 2


def test_status_of_the_centre(cloud, tmp_path):
    (tmp_path / 'glance-image-import.conf').write_text(
        f'[image_import_opts]\nimage_import_plugins = [fastboot]\n'
        f'[jobboard]\nconnection = {cloud.redis.url}\n')
    done = command(
        'fastboot_common.upgradecheck.status', '--config-file',
        str(cloud.conf), '--glance-config-dir', str(tmp_path), 'upgrade',
        'check', '--json')
    found = {row['check']: row for row in json.loads(done.stdout)['checks']}
    assert done.returncode == 1, done.stdout  # no message bus
    assert {name: row['result'] for name, row in found.items()
            if row['result']} == {'Message bus': 1}
    assert (found['Database']['details']
            == f'the tables have version {TABLES}')
    assert 'version 1 with 1 images' in found['Repository']['details']
    assert 'image_import_plugins' in found['Import plugin in Glance'][
        'details']
    for name in ('Driver in Nova', 'Volumes', 'Export'):
        assert found[name]['details'].startswith('Skipped')
