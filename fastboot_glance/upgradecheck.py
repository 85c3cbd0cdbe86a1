# SPDX-License-Identifier: Apache-2.0
"""Checks of the centre: database, jobboard, Glance's import plugin."""

import pathlib
from typing import Any, Final

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from fastboot_common.cli import base
from fastboot_common.conf import jobboard as jobboard_options
from fastboot_common.upgradecheck import result
from fastboot_glance import jobs, needs, records, tables

_PLUGIN: Final = 'fastboot'
_MODULE: Final = 'fastboot_glance.import_plugin'
#: Images that a message names.
_NAMED: Final = 5


def database(conf: Any) -> upgradecheck.Result:
    """Is the database there, with the tables of this version?"""
    if not conf.database.connection:
        return result.skipped('[database] connection is not set; only '
                              'builders and API need it')
    found = records.Records(conf.database.connection).version()
    if found != tables.head():
        return result.failure(
            f'the tables have version {found or "none"}, this program needs '
            f'{tables.head()}: run "fastboot-manage db sync"')
    return result.success(f'the tables have version {found}')


def jobboard(conf: Any) -> upgradecheck.Result:
    """Does the jobboard answer?"""
    if not conf.database.connection:
        return result.skipped('[database] connection is not set, so there '
                              'is neither builder nor API here')
    board = jobs.Board(conf)
    try:
        return result.success(f'{len(board.jobs())} jobs are on it')
    finally:
        board.close()


def import_plugin(conf: Any) -> upgradecheck.Result:
    """Does Glance load the plugin, and reach the same jobboard?"""
    directory = pathlib.Path(conf.glance_config_dir)
    files = [directory / 'glance-image-import.conf',
             directory / 'glance-api.conf']
    if not any(path.exists() for path in files):
        return result.skipped(f'no configuration of glance-api in '
                              f'{directory} (see --glance-config-dir)')
    glance = result.read_config(files, {
        'image_import_opts': [cfg.ListOpt(
            'image_import_plugins', bounds=True, default=[])],
        jobboard_options.GROUP: jobboard_options.OPTS})
    if _PLUGIN not in glance.image_import_opts.image_import_plugins:
        return result.warning(
            f'[image_import_opts] image_import_plugins in {files[0]} lacks '
            f'"{_PLUGIN}": builds begin with the notification of the '
            f'image, or with the audit')
    error = result.import_error('glance')
    if error:
        return result.skipped(
            f'{_PLUGIN} is in image_import_plugins, but Glance is not '
            f'installed beside this program: {error}')
    error = result.import_error(_MODULE)
    if error:
        return result.failure(
            f'{_MODULE} cannot be imported: {error}; install fastboot in '
            f'the Python that runs glance-api')
    if conf.database.connection and any(
            glance.jobboard[name] != conf.jobboard[name]
            for name in ('connection', 'namespace')):
        return result.warning(
            f'[jobboard] in {files[0]} names another jobboard than '
            f'fastboot.conf: the plugin\'s jobs reach no builder')
    return result.success(f'{_PLUGIN} is in image_import_plugins')


def deregistered(conf: Any) -> upgradecheck.Result:
    """Which images does garbage collection keep for servers of hosts?"""
    if not conf.database.connection:
        return result.skipped('[database] connection is not set, so hosts '
                              'report elsewhere')
    state = base.Environment(conf).open_repository().state()
    retention = conf.repository.retention_days * 86400
    old = [gone.image for gone in state.removed.values()
           if gone.age >= retention]
    kept = needs.find(records.Records(conf.database.connection), old)
    if not kept:
        return result.success('none is kept longer than [repository] '
                              'retention_days')
    words = [needs.describe(image, kept[image.serial])
             for image in old if image.serial in kept]
    return result.warning(
        f'{"; ".join(words[:_NAMED])}{"; …" * (len(words) > _NAMED)}: have '
        f'them completed there ([agent] hydrate, quota, min_free), and '
        f'forget hosts that are gone ("fastboot-manage host forget")')


CHECKS: Final[list[tuple[str, result.Check]]] = [
    ('Database', database), ('Jobboard', jobboard),
    ('Import plugin in Glance', import_plugin),
    ('Deregistered images', deregistered)]
