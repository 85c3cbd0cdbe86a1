# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl`` as people use it, on a guest of one sector."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

import bootsector
import microvms
import numpy as np
import pytest
from test_signing import private

from fastboot_common import repository
from fastboot_common.store.local import LocalStore

CTL = pathlib.Path(sys.executable).parent / 'fastbootctl'
SIZE = 8 << 20
TEXT = b'fb login: '


class Fastbootctl:
    """The program on one state directory."""

    def __init__(self, state: pathlib.Path, *options: str) -> None:
        self.state = state
        state.mkdir(exist_ok=True)
        config = state / 'fastboot.conf'
        config.write_text(
            '[capture]\nend = console\nboots = 1\nsettle_seconds = 0\n'
            'config_drive = false\nmemory = 64\ntimeout = 120\n'
            'console_pattern = login:\n')
        self.options = ('--state-dir', str(state), '--config-file',
                        str(config), *options)

    def __call__(self, *words: object,
                 status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [CTL, *self.options, *map(str, words)], capture_output=True,
            text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        assert 'Traceback' not in done.stderr
        return done

    def json(self, *words: object, status: int = 0):
        """The answer of ``-f json``."""
        return json.loads(self(*words, '-f', 'json', status=status).stdout)


@pytest.fixture(scope='module')
def state(tmp_path_factory) -> pathlib.Path:
    """A repository with one image that was booted."""
    room = tmp_path_factory.mktemp('cli')
    ctl = Fastbootctl(room / 's')
    raw = room / 'guest.raw'
    boot = bootsector.sector(TEXT, count=40, first=2048, step=64)
    raw.write_bytes(boot + np.random.default_rng(1).bytes(SIZE - len(boot)))
    ctl('repo', 'init')
    added = ctl.json('image', 'add', raw, '--id', 'guest', '--name', 'one')
    assert added['boot'] == 'booted', added
    assert 0 < added['boot_set_bytes'] < SIZE / 2
    return room


@pytest.fixture
def ctl(state) -> Fastbootctl:
    """The program on it."""
    return Fastbootctl(state / 's')


def test_shows_the_image(ctl):
    assert [row['Name'] for row in ctl.json('image', 'list')] == ['one']
    shown = ctl.json('image', 'show', 'one')
    assert shown['id'] == 'guest'
    assert shown['capture']['end'] == 'console'
    assert shown['trace']['reads'] >= 40
    assert ctl.json('repo', 'stats')['images'] == 1
    assert ctl.json('repo', 'check', '--deep') == []


def test_adding_again_changes_nothing(ctl, state):
    again = ctl.json('image', 'add', state / 'guest.raw', '--id', 'guest',
                     '--name', 'one')
    assert not again['created']
    assert again['serial'] == 1
    other = state / 'other.raw'
    other.write_bytes(b'x' * SIZE)
    done = ctl('image', 'add', other, '--id', 'guest', '--no-boot', status=1)
    assert 'registered with other content' in done.stderr


def test_boots_without_a_miss_then_cleans_up(state):
    ctl = Fastbootctl(state / 'h', '--repository',
                      str(state / 's' / 'repository'))
    assert ctl.json('host', 'sync')['images'] == 1
    assert [row['State'] for row in ctl.json('host', 'status')] == ['ready']
    done = ctl.json('vm', 'run', 'one', '--until-prompt', '--quiet-console')
    assert done['missed_reads'] == 0
    assert not done['complete']
    assert ctl.json('volume', 'check')[0]['Problem'] == ''
    assert ctl.json('volume', 'check', '--repair')[0]['Repaired'] == 0
    replayed = ctl.json('bench', 'replay', 'one', '--runs', 2)
    assert replayed['reads'] >= 40 and replayed['runs'] == 2
    ctl('volume', 'hydrate', 'one')
    rows = ctl.json('host', 'status')
    assert rows[0]['State'] == 'complete'
    assert rows[0]['Leases'] == 0
    assert ctl.json('vm', 'run', 'one', '--until-prompt',
                    '--quiet-console')['complete']
    ctl('volume', 'pin', 'one')
    assert 'pinned' in ctl('volume', 'evict', 'one', status=1).stderr
    ctl('volume', 'unpin', 'one')
    ctl('volume', 'evict', 'one')
    assert ctl.json('host', 'status')[0]['State'] == 'ready'
    assert ctl.json('volume', 'show')[0]['Images'] == 0


def test_a_kept_disk_stays(state, tmp_path):
    """Whatever else is run under its name."""
    ctl = Fastbootctl(tmp_path / 's')
    ctl('repo', 'init')
    for name in ('one', 'two'):
        ctl('image', 'add', state / 'guest.raw', '--id', name, '--no-boot')
    ctl('host', 'sync')
    run = ('vm', 'run', '--until-prompt', '--quiet-console')
    ctl(*run, 'one', '--keep')
    home = tmp_path / 's' / 'vms' / 'vm'
    disk = (home / 'disk.qcow2').stat().st_ino
    for words in (['one'], ['two'], ['two', '--keep']):
        said = ctl(*run, *words, status=1).stderr
        assert 'has a disk of image one that was kept' in said
    ctl(*run, 'one', '--keep')
    assert (home / 'disk.qcow2').stat().st_ino == disk
    assert {row['ID']: row['Leases'] for row in ctl.json('host', 'status')
            } == {'one': 1, 'two': 0}


def test_a_run_that_never_began_removes_nothing(state, tmp_path):
    """Another has the volumes, and may have the directory."""
    ctl = Fastbootctl(tmp_path / 's', '--repository',
                      str(state / 's' / 'repository'))
    ctl('host', 'sync', '--thaw')
    log = tmp_path / 's' / 'vms' / 'vm' / 'misses.log'
    log.parent.mkdir(parents=True)
    log.touch()
    lock, = (tmp_path / 's' / 'host' / 'volumes').glob('*/lock')
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = ctl('vm', 'run', 'one', status=1).stderr
    assert 'another process' in said
    assert log.exists()


def test_report(ctl, tmp_path):
    page = tmp_path / 'page.html'
    ctl('report', '-o', page)
    assert '</html>' in page.read_text()


def test_removal_and_gc(state, tmp_path):
    ctl = Fastbootctl(tmp_path / 's')
    ctl('repo', 'init')
    ctl('image', 'add', state / 'guest.raw', '--id', 'guest', '--no-boot')
    ctl('image', 'remove', 'guest')
    assert ctl.json('image', 'list') == []
    kept = ctl.json('repo', 'gc')
    assert kept['bytes'] == 0
    would = ctl.json('repo', 'gc', '--retention-days', 0, '--grace-hours', 0,
                     '--dry-run')
    assert would['packs'] == 1 and would['bytes'] > SIZE / 2
    gone = ctl.json('repo', 'gc', '--retention-days', 0, '--grace-hours', 0)
    assert gone['packs'] == 1 and gone['bytes'] > SIZE / 2
    assert not list((tmp_path / 's' / 'repository' / 'packs').glob('*/*'))
    assert ctl.json('repo', 'check') == []


@pytest.mark.parametrize(('words', 'message'), [
    (['image', 'show', 'none'], 'no image'),
    (['image', 'add', '/nonexistent/file'], 'there is no file'),
    (['volume', 'check', 'none'], 'no image'),
    (['vm', 'run', 'none'], 'no image'),
    (['--repository', 'ftp://x/', 'image', 'list'], 'ftp'),
])
def test_mistakes_are_named(ctl, words, message):
    assert message in ctl(*words, status=1).stderr


def test_no_repository_says_what_to_do(tmp_path):
    done = Fastbootctl(tmp_path / 's')('image', 'list', status=1)
    assert 'repo init' in done.stderr


def test_damage_is_found_and_named(state, tmp_path):
    ctl = Fastbootctl(tmp_path / 's')
    ctl('repo', 'init')
    ctl('image', 'add', state / 'guest.raw', '--id', 'guest', '--no-boot')
    pack = next((tmp_path / 's' / 'repository' / 'packs').glob('*/*'))
    data = bytearray(pack.read_bytes())
    data[1000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    problems = ctl.json('repo', 'check', '--deep', status=1)
    assert pack.name in problems[0]['Object']


def test_a_volume_that_cannot_be_opened_is_named(state, tmp_path):
    ctl = Fastbootctl(tmp_path / 's')
    ctl('repo', 'init')
    ctl('image', 'add', state / 'guest.raw', '--id', 'guest', '--no-boot')
    ctl('host', 'sync')
    ctl('volume', 'hydrate', 'guest')
    ctl('volume', 'check')
    description = tmp_path.joinpath(
        's', 'host', 'volumes', 'public', 'images', 'guest')
    description.write_text('')
    with description.parents[1].joinpath('volume').open('r+b') as file:
        file.write(b'x')
    [row] = ctl.json('volume', 'check', status=1)
    assert row['Image'] == 'all of public' and row['Problem']
    ctl('volume', 'check', 'guest', status=1)


def test_microvms(state, ctl, nginx):
    """Into a repository that is made for them, and back."""
    baked, again = state / 'baked', state / 'again'
    stream, _ = microvms.qemu_stream([bytes([at]) * 4096 for at in range(9)])
    found = microvms.make(baked, stream, size=SIZE)
    ctl('microvm', 'fetch', 'one', again, status=1)
    done = ctl.json('microvm', 'publish', baked, 'one')
    assert done['created'] and done['image'] == 'guest'
    assert done['class'] == found.key.digest
    assert not ctl.json('microvm', 'publish', baked, 'one')['created']
    here = state / 's' / 'repository' / 'microvms' / 'packs'
    assert sum(path.stat().st_size for path in here.glob('??/*')) == (
        done['stored_bytes'])

    came = ctl.json('microvm', 'fetch', 'one', again)
    assert came['memory_bytes'] == found.parts['memory'].size
    for path in baked.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert 'not empty' in ctl('microvm', 'fetch', 'one', again,
                              status=1).stderr
    ctl('microvm', 'fetch', 'one', state / 'x', '--class', 'no', status=1)
    assert 'no image' in ctl('microvm', 'publish', baked, 'other',
                             status=1).stderr
    served = Fastbootctl(state / 'elsewhere')
    config = state / 'elsewhere' / 'fastboot.conf'
    config.write_text(f'[repository]\n'
                      f'location = {nginx(state / "s" / "repository").url}\n')
    served.json('microvm', 'fetch', 'one', state / 'served')
    for path in baked.iterdir():
        assert path.read_bytes() == (state / 'served' / path.name
                                     ).read_bytes()
    assert 'only be read' in served('microvm', 'publish', baked, 'one',
                                    status=1).stderr
    # The images' repository is as it was.
    assert ctl.json('repo', 'check', '--deep') == []
    assert ctl.json('repo', 'stats')['images'] == 1


def test_a_checkpoint_is_signed(tmp_path):
    ctl = Fastbootctl(tmp_path / 's')
    ctl('repo', 'init')
    assert ctl('repo', 'checkpoint').stdout == 'version 1, not signed\n'
    key = private(tmp_path / 'key')
    with (tmp_path / 's' / 'fastboot.conf').open('a') as file:
        file.write(f'[repository]\nsigning_key = {key}\n')
    for words in (['checkpoint'], ['stats'], ['gc']):
        assert 'checkpoint --vouch' in ctl('repo', *words, status=1).stderr
    microvms = tmp_path / 's' / 'repository' / 'microvms'
    microvms.mkdir()
    repository.init(LocalStore(microvms), 4096)
    repository.Repository(LocalStore(microvms)).checkpoint()
    said = ctl('repo', 'checkpoint', '--vouch').stdout.splitlines()
    assert [line.partition(' key ')[0] for line in said] == [
        'version 2, signed with', 'µVMs: version 2, signed with']
    assert ctl('repo', 'checkpoint').stdout.startswith('version 3, signed')
    assert ctl.json('repo', 'stats')['version'] == 3


@pytest.mark.skipif(os.geteuid() != 0, reason='gives files to others')
def test_root_and_a_repository_of_others(tmp_path):
    """They could not read what root wrote."""
    ctl = Fastbootctl(tmp_path / 's')
    path = ctl.state / 'repository'
    path.mkdir()
    os.chown(path, 65534, -1)
    assert 'runuser -u nobody' in ctl('repo', 'init', status=1).stderr
    os.chown(path, 0, -1)
    ctl('repo', 'init')
    ctl('repo', 'checkpoint')
    os.chown(path, 4242, -1)
    assert 'belongs to #4242' in ctl('repo', 'checkpoint', status=1).stderr
    ctl('repo', 'stats')
