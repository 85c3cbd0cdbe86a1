# SPDX-License-Identifier: Apache-2.0
"""All option groups, for oslo-config-generator."""

import importlib
from collections.abc import Sequence
from typing import Any

GROUPS = (
    'default', 'repository', 'host', 'export', 'capture', 'bakery', 'agent',
    'microvm', 'database', 'jobboard', 'glance', 'builder', 'eligibility',
    'listener', 'api')


def _modules() -> list[Any]:
    return [
        importlib.import_module(f'fastboot_common.conf.{name}')
        for name in GROUPS
    ]


def list_opts() -> list[tuple[str, Sequence[Any]]]:
    """Group name and options, one pair a group."""
    return [(module.GROUP, module.OPTS) for module in _modules()]


def register(conf: Any) -> Any:
    """Register every group with `conf` and return it."""
    for group, opts in list_opts():
        conf.register_opts(opts, group=None if group == 'DEFAULT' else group)
    return conf
