# SPDX-License-Identifier: Apache-2.0
"""``python -m bench [--suite NAME] --state-dir DIR``."""

import argparse
import importlib
import pathlib
import sys

from bench import result

SUITES = ('core', 'block-size', 'openstack', 'operations', 'hydration',
          'microvm', 'formats')


def main() -> int:
    """Run the suites; status 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog='bench', description=__doc__)
    parser.add_argument('--suite', action='append', choices=SUITES,
                        help='default: those that need no cloud')
    parser.add_argument('--state-dir', type=pathlib.Path, required=True,
                        help='directory for images and volumes; kept')
    parser.add_argument('--runs', type=int, default=7,
                        help='of each measurement (default: 7)')
    parser.add_argument('--only', metavar='WORD',
                        help='only measurements whose name has this word; '
                             'rows of others stay in the results')
    args = parser.parse_args()
    args.state_dir.mkdir(parents=True, exist_ok=True)
    missed = 0
    for suite in args.suite or SUITES[:2]:
        table = result.Table(suite, keep=args.only is not None)
        module = importlib.import_module(
            'bench.' + suite.replace('-', '_'))
        module.run(table, args.state_dir.absolute(), args.runs, args.only)
        missed += sum(row.ok is False for row in table.rows)
    return int(missed > 0)


if __name__ == '__main__':
    sys.exit(main())
