# SPDX-License-Identifier: Apache-2.0
"""A whole centre for tests: Glance, its bus, a jobboard, a repository and
builders as processes of their own.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import struct
import sys
import uuid

import bootsector
import brokers
from oslo_config import cfg

from fastboot_common import repository
from fastboot_common.conf import opts
from fastboot_common.microvm import shelf
from fastboot_common.store import local
from fastboot_glance import images, jobs, logbooks, records

ROOT = pathlib.Path(__file__).parents[2]
LOGIN = b'\r\ntest login: '
READS = {'count': 32, 'first': 2048, 'step': 128}
BLOCK = 16 << 10
_CONF = {
    'DEFAULT': {'debug': True},
    'capture': {
        'boots': 1, 'timeout': 60, 'memory': 64, 'settle_seconds': 0,
        'end': 'console', 'quiet_mib': 0, 'quiet_seconds': 2,
        'config_drive': False},
    'jobboard': {'claim_seconds': 6, 'timeout': 2},
    'glance': {'auth_type': 'none', 'retries': 2, 'timeout': 20},
    'builder': {'poll': 0.2, 'retry_wait': 1, 'audit_interval': 3600},
}
#: What builders start, and must not leave behind.
PROGRAMS = ('unshare', 'setpriv', 'prlimit', 'qemu-system-x86', 'qemu-img',
            'nbdkit')


def bootable(path, size=16 << 20, fill=0, seed=b''):
    """A raw disk that boots at once; `fill` bytes of it are noise."""
    bootsector.disk(path, size, bootsector.sector(LOGIN, **READS))
    with path.open('r+b') as disk:
        # Glance refuses boot sectors without a partition.
        disk.seek(446)
        disk.write(struct.pack('<B3sB3sII', 0x80, bytes(3), 0x83, bytes(3),
                               2048, size // 512 - 2048))
        disk.seek(1 << 20)
        disk.write(seed.ljust(4096, b'.') if seed else b'')
        disk.seek(4 << 20)
        for _ in range(fill >> 20):
            disk.write(os.urandom(1 << 20))
    return path


def descendants(pid):
    """Every process below `pid`: its id, start time and name."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in pathlib.Path(f'/proc/{pid}/task').iterdir():
            for child in (task / 'children').read_text().split():
                with contextlib.suppress(FileNotFoundError):
                    found.add(_identity(int(child)))
                found |= descendants(int(child))
    return found


def _identity(pid):
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
    name, _, rest = text.partition('(')[2].rpartition(')')
    return pid, rest.split()[19], name


def alive(found):
    """Those of `found` that still run."""
    left = []
    for one in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _identity(one[0]) == one and 'Z' not in pathlib.Path(
                    f'/proc/{one[0]}/stat').read_text().rpartition(
                        ')')[2].split()[0]:
                left.append(one)
    return left


@dataclasses.dataclass
class Centre:
    """Places and servers of one test; a namespace on the jobboard its own."""

    path: pathlib.Path
    glance: brokers.Glance
    database: str
    board_url: str
    bus: str
    values: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.namespace = f'test-{uuid.uuid4().hex[:8]}'
        self.builders = []
        (self.path / 'repository').mkdir()
        repository.init(local.LocalStore(self.path / 'repository'), BLOCK)
        self.records = records.Records(self.database)
        self.records.create()
        self.books = logbooks.Logbooks(self.database)
        self.books.create()

    @property
    def board(self):
        return jobs.Board(self.conf())

    @property
    def state(self):
        return repository.Repository(
            local.LocalStore(self.path / 'repository')).state()

    @property
    def microvms(self):
        """Names of the µVMs in the repository: image and class."""
        path = self.path / 'repository' / 'microvms'
        if not (path / 'config.json').exists():
            return []
        found = repository.Repository(local.LocalStore(path))
        return [(name.image, name.group)
                for name, _ in shelf.entries(found.state())]

    def microvm(self, image_id, *states, seconds=60):
        """The record of an image's µVM when it has one of some states."""
        def answer():
            return [one for one in self.records.microvms(image_id)
                    if one.state in states]

        return self._wait(answer, f'µVM of {image_id} {states}', seconds)[0]

    def manifest(self, image_id):
        found = repository.Repository(
            local.LocalStore(self.path / 'repository'))
        return found.read_manifest(found.image(image_id).manifest)

    def write_conf(self, name='fastboot', **groups):
        """A configuration file; `groups` change single options."""
        merged = {group: dict(options) for group, options in _CONF.items()}
        merged['DEFAULT'] |= {'state_dir': self.path,
                              'transport_url': self.bus}
        merged['jobboard'] |= {'connection': self.board_url,
                               'namespace': self.namespace}
        merged['database'] = {'connection': self.database}
        merged['repository'] = {'location': self.path / 'repository'}
        merged['glance']['endpoint_override'] = self.glance.url
        merged['listener'] = {'pool': self.namespace}
        for group, options in [*self.values.items(), *groups.items()]:
            merged.setdefault(group, {}).update(options)
        file = self.path / f'{name}.conf'
        file.write_text(''.join(
            f'[{group}]\n' + ''.join(
                f'{key} = {value}\n' for key, value in options.items())
            for group, options in merged.items()))
        return file

    def conf(self, **groups):
        found = cfg.ConfigOpts()
        opts.register(found)
        found(['--config-file', str(self.write_conf('test', **groups))])
        return found

    def images(self, **options):
        return images.Images(self.conf(glance=options))

    def plan(self, name='plan', **plan):
        """What the bakery does of builders that are started with `name`."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        (path / 'new').write_text(json.dumps(plan))
        (path / 'new').rename(path / 'plan.json')
        return path

    def bakes(self, name='plan'):
        """What was baked by that plan."""
        path = self.path / name / 'baked'
        return path.read_text().splitlines() if path.exists() else []

    def start(self, name='builder', plan=None, **groups):
        """Start a builder; its log is ``<name>.log``.

        :param plan: see :meth:`plan`; None: it has a real bakery.
        """
        file = self.write_conf(name, **groups)
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        program = ['-m', 'fastboot_glance.builder']
        if plan:
            program = [str(ROOT / 'tests' / 'functional' / 'fake_bakery.py')]
            env['FAKE_BAKERY'] = str(self.path / plan / 'plan.json')
        found = brokers.Process(
            [sys.executable, '-W', 'ignore', *program,
             '--config-file', str(file)], self.path / f'{name}.log', env=env)
        self.builders.append(found)
        return found

    def log(self, name='builder'):
        return (self.path / f'{name}.log').read_text(errors='replace')

    def wait_state(self, image_id, *states, seconds=90):
        """Wait for an image's record to have one of some states."""
        def answer():
            found = self.records.build(image_id)
            return found if found and found.state in states else None

        return self._wait(answer, f'image {image_id} {states}', seconds)

    def wait_stage(self, image_id, stage, seconds=60):
        def answer():
            found = self.records.build(image_id)
            return found and found.stage == stage

        return self._wait(answer, f'image {image_id} at {stage}', seconds)

    def wait_idle(self, seconds=60):
        """Wait until nothing is left to do, and nothing is left over."""
        board = self.board

        def idle():
            staging = self.path / 'work' / 'staging'
            return (not board.jobs() and not self.books.list() and not (
                staging.is_dir() and list(staging.iterdir())))

        try:
            self._wait(idle, 'nothing left to do', seconds)
        finally:
            board.close()

    def _wait(self, answer, what, seconds):
        def alive():
            # Tests kill builders; none of them fails by itself.
            assert not [one for one in self.builders
                        if one.process.poll() not in (None, 0, -9)]
            return answer()

        try:
            return brokers.wait_for(alive, what, seconds)
        except BaseException:
            for log in sorted(self.path.glob('*.log')):
                print(f'--- {log.name}\n'
                      f'{log.read_text(errors="replace")[-6000:]}')
            raise

    def stop(self):
        below = set()
        for one in self.builders:
            below |= descendants(one.process.pid)
        for one in self.builders:
            if one.process.poll() is None:
                one.stop(signal.SIGTERM, 60)
        brokers.wait_for(lambda: not alive(below), f'no orphans: {below}', 30)
