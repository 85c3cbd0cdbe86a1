# SPDX-License-Identifier: Apache-2.0
"""The bakery believes nothing of what comes out of its sandbox."""

import json
import os
import struct
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_config import cfg

from fastboot_common import exception
from fastboot_common.conf import opts
from fastboot_common.microvm import template
from fastboot_glance import bakery, guest

BACKING = 'nbd+unix:///?socket=/room/nbd.sock'
SIZE = 1 << 30


def options():
    conf = opts.register(cfg.ConfigOpts())
    conf([], default_config_files=[])
    return conf.bakery


@pytest.fixture
def one(tmp_path):
    told = []
    found = bakery._Bakery(
        tmp_path / 'raw', SIZE, tmp_path, options(),
        (tmp_path / 'raw', 'raw'), told.append, threading.Event())
    found.told = told
    return found


def test_the_options_are_the_templates_defaults():
    assert bakery.config(options()) == template.Config()


def test_what_is_written_counts_wherever_it_is(tmp_path):
    deep = tmp_path / 'room' / 'run' / 'libvirt'
    deep.mkdir(parents=True)
    (deep / 'one').write_bytes(b'x' * 100_000)
    (deep / 'link').symlink_to(tmp_path / 'two')
    (tmp_path / 'two').write_bytes(b'x' * 1_000_000)
    assert 100_000 <= guest.disk_usage(tmp_path / 'room') < 200_000
    assert guest.disk_usage(tmp_path / 'nothing') == 0


class TestLimits:
    """What a bake may write."""

    @pytest.fixture(autouse=True)
    def _limit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(bakery, '_WRITTEN', 100_000)
        self.room = tmp_path / 'bake' / 'guest'
        self.room.mkdir(parents=True)

    @pytest.mark.parametrize('name', [
        'guest/root.qcow2', 'guest/below/log', 'oven.log'])
    def test_every_file_counts(self, one, name):
        path = self.room.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'x' * 200_000)
        read, write = os.pipe()
        os.close(write)
        try:
            with pytest.raises(bakery._Refused, match='wrote more'):
                one._follow(read, self.room)
        finally:
            os.close(read)

    def test_reads_are_not_noted(self, one, monkeypatch, tmp_path):
        (tmp_path / 'raw').write_bytes(bytes(65536))
        with one._served() as room:
            assert {path.name for path in room.parent.iterdir()} == {'guest'}


class TestWords:
    """What the process in the sandbox says."""

    def test_phases_and_the_end(self, one):
        assert not one._heard(b'{"phase": "boot", "libvirt": 9000000}')
        assert not one._heard(b'{"phase": "save"}')
        assert one._heard(b'{"done": true}')
        assert one.told == ['boot', 'save', 'done']
        assert set(one.seconds) == {'boot', 'save'}

    @pytest.mark.parametrize('line', [
        b'', b'\xff', b'[]', b'1', b'{', b'{"done": 1}', b'{"phase": []}',
        b'{"phase": "done"}', b'{"phase": "../x"}', b'[' * 5000])
    def test_nonsense_is_nothing(self, one, line):
        try:
            assert not one._heard(line)
        except TypeError:
            pytest.fail('a phase that cannot be compared')
        assert not one.told

    @pytest.mark.parametrize('said, taken', [
        (4, 4), (1000, 8), (-5, 1), ('4', 1), (None, 1), (True, 1)])
    def test_processors_that_the_guest_can_have(self, one, said, taken):
        one._heard(json.dumps({'phase': 'unplug', 'vcpus': said}).encode())
        assert one._vcpus == taken

    def test_a_reason_is_cut(self, one):
        with pytest.raises(bakery._NotBaked) as caught:
            one._heard(json.dumps({'failed': 'x' * 10000}).encode())
        assert len(str(caught.value)) < 600

    def test_a_reason_is_one_line_for_terminals(self, one, tmp_path):
        with pytest.raises(bakery._NotBaked) as caught:
            one._heard(json.dumps({'failed': 'a\n\x1b[2Jb\udc80'}).encode())
        assert str(caught.value) == 'a  [2Jb '
        (tmp_path / 'log').write_text(
            'Traceback\n  File "/home/builder/x.py"\nOSError: \x1b[2J\n')
        assert bakery._tail(tmp_path / 'log') == 'OSError:  [2J'
        (tmp_path / 'log').write_text('')
        assert bakery._tail(tmp_path / 'log') == 'silently'

    @pytest.mark.parametrize('word', ['refused', 'failed'])
    def test_whose_doing_it_is(self, one, word):
        with pytest.raises(bakery._NotBaked, match='because') as caught:
            one._heard(json.dumps({word: 'because'}).encode())
        assert isinstance(caught.value, bakery._Refused) == (
            word == 'refused')

    @given(st.binary(max_size=200))
    def test_any_line(self, tmp_path_factory, line):
        path = tmp_path_factory.mktemp('x')
        found = bakery._Bakery(path, SIZE, path, options(), (path, 'raw'),
                               lambda phase: None, threading.Event())
        assert not found._heard(line)

    def test_lines_without_end(self, one, tmp_path):
        read, write = os.pipe()
        thread = threading.Thread(
            target=lambda: (os.write(write, b'x' * 60000),
                            os.write(write, b'x' * 60000), os.close(write)))
        thread.start()
        with pytest.raises(bakery._NotBaked):
            one._follow(read, tmp_path)
        os.close(read)
        thread.join()


class TestFiles:
    """What it leaves."""

    def test_a_file(self, tmp_path):
        (tmp_path / 'a').write_bytes(b'x' * 5000)
        assert bakery._take(tmp_path / 'a', tmp_path / 'b').size == 5000

    def test_no_links_pipes_or_directories(self, tmp_path):
        (tmp_path / 'secret').write_text('secret')
        (tmp_path / 'link').symlink_to(tmp_path / 'secret')
        os.mkfifo(tmp_path / 'pipe')
        (tmp_path / 'directory').mkdir()
        for name in ('link', 'pipe', 'directory', 'nothing'):
            with pytest.raises(bakery._NotBaked):
                bakery._take(tmp_path / name, tmp_path / 'out')
            assert not (tmp_path / 'out').exists()

    def disk(self, tmp_path, backing=BACKING, version=3, size=SIZE,
             features=0):
        data = backing.encode()
        path = tmp_path / 'disk'
        head = struct.pack('>IIQIIQ', 0x514649FB, version, 512, len(data),
                           16, size).ljust(72, b'\0')
        path.write_bytes((head + features.to_bytes(8, 'big')).ljust(
            512, b'\0') + data)
        return path

    def test_a_disk(self, tmp_path):
        bakery._check_disk(self.disk(tmp_path), BACKING, SIZE)

    @pytest.mark.parametrize('change', [
        {'backing': '/etc/shadow'}, {'backing': 'json:{}'}, {'version': 2},
        {'size': SIZE * 2}, {'features': 4}, {'features': 1},
        {'features': 16}])
    def test_another_disk(self, tmp_path, change):
        with pytest.raises(bakery._NotBaked):
            bakery._check_disk(self.disk(tmp_path, **change), BACKING, SIZE)

    def test_a_first_boot_that_wrote_too_much(self, tmp_path):
        path = self.disk(tmp_path)
        os.truncate(path, bakery._DELTA)
        bakery._check_disk(path, BACKING, SIZE)
        os.truncate(path, bakery._DELTA + 1)
        with pytest.raises(bakery._Refused, match='256 are the most'):
            bakery._check_disk(path, BACKING, SIZE)


def test_a_name_that_is_too_long_for_sockets(one, monkeypatch, tmp_path):
    monkeypatch.setattr(bakery.nbdkit, 'Tap', None)
    deep = tmp_path / ('x' * 100)
    deep.mkdir()
    one._workdir = deep
    monkeypatch.setattr(one, '_home', lambda room: room)
    with pytest.raises(exception.ConfigError):
        one._served().__enter__()


def test_no_bake_without_name_spaces(one, tmp_path):
    one._sandbox = types.SimpleNamespace(isolated=False)
    with pytest.raises(exception.ConfigError):
        one.run(tmp_path)
