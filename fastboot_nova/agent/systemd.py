# SPDX-License-Identifier: Apache-2.0
"""What systemd wants to know: sd_notify(3)."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Tell the service manager, if there is one.

    :param state: ``READY=1`` and the like.
    """
    address = os.environ.get('NOTIFY_SOCKET', '')
    if not address.startswith(('/', '@')):
        return
    if address[0] == '@':
        address = f'\0{address[1:]}'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.settimeout(1)
        # One that went away is no reason to end.
        with contextlib.suppress(OSError):
            line.connect(address)
            line.send(state.encode())


def watchdog_seconds() -> float:
    """Half of the time within which it wants to hear; 0: it does not."""
    if os.environ.get('WATCHDOG_PID', str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get('WATCHDOG_USEC', '0')) / 2e6
