# SPDX-License-Identifier: Apache-2.0
"""Glance's files."""

from cloud.config.fastboot import JOBBOARD
from cloud.config.ini import authtoken, render
from cloud.layout import Layout, url


def api(layout: Layout) -> str:
    """glance-api.conf."""
    data = layout.data / 'glance'
    notifications = {'driver': 'messagingv2', 'retry': 0} \
        if layout.options.fastboot else {}
    return render({
        'DEFAULT': {
            'transport_url': layout.bus,
            'enabled_backends': 'fs:file',
            'enabled_import_methods': '[glance-direct,web-download,'
                                      'copy-image]',
            'worker_self_reference_url': url('glance'),
        },
        'database': {'connection': layout.database('glance')},
        'glance_store': {'default_backend': 'fs'},
        'fs': {'filesystem_store_datadir': data / 'images'},
        'os_glance_staging_store': {
            'filesystem_store_datadir': data / 'staging'},
        'os_glance_tasks_store': {
            'filesystem_store_datadir': data / 'tasks'},
        'paste_deploy': {
            'flavor': 'keystone',
            'config_file': layout.venv / 'etc/glance/glance-api-paste.ini'},
        # Without a listener they would pile up in the bus.
        'oslo_messaging_notifications': notifications,
        'oslo_concurrency': {'lock_path': '/run/glance'},
        **authtoken(layout, 'glance'),
    })


def image_import(layout: Layout) -> str:
    """glance-image-import.conf, which Glance reads besides the other."""
    if not layout.options.fastboot:
        return ''
    return render({
        'image_import_opts': {'image_import_plugins': '[fastboot]'},
        'jobboard': {'connection': JOBBOARD},
    })
