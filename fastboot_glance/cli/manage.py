# SPDX-License-Identifier: Apache-2.0
"""``fastboot-manage``: what an operator does to the database by hand."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log as logging

from fastboot_common import exception
from fastboot_common.conf import opts
from fastboot_glance import logbooks, records, reports, tables


def sync(conf: Any) -> None:
    """Make or upgrade all tables; may be repeated."""
    _records(conf).create()
    logbooks.Logbooks(conf.database.connection).create()


def version(conf: Any) -> None:
    """Print the version of the tables, and the program's if they differ."""
    found = _records(conf).version() or 'none'
    print(found if found == tables.head() else
          f'{found} (this program needs {tables.head()}: run '
          f'"fastboot-manage db sync")')


def forget(conf: Any) -> None:
    """Drop the report of a host that is gone."""
    name = reports.validate_host(conf.command.forgotten)
    if not _records(conf).forget_host(name):
        raise exception.NotFound(f'host {name} has never reported')


def _records(conf: Any) -> records.Records:
    return records.Records(conf.database.connection)


_COMMANDS: Final[tuple[tuple[str, str, Callable[[Any], None]], ...]] = (
    ('db', 'sync', sync), ('db', 'version', version),
    ('host', 'forget', forget),
)


def _add_parsers(subparsers: Any) -> None:
    groups = {
        'db': subparsers.add_parser('db', help='the database'),
        'host': subparsers.add_parser('host', help='compute hosts'),
    }
    actions = {
        name: group.add_subparsers(dest='action', required=True)
        for name, group in groups.items()
    }
    for name, action, function in _COMMANDS:
        words = (function.__doc__ or '').partition('\n')[0]
        parser: argparse.ArgumentParser = actions[name].add_parser(
            action, help=words, description=words)
        parser.set_defaults(function=function)
        if function is forget:
            parser.add_argument(
                'forgotten', metavar='NAME', help='as "host list" shows it')


def main(argv: list[str] | None = None) -> int:
    """The program.

    :returns: its exit status.
    """
    conf = opts.register(cfg.ConfigOpts())
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=_add_parsers))
    logging.register_options(conf)
    try:
        conf(sys.argv[1:] if argv is None else argv, project='fastboot',
             prog='fastboot-manage')
        logging.setup(conf, 'fastboot')
        # SQLite would make its file readable for all.
        os.umask(0o027)
        conf.command.function(conf)
    except (exception.FastbootError, cfg.Error) as error:
        print(f'fastboot-manage: {error}', file=sys.stderr)
        return 1
    return 0
