# SPDX-License-Identifier: Apache-2.0
"""A host that serves guests by itself: volumes, export and shield.

What the agent does in a cloud, for one process and as long as it lives.
"""

import contextlib
import pathlib
from types import TracebackType
from typing import Self

from fastboot_common import ensure, files, localapi, nbdkit
from fastboot_nova import host


class Node:
    """Serves the misses of guests; a context manager."""

    def __init__(self, served: host.Host, run: pathlib.Path, *,
                 socket: pathlib.Path, wait: int, shield_wait: int,
                 group: str | None = None,
                 log: pathlib.Path | None = None) -> None:
        """Prepare it.

        :param served: the host, opened for writing.
        :param run: directory of the inner sockets.
        :param socket: where guests connect.
        :param wait: seconds that a miss waits for this process.
        :param shield_wait: seconds that a read waits for the export.
        :param group: that may connect.
        :param log: where the shield notes every request; None: nowhere.
        """
        self._host = served
        self._run = run
        self._socket = socket
        self._wait = wait
        self._shield_wait = shield_wait
        self._group = group
        self._log = log
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start all parts.

        :raises CommandFailed: nbdkit does not start.
        :raises ConfigError: it is missing or too old.
        """
        agent, export = self._run / 'agent.sock', self._run / 'export.sock'
        files.make_directory(self._run)
        with self._resources:
            enter = self._resources.enter_context
            enter(localapi.Server(
                agent, [ensure.route(self._host.ensure)], self._group))
            enter(nbdkit.Export(self._host.path, export, agent=agent,
                                wait=self._wait, group=self._group))
            enter(nbdkit.Shield(self._socket, export,
                                wait=self._shield_wait, log=self._log,
                                group=self._group))
            self._resources = self._resources.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._resources.close()
