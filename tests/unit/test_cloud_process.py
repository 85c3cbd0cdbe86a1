# SPDX-License-Identifier: Apache-2.0
"""tools/cloud: processes, their records, and steps in their order."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

from cloud import process, steps  # noqa: E402


@pytest.fixture
def spawn(tmp_path):
    """Start a process; killed in the end."""
    started = []

    def start(*argv):
        record = process.spawn(
            process.Records(tmp_path / 'run'), f'thing{len(started)}', argv,
            tmp_path / 'thing.log', env={'PATH': os.environ['PATH']})
        started.append(record)
        return record

    yield start
    for record in started:
        process.stop(record, signal.SIGKILL, group=True)


def wait_for(check):
    assert steps.Clock().wait(check, 20)


class TestRecord:
    def test_lives_and_ends(self, spawn):
        record = spawn('sleep', '1000')
        assert record.alive
        assert os.getsid(record.pid) == record.pid
        assert process.stop(record)
        assert not record.alive

    def test_is_nobodys_child(self, spawn):
        record = spawn('sleep', '1000')
        with pytest.raises(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)

    def test_another_process_with_its_id_is_left_alone(self, spawn):
        record = spawn('sleep', '1000')
        old = dataclasses.replace(record, start=record.start - 1)
        assert not old.alive
        assert process.stop(old, signal.SIGKILL)
        assert record.alive

    def test_zombie_has_ended(self):
        child = subprocess.Popen(['true'])
        wait_for(lambda: process.start_time(child.pid) == 0)
        assert pathlib.Path(f'/proc/{child.pid}').exists()
        child.wait()

    def test_stubborn_one_is_killed(self, spawn):
        record = spawn('sh', '-c', 'trap "" TERM; echo deaf; '
                       'while :; do sleep 1; done')
        wait_for(lambda: 'deaf' in record.said())
        assert not process.stop(record, patience=.2)
        assert not record.alive

    def test_group(self, spawn):
        record = spawn('sh', '-c', 'sleep 1000 & echo $!; wait')
        wait_for(lambda: record.said().endswith('\n'))
        child = int(record.said())
        process.stop(record, group=True)
        wait_for(lambda: process.start_time(child) == 0)

    def test_log_of_this_start_only(self, spawn):
        for word in 'one', 'two':
            record = spawn('echo', word)
            wait_for(lambda record=record: record.said())
        assert record.said() == 'two\n'
        assert pathlib.Path(record.log).read_text() == 'one\ntwo\n'

    def test_missing_program_shows_in_the_log(self, spawn):
        record = spawn('/nonexistent/program')
        wait_for(lambda: 'No such file' in record.said())
        wait_for(lambda: not record.alive)


class TestRecords:
    def test_kept_and_forgotten(self, tmp_path, spawn):
        records = process.Records(tmp_path / 'run')
        assert records.get('thing0') is None
        record = spawn('sleep', '1000')
        assert records.get('thing0') == record
        assert list(process.Records(tmp_path / 'run')) == [record]
        records.forget('thing0')
        records.forget('thing0')
        assert not list(records)

    def test_no_program_without_a_record(self, tmp_path, spawn):
        """Where that cannot be written, nothing was started."""
        (tmp_path / 'run' / 'thing0.json').mkdir(parents=True)
        mark = tmp_path / 'mark'
        with pytest.raises(OSError, match='thing0 was not started'):
            spawn('touch', str(mark))
        time.sleep(.5)
        assert not mark.exists()


class TestMembers:
    def test_of_a_namespace(self, spawn):
        record = spawn('sleep', '1000')
        space = process.namespace(os.getpid())
        wait_for(lambda: record.pid in process.members(space, 'sleep'))
        assert os.getpid() not in process.members(space, 'sleep')
        assert process.members('pid:[0]') == []

    def test_of_no_process(self):
        assert process.namespace(1 << 30) == ''


class TestSteps:
    def test_order(self):
        seen = []
        made = [steps.Step(name, lambda clock, n=name: seen.append(n) or '',
                           needs)
                for name, needs in (('c', ('a', 'b')), ('b', ('a',)),
                                    ('a', ()))]
        steps.run(made, steps.Clock())
        assert seen == ['a', 'b', 'c']

    def test_side_by_side(self):
        both = threading.Barrier(2, timeout=20)
        steps.run([steps.Step(name, lambda clock: str(both.wait()))
                   for name in 'ab'], steps.Clock())

    def test_failure_ends_waits_and_starts_nothing_new(self):
        seen = []

        def fail(clock):
            raise OSError('no such thing')

        def wait(clock):
            clock.wait(lambda: False, 1000)
            return ''

        with pytest.raises(steps.StepError, match='bad: no such thing'):
            steps.run([steps.Step('bad', fail), steps.Step('slow', wait),
                       steps.Step('next', lambda clock: seen.append(1) or '',
                                  ('slow',))], steps.Clock())
        assert seen == []

    @pytest.mark.parametrize('needs', [('a',), ('unknown',)])
    def test_never_startable(self, needs):
        with pytest.raises(ValueError, match='a: never startable'):
            steps.run([steps.Step('a', lambda clock: '', needs)],
                      steps.Clock())

    def test_wait_in_vain(self):
        begun = time.monotonic()
        assert not steps.Clock().wait(lambda: False, .05, .01)
        assert time.monotonic() > begun + .05

    def test_tells_the_user(self, capsys):
        steps.run([steps.Step('a', lambda clock: 'done so')], steps.Clock())
        assert ' s] done so (0.' in capsys.readouterr().out
