# SPDX-License-Identifier: Apache-2.0
"""Fixtures that start real neighbours."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest
from brokers import rabbitmq
from images import fast_directory

pytest.register_assert_rewrite('store_conformance')

#: nginx installs itself where users without root have no PATH.
_NGINX = shutil.which('nginx', path=f'{os.environ["PATH"]}:/usr/sbin')

_CONF = """
{user}
daemon off;
worker_processes 1;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 256; }}
http {{
  access_log access.log;
  client_body_temp_path body; proxy_temp_path proxy;
  fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server {{
    listen 127.0.0.1:{port} {tls};
    root {root};
    {extra}
  }}
}}
"""


def free_port():
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _wait_for(process, port, log):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0:
                return
        time.sleep(.02)
    pytest.fail(f'nginx does not answer: {log.read_text()}')


class Nginx:
    """A running nginx over the directory `root`.

    :ivar url: where it answers.
    :ivar prefix: its own directory, with ``access.log``.
    """

    def __init__(self, prefix, root, tls='', extra=''):
        self.prefix = prefix
        self.port = free_port()
        self.url = f'{"https" if tls else "http"}://127.0.0.1:{self.port}'
        # As root, its worker would else be a user who may not read objects.
        user = 'user root;' if os.geteuid() == 0 else ''
        (prefix / 'nginx.conf').write_text(_CONF.format(
            user=user, port=self.port, root=root, tls='ssl' if tls else '',
            extra=tls + extra))
        self.start()

    def start(self):
        log = self.prefix / 'error.log'
        self.process = subprocess.Popen(
            [_NGINX, '-p', str(self.prefix), '-c', 'nginx.conf', '-e',
             str(log)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_for(self.process, self.port, log)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


@contextlib.contextmanager
def _servers(tmp_path_factory):
    if _NGINX is None:
        pytest.skip('nginx is not installed')
    servers = []

    def start(root, tls='', extra=''):
        servers.append(Nginx(
            tmp_path_factory.mktemp('nginx'), pathlib.Path(root), tls, extra))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def nginx(tmp_path_factory):
    """Start nginx over a directory: ``nginx(root, tls='', extra='')``.

    `tls`: directives with the certificate, for HTTPS; `extra`: more
    directives of the server.
    """
    with _servers(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope='class')
def class_nginx(tmp_path_factory):
    """As `nginx`, for all tests of a class together."""
    with _servers(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope='session')
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: its file and its key's."""
    openssl = shutil.which('openssl')
    if openssl is None:
        pytest.skip('openssl is not installed')
    path = tmp_path_factory.mktemp('certificate')
    cert, key = path / 'cert.pem', path / 'key.pem'
    subprocess.run(
        [openssl, 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
         'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj',
         '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1',
         '-keyout', str(key), '-out', str(cert)],
        check=True, capture_output=True, timeout=60)
    return cert, key


@pytest.fixture
def room():
    """A directory that is as fast as there is one."""
    with fast_directory() as path:
        yield path


@pytest.fixture
def broker(tmp_path):
    """The address of a RabbitMQ."""
    with rabbitmq(tmp_path) as found:
        yield found
