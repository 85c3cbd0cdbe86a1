# SPDX-License-Identifier: Apache-2.0
"""The sandbox cloud for tests, and the removal of what they made in it.

``FASTBOOT_SANDBOX`` names the state directory (default: .state/sandbox). A
sandbox that is up and whole is used as it is; else one is brought up with
the options in ``FASTBOOT_SANDBOX_OPTIONS``, and down again in the end.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'sandbox'
STATE = pathlib.Path(os.environ.get('FASTBOOT_SANDBOX')
                     or ROOT / '.state' / 'sandbox').absolute()
sys.path.insert(0, str(ROOT / 'tools'))
sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_configure(config):
    config.addinivalue_line('markers', 'smoke: a path for every day')
    config.addinivalue_line('markers', 'slow: takes minutes')


class Tool:
    """The command ``tools/sandbox`` on one state directory."""

    def __call__(self, *words, check=True, seconds=900):
        """Run it; its output and status.

        With `check`, a failure fails the test.
        """
        done = subprocess.run([TOOL, '--state-dir', STATE,
                               *map(str, words)],
                              capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=seconds)
        if check and done.returncode:
            pytest.fail(f'sandbox {words}: {done.stdout}{done.stderr}')
        return done

    def up(self):
        """Bring it up as it was made, or as the environment says."""
        from cloud import layout
        if (STATE / 'options.json').exists():
            options = layout.load(STATE).options
            words = ['--hosts', options.hosts,
                     *(['--router'] if options.router else []),
                     *([] if options.fastboot else ['--no-fastboot']),
                     '--link-rate', options.link_rate]
        else:
            words = os.environ.get('FASTBOOT_SANDBOX_OPTIONS', '').split()
        return self('up', *words)

    def inside(self, node, *words, seconds=120):
        """What a command prints that runs in a node's namespaces."""
        return self('exec', node, *words, seconds=seconds).stdout


@pytest.fixture(scope='session')
def sandbox():
    """``tools/sandbox``; the sandbox is up."""
    pytest.importorskip('openstack')
    if os.geteuid():
        pytest.skip('needs root')
    tool = Tool()
    ours = tool('status', check=False).returncode != 0
    if ours:
        tool.up()
    yield tool
    if ours:
        tool('down')


@pytest.fixture(scope='session')
def layout(sandbox):
    """Where the sandbox has its things."""
    from cloud.layout import load
    return load(STATE)


@pytest.fixture(scope='session')
def user(layout):
    """The administrator of the sandbox, see ``cloud.user``."""
    from cloud.user import User
    return User(layout)


@pytest.fixture(scope='session')
def guest(tmp_path_factory):
    """The file of a Debian image with cloud-init and sshd, in qcow2."""
    file = tmp_path_factory.mktemp('guest') / 'guest.qcow2'
    subprocess.run([ROOT / 'tools' / 'guest-image', 'build', '--suite',
                    'bookworm', file], check=True, timeout=1800)
    yield file
    file.unlink()


class Clean:
    """Removes what it is given.

    :ivar directory: for files; gone in the end, too.
    """

    def __init__(self, stack, user, directory):
        self._stack = stack
        self._user = user
        self.directory = directory

    def image(self, image):
        """An image, by its id; returns that."""
        self._stack.callback(self._delete, image)
        return image

    def _delete(self, image):
        from openstack import exceptions
        remove = self._user.cloud.image.delete_image
        try:
            remove(image, ignore_missing=True)
        except exceptions.HttpException:
            # Glance answers 500 if a property is written meanwhile.
            time.sleep(2)
            remove(image, ignore_missing=True)

    def boot(self, boot):
        """What ``user.boot`` returned; returns that."""
        self._stack.callback(self._user.delete, boot.server)
        return boot


@pytest.fixture
def clean(user, tmp_path):
    """Servers and images given to it go with the test, latest first."""
    left = {server.id for server in user.cloud.compute.servers()}
    with contextlib.ExitStack() as stack:
        # Last of all: servers of failed boots, which nobody was given.
        stack.callback(lambda: user.delete(*(
            server for server in user.cloud.compute.servers()
            if server.id not in left)))
        yield Clean(stack, user, tmp_path)
