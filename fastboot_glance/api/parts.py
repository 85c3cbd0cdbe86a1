# SPDX-License-Identifier: Apache-2.0
"""What the API reads and tells: repository, records, jobboard, bus.

All are opened when they are first needed, so that the API starts while they
are away, and not before a web server has forked its workers.
"""

import functools
import threading
from typing import Any

from fastboot_common import exception, journal, manifest, repository
from fastboot_common.cli import base
from fastboot_glance import jobs, microvms, records


class Parts:
    """The parts that a configuration names; threads may share them."""

    def __init__(self, conf: Any) -> None:
        self.conf = conf
        self._lock = threading.Lock()
        self._repository: repository.Repository | None = None
        self._microvms = microvms.Microvms(base.Environment(conf))

    def state(self) -> journal.State:
        """The newest state of the repository.

        :raises Unavailable: it cannot be reached.
        :raises Corrupt: it is damaged.
        """
        with self._lock:
            return self._open_repository().state()

    def manifest(self, digest: str) -> manifest.Manifest:
        """An image's manifest.

        :raises NotFound: it is gone since.
        """
        with self._lock:
            return self._open_repository().read_manifest(digest)

    def microvms(self, image_id: str) -> list[microvms.Published]:
        """The µVMs of an image that are in the repository.

        :raises Unavailable: it cannot be reached.
        """
        with self._lock:
            return self._microvms.of(image_id)

    def _open_repository(self) -> repository.Repository:
        if self._repository is None:
            try:
                self._repository = base.Environment(
                    self.conf).open_repository()
            except exception.NotFound as error:
                raise exception.Unavailable(str(error)) from error
        return self._repository

    @functools.cached_property
    def records(self) -> records.Records:
        """What builders and hosts say."""
        group = self.conf.database
        try:
            return records.Records(
                group.connection,
                connection_recycle_time=group.connection_recycle_time,
                max_pool_size=group.max_pool_size)
        except exception.ConfigError as error:
            raise exception.Unavailable(str(error)) from error

    def post_build(self, image_id: str, force: bool) -> None:
        """Ask the builders for an image, and note that it was asked for.

        :param force: also if its cache is there already.
        :raises Unavailable: the jobboard cannot be reached.
        """
        self.records.note_request(image_id)
        try:
            self._board.post(image_id, reason='api', force=force)
        except exception.FastbootError:
            self.records.withdraw_request(image_id)
            raise

    @functools.cached_property
    def _board(self) -> jobs.Board:
        try:
            return jobs.Board(self.conf)
        except exception.ConfigError as error:
            raise exception.Unavailable(str(error)) from error

    def sync(self, host: str, images: list[str] | None) -> None:
        """Tell a host to sync.

        :raises Unavailable: the bus is away.
        """
        try:
            self._agents.sync(host, images)
        except Exception as error:
            # The bus's drivers let errors of their clients through, which
            # have no common root.
            raise exception.Unavailable(
                f'the message bus does not answer: {error}') from error

    @functools.cached_property
    def _agents(self) -> Any:
        from fastboot_common import rpc
        return rpc.Agents(rpc.transport(self.conf))
