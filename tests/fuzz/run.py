#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of what reads bytes of others.

Each target gets its seconds of CPU, one after another. Inputs that found
something new are kept in the state directory; "--keep" brings the few that
reach most into tests/fuzz/corpus, which the unit tests replay. Run by
"make fuzz"; status 1 if a target was broken.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ATHERIS = 'atheris==3.0.0'
RESULT = ROOT / 'bench' / 'results' / 'fuzz.json'
#: Of one input: seconds, and MiB that the whole process may take.
TIMEOUT = 10
MEMORY = 1024
#: Of one process: seconds of CPU. The fuzzer itself grows, with manifests by
#: 70 bytes an input: a gigabyte in six minutes. Without its instruments, the
#: same inputs take nothing.
SLICE = 120
#: Of what is committed of one target: files, and bytes of all.
KEPT_FILES = 60
KEPT_BYTES = 12 << 10


@dataclasses.dataclass
class Row:
    """What was done to a target, and what came of it.

    :ivar executions: inputs that were tried.
    :ivar cpu_seconds: of user and system together.
    :ivar peak_mib: of resident memory.
    :ivar edges: of our code that some input reached.
    :ivar crashes: files of inputs that broke it.
    :ivar sources: digest of the code that was fuzzed.
    """

    target: str
    executions: int = 0
    cpu_seconds: int = 0
    peak_mib: int = 0
    edges: int = 0
    crashes: int = 0
    sources: str = ''

    def add(self, words: str, usage: resource.struct_rusage) -> None:
        """Count one run of libFuzzer by what it printed."""
        self.executions += number(r'stat::number_of_executed_units: +', words)
        self.peak_mib = max(self.peak_mib, usage.ru_maxrss >> 10)
        self.edges = max(self.edges, number(r'cov: ', words))
        self.cpu_seconds = round(
            self.cpu_seconds + usage.ru_utime + usage.ru_stime)


def number(before: str, words: str) -> int:
    """The last number behind what a pattern matches; 0: there is none."""
    found = re.findall(before + r'(\d+)', words)
    return int(found[-1]) if found else 0


class Fuzzer:
    """The virtual environment, and the runs in it."""

    def __init__(self, state: pathlib.Path) -> None:
        self.home = state / 'fuzz'
        self.python = self.home / 'venv' / 'bin' / 'python'

    def install(self) -> None:
        """Make the virtual environment, unless it is there."""
        requirements = ROOT / 'requirements.txt'
        version = hashlib.sha256(
            ATHERIS.encode() + requirements.read_bytes()).hexdigest()
        stamp = self.home / 'installed'
        if stamp.exists() and stamp.read_text() == version:
            return
        print(f'installing {ATHERIS} and what fastboot needs', flush=True)
        self.home.mkdir(parents=True, exist_ok=True)
        subprocess.run(['/usr/bin/python3', '-m', 'venv',
                        self.home / 'venv'], check=True)
        subprocess.run([self.python, '-m', 'pip', 'install', '-q', ATHERIS,
                        '-r', requirements], check=True)
        stamp.write_text(version)

    def names(self) -> list[str]:
        """The targets there are."""
        code = 'import targets\nprint(*(one.name for one in targets.every()))'
        return subprocess.run(
            [self.python, '-W', 'ignore', '-c', code], cwd=HERE, check=True,
            capture_output=True, text=True).stdout.split()

    def sources(self, name: str) -> str:
        """Digest of the code that a target runs."""
        return subprocess.run(
            [self.python, '-W', 'ignore', HERE / 'sources.py', name],
            check=True, capture_output=True, text=True).stdout.strip()

    def fuzz(self, row: Row, seconds: float) -> None:
        """Try inputs until they took so many seconds of CPU, or one broke
        the target."""
        name = row.target
        found = self.corpus(name)
        broken = self.home / 'crashes' / name
        broken.mkdir(parents=True, exist_ok=True)
        before = set(broken.iterdir())
        while row.cpu_seconds < seconds and not row.crashes:
            status = self._loop(
                row, f'--seconds={min(SLICE, seconds - row.cpu_seconds)}',
                f'--seeds={found}', f'-artifact_prefix={broken}/',
                '-print_final_stats=1', str(found),
                str(HERE / 'corpus' / name))
            row.crashes = len(set(broken.iterdir()) - before)
            if status and not row.crashes:
                raise SystemExit(f'{name}: the fuzzer ended with {status}; '
                                 f'see {self._log(name)}')
            save(row)

    def corpus(self, name: str) -> pathlib.Path:
        """All inputs that reached something new, and the seeds."""
        found = self.home / 'corpus' / name
        found.mkdir(parents=True, exist_ok=True)
        (HERE / 'corpus' / name).mkdir(parents=True, exist_ok=True)
        return found

    def _log(self, name: str) -> pathlib.Path:
        return self.home / f'{name}.log'

    def _loop(self, row: Row, *words: str) -> int:
        """Run libFuzzer once, and count it; its exit status."""
        with self._log(row.target).open('w') as log:
            process = subprocess.Popen(
                [self.python, '-W', 'ignore', HERE / 'loop.py', row.target,
                 f'-timeout={TIMEOUT}', f'-rss_limit_mb={MEMORY}',
                 # The limit is enough. What is slow by the clock need not
                 # be: it may have jumped.
                 f'-report_slow_units={24 * 3600}',
                 f'-dict={HERE}/words', *words],
                stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        row.add(self._log(row.target).read_text(errors='replace'), usage)
        return process.returncode

    def keep(self, name: str) -> None:
        """Make tests/fuzz/corpus of the smallest inputs that reach most.

        One for each edge is enough there, however often it is taken.
        """
        kept = HERE / 'corpus' / name
        merged = self.home / 'merged' / name
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        found = self.corpus(name)
        self._loop(Row(name), '-merge=1', '-use_counters=0', str(merged),
                   str(kept), str(found))
        shutil.rmtree(kept)
        kept.mkdir()
        size = 0
        for path in sorted(merged.iterdir(), key=lambda one: (
                one.stat().st_size, one.name))[:KEPT_FILES]:
            size += path.stat().st_size
            if size > KEPT_BYTES:
                break
            shutil.copyfile(path, kept / path.name[:16])


def show(rows: list[Row]) -> None:
    """A table for people."""
    print(f'\n{"target":14} {"executions":>11} {"CPU s":>7} {"MiB":>5} '
          f'{"edges":>6} {"crashes":>7}')
    for row in rows:
        print(f'{row.target:14} {row.executions:11} {row.cpu_seconds:7.0f} '
              f'{row.peak_mib:5} {row.edges:6} {row.crashes:7}', flush=True)


def results() -> dict[str, Row]:
    """The rows of bench/results/fuzz.json, by target."""
    if not RESULT.exists():
        return {}
    return {row['target']: Row(**row)
            for row in json.loads(RESULT.read_text())['targets']}


def save(row: Row) -> None:
    """Replace the row of its target there."""
    known = results() | {row.target: row}
    lines = ',\n'.join(json.dumps(dataclasses.asdict(known[name]))
                       for name in sorted(known))
    RESULT.write_text(
        f'{{"fuzzer": "{ATHERIS}", "python": "{sys.version.split()[0]}", '
        f'"at": "{time.strftime("%Y-%m-%d", time.gmtime())}", "targets": [\n'
        f'{lines}\n]}}\n')


def main() -> int:
    """Status 1 if something was broken."""
    parser = argparse.ArgumentParser(prog='fuzz', description=__doc__)
    parser.add_argument('--state-dir', type=pathlib.Path,
                        default=ROOT / '.state')
    parser.add_argument('--seconds', type=float, default=600,
                        help='of CPU for each target; default: %(default)s')
    parser.add_argument('--continue', action='store_true', dest='more',
                        help='count what the same code had before')
    parser.add_argument('--keep', action='store_true',
                        help='put the best inputs into tests/fuzz/corpus')
    parser.add_argument('targets', nargs='*', metavar='target',
                        help='default: all')
    args = parser.parse_args()
    fuzzer = Fuzzer(args.state_dir.absolute())
    fuzzer.install()
    rows: list[Row] = []
    for name in args.targets or fuzzer.names():
        if args.seconds:
            code = fuzzer.sources(name)
            row = results().get(name) if args.more else None
            if row is None or row.sources != code:
                row = Row(name, sources=code)
            fuzzer.fuzz(row, args.seconds)
            rows.append(row)
            show(rows[-1:])
        if args.keep:
            fuzzer.keep(name)
    show(rows)
    for row in rows:
        if row.crashes:
            print(f'{row.target}: see {fuzzer.home}/crashes/{row.target} and '
                  f'{fuzzer.home}/{row.target}.log')
    return int(any(row.crashes for row in rows))


if __name__ == '__main__':
    sys.exit(main())
