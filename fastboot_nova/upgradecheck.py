# SPDX-License-Identifier: Apache-2.0
"""Checks of a compute host: nova-compute's driver, volumes, export, agent."""

import grp
import os
import pathlib
import pwd
import re
import stat
from typing import Any, Final

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from fastboot_common import exception, nbdkit
from fastboot_common.cli import base
from fastboot_common.conf import nova as options
from fastboot_common.upgradecheck import result
from fastboot_nova import client

_DRIVER: Final = 'fastboot.FastbootLibvirtDriver'
_SHIM: Final = 'nova.virt.fastboot'
#: Cache modes with which QEMU reads through the page cache.
_BUFFERED: Final = ('writeback', 'writethrough', 'unsafe')
#: Accounts that libvirt runs QEMU as where qemu.conf names none.
_QEMU_USERS: Final = ('libvirt-qemu', 'qemu')
_OPTIONS: Final = {
    'DEFAULT': [cfg.StrOpt('compute_driver')],
    'libvirt': [cfg.ListOpt('disk_cachemodes', default=[])],
    options.GROUP: options.OPTS,
}
_ASK_SECONDS: Final = 5.0
_OF_EXPORT: Final = 'set [export] group to a group of that user'


def driver(conf: Any) -> upgradecheck.Result:
    """Is it nova-compute's driver, and can Nova load it?"""
    nova = _nova(conf)
    if nova is None:
        return _no_nova(conf)
    if nova.compute_driver != _DRIVER:
        return result.failure(
            f'compute_driver is {nova.compute_driver}, so every server takes '
            f'the stock path: set compute_driver = {_DRIVER} in nova.conf')
    error = result.import_error('nova')
    if error:
        return result.skipped(
            f'compute_driver is right, but Nova is not installed beside '
            f'this program: {error}')
    error = result.import_error(_SHIM)
    if error:
        return result.failure(
            f'{_SHIM} cannot be imported: {error}; install fastboot in the '
            f'Python that runs nova-compute. If Nova is installed editable, '
            f'or comes from the distribution, link the directory '
            f'nova/virt/fastboot into its tree')
    return result.success(f'compute_driver is {_DRIVER}, and loads')


def cache_mode(conf: Any) -> upgradecheck.Result:
    """Do guests share the page cache?"""
    nova = _nova(conf)
    if nova is None:
        return _no_nova(conf)
    modes = dict(mode.partition('=')[::2]
                 for mode in nova.libvirt.disk_cachemodes)
    mode = modes.get('file', 'none')
    if mode in _BUFFERED:
        return result.success(f'[libvirt] disk_cachemodes: file={mode}')
    if conf.agent.loop:
        return result.success(
            f'guests use {mode}, and [agent] loop gives volumes a buffered '
            f'device')
    return result.warning(
        f'with cache mode "{mode}" every guest reads its boot set from disk '
        f'again: set [libvirt] disk_cachemodes = file=writeback in '
        f'nova.conf, or [agent] loop = true in fastboot.conf')


def volumes(conf: Any) -> upgradecheck.Result:
    """May QEMU read the volumes?"""
    user = _qemu_user(conf)
    found = _volumes(conf)
    if not found:
        return result.skipped('there is no volume here yet')
    if user is None:
        return _no_user(conf)
    for path in found:
        problem = _obstacle(path, user, stat.S_IROTH, _OF_EXPORT)
        if problem:
            return result.failure(
                f'QEMU (user {user[0]}) cannot read {path}: {problem}')
    return result.success(
        f'QEMU (user {user[0]}) can read {len(found)} volumes')


def shield(conf: Any) -> upgradecheck.Result:
    """Does the export answer, and may QEMU ask it?"""
    environment = base.Environment(conf)
    path = environment.shield_socket
    if not environment.host_path.exists():
        return result.skipped(f'no host state in {environment.host_path}; '
                              f'the agent has never run here')
    try:
        nbdkit.greet(path, _ASK_SECONDS)
    except OSError as error:
        return result.failure(
            f'nothing answers at {path}: {error}; start fastboot-agent, '
            f'and see its log')
    user = _qemu_user(conf)
    if user is None:
        return _no_user(conf)
    problem = _obstacle(path, user, stat.S_IWOTH, _OF_EXPORT)
    if problem:
        return result.failure(
            f'QEMU (user {user[0]}) cannot connect to {path}: {problem}')
    return result.success(f'{path} answers')


def agent(conf: Any) -> upgradecheck.Result:
    """May nova-compute ask the agent, and read what it gives?"""
    nova = _nova(conf)
    if nova is None:
        return _no_nova(conf)
    if nova.compute_driver != _DRIVER:
        return result.skipped(f'compute_driver is {nova.compute_driver}')
    path = pathlib.Path(nova.fastboot.agent_socket)
    try:
        client.Agent(str(path), _ASK_SECONDS).image_ids()
    except exception.Unavailable as error:
        return result.failure(
            f'{error}; start fastboot-agent, which listens at '
            f'{base.Environment(conf).run / "agent.sock"}, and see '
            f'[fastboot] agent_socket in nova.conf')
    try:
        user = _known(conf.nova_user)
    except KeyError:
        return result.skipped(
            f'the agent answers, and nobody here is {conf.nova_user}, as '
            f'nova-compute may be (see --nova-user)')
    problem = _obstacle(path, user, stat.S_IWOTH,
                        'set [agent] group to a group of that user')
    if problem:
        return result.failure(f'nova-compute (user {user[0]}) cannot '
                              f'connect to {path}: {problem}')
    for volume in _volumes(conf):
        problem = _obstacle(volume, user, stat.S_IROTH, _OF_EXPORT)
        if problem:
            return result.failure(f'nova-compute (user {user[0]}) cannot '
                                  f'read {volume}: {problem}')
    return result.success(f'{path} answers, and {user[0]} may ask')


def _nova(conf: Any) -> Any:
    """nova-compute's options; None: it is not on this machine.

    Controllers have the file, too, but nova-compute does not start without
    a driver.
    """
    files = [pathlib.Path(name) for name in conf.nova_config_file]
    found = result.read_config(files, _OPTIONS)
    return None if found.compute_driver is None else found


def _volumes(conf: Any) -> list[pathlib.Path]:
    directory = base.Environment(conf).host_path / 'volumes'
    return sorted(directory.glob('*/volume'))


def _no_nova(conf: Any) -> upgradecheck.Result:
    return result.skipped(
        f'no compute_driver is set in '
        f'{" or ".join(conf.nova_config_file)} (see --nova-config-file)')


def _no_user(conf: Any) -> upgradecheck.Result:
    return result.skipped(
        f'{conf.qemu_config} names no account for QEMU, and there is none '
        f'of {" and ".join(_QEMU_USERS)}')


def _qemu_user(conf: Any) -> tuple[str, int, set[int]] | None:
    """Name, id and groups that libvirt runs QEMU with.

    :raises ConfigError: qemu.conf names an account that is not there.
    """
    path = pathlib.Path(conf.qemu_config)
    try:
        words = path.read_text(errors='replace')
    except FileNotFoundError:
        words = ''
    except OSError as error:
        raise exception.ConfigError(
            f'{path} cannot be read: {error.strerror}; run this as '
            f'root') from error
    said = dict(re.findall(
        r'^\s*(user|group)\s*=\s*["\']?\+?([^"\'\s#]+)', words, re.M))
    try:
        account = _account(said.get('user'))
        if account is None:
            return None
        group = said.get('group')
        gid = account.pw_gid if group is None else int(group) \
            if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise exception.ConfigError(f'{path}: {error.args[0]}') from error
    return (account.pw_name, account.pw_uid,
            set(os.getgrouplist(account.pw_name, gid)))


def _account(name: str | None) -> pwd.struct_passwd | None:
    if name is not None:
        return pwd.getpwuid(int(name)) if name.isdigit() \
            else pwd.getpwnam(name)
    for known in _QEMU_USERS:
        try:
            return pwd.getpwnam(known)
        except KeyError:
            continue
    return None


def _known(name: str) -> tuple[str, int, set[int]]:
    """Name, id and groups of an account.

    :raises KeyError: there is none.
    """
    found = pwd.getpwnam(name)
    return (found.pw_name, found.pw_uid,
            set(os.getgrouplist(found.pw_name, found.pw_gid)))


def _obstacle(path: pathlib.Path, user: tuple[str, int, set[int]],
              wanted: int, cure: str) -> str | None:
    """What keeps an account from a file; None: nothing does.

    Modes are looked at only, neither access lists nor security modules.

    :param wanted: the bit of others that stands for what is wanted.
    :param cure: what helps against the file's own mode.
    """
    for directory in reversed(path.parents):
        if not _allowed(directory, user, stat.S_IXOTH):
            return f'the directory {directory} is closed to it ' \
                   f'({_describe(directory)}); let its group pass (chmod g+x)'
    if not _allowed(path, user, wanted):
        return f'its mode is {_describe(path)}; {cure}'
    return None


def _allowed(path: pathlib.Path, user: tuple[str, int, set[int]],
             bit: int) -> bool:
    found = path.stat()
    _, uid, groups = user
    if uid == 0:
        return True
    if found.st_uid == uid:
        return bool(found.st_mode & bit << 6)
    if found.st_gid in groups:
        return bool(found.st_mode & bit << 3)
    return bool(found.st_mode & bit)


def _describe(path: pathlib.Path) -> str:
    found = path.stat()
    return f'{stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid}'


CHECKS: Final[list[tuple[str, result.Check]]] = [
    ('Driver in Nova', driver), ('Cache mode', cache_mode),
    ('Volumes', volumes), ('Export', shield), ('Agent', agent)]
