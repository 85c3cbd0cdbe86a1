# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl report`` and ``report timeline``."""

import argparse
import pathlib
from typing import Any

from cliff import columns

from fastboot_common import files, report, timeline
from fastboot_common.cli import base


class Report(base.Command):
    """Write a page that shows the repository: boots, sharing, timelines."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            '-o', '--output', type=pathlib.Path, metavar='FILE',
            default=pathlib.Path('fastboot-report.html'),
            help='where it is written (default: %(default)s)')
        parser.add_argument(
            '--image', action='append', metavar='IMAGE',
            help='id or name, may be repeated (default: the newest '
                 f'{report.IMAGES})')
        parser.add_argument(
            '--boots', type=pathlib.Path, metavar='FILE',
            help='JSON with measured boots, to compare their phases')
        parser.add_argument(
            '--bench', type=pathlib.Path, metavar='DIR',
            help='directory with JSON results of benchmarks')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Gather, write, and say where."""
        boots = parsed_args.boots and report.read_boots(parsed_args.boots)
        bench = parsed_args.bench and report.read_bench(parsed_args.bench)
        data = report.gather(self.env.open_repository(), parsed_args.image,
                             bench, boots)
        path = parsed_args.output.absolute()
        files.write_atomically(path, report.render(data).encode())
        self.app.stdout.write(f'{path}\n')


class Timeline(base.Lister):
    """Show measured boots and resumes side by side: seconds until each
    phase was over.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            'boots', type=pathlib.Path, nargs='+', metavar='FILE',
            help='JSON of a demo, a benchmark, "vm run -f json" or "microvm '
                 'resume -f json"')
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Read them all and print a column for each."""
        boots = [boot for path in parsed_args.boots
                 for boot in report.read_boots(path)]
        return ('Until', *timeline.labels(boots)), [
            (name, *map(_Seconds, values))
            for name, values in timeline.rows(boots)]


class _Seconds(columns.FormattableColumn):
    """Seconds, or nothing."""

    def human_readable(self) -> str:
        """For tables."""
        return '' if self._value is None else f'{self._value:.2f}'
