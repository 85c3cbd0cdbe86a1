# SPDX-License-Identifier: Apache-2.0
"""A real ``fastboot-agent`` as a process of its own, and what calls it."""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

needs_nbdkit = pytest.mark.skipif(
    shutil.which('nbdkit') is None, reason='nbdkit is not installed')


def wait_for(question, seconds=60):
    """The first answer that is true; it fails if none comes."""
    deadline = time.monotonic() + seconds
    while True:
        found = question()
        if found:
            return found
        assert time.monotonic() < deadline, f'never true: {found}'
        time.sleep(0.02)


class Line(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path, seconds=30):
        super().__init__('localhost', timeout=seconds)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self.path))


def call(path, method, url, body=None, seconds=30):
    """One call: status and answer."""
    line = Line(path, seconds)
    try:
        line.request(method, url, None if body is None else json.dumps(body))
        answer = line.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        line.close()


class Agent:
    """The process, on one state directory.

    :param location: of the repository.
    :param options: lines of the configuration, by group.
    """

    def __init__(self, state, location, **options):
        self.state = state
        self.config = state / 'fastboot.conf'
        self.log = state / 'agent.log'
        self.process = None
        state.mkdir(exist_ok=True)
        self.configure(location, **options)

    def configure(self, location, **options):
        groups = {
            'DEFAULT': {'state_dir': self.state},
            'repository': {'location': location, 'timeout': 2, 'retries': 1},
            'host': {'path': self.state / 'host', 'volume_size': 128 << 30},
            'export': {'wait': 20},
            'agent': {'messaging': False, 'jitter': 0, 'interval': 1,
                      'min_free': 1 << 20, 'resume_guests': False,
                      'libvirt_uri': 'test:///default',
                      'hydrate': 'never', 'acquire_wait': 20,
                      'lease_interval': 1}}
        for group, values in options.items():
            groups.setdefault(group, {}).update(values)
        self.config.write_text('\n'.join(
            line for group, values in groups.items()
            for line in [f'[{group}]', *(
                f'{key} = {value}' for key, value in values.items())]))

    @property
    def socket(self):
        return self.state / 'run' / 'agent.sock'

    @property
    def nbd(self):
        return self.state / 'run' / 'nbd.sock'

    def start(self, wait=True, **environment):
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'fastboot_nova.agent.service',
                 '--config-file', self.config], stdout=log, stderr=log,
                env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
                cwd=self.state)
        if wait:
            wait_for(lambda: self.process.poll() is not None
                     or self.status().get('export'))
            assert self.process.poll() is None, self.words()
        return self

    def words(self):
        return self.log.read_text()

    def status(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return call(self.socket, 'GET', '/v1/status')[1]
        return {}

    def call(self, verb, seconds=30, **body):
        return call(self.socket, 'POST', f'/v1/{verb}', body, seconds)

    def acquire(self, image, file, **options):
        return self.call('acquire', image=image, holder='nova',
                         file=str(file), **options)

    def image(self, image_id):
        status, row = call(self.socket, 'GET', f'/v1/images/{image_id}')
        return row if status == 200 else {}

    def await_state(self, image_id, *states):
        return wait_for(lambda: self.image(image_id).get('state') in states
                        and self.image(image_id))

    def pids(self):
        said = {path.stem: path.read_text() for path
                in (self.state / 'run').glob('*.pid')}
        return {name: int(pid) for name, pid in said.items() if pid}

    def kill(self):
        self.process.kill()
        self.process.wait(20)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(40) == 0, self.words()

    def clean(self):
        """End all that there is."""
        if self.process and self.process.poll() is None:
            self.kill()
        for pid in self.pids().values():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # Nobody else's that got the number.
                if b'nbdkit' in pathlib.Path(
                        f'/proc/{pid}/cmdline').read_bytes():
                    os.kill(pid, signal.SIGKILL)
