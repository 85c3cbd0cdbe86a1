# SPDX-License-Identifier: Apache-2.0
"""``fastboot-status upgrade check``.

Runs the checks of every part that is installed; each package brings its own.
What this machine has no part of is skipped, so that the same command serves
everywhere.
"""

import importlib
import sys
from typing import Any, Final

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from fastboot_common.conf import opts
from fastboot_common.upgradecheck import result

#: Where checks are; by name, because common imports neither of the others.
_MODULES: Final = (
    'fastboot_common.upgradecheck.common',
    'fastboot_glance.upgradecheck',
    'fastboot_nova.upgradecheck',
)
#: As of oslo.upgradecheck, where it fails itself.
_NOTHING_CHECKED: Final = 255
CLI_OPTS: Final = [
    cfg.StrOpt(
        'glance-config-dir', default='/etc/glance',
        help='Where glance-api.conf and glance-image-import.conf are.'),
    cfg.MultiStrOpt(
        'nova-config-file',
        default=['/etc/nova/nova.conf', '/etc/nova/nova-compute.conf'],
        help='What nova-compute reads; may be repeated.'),
    cfg.StrOpt(
        'nova-user', default='nova', help='Account of nova-compute.'),
    cfg.StrOpt(
        'qemu-config', default='/etc/libvirt/qemu.conf',
        help='libvirt\'s configuration of QEMU.'),
]


class Commands(upgradecheck.UpgradeCommands):
    """The checks, for oslo.upgradecheck.

    :param conf: parsed by the time that they run.
    """

    def __init__(self, conf: Any) -> None:
        self._upgrade_checks = tuple(
            (name, self._run(check, conf)) for name, check in _checks())

    @staticmethod
    def _run(check: result.Check, conf: Any) -> Any:
        safe = result.guarded(check)
        return lambda _: safe(conf)


def _checks() -> list[tuple[str, result.Check]]:
    found: list[tuple[str, result.Check]] = []
    for name in _MODULES:
        try:
            found += importlib.import_module(name).CHECKS
        except ImportError as error:
            found.append((name.partition('.')[0], _lacking(error)))
    return found


def _lacking(error: ImportError) -> result.Check:
    # The name is gone after the except clause.
    return lambda conf: result.skipped(f'cannot be imported: {error}')


def main(argv: list[str] | None = None) -> int:
    """The program.

    :returns: 0: all well, 1: warnings, 2: failures, 255: nothing was
        checked.
    """
    conf = opts.register(cfg.ConfigOpts())
    conf.register_cli_opts(CLI_OPTS)
    try:
        return int(upgradecheck.main(
            conf, 'fastboot', Commands(conf),
            argv=sys.argv[1:] if argv is None else argv))
    except cfg.Error as error:
        print(f'fastboot-status: {error}', file=sys.stderr)
        return _NOTHING_CHECKED
