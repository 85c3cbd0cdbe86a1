# SPDX-License-Identifier: Apache-2.0
"""Rows of results, their table, and the machine they were measured on."""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar('_T')
RESULTS = pathlib.Path(__file__).parent / 'results'


@dataclasses.dataclass
class Row:
    """One figure and its bar; a row without a bar informs."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    op: str = '<='
    runs: int = 1
    command: str = ''
    note: str = ''

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met."""
        if self.bar is None:
            return None
        return (self.value <= self.bar if self.op == '<='
                else self.value >= self.bar)

    def as_json(self) -> dict[str, Any]:
        """The row in the order of the published form."""
        return {'name': self.name, 'value': self.value, 'unit': self.unit,
                'bar': self.bar, 'op': self.op, 'ok': self.ok,
                'runs': self.runs, 'command': self.command,
                'note': self.note}


class Table:
    """The rows of a suite, printed and saved as they come."""

    def __init__(self, suite: str, keep: bool = False,
                 command: str = '') -> None:
        """Begin a table.

        :param keep: rows of the last run that are not measured now.
        :param command: that makes it, if it is no suite of the benchmark.
        """
        self.suite = suite
        self.command = command or f'make bench SUITE={suite}'
        self.rows: list[Row] = []
        self._old = self._read() if keep else []

    @property
    def _path(self) -> pathlib.Path:
        return RESULTS / f'{self.suite}.json'

    def _read(self) -> list[dict[str, Any]]:
        rows = json.loads(self._path.read_text()) if self._path.exists() \
            else []
        return [row for row in rows if 'name' in row]

    def add(self, name: str, value: float, unit: str,
            bar: float | None = None, op: str = '<=', *, runs: int = 1,
            note: str = '') -> None:
        """Print a row and save all so far."""
        row = Row(name, float(f'{value:.4g}'), unit, bar, op, runs,
                  self.command, note)
        self.rows.append(row)
        self.print_row(row)
        self.save()

    def print_row(self, row: Row) -> None:
        """One line."""
        mark = {True: 'ok    ', False: 'MISSED', None: '      '}[row.ok]
        bar = f'{row.op} {row.bar:g}' if row.bar is not None else ''
        print(f'{mark} {row.name:58} {row.value:>10g} {row.unit:8} '
              f'{bar:10} n={row.runs}  {row.note}', flush=True)

    def save(self) -> None:
        """Write ``bench/results/<suite>.json``."""
        RESULTS.mkdir(exist_ok=True)
        lines = [json.dumps({'machine': machine()})]
        new = [row.as_json() for row in self.rows]
        names = {row['name'] for row in new}
        lines += [json.dumps(row) for row in (
            *(row for row in self._old if row['name'] not in names), *new)]
        self._path.write_text('[\n' + ',\n'.join(lines) + '\n]\n')


def machine() -> dict[str, Any]:
    """What it was measured on."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return {
        'cpu': _cpu(), 'cpus': len(os.sched_getaffinity(0)),
        'memory_gib': round(memory / 2**30),
        'kernel': platform.release().split('-')[0],
        'qemu': _first_line('qemu-img', '--version'),
        'nbdkit': _first_line('nbdkit', '--version'),
        'python': platform.python_version(),
        'accelerator': 'tcg',
    }


def _cpu() -> str:
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.machine()


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True,
                          check=True).stdout.splitlines()[0]


def interleaved(runs: int, cases: Mapping[str, Callable[[], _T]],
                ) -> dict[str, list[_T]]:
    """Measure all cases in turn, `runs` times: noise hits all alike."""
    measured: dict[str, list[_T]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            measured[name].append(case())
    return measured


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The ratio of medians."""
    return statistics.median(ours) / statistics.median(theirs)


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum, for a note."""
    return (f'{min(values):.3g}/{statistics.median(values):.3g}/'
            f'{max(values):.3g}')
