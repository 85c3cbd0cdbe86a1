# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: it draws itself, without an error."""

import contextlib
import html.parser
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from fastboot_common import (
    extents,
    manifest,
    publish,
    repository,
    trace,
)
from fastboot_common.cli import main
from fastboot_common.store.local import LocalStore

BLOCK = 4096
HOSTILE = ('</script><script>document.title = "owned"</script>'
           '<img src=x onerror="document.title = 1">"&\'')
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture
def browse(tmp_path):
    """Load a page: ``browse(path, fragment)``, the finished document and
    what the page said on its console."""
    if BROWSER is None:
        pytest.skip('no chromium is installed to look at the page')

    def load(path, fragment=''):
        command = [
            BROWSER, '--headless', '--no-sandbox', '--disable-gpu',
            '--disable-quic', '--no-first-run', '--disable-sync',
            '--disable-background-networking', '--disable-component-update',
            '--disable-dev-shm-usage', f'--user-data-dir={tmp_path}/profile',
            '--window-size=1280,2000', '--enable-logging=stderr', '--v=0',
            '--virtual-time-budget=3000', '--dump-dom',
            f'file://{path}{fragment}']
        # Its own group: it starts a dozen processes that must all end.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True)
        try:
            document, words = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        assert process.returncode == 0, words
        console = [line for line in words.splitlines() if 'CONSOLE' in line]
        return Document(document), console

    return load


class Document(html.parser.HTMLParser):
    """Elements of a finished page, by id and by tag."""

    def __init__(self, text):
        super().__init__()
        self.ids = {}
        self.tags = []
        self.words = ''
        self.shown = True
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.shown = tag not in ('script', 'style')
        if 'id' in found:
            self.ids[found['id']] = found

    def handle_data(self, data):
        if self.shown:
            self.words += data

    def count(self, tag, **attributes):
        return sum(found == tag and attributes.items() <= values.items()
                   for found, values in self.tags)


@pytest.fixture
def state_dir(tmp_path):
    """A state directory with an empty repository."""
    path = tmp_path / 'state'
    (path / 'repository').mkdir(parents=True)
    repository.init(LocalStore(path / 'repository'), BLOCK)
    return path


@pytest.fixture
def add(state_dir, tmp_path):
    """Publish an image of random blocks: ``add(id, name, seed, reads)``."""
    def publish_image(image_id, name, seed, reads):
        target = repository.Repository(LocalStore(state_dir / 'repository'))
        raw = tmp_path / 'raw'
        raw.write_bytes(np.random.default_rng(seed).bytes(64 * BLOCK)
                        + bytes(64 * BLOCK))
        boots = trace.merge([np.array(
            [(at * 10000, at * BLOCK, BLOCK, 0) for at in range(count)],
            trace.DTYPE) for count in reads])
        publish.Publisher(target, tmp_path / 'cache').publish(
            raw, manifest.Manifest(
                image_id, name, 128 * BLOCK, BLOCK, '', [],
                np.empty(0, extents.DTYPE), trace=boots,
                boot=trace.boot_set(boots[boots['offset'] < 64 * BLOCK],
                                    BLOCK, 128 * BLOCK),
                capture={'state': 'booted' if reads else 'failed',
                         'reason': None if reads else HOSTILE,
                         'seconds': [1.5] * len(reads)}))

    return publish_image


def run(state_dir, tmp_path, *options):
    page = tmp_path / 'page.html'
    assert main.main(['--state-dir', str(state_dir), 'report', '-o',
                      str(page), *options]) == 0
    return page


def test_everything_is_drawn(state_dir, tmp_path, add, browse):
    add('a', 'first', 1, [40, 30])
    add('b', HOSTILE, 1, [50])
    add('c', 'third', 2, [])
    boots = tmp_path / 'boots.json'
    boots.write_text(json.dumps([
        {'label': HOSTILE, 'phases': [{'name': 'copy', 'seconds': 4},
                                      {'name': 'boot', 'seconds': 6}]},
        {'label': 'fast', 'phases': [{'name': 'boot', 'seconds': 5}],
         'missed_reads': 0}]))
    bench = tmp_path / 'bench'
    bench.mkdir()
    (bench / 'x.json').write_text(json.dumps([
        {'name': HOSTILE, 'value': 3, 'unit': 's', 'bar': 4, 'ok': True},
        {'name': 'y', 'value': 5, 'unit': 's', 'bar': 4, 'ok': False}]))
    page = run(state_dir, tmp_path, '--boots', str(boots), '--bench',
               str(bench))
    found, console = browse(page)
    assert console == []
    root = next(values for tag, values in found.tags if tag == 'html')
    assert root['data-drawn'] == 'yes'
    for name in ('scatter', 'growth', 'map', 'matrix', 'boots', 'timelines',
                 'bench', 'figures'):
        assert name in found.ids
    # The newest image with a boot set is shown: 50 reads, and a hover ring.
    circles = [values['class'] for tag, values in found.tags
               if tag == 'circle' and 'class' in values]
    assert sorted(circles) == ['c-0'] * 50 + ['ring']
    assert found.count('button', role='tab') == 3
    assert found.words.count(HOSTILE) >= 4
    assert '2.00 × sooner' in found.words
    assert '✓ ok' in found.words and '✗ missed' in found.words
    assert not found.count('img')
    assert found.count('script') == 2
    assert found.words.split()[:2] == ['fastboot', 'report']  # the title


def test_image_without_trace(state_dir, tmp_path, add, browse):
    add('c', 'never booted', 2, [])
    found, console = browse(run(state_dir, tmp_path))
    assert console == []
    assert {'untraced', 'map'} <= found.ids.keys()
    assert 'scatter' not in found.ids and 'matrix' not in found.ids
    assert HOSTILE in found.words


def test_chosen_image(state_dir, tmp_path, add, browse):
    add('a', 'first', 1, [7])
    add('b', 'second', 1, [9])
    found, console = browse(run(state_dir, tmp_path), '#image-1')
    assert console == []
    assert found.count('circle', **{'class': 'c-own'}) == 7
    found, _ = browse(run(state_dir, tmp_path, '--image', 'second'))
    assert found.count('circle', **{'class': 'c-other'}) \
        + found.count('circle', **{'class': 'c-0'}) == 9
    assert '1 of 2 images' in found.words


def test_empty_repository(state_dir, tmp_path, browse):
    found, console = browse(run(state_dir, tmp_path))
    assert console == []
    assert 'No images yet' in found.words
    assert 'figures' not in found.ids


def test_an_error_would_be_seen(state_dir, tmp_path, add, browse):
    """The other tests can fail: a broken page says so on its console."""
    add('a', 'first', 1, [7])
    page = run(state_dir, tmp_path)
    page.write_text(page.read_text().replace('"growth":[', '"grown":['))
    _, console = browse(page)
    assert console


def test_foreign_script_does_not_run(state_dir, tmp_path, browse):
    """The policy is a second wall, should a name ever become markup."""
    page = run(state_dir, tmp_path)
    page.write_text(page.read_text().replace(
        '</body>', '<script>document.body.id = "owned"</script></body>'))
    found, console = browse(page)
    assert 'owned' not in found.ids
    assert any('Content Security Policy' in line for line in console)
