# SPDX-License-Identifier: Apache-2.0
"""The jobboard: which images wait for a builder, and who builds which.

TaskFlow's jobboard over redis, etcd or ZooKeeper, with what it leaves open:
a job a image, claims that live as long as their builder, and no image in
two builders' hands. Everybody posts: import plugin, listener, audit, API.
A job names an image, and what is to be done, Glance says; but builds and
bakes are jobs of their own, and a bake names the platform that it is for.
"""

import contextlib
import dataclasses
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from oslo_log import log as logging
from taskflow import exceptions as tf_exception
from taskflow import states
from taskflow.jobs import backends

from fastboot_common import exception

LOG = logging.getLogger(__name__)

_DRIVERS: Final = ('redis', 'rediss', 'etcd', 'zookeeper')
#: Of a claim's seconds: when it is extended, and when it counts as lost
#: because that did not work.
_EXTEND: Final = 0.25
_LOST: Final = 0.75


@dataclasses.dataclass(frozen=True)
class Job:
    """A job on the board.

    :ivar sequence: its number; older jobs have lower ones.
    :ivar posted: when (seconds, Unix time).
    :ivar force: build even what is registered already.
    :ivar platform: to bake for, as its text; empty: it is a build.
    """

    uuid: str
    image_id: str
    reason: str
    force: bool
    posted: float
    sequence: int
    platform: str = ''
    handle: Any = dataclasses.field(default=None, repr=False, compare=False)


class Board:
    """The jobboard that ``[jobboard]`` names. Threads may share it.

    It connects when it is used. Everything but its making raises
    Unavailable while the server is away.
    """

    def __init__(self, conf: Any) -> None:
        """Read the configuration.

        :raises ConfigError: it names no jobboard that could be used.
        """
        group = conf.jobboard
        self._seconds: int = group.claim_seconds
        self._options = _options(group)
        self._lock = threading.Lock()
        self._found: Any = None

    def post(self, image_id: str, reason: str, force: bool = False,
             among: Sequence[Job] | None = None,
             platform: str = '') -> bool:
        """Ask for a build, or for a bake. A job that is there already will
        do.

        :param reason: who asks, for the log.
        :param force: build even if the image is registered.
        :param among: the jobs on the board, for who posts many and has
            looked before; a job that came since is no harm.
        :param platform: to bake for; empty: it is a build.
        :returns: whether there is a new job.
        """
        if any((job.image_id, job.platform) == (image_id, platform)
               and job.force >= force
               for job in (self.jobs() if among is None else among)):
            return False
        with self._use('posting a job') as board:
            board.post(image_id, details={
                'image_id': image_id, 'reason': reason, 'force': force,
                'posted': time.time(), 'platform': platform})
        LOG.info('image %s: %s posted (%s)', image_id,
                 'bake' if platform else 'build', reason)
        return True

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        with self._use('reading the jobs') as board:
            found = [_job(one) for one in board.iterjobs(ensure_fresh=True)
                     if (one.details or {}).get('image_id')]
        return sorted(found, key=lambda job: job.sequence)

    def claim(self, job: Job, who: str) -> 'Claim | None':
        """Take a job in hands.

        :param who: a name that no other builder has.
        :returns: None if another has it, or another job of the same image
            is in hands or comes first. Bakes for several platforms do not
            mind each other.
        """
        with self._use('claiming a job') as board:
            # ZooKeeper notices the death of a builder by itself.
            options = {'expiry': self._seconds} \
                if hasattr(job.handle, 'extend_expiry') else {}
            try:
                board.claim(job.handle, who, **options)
            except (tf_exception.UnclaimableJob, tf_exception.NotFound):
                return None
        claim = Claim(self, job, who, self._seconds)
        try:
            # Two were posted at the same time. The order matters: only
            # after our claim can be seen do we look at the others'.
            rivals = [other for other in self.jobs() if
                      other.image_id == job.image_id
                      and other.uuid != job.uuid
                      and not (job.platform and other.platform
                               and job.platform != other.platform)]
            older = any(other.sequence < job.sequence for other in rivals
                        if other.platform == job.platform)
            if not older and not any(map(self._claimed, rivals)):
                return claim
        except BaseException:
            claim.release()
            raise
        if older and not job.force:
            claim.finish()
        else:
            claim.release()
        return None

    def _claimed(self, job: Job) -> bool:
        with self._use('reading a job'):
            return bool(job.handle.state == states.CLAIMED)

    def close(self) -> None:
        """Close the connection."""
        with self._lock, contextlib.suppress(Exception):
            found, self._found = self._found, None
            if found:
                found.close()

    @contextlib.contextmanager
    def _use(self, what: str) -> Iterator[Any]:
        """TaskFlow's board, connected.

        Its drivers let their clients' own errors through, which have no
        common root.
        """
        try:
            with self._lock:
                if self._found is None:
                    self._found = self._fetch()
                if not self._found.connected:
                    self._found.connect()
            yield self._found
        except exception.FastbootError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            raise exception.Unavailable(
                f'{what}: the jobboard does not answer: '
                f'{cause or repr(cause)}') from error

    def _fetch(self) -> Any:
        options = dict(self._options)
        extra = {}
        if options['board'] == 'etcd':
            # With a client of its own the driver would start a thread that
            # watches the board, and spins when etcd goes away. We ask.
            import etcd3gw

            extra['client'] = etcd3gw.Etcd3Client(**{
                key: kind(options[key]) for key, kind in (
                    ('host', str), ('port', int), ('protocol', str),
                    ('ca_cert', str), ('cert_key', str), ('cert_cert', str),
                    ('timeout', float), ('api_path', str))
                if key in options})
        return backends.fetch('fastboot', options, **extra)


class Claim:
    """A job in our hands, until it is finished or released.

    As a context it is kept alive. `cancel` is set when it is lost, and by
    whoever wants the work to be given up.
    """

    def __init__(self, board: Board, job: Job, who: str,
                 seconds: int) -> None:
        self.job = job
        self.cancel = threading.Event()
        self.lost = False
        self._board = board
        self._who = who
        self._seconds = seconds
        self._done = threading.Event()
        self._fuse = self._lit()
        self._keeper = threading.Thread(
            target=self._keep, name=f'claim-{job.image_id}', daemon=True)

    def __enter__(self) -> Self:
        self._fuse.start()
        self._keeper.start()
        return self

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._done.set()
        self._fuse.cancel()
        # It may be waiting for a server that hangs; it changes nothing any
        # more.
        self._keeper.join(1)

    def finish(self) -> None:
        """Remove the job: it is done.

        :raises Unavailable: it stays, and will be done once more.
        """
        with self._board._use('finishing a job') as board:
            try:
                board.consume(self.job.handle, self._who)
            except (tf_exception.NotFound, tf_exception.JobFailure) as error:
                if not _is_answer(error):
                    raise
                LOG.warning('image %s: its job was not ours any more',
                            self.job.image_id)

    def release(self) -> None:
        """Let others have it; without an answer, the claim runs out."""
        try:
            with self._board._use('releasing a job') as board:
                board.abandon(self.job.handle, self._who)
        except exception.Unavailable as error:
            LOG.warning('image %s: %s', self.job.image_id, error)

    def _keep(self) -> None:
        while not self._done.wait(self._seconds * _EXTEND):
            try:
                with self._board._use('extending a claim') as board:
                    ours = self._owner(board) == self._who \
                        and self._extend()
            except exception.Unavailable as error:
                LOG.warning('image %s: %s', self.job.image_id, error)
                continue
            if not ours:
                self._lose()
                return
            self._fuse.cancel()
            if self._done.is_set():
                return
            self._fuse = self._lit()
            self._fuse.start()

    def _owner(self, board: Any) -> Any:
        # The redis driver stumbles over a claim that has run out.
        with contextlib.suppress(TypeError):
            return board.find_owner(self.job.handle)
        return None

    def _extend(self) -> bool:
        extend = getattr(self.job.handle, 'extend_expiry', None)
        return extend is None or bool(extend(self._seconds))

    def _lit(self) -> threading.Timer:
        """Goes off if the claim is not extended in time."""
        fuse = threading.Timer(self._seconds * _LOST, self._lose)
        fuse.daemon = True
        return fuse

    def _lose(self) -> None:
        if not self._done.is_set():
            LOG.error('image %s: the claim on its job is lost; the work is '
                      'given up', self.job.image_id)
            self.lost = True
            self.cancel.set()


def _is_answer(error: Exception) -> bool:
    """Whether the server said no, rather than nothing."""
    return isinstance(error, tf_exception.NotFound) \
        or error.__cause__ is None


def _job(found: Any) -> Job:
    details = found.details
    return Job(
        uuid=found.uuid, image_id=str(details['image_id']),
        reason=str(details.get('reason', '')),
        force=bool(details.get('force')),
        posted=float(details.get('posted', 0)), sequence=found.sequence,
        platform=str(details.get('platform', '')),
        handle=found)


def _options(group: Any) -> dict[str, Any]:
    """What TaskFlow's drivers want to know."""
    try:
        url = urllib.parse.urlsplit(group.connection)
        host, port = url.hostname, None
        if url.scheme != 'zookeeper':
            port = url.port
    except ValueError as error:
        raise exception.ConfigError(
            f'[jobboard] connection: {error}') from error
    if url.scheme not in _DRIVERS or not (
            host or 'unix_socket_path' in url.query):
        raise exception.ConfigError(
            f'[jobboard] connection: {url.scheme}://{host or ""}: it must '
            f'be redis://host:port/db, etcd://host:port or '
            f'zookeeper://host:port')
    options: dict[str, Any] = {'board': url.scheme}
    if url.scheme == 'zookeeper':
        options |= {
            'hosts': url.netloc.rpartition('@')[2],
            'path': f'/{group.namespace}/jobs',
            'timeout': group.claim_seconds,
            # It asks with a command that ZooKeeper 3.5 and later refuse.
            'check_compatible': False}
    elif url.scheme == 'etcd':
        options |= {
            'host': host, 'port': port or 2379, 'path': group.namespace,
            'timeout': group.timeout}
    else:
        options |= {
            'board': 'redis', 'host': host or 'localhost',
            'port': port or 6379, 'db': url.path.strip('/') or 0,
            'namespace': group.namespace, 'socket_timeout': group.timeout,
            'socket_connect_timeout': group.timeout}
        if url.scheme == 'rediss':
            options['ssl'] = True
        for key, value in (('username', url.username),
                           ('password', url.password)):
            if value:
                options[key] = urllib.parse.unquote(value)
    return options | dict(urllib.parse.parse_qsl(url.query))
