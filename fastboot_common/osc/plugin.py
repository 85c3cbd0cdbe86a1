# SPDX-License-Identifier: Apache-2.0
"""What python-openstackclient asks of a plugin."""

import argparse
from typing import Any, Final

from osc_lib import utils

from fastboot_common.osc import client

DEFAULT_API_VERSION: Final = '1'
API_VERSION_OPTION: Final = 'os_fastboot_api_version'
API_NAME: Final = 'fastboot'
API_VERSIONS: Final = {'1': 'fastboot_common.osc.client.Client'}


def make_client(instance: Any) -> client.Client:
    """A client for the cloud that the command line names."""
    return client.Client(instance.session, instance.region_name,
                         instance.interface)


def build_option_parser(
        parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the global options."""
    parser.add_argument(
        '--os-fastboot-api-version', metavar='<fastboot-api-version>',
        default=utils.env('OS_FASTBOOT_API_VERSION',
                          default=DEFAULT_API_VERSION),
        help='fastboot API version, default=1 '
             '(Env: OS_FASTBOOT_API_VERSION)')
    return parser
