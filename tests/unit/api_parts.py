# SPDX-License-Identifier: Apache-2.0
"""A whole API over a real repository and database, without the network."""

import time

import webob
from disks import BLOCK, disk, make_repository, put
from oslo_config import cfg

from fastboot_common import exception
from fastboot_common.conf import api, database, opts
from fastboot_glance import centre, records
from fastboot_glance.api import app

ONE = '11111111-1111-4111-8111-111111111111'
TWO = '22222222-2222-4222-8222-222222222222'
NEW = '33333333-3333-4333-8333-333333333333'


def configuration(path, policy=''):
    """A configuration whose places are below `path`."""
    conf = opts.register(cfg.ConfigOpts())
    for module in (api, database):
        conf.register_opts(module.OPTS, group=module.GROUP)
    (path / 'policy.yaml').write_text(policy)
    (path / 'fastboot.conf').write_text(f"""
[DEFAULT]
state_dir = {path}
[api]
auth_strategy = noauth
max_limit = 50
[database]
connection = sqlite:///{path}/records.db
[oslo_policy]
policy_file = {path}/policy.yaml
""")
    conf([], project='fastboot',
         default_config_files=[str(path / 'fastboot.conf')])
    return conf


class FakeBoard:
    """Remembers what was posted."""

    def __init__(self):
        self.posted = []
        self.error = None

    def post(self, image_id, reason, force=False):
        if self.error:
            raise self.error
        self.posted.append((image_id, reason, force))


class FakeAgents:
    """Remembers who was told what."""

    def __init__(self):
        self.told = []

    def sync(self, host, images):
        self.told.append((host, images))


class Centre:
    """API, repository with images ONE and TWO, and records."""

    def __init__(self, path, policy=''):
        self.repo = make_repository(path / 'repository')
        for image_id, owner in ((ONE, 'p1'), (TWO, 'p2')):
            self.publish(path, image_id, owner)
        self.conf = configuration(path, policy)
        self.records = records.Records(self.conf.database.connection)
        self.records.create()
        self.app = app.deploy(self.conf)
        self.board, self.agents = FakeBoard(), FakeAgents()

    def publish(self, path, image_id, owner):
        put(self.repo, path / 'work', image_id, disk(20 * BLOCK, image_id),
            boot=(1, 2, 3), visibility='private', owner=owner)

    def report(self, host, images, age=0.0, **more):
        """Take a host's report as the endpoint does."""
        state = self.repo.state()
        centre.Endpoint(self.records).report({}, {
            'host': host, 'version': state.version,
            'at': time.time() - age, 'software': '1.0',
            'volume_bytes': 1 << 30, 'mirror_bytes': 1 << 20,
            'free_bytes': 1 << 40,
            'images': [
                {'id': key, 'state': value, 'progress': 0.25, 'error': '',
                 'serial': state.images[key].serial
                 if key in state.images else 1}
                if isinstance(value, str) else {'id': key, **value}
                for key, value in images.items()], **more})

    def __call__(self, path, method='GET', body=None, **headers):
        """Status and JSON of a request."""
        response = self.raw(path, method, body, **headers)
        return response.status_int, response.json

    def raw(self, path, method='GET', body=None, **headers):
        request = webob.Request.blank(path, method=method)
        request.headers.update({
            key.replace('_', '-'): value for key, value in headers.items()})
        if isinstance(body, bytes):
            request.body = body
        elif body is not None:
            request.json = body
        return request.get_response(self.app)


def make_centre(path, monkeypatch, policy=''):
    """A centre whose jobboard and bus are the fakes."""
    found = Centre(path, policy)
    monkeypatch.setattr(
        'fastboot_glance.api.parts.Parts._board', found.board)
    monkeypatch.setattr(
        'fastboot_glance.api.parts.Parts._agents', found.agents)
    return found


UNREACHABLE = exception.Unavailable('the jobboard does not answer')
