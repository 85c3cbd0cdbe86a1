# SPDX-License-Identifier: Apache-2.0
"""Boots and resumes side by side, and the times of benchmarks."""

import json

import pytest

from bench import times
from fastboot_common import exception, report, timeline
from fastboot_common.cli import report as commands


@pytest.mark.parametrize('sequences, expected', [
    ([], []),
    ([['a', 'b']], ['a', 'b']),
    ([['answer', 'multi-user'], ['load', 'answer', 'done']],
     ['load', 'answer', 'multi-user', 'done']),
    ([['a', 'b'], ['b', 'a']], ['a', 'b']),
    ([[], ['a', 'b', 'c'], ['c', 'd'], ['b', 'd']], ['a', 'b', 'c', 'd']),
])
def test_merged(sequences, expected):
    assert timeline.merged(sequences) == expected


def test_rows_are_seconds_since_the_beginning():
    boots = [times.phases('boot', {'multi-user': 66.0, 'first answer': 60.0}),
             times.phases('resume', {'load': 0.9, 'first answer': 1.1})]
    assert timeline.rows(boots) == [
        ('load', [None, 0.9]), ('first answer', [60.0, 1.1]),
        ('multi-user', [66.0, None])]


def test_labels_differ():
    assert timeline.labels([{'label': 'a'}, {'label': 'b'}, {'label': 'a'},
                            {'label': 'a'}]) == ['a', 'b', 'a (2)', 'a (3)']


def written(tmp_path, document):
    path = tmp_path / 'one.json'
    path.write_text(json.dumps(document))
    return path


def test_what_commands_print_is_read(tmp_path):
    found = report.read_boots(written(tmp_path, {
        'name': 'web', 'uuid': 'x', 'disk': 'y',
        'seconds': {'define': 0.25, 'load': 1.0, 'DONE': 31.0, 'end': 31.0}}))
    assert [one['label'] for one in found] == ['resume of web']
    assert found[0]['phases'] == [
        {'name': 'define', 'seconds': 0.25},
        {'name': 'load', 'seconds': 0.75}, {'name': 'DONE', 'seconds': 30.0}]
    found = report.read_boots(written(tmp_path, {
        'image': 'debian', 'acquire_seconds': 0.5, 'prompt_seconds': 30}))
    assert timeline.rows(found) == [
        ('acquire', [0.5]), ('prompt', [30.5])]


@pytest.mark.parametrize('document', [
    {}, {'seconds': {'a': 1}}, {'name': 'web', 'seconds': [1]},
    {'name': 'web', 'seconds': {'a': 2, 'b': 1}},
    {'name': 'web', 'seconds': {'a': '1'}},
    {'image': 'x', 'acquire_seconds': 1, 'prompt_seconds': None},
    {'state': 'baked', 'seconds': {'boot': 60}}])
def test_what_is_no_measured_boot_is_refused(tmp_path, document):
    with pytest.raises(exception.Invalid, match='one.json'):
        report.read_boots(written(tmp_path, document))


def test_the_command(tmp_path):
    boots = written(tmp_path, [times.phases('boot', {'first answer': 60.0})])
    other = tmp_path / 'other.json'
    other.write_text(json.dumps({'name': 'web', 'seconds': {'load': 0.875}}))
    command = commands.Timeline(None, None)
    columns, rows = command.take_action(command.get_parser('x').parse_args(
        [str(boots), str(other)]))
    assert columns == ('Until', 'boot', 'resume of web')
    assert [(name, *(one.human_readable() for one in values))
            for name, *values in rows] == [
        ('first answer', '60.00', ''), ('load', '', '0.88')]
    assert [[one.machine_readable() for one in values]
            for _, *values in rows] == [[60.0, None], [None, 0.875]]


def test_what_a_console_says():
    console = (b'[    1.0] systemd: started\r\nFASTBOOT-READY 41.20\r\n')
    assert times.printed(b'') == times.printed(console[:30]) == set()
    assert times.printed(console) == {times.MULTI_USER}
    console += (b'[   50.1] cloud-init[512]: Cloud-init v. 22.4.2 finished '
                b'at Sun, 22 Nov 2026 07:00:00 +0000. Datasource ...\r\n')
    assert times.printed(console) == {times.MULTI_USER, times.CLOUD_INIT}


def test_medians_are_in_the_order_of_time():
    found = times.medians([{'b': 1.0, 'a': 5.0}, {'b': 3.0, 'a': 2.0},
                           {'b': 2.0, 'a': 9.0}])
    assert list(found.items()) == [('b', 2.0), ('a', 5.0)]


def test_what_sets_share():
    assert times.shared([{'a', 'b'}, {'c'}]) == 0
    assert times.shared([{'a', 'b'}, {'b', 'c'}, {'b', 'c'}]) == 2


def test_macs_are_of_servers():
    one = times.mac('6c0f1d62-9ad9-4f35-8a3f-6f2a8f0b1c2d')
    assert one == 'fa:16:3e:0b:1c:2d'
