# SPDX-License-Identifier: Apache-2.0
"""``application`` for a WSGI server such as uWSGI.

Reads ``fastboot.conf`` in the directory that ``OS_FASTBOOT_CONFIG_DIR``
names (default: /etc/fastboot).
"""

import os
import pathlib
import threading
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log as logging

from fastboot_common.conf import opts
from fastboot_glance.api import app

_DIRECTORY: Final = '/etc/fastboot'


def make_application(directory: str | None = None) -> Any:
    """The application of the configuration in a directory."""
    conf = opts.register(cfg.ConfigOpts())
    logging.register_options(conf)
    path = pathlib.Path(directory or os.environ.get(
        'OS_FASTBOOT_CONFIG_DIR') or _DIRECTORY) / 'fastboot.conf'
    conf([], project='fastboot', prog='fastboot-api',
         default_config_files=[str(path)])
    logging.setup(conf, 'fastboot')
    return app.deploy(conf)


application = None
# Apache may import this in several threads at once.
with threading.Lock():
    if application is None:
        application = make_application()
