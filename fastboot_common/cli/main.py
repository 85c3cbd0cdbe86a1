# SPDX-License-Identifier: Apache-2.0
"""``fastbootctl``: fastboot by hand, with or without an OpenStack.

Commands come from the entry points ``fastbootctl.commands`` of any package.
"""

import argparse
import importlib.metadata
import os
import sys
from typing import Any

from cliff import app, commandmanager
from oslo_config import cfg

from fastboot_common.conf import opts


class Fastbootctl(app.App):
    """The application: global options and configuration."""

    def __init__(self) -> None:
        super().__init__(
            description='Fast boots of virtual machines: images, repository, '
                        'host and guests.',
            version=importlib.metadata.version('openstack-fastboot'),
            command_manager=commandmanager.CommandManager(
                'fastbootctl.commands'),
            deferred_help=True)
        self.conf: Any = opts.register(cfg.ConfigOpts())

    def build_option_parser(self, description: str, version: str,
                            argparse_kwargs: dict[str, Any] | None = None,
                            ) -> argparse.ArgumentParser:
        """The global options."""
        parser: argparse.ArgumentParser = super().build_option_parser(
            description, version, argparse_kwargs)
        parser.add_argument(
            '--config-file', action='append', metavar='FILE',
            help='configuration, may be repeated (default: '
                 '/etc/fastboot/fastboot.conf, if there is one)')
        parser.add_argument(
            '--state-dir', metavar='DIR',
            help='where everything is kept; overrides [DEFAULT] state_dir')
        parser.add_argument(
            '--repository', metavar='LOCATION',
            help='directory or URL; overrides [repository] location')
        return parser

    def initialize_app(self, argv: list[str]) -> None:
        """Read the configuration."""
        self.conf([], project='fastboot', prog='fastboot',
                  default_config_files=self.options.config_file)
        if self.options.state_dir:
            self.conf.set_override('state_dir', self.options.state_dir)
        if self.options.repository:
            self.conf.set_override('location', self.options.repository,
                                   group='repository')


def main(argv: list[str] | None = None) -> int:
    """The program.

    :returns: its exit status.
    """
    # Not for everybody: what it makes holds the content of images.
    os.umask(0o027)
    return int(Fastbootctl().run(
        sys.argv[1:] if argv is None else argv))
