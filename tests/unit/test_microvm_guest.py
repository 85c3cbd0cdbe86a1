# SPDX-License-Identifier: Apache-2.0
"""How host and guest speak, and what a copy of a guest is made of."""

import re
import shlex
import shutil
import string
import subprocess
import sys
import types
import uuid

import microvms
import pytest
from hypothesis import given
from hypothesis import strategies as st
from microvms import OTHER

from fastboot_common import exception
from fastboot_common.microvm import (
    activation,
    activator,
    artifact,
    clone,
    document,
    savefile,
)
from fastboot_nova.microvm import definition, lane

MACHINE = artifact.Machine(memory=512, max_memory=8192, vcpus=4, slots=4)


class TestLines:

    @pytest.mark.parametrize('line, found', [
        (b'READY 1.25', activation.Line('READY')),
        (b'QUIET 12.50 300', activation.Line('QUIET', 300)),
        (b'DONE 9 0\r', activation.Line('DONE', 0)),
        (b'READY', None), (b'ready 1', None), (b'ROOT 1', None),
        (b'READY 1 2 3', None), (b'READY  1', None), (b'READY -1', None),
        (b'READY 1 $(reboot)', None), (b'READY 1 ../../x', None),
        (b'READY 1' + b'0' * 200, None), (b'', None), (b'\0', None),
        ('READY ١'.encode(), None)])
    def test_only_what_is_known(self, line, found):
        assert activation.parse(line) == found

    @given(st.lists(st.binary(max_size=300), max_size=20))
    def test_any_bytes(self, pieces):
        lines = activation.Lines()
        for piece in pieces:
            for line in lines.feed(piece):
                assert re.fullmatch('[A-Z]+', line.word)
                assert line.number is None or 0 <= line.number < 10**9
            assert len(lines._rest) <= 128

    @given(st.integers(1, 40))
    def test_pieces_of_any_length(self, size):
        data = b'READY 1.0\nNOISE 2\n' + b'x' * 500 + b' READY 1\nDONE 3 0\n'
        lines, found = activation.Lines(), []
        for start in range(0, len(data), size):
            found += lines.feed(data[start:start + size])
        assert [line.word for line in found] == ['READY', 'DONE']


class TestRequest:

    def test_its_words(self):
        line = activation.request(str(OTHER), 'web-1.example.org', 1.5,
                                  vcpus=2, memory=512, interfaces=3,
                                  entropy=b'\1\2')
        assert line == (f'ACTIVATE 2 {OTHER} web-1.example.org 1.500 2 512 '
                        f'3 0102\n').encode()

    def test_entropy_is_new_each_time(self):
        one, two = (activation.request(str(OTHER), 'a', 0).split()[-1]
                    for _ in range(2))
        assert one != two and len(bytes.fromhex(one.decode())) == 64
        assert activation.request(str(OTHER), 'a', 0, entropy=b'').endswith(
            b' -\n')

    @pytest.mark.parametrize('uuid, name', [
        ('x', 'a'), (str(OTHER).upper(), 'a'), (str(OTHER) + '\n', 'a'),
        (str(OTHER), ''), (str(OTHER), 'a b'), (str(OTHER), 'a\nb'),
        (str(OTHER), '-a'), (str(OTHER), 'a.'), (str(OTHER), '$(x)'),
        (str(OTHER), 'ä'), (str(OTHER), 'a' * 65), (str(OTHER), 'a\n')])
    def test_what_could_be_taken_for_something_else(self, uuid, name):
        with pytest.raises(exception.Invalid):
            activation.request(uuid, name, 0)

    @given(st.text(max_size=100))
    def test_a_host_name_of_any_name(self, name):
        activation.request(str(OTHER), activation.hostname(name), 0)


class TestScripts:

    def test_all_is_in_the_user_data(self):
        data = activation.user_data().decode()
        assert data.startswith('#!/bin/sh')
        assert data.count('END-OF-ACTIVATOR') == 4
        assert not re.search(r'@activator\.\w+@', data)

    @pytest.mark.parametrize('name', ['activator.sh', 'bakery.sh'])
    def test_shell(self, name, tmp_path):
        path = tmp_path / name
        path.write_text((activation._HERE / name).read_text())
        subprocess.run(['sh', '-n', path], check=True)
        if shutil.which('shellcheck'):
            subprocess.run(['shellcheck', path], check=True)

    def test_user_data_writes_the_activators(self, tmp_path):
        script = activation.user_data().decode().split('port=')[0]
        script = script.replace('/run/', f'{shlex.quote(str(tmp_path))}/')
        subprocess.run(['sh', '-c', script], check=True)
        for name in ('activator.py', 'activator.sh'):
            here = (activation._HERE / name).read_text()
            there = (tmp_path / 'fastboot' / name).read_text()
            # The shell's here-documents are quoted: only the paths differ.
            assert there.replace(f'{tmp_path}/', '/run/').strip() == \
                here.strip()

    def test_the_guests_port_is_the_templates(self):
        from fastboot_common.microvm import template
        assert activator.PORT.endswith('/' + template.PORT)

    def test_its_words_are_known(self):
        source = (activation._HERE / 'activator.py').read_text()
        shell = (activation._HERE / 'activator.sh').read_text()
        for word in (*activation.STAGES, 'READY', 'QUIET', 'FAILED'):
            assert f"'{word}'" in source
            assert f'say {word}' in shell


class TestActivator:
    """The parts that harm nobody when they run here."""

    def test_lines(self, monkeypatch):
        pieces = iter([b'QUIE', b'SCE\nACTIVATE 1', b'', b' x\n' + b'y' * 5000,
                       b'z\nQUIESCE\n'])
        monkeypatch.setattr(activator.os, 'read',
                            lambda fd, size: next(pieces))
        monkeypatch.setattr(activator.time, 'sleep', lambda seconds: None)
        words = activator.lines(0)
        assert next(words) == ['QUIESCE']
        assert next(words) == ['ACTIVATE', '1', 'x']

    def test_order(self, monkeypatch):
        told, done = [], []
        for name in ('randomize', 'begin_key', 'wait_for_hardware',
                     'rename', 'wait_for_links', 'be_born'):
            monkeypatch.setattr(
                activator, name,
                lambda *args, name=name: done.append(name))
        monkeypatch.setattr(activator.time, 'clock_settime',
                            lambda clock, now: done.append('clock'))
        monkeypatch.setattr(activator, 'say',
                            lambda port, word, *more: told.append(word))
        monkeypatch.setattr(activator, 'read', lambda path: '8000000')
        words = activation.request(str(OTHER), 'a', 1.0).decode().split()[1:]
        main = types.ModuleType('main')
        activator.activate(3, main, words, [], 4, 'x')
        assert done == ['randomize', 'clock', 'begin_key',
                        'wait_for_hardware', 'rename', 'wait_for_links',
                        'be_born']
        assert tuple(told) == activation.STAGES[:5]

    def test_links(self, monkeypatch):
        """It waits for those of all, and leaves them as they were."""
        here, up, asked = ['e0'], {'e1'}, []

        def switch(name, on):
            was = name in up
            (up.add if on else up.discard)(name)
            return was != on

        def has_link(name):
            asked.append(name)
            return name in up and asked.count(name) > 2
        monkeypatch.setattr(activator, 'interfaces', lambda: here[:])
        monkeypatch.setattr(activator, 'run', lambda *words: 0)
        monkeypatch.setattr(activator.time, 'sleep',
                            lambda seconds: here.append('e1')
                            if 'e1' not in here else None)
        monkeypatch.setattr(activator, 'switch', switch)
        monkeypatch.setattr(activator, 'has_link', has_link)
        activator.wait_for_links(0)
        assert not asked and here == ['e0']
        activator.wait_for_links(2)
        assert asked.count('e0') > 2 and asked.count('e1') > 2
        assert up == {'e1'}

    @pytest.mark.parametrize('found, has', [
        ('1', True), ('0', False), (OSError(22, 'it is down'), False),
        (FileNotFoundError(), True)])
    def test_a_link(self, monkeypatch, found, has):
        def read(path):
            if isinstance(found, OSError):
                raise found
            return found
        monkeypatch.setattr(activator, 'read', read)
        assert activator.has_link('e0') is has

    def test_links_that_never_come(self, monkeypatch):
        monkeypatch.setattr(activator, 'LINK_SECONDS', .1)
        monkeypatch.setattr(activator, 'PLUG_SECONDS', .1)
        monkeypatch.setattr(activator, 'interfaces', lambda: [])
        monkeypatch.setattr(activator, 'run', lambda *words: 0)
        activator.wait_for_links(1)
        monkeypatch.setattr(activator, 'interfaces', lambda: ['nothing'])
        monkeypatch.setattr(activator, 'switch', lambda name, on: True)
        activator.wait_for_links(1)

    def test_a_rehearsal_leaves_nothing(self, monkeypatch, tmp_path):
        ran = []
        monkeypatch.setattr(activator, 'REHEARSAL', str(tmp_path / 'room'))
        monkeypatch.setattr(activator, 'randomize', ran.append)
        monkeypatch.setattr(activator, 'run', lambda *words: ran.append(
            words))
        activator.rehearse()
        assert not list(tmp_path.iterdir())
        assert [len(ran[0]), *(one[:2] for one in ran[1:])] == [
            64, ('udevadm', 'trigger'), ('udevadm', 'settle')]

    def test_udev_waits_for_the_identity(self, monkeypatch):
        told = []
        for name in ('randomize', 'wait_for_hardware', 'wait_for_links',
                     'be_born', 'rehearse', 'wipe', 'write', 'rename'):
            monkeypatch.setattr(activator, name, lambda *_: None)
        monkeypatch.setattr(activator.time, 'clock_settime',
                            lambda *_: None)
        monkeypatch.setattr(activator, 'begin_key', lambda name: None)
        monkeypatch.setattr(activator, 'read', lambda path: '8000000')
        monkeypatch.setattr(activator, 'run', lambda *words, **_: told.append(
            words[-1]))
        monkeypatch.setattr(activator, 'say', lambda port, word, *_:
                            told.append(word))
        activator.quiesce()
        activator.activate(3, types.ModuleType('main'),
                           ['2', 'u', 'h', '1', '1', '0', '0', '-'], [], 4,
                           'x')
        assert told == ['--all', '--stop-exec-queue',
                        'RANDOM', 'CLOCK', 'PLUGGED', 'IDENTITY',
                        '--start-exec-queue', 'LINKED']

    @pytest.mark.parametrize('text, count', [
        ('0', 1), ('0-7', 8), ('0,2-3', 4)])
    def test_processors_that_can_come(self, monkeypatch, text, count):
        monkeypatch.setattr(activator, 'read', lambda path: text)
        assert activator.possible() == count
        done = subprocess.run(['sed', 's/.*[,-]//'], input=text, text=True,
                              capture_output=True, check=True)
        assert int(done.stdout) + 1 == count

    def test_another_version_is_refused(self):
        with pytest.raises(ValueError):
            activator.activate(3, types.ModuleType('main'),
                               ['1', 'u', 'h', '1', '1', '0', '-'], [], 4,
                               'x')

    @pytest.mark.parametrize('name, kept', [
        ('dbus.service', True), ('getty@tty1.service', True),
        ('serial-getty@ttyS0.service', True), ('ssh.service', False),
        ('qemu-guest-agent.service', True), ('nginx.service', False),
        ('systemd-networkd.service', False), ('cron.service', False),
        ('systemd-journald.service', True),
        ('fastboot-activator.service', True)])
    def test_who_is_stopped(self, name, kept):
        assert bool(activator.KEPT.fullmatch(name)) is kept

    def test_python_36_can_read_it(self):
        source = (activation._HERE / 'activator.py').read_text()
        compile(source, 'activator.py', 'exec')
        import ast
        ast.parse(source, feature_version=(3, 6))
        assert sys.version_info >= (3, 11)


def server(**options):
    return definition.Server(**{
        'name': 'web', 'uuid': str(OTHER), 'disk': '/i/disk',
        'console': '/i/console', **options})


def instance(**options):
    return clone.instance(server(**options).xml(), MACHINE)


class TestInstance:

    def test_what_is_plugged(self):
        one = instance(memory=1024, vcpus=2, config_drive='/i/cd',
                       network='default', mac='fa:16:3e:00:00:01')
        assert (one.vcpus, one.memory, one.uuid) == (2, 512, OTHER)
        assert [device.tag for device in one.plugged] == ['memory', 'disk']
        link = one.interfaces[0]
        assert clone.linked(link, 'down').find('link').get('state') == 'down'
        assert link.find('link') is None

    def test_a_cd_becomes_a_disk(self):
        xml = server().xml().replace('</devices>', (
            "<disk type='file' device='cdrom'><source file='/i/cd'/>"
            "<target dev='sda' bus='sata'/>"
            "<address type='drive' unit='0'/></disk></devices>"))
        one = clone.instance(xml, MACHINE)
        target = one.plugged[0].find('target')
        assert (target.get('dev'), target.get('bus')) == ('vdz', 'virtio')

    def test_no_name_is_left_for_a_cd(self):
        volumes = ''.join(
            f"<disk type='block'><source dev='/dev/{letter}'/>"
            f"<target dev='vd{letter}' bus='virtio'/></disk>"
            for letter in string.ascii_lowercase)
        with pytest.raises(clone.Unsuitable, match='no name left'):
            clone.instance(server().xml().replace('</devices>', (
                f"<disk type='file' device='cdrom'><source file='/i/cd'/>"
                f"<target dev='sda' bus='sata'/></disk>{volumes}</devices>"),
                ), MACHINE)

    @pytest.mark.parametrize('other', [
        "<disk type='file' device='cdrom'><source file='/i/cd'/>"
        "<target dev='sda' bus='sata'/></disk>",
        "<disk type='block'><source dev='/dev/b'/>"
        "<target dev='vdc' bus='virtio'/></disk>"])
    def test_names_of_disks_are_not_left_to_chance(self, other):
        volume = ("<disk type='block'><source dev='/dev/a'/>"
                  "<target dev='vdb' bus='virtio'/></disk>")
        xml = server().xml()
        for more in volume, other:
            one = clone.instance(xml.replace(
                '</devices>', f'{more}</devices>'), MACHINE)
            assert len(one.plugged) == 1
        with pytest.raises(clone.Unsuitable, match='more than one disk'):
            clone.instance(xml.replace(
                '</devices>', f'{volume}{other}</devices>'), MACHINE)

    @pytest.mark.parametrize('options', [
        {'memory': 256}, {'memory': 16384}, {'memory': 600}, {'vcpus': 5}])
    def test_limits(self, options):
        with pytest.raises(clone.Unsuitable):
            instance(**options)

    @pytest.mark.parametrize('old, new', [
        ('</devices>', '<hostdev/></devices>'),
        ('<driver ', '<driver packed="on" '),
        ('</devices>', '<tpm/></devices>'),
        ('</devices>', '<vsock/></devices>'),
        ('</devices>', "<disk device='disk'><source file='/x'/>"
                       "<target dev='sda' bus='scsi'/></disk></devices>"),
        ('</domain>', '<memoryBacking/></domain>'),
        ('</domain>', '<launchSecurity/></domain>'),
        ('</domain>', "<cputune><vcpupin/></cputune></domain>"),
        ('</domain>', "<cputune><emulatorpin/></cputune></domain>"),
        ('</domain>', '<cpu><numa/></cpu></domain>'),
        ('</domain>', '<cpu><maxphysaddr/></cpu></domain>'),
        ('</domain>', "<cpu><topology sockets='1' cores='2' threads='1'/>"
                      "</cpu></domain>"),
        ('</domain>', "<features><pmu state='on'/></features></domain>"),
        ('</domain>', "<features><kvm><hidden state='on'/></kvm></features>"
                      "</domain>"),
        ('<driver ', '<encryption/><driver '),
        ('<os>', "<os firmware='efi'>"), ('<boot ', '<loader/><boot '),
        ('<vcpu>', "<vcpu cpuset='1'>"),
        ('</devices>', "<interface type='hostdev'/></devices>"),
        ('</devices>', '<serial/></devices>'),
        ("file=\"/i/disk\"", "dev=\"/i/disk\"")])
    def test_other_machines(self, old, new):
        xml = server().xml()
        assert old in xml
        with pytest.raises(clone.Unsuitable):
            clone.instance(xml.replace(old, new, 1), MACHINE)

    @pytest.mark.parametrize('old, new', [
        ('>512<', '>x<'), ('>512<', '><'), ('"MiB"', '"miles"'),
        (str(OTHER), 'nobody'), ('"vda"', '"vdb"')])
    def test_no_definition(self, old, new):
        with pytest.raises(exception.Corrupt):
            clone.instance(server().xml().replace(old, new), MACHINE)


class TestLive:

    def test_the_machine_is_the_saved_the_rest_the_instances(self):
        saved = microvms.saved_xml()
        tree = document.parse(clone.live(saved, instance()))
        was = document.parse(saved)
        assert tree.findtext('name') == 'web'
        assert {entry.text for entry in
                tree.iterfind('sysinfo/system/entry')
                if entry.get('name') in ('uuid', 'serial')} == {str(OTHER)}
        for path in ('memory', 'vcpu', 'maxMemory', 'cpu', 'os', 'genid'):
            assert document.canonical(tree.find(path)) == \
                document.canonical(was.find(path))
        disk = tree.find('devices/disk')
        assert disk.find('source').get('file') == '/i/disk'
        assert disk.find('driver').get('queues') == '1'
        assert disk.find('driver').get('cache') == 'writeback'
        assert disk.find('backingStore') is None
        assert not tree.findall('devices/channel/source')
        assert tree.findtext('on_reboot') == 'destroy'
        assert was.find('features/tcg/tb-cache') is not None
        assert tree.find('features/tcg') is None
        text = document.text_of(tree)
        assert '/room' not in text.replace('/room/drive', '')

    def test_threads_of_the_host_are_not_taken_over(self):
        xml = server().xml().replace(
            '<driver name="qemu"', '<driver iothread="1" name="qemu"')
        assert 'iothread' in xml
        xml = xml.replace('<devices>', '<iothreads>1</iothreads><devices>')
        live = clone.live(microvms.saved_xml(),
                          clone.instance(xml, MACHINE))
        assert 'iothread' not in live

    def test_statistics_of_memory(self):
        one = instance()
        one.tree.find('devices/memballoon').append(
            document.Element('stats', {'period': '10'}))
        live = clone.live(microvms.saved_xml(), one)
        balloon = document.parse(live).find('devices/memballoon')
        assert balloon.find('stats').get('period') == '10'
        assert balloon.get('freePageReporting') == 'on'
        assert clone.live(live, one) == live

    def test_the_machine_has_a_serial_port(self):
        one = instance()
        devices = one.tree.find('devices')
        devices.remove(devices.find('serial'))
        tree = document.parse(clone.live(microvms.saved_xml(), one))
        assert [port.get('type') for port in
                tree.findall('devices/serial')] == ['null']

    def test_twice_is_once(self):
        saved = microvms.saved_xml()
        once = clone.live(saved, instance())
        assert clone.live(once, instance()) == once


class TestLane:

    def test_dressed_again_and_again(self, tmp_path):
        microvms.make(tmp_path / 'a')
        one = lane.Lane.create(tmp_path / 'a', tmp_path / 'lane')
        for _ in range(3):
            known = uuid.uuid4()
            one.dress(clone.instance(
                server(uuid=str(known)).xml(), MACHINE))
            data = (tmp_path / 'lane').read_bytes()
            head = savefile.SaveFile.parse(data)
            assert f'<uuid>{known}</uuid>' in head.xml
            assert data[head.stream:].count(str(known).encode()) == 3
            assert data[head.stream:].count(known.bytes_le) == 1
        one.remove()
        one.remove()

    def test_a_damaged_memory_is_no_lane(self, tmp_path):
        microvms.make(tmp_path / 'a')
        with (tmp_path / 'a' / 'memory').open('r+b') as file:
            file.seek(-3, 2)
            last = file.read()
            file.seek(-3, 2)
            file.write(bytes(255 - byte for byte in last))
        with pytest.raises(exception.Corrupt):
            lane.Lane.create(tmp_path / 'a', tmp_path / 'lane')
        assert not (tmp_path / 'lane').exists()

    def test_a_file_in_its_place_is_left_alone(self, tmp_path):
        microvms.make(tmp_path / 'a')
        (tmp_path / 'lane').write_text('mine')
        with pytest.raises(exception.Exists):
            lane.Lane.create(tmp_path / 'a', tmp_path / 'lane')
        assert (tmp_path / 'lane').read_text() == 'mine'
