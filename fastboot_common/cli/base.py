# SPDX-License-Identifier: Apache-2.0
"""What all commands need: configuration, places, formats of values."""

import contextlib
import os
import pathlib
import pwd
from typing import Any

from cliff import command, lister, show

from fastboot_common import (
    blocks,
    exception,
    files,
    repository,
    signing,
    store,
)
from fastboot_common.store import local, striped, throttle


class Environment:
    """The places and parts that the configuration names.

    :param by_hand: for a command, whoever runs it, not for a service.
    """

    def __init__(self, conf: Any, by_hand: bool = False) -> None:
        self.conf = conf
        self._by_hand = by_hand
        self.state_dir = pathlib.Path(conf.state_dir).absolute()

    def make_state_dir(self) -> None:
        """Make the state directory, unless it is there.

        Others may pass, and list nothing: who serves the repository, and
        nova-compute.
        """
        if not self.state_dir.exists():
            files.make_directory(self.state_dir)
            self.state_dir.chmod(0o751)

    @property
    def cache(self) -> pathlib.Path:
        """Directory of what can be made again."""
        return self.state_dir / 'cache'

    @property
    def run(self) -> pathlib.Path:
        """Directory of sockets."""
        return self.state_dir / 'run'

    @property
    def host_path(self) -> pathlib.Path:
        """Directory of the host's mirror and volumes."""
        return pathlib.Path(self.conf.host.path or self.state_dir / 'host')

    @property
    def shield_socket(self) -> pathlib.Path:
        """Where guests reach the export."""
        return self.run / 'nbd.sock'

    def location(self) -> str:
        """Where the repository is."""
        return (self.conf.repository.location
                or str(self.state_dir / 'repository'))

    def locations(self) -> list[str]:
        """Where hosts may read the repository: there, and its replicas."""
        return [self.location(), *self.conf.repository.replicas]

    def open_store(self) -> store.ReadStore:
        """The repository's store."""
        location = self.location()
        if '://' not in location and not pathlib.Path(location).exists():
            raise _no_repository(location)
        return self._open(location, self.conf.repository.retries,
                          self._throttle())

    def open_replicas(self) -> store.ReadStore:
        """The repository for reading, at all places that have it."""
        if not self.conf.repository.replicas:
            return self.open_store()
        return self._open_all(self.locations())

    def open_microvm_replicas(self) -> store.ReadStore:
        """The repository of the µVMs for reading, at the same places.

        :raises NotFound: there is none in any directory among them; what a
            server has turns out when it is read.
        """
        locations = [_microvms(one) for one in self.locations()]
        found = [one for one in locations if '://' in one.removeprefix(
            'file://') or pathlib.Path(one.removeprefix('file://')).exists()]
        if not found:
            raise exception.NotFound(
                f'there are no µVMs at {self.location()}')
        return self._open_all(found)

    def _open_all(self, locations: list[str]) -> store.ReadStore:
        retries, limit = self.conf.repository.retries, self._throttle()
        if len(locations) == 1:
            return self._open(locations[0], retries, limit)
        return striped.StripedStore(
            [self._open(one, 0, limit) for one in locations],
            retries=retries)

    def _open(self, location: str, retries: int,
              limit: throttle.Throttle | None) -> store.ReadStore:
        group = self.conf.repository
        return store.open_store(
            location, timeout=group.timeout, retries=retries,
            throttle=limit, ca_file=group.ca_file)

    def _throttle(self) -> throttle.Throttle | None:
        rate = self.conf.repository.limit_rate
        return throttle.Throttle(rate) if rate else None

    def trust(self) -> signing.Trust | None:
        """Who may say what a repository is; None: its server.

        Who signs vouches for all that was before, so it believes nobody
        else.
        """
        paths = self.conf.repository.trusted_keys
        signer = self.signer()
        return signing.Trust([pathlib.Path(path) for path in paths],
                             signer) if paths or signer else None

    def signer(self) -> signing.Signer | None:
        """Signs what is published; None: it is not signed."""
        path = self.conf.repository.signing_key
        return signing.Signer(pathlib.Path(path)) if path else None

    def open_repository(self, vouch: bool = False) -> repository.Repository:
        """The repository, for reading and (a directory) for writing.

        :param vouch: believe it, whoever signed it.
        :raises NotFound: there is none.
        """
        try:
            return repository.Repository(
                self.open_store(), trust=None if vouch else self.trust(),
                signer=self.signer())
        except exception.NotFound:
            raise _no_repository(self.location()) from None

    def writable_repository(self, vouch: bool = False
                            ) -> repository.Repository:
        """The repository, if it can be written.

        :param vouch: believe it, whoever signed it.
        :raises Invalid: it is behind HTTP, or a command of root's would write
            to another account's.
        """
        found = self.open_repository(vouch)
        if not hasattr(found.store, 'create'):
            raise exception.Invalid(
                f'{self.location()} can only be read; use its directory')
        if self._by_hand:
            as_owner(self.location())
        return found

    def microvm_location(self) -> str:
        """Where the µVMs are: in the directory of the repository.

        So whatever serves that one, or copies it, has them as well.
        """
        return _microvms(self.location())

    def open_microvms(self, vouch: bool = False) -> repository.Repository:
        """The repository of the µVMs, for reading.

        :param vouch: believe it, whoever signed it.
        :raises NotFound: there is none, so there are no µVMs.
        """
        location = self.microvm_location()
        missing = exception.NotFound(
            f'there are no µVMs at {self.location()}')
        # A directory that is missing counts as away, which it is not if
        # that of the images is there.
        path = pathlib.Path(location.removeprefix('file://'))
        if path.parent.exists() and not path.exists():
            raise missing
        try:
            return repository.Repository(
                self._open(location, self.conf.repository.retries,
                           self._throttle()),
                trust=None if vouch else self.trust(), signer=self.signer())
        except exception.NotFound:
            raise missing from None

    def writable_microvms(self) -> repository.Repository:
        """The repository of the µVMs, made if there is none.

        :raises Invalid: it is behind HTTP.
        """
        self.writable_repository()
        path = pathlib.Path(self.microvm_location().removeprefix('file://'))
        files.make_directory(path)
        with contextlib.suppress(exception.Exists):
            repository.init(local.LocalStore(path), blocks.PAGE)
        return self.open_microvms()


def as_owner(location: str) -> None:
    """See that what is written to a repository is its owner's.

    Files are 0640: builders could not read what root wrote.

    :param location: its directory, which is there.
    :raises Invalid: we are root, and it is another's.
    """
    path = pathlib.Path(location.removeprefix('file://'))
    owner = path.stat().st_uid
    if os.geteuid() == 0 and owner != 0:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f'#{owner}'
        raise exception.Invalid(
            f'{path} belongs to {name}, who could not read what root writes '
            f'there: run this as {name} (runuser -u {name} -- …)')


def _microvms(location: str) -> str:
    return location.rstrip('/') + '/microvms'


def _no_repository(location: str) -> exception.NotFound:
    return exception.NotFound(
        f'there is no repository at {location}; "fastbootctl repo init" '
        f'makes one')


class Command(command.Command):
    """A command that prints no table."""

    @property
    def env(self) -> Environment:
        """The places and parts."""
        return Environment(self.app.conf, by_hand=True)


class ShowOne(show.ShowOne):
    """A command that shows one thing (``-f json`` and others)."""

    env = Command.env


class Lister(lister.Lister):
    """A command that lists things (``-f json`` and others)."""

    env = Command.env


def mib(count: int) -> float:
    """Bytes as MiB with one digit."""
    return round(count / 2**20, 1)
