# SPDX-License-Identifier: Apache-2.0
"""A connection to libvirt for one command.

Services have theirs: Nova's, and the agent's.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import libvirt

from fastboot_common import exception


@functools.cache
def run_events() -> None:
    """Run libvirt's events, in a thread that never ends.

    Streams, its embedded driver and who wants to be told need them.
    """
    libvirt.registerErrorHandler(lambda context, error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name='libvirt', daemon=True).start()


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Any]:
    """The connection.

    :raises Unavailable: libvirt does not answer.
    """
    run_events()
    try:
        found = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise exception.Unavailable(f'{uri}: {error}') from error
    try:
        yield found
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            found.close()
