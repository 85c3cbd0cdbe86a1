# SPDX-License-Identifier: Apache-2.0
"""A connection to libvirt for one command.

Services have theirs: Nova's, and the agent's.
"""

import contextlib
import functools
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import libvirt

from fastboot_common import exception

#: Guests have the rights of who starts them. Without name spaces, for libvirt
#: moves all that is mounted below /dev into those that it makes. Without
#: cores: libvirt 11 wants to raise their limit, which needs a capability.
_EMBEDDED: Final = """\
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
security_driver = "none"
remember_owner = 0
user = "root"
group = "root"
max_core = 0
"""


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


def embedded(root: pathlib.Path) -> str:
    """The URI of a libvirt in this process, to try one's own guests with.

    They outlive the process: the next that opens it has them.

    :param root: its directory. A short name: libvirt makes those of its
        sockets below, of which none may have more than 107 characters.
    """
    etc = root / 'etc'
    etc.mkdir(parents=True, exist_ok=True)
    (etc / 'qemu.conf').write_text(_EMBEDDED)
    return f'qemu:///embed?root={root}'
