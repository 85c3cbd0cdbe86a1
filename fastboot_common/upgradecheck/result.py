# SPDX-License-Identifier: Apache-2.0
"""What checks answer, and what several of them need."""

import functools
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from fastboot_common import exception

#: A check gets the configuration and answers one of the below. What it
#: raises on purpose is a failure with these words.
Check = Callable[[Any], upgradecheck.Result]

_IMPORT_SECONDS: Final = 120


def success(words: str) -> upgradecheck.Result:
    """All is well."""
    return upgradecheck.Result(upgradecheck.Code.SUCCESS, words)


def skipped(words: str) -> upgradecheck.Result:
    """There is nothing to check on this machine."""
    return success(f'Skipped: {words}')


def warning(words: str) -> upgradecheck.Result:
    """It works, but not as well as it could."""
    return upgradecheck.Result(upgradecheck.Code.WARNING, words)


def failure(words: str) -> upgradecheck.Result:
    """It does not work."""
    return upgradecheck.Result(upgradecheck.Code.FAILURE, words)


def guarded(check: Check) -> Check:
    """A check whose errors are failures: others shall run, too."""
    @functools.wraps(check)
    def run(conf: Any) -> upgradecheck.Result:
        try:
            return check(conf)
        except exception.FastbootError as error:
            return failure(str(error))
        except Exception as error:
            return failure(f'the check itself failed: {error!r}')

    return run


def import_error(module: str) -> str | None:
    """Why a module cannot be imported by this Python; None: it can.

    In a process of its own: what it changes in passing stays there.
    """
    try:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', f'import {module}'],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=_IMPORT_SECONDS,
            check=False)
    except subprocess.TimeoutExpired:
        return f'it takes more than {_IMPORT_SECONDS} s'
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or 'no reason given').splitlines()[-1]


def read_config(files: list[pathlib.Path],
                options: dict[str, list[Any]]) -> Any:
    """Some options of another service's configuration.

    :param files: what it reads, in this order; those that are there.
    :param options: by group.
    :raises ConfigError: a file cannot be parsed.
    """
    conf = cfg.ConfigOpts()
    for group, opts in options.items():
        conf.register_opts(opts, group=None if group == 'DEFAULT' else group)
    try:
        conf([], default_config_files=[
            str(path) for path in files if path.exists()],
            default_config_dirs=[])
    except cfg.Error as error:
        raise exception.ConfigError(str(error)) from error
    return conf
