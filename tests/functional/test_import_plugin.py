# SPDX-License-Identifier: Apache-2.0
"""The import plugin, alone and in a real Glance, with everything broken."""

import os
import pathlib
import time

import brokers
import centre_stack
import pytest
from oslo_config import cfg

pytest.importorskip('glance')
pytest.importorskip('taskflow')

from taskflow import engines
from taskflow.patterns import linear_flow

from fastboot_common.conf import jobboard
from fastboot_glance import import_plugin, jobs

CONF = """
[image_import_opts]
image_import_plugins = [fastboot]
[jobboard]
connection = {url}
namespace = {namespace}
timeout = 2
{more}
"""
_ENTRY = """[glance.image_import.plugins]
fastboot = fastboot_glance.import_plugin:get_flow
"""


def configuration(url, namespace='test'):
    conf = cfg.ConfigOpts()
    conf.register_opts(jobboard.OPTS, group=jobboard.GROUP)
    conf([], default_config_files=[])
    for name, value in {'connection': url, 'namespace': namespace,
                        'timeout': 2}.items():
        conf.set_override(name, value, group=jobboard.GROUP)
    return conf


def run(record_property, image_id):
    """Run the flow as Glance does; its milliseconds are a property."""
    engines.run(linear_flow.Flow('warm-up'))
    begun = time.monotonic()
    flow = import_plugin.get_flow(task_id='t', image_id=image_id,
                                  context=None, backend=['fs'])
    engines.run(flow)
    taken = 1000 * (time.monotonic() - begun)
    record_property('milliseconds', round(taken, 1))
    print(f'import plugin: {taken:.1f} ms')


@pytest.fixture
def redis(tmp_path):
    with brokers.redis(tmp_path) as found:
        yield found


@pytest.mark.parametrize('state', ['up', 'hangs', 'down'])
def test_posts_sooner_or_later(redis, state, record_property, monkeypatch):
    conf = configuration(redis.url)
    monkeypatch.setattr(import_plugin, '_POSTER', import_plugin.Poster(conf))
    if state == 'hangs':
        redis.freeze()
    elif state == 'down':
        redis.kill()
    for number in range(3):
        run(record_property, f'image-{number}')
    # It returned while nobody answered.
    if state == 'hangs':
        redis.thaw()
    elif state == 'down':
        redis.start()
    board = jobs.Board(conf)

    def posted():
        try:
            return {job.image_id for job in board.jobs()} == {
                'image-0', 'image-1', 'image-2'}
        except Exception:
            return False

    brokers.wait_for(posted, 'the jobs', 60)
    board.close()


@pytest.mark.parametrize('url', ['', 'nonsense', 'etcd://', 'redis://x:y/'])
def test_broken_configuration(url, record_property, monkeypatch, caplog):
    monkeypatch.setattr(import_plugin, '_POSTER',
                        import_plugin.Poster(configuration(url)))
    run(record_property, 'image')
    brokers.wait_for(lambda: 'no job for image image' in caplog.text,
                     'words in the log')


def test_what_does_not_fit_is_dropped(record_property, monkeypatch, caplog):
    poster = import_plugin.Poster(configuration(
        f'redis://127.0.0.1:{brokers.free_port()}/0'))
    monkeypatch.setattr(import_plugin, '_POSTER', poster)
    for number in range(import_plugin._WAITING + 2):
        poster.put(f'image-{number}')
    run(record_property, 'last')
    assert 'no job for image last' in caplog.text


def test_nothing_else_can_fail_an_import(monkeypatch):
    def broken(image_id):
        raise RuntimeError('no threads left')

    poster = import_plugin.Poster(None)
    monkeypatch.setattr(poster, 'put', broken)
    monkeypatch.setattr(import_plugin, '_POSTER', poster)
    engines.run(import_plugin.get_flow(task_id='t', image_id='image'))


@pytest.fixture(scope='module')
def sql(tmp_path_factory):
    with brokers.mariadb(tmp_path_factory.mktemp('sql')) as found:
        yield found


def start_glance(path, sql, url, more=''):
    """A Glance that sees the plugin as if it were installed."""
    site = path / 'site' / 'fastboot_test-0.dist-info'
    site.mkdir(parents=True)
    (site / 'METADATA').write_text('Metadata-Version: 2.1\n'
                                   'Name: fastboot-test\nVersion: 0\n')
    (site / 'entry_points.txt').write_text(_ENTRY)
    sql.client('DROP DATABASE IF EXISTS glance')
    return brokers.glance(
        path, sql, plugins=CONF.format(url=url, namespace='test', more=more),
        python_path=f'{site.parent}:{centre_stack.ROOT}')


def wait_active(glance, image_id):
    brokers.wait_for(lambda: glance.show(image_id)['status'] == 'active',
                     f'image {image_id} active', 60)


def import_image(glance, file):
    image_id = glance.create('tiny')
    glance.stage(image_id, file)
    glance.import_staged(image_id)
    return image_id


def test_in_glance(tmp_path, sql, redis):
    """Imports while redis is up, hangs, is down, and up again."""
    disk = centre_stack.bootable(tmp_path / 'disk')
    path = tmp_path / 'glance'
    path.mkdir()
    board = jobs.Board(configuration(redis.url))
    with start_glance(path, sql, redis.url) as glance:
        up = import_image(glance, disk)
        wait_active(glance, up)
        brokers.wait_for(lambda: {job.image_id for job in board.jobs()} == {
            up}, 'a job')
        redis.freeze()
        hanging = import_image(glance, disk)
        wait_active(glance, hanging)
        redis.thaw()
        redis.kill()
        down = import_image(glance, disk)
        wait_active(glance, down)
        redis.start()
        brokers.wait_for(lambda: answers(board) >= {down}, 'the jobs', 90)
        shown = glance.show(down)
        assert not [key for key in shown if key.startswith('fastboot')]
    board.close()


def answers(board):
    try:
        return {job.image_id for job in board.jobs()}
    except Exception:
        return set()


@pytest.mark.parametrize('more', [
    'claim_seconds = nonsense', 'connection = nonsense://'])
def test_in_glance_with_a_broken_configuration(tmp_path, sql, more):
    disk = centre_stack.bootable(tmp_path / 'disk')
    path = tmp_path / 'glance'
    path.mkdir()
    with start_glance(path, sql, 'redis://127.0.0.1:1/0', more) as glance:
        image_id = import_image(glance, disk)
        wait_active(glance, image_id)
        log = path / 'glance.log'
        brokers.wait_for(
            lambda: f'no job for image {image_id}' in log.read_text(),
            'words in the log')


def test_imports_nothing_that_may_be_missing():
    """Glance imports it for each image: what it needs, Glance has."""
    names = {line.split()[1].partition('.')[0] for line in pathlib.Path(
        import_plugin.__file__).read_text().splitlines()
        if line.startswith(('import ', 'from '))}
    assert names <= {'logging', 'queue', 'threading', 'typing',
                     'oslo_config', 'taskflow'}
    assert os.path.basename(import_plugin.__file__) == 'import_plugin.py'
