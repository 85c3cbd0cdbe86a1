# SPDX-License-Identifier: Apache-2.0
"""Records in SQL: what builders do, and what hosts have.

They are for people to look at. Nothing that boots a guest reads them: what
images there are says the journal, what a host has says the host. Garbage
collection keeps for hosts what they say that they need
(:mod:`fastboot_glance.needs`).

Every write is one statement, so that any number of builders may write at
once; deadlocks are retried.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import sqlalchemy as sa
from oslo_db import api as db_api
from oslo_db import exception as db_exception
from oslo_db.sqlalchemy import engines
from sqlalchemy.dialects import mysql, sqlite

from fastboot_common import exception
from fastboot_glance import tables

# It logs a traceback at the end of its patience; our error has the words.
logging.getLogger('oslo_db.api').setLevel(logging.CRITICAL)
LOG = logging.getLogger(__name__)

BUILD_STATES: Final = (
    'queued', 'building', 'ready', 'error', 'skipped', 'off')
#: The stage of a build in error that the audit has tried again.
PASSING: Final = 'passing'
MICROVM_STATES: Final = ('none', 'baking', 'ready', 'refused', 'failed')
#: Bytes that a host's images may have before compression, and its µVMs.
IMAGES_LIMIT: Final = 64 << 20
#: Names that hostile reports can make up at most.
HOSTS_LIMIT: Final = 20_000
#: Observations that wait, of an image (the newest) and of all; each up to
#: 1 MiB.
IMAGE_OBSERVATIONS: Final = 16
ALL_OBSERVATIONS: Final = 1000
#: Rows that are in memory at a time, where each may be large.
_AT_ONCE: Final = 50
#: Seconds that a report may be overtaken by.
_OVERTAKEN: Final = 300.0
#: Seconds that one waits for others.
_WAIT: Final = 7 * 86400.0

_P = ParamSpec('_P')
_R = TypeVar('_R')


@dataclasses.dataclass(frozen=True)
class Build:
    """What the builders say of an image.

    :ivar state: one of ``BUILD_STATES``.
    :ivar stage: what it is at; in state ``error``, ``PASSING`` if it was
        not the image's fault.
    :ivar progress: of the stage, 0 to 1.
    :ivar version: serial that the last successful build gave it.
    :ivar boot_size: bytes of its boot set.
    :ivar updated: when a builder last said something (seconds, Unix time).
    :ivar requested: when a build was asked for that no builder has said
        anything about (seconds, Unix time); 0: none is waiting.
    """

    image_id: str
    state: str
    name: str = ''
    owner: str = ''
    stage: str = ''
    progress: float = 0.0
    error: str = ''
    version: int | None = None
    boot_size: int | None = None
    builder: str = ''
    attempts: int = 0
    updated: float = 0.0
    requested: float = 0.0


@dataclasses.dataclass(frozen=True)
class Microvm:
    """What the builders say of the µVM of an image for a platform.

    :ivar platform: of hosts, as its text.
    :ivar state: ``none`` (it waits for a builder), ``baking``, ``ready``,
        ``refused`` (the image's doing) or ``failed`` (ours).
    :ivar stage: what it is at; in state ``failed``, ``PASSING`` if it was
        not the image's fault.
    :ivar progress: of the stage, 0 to 1.
    :ivar basis: digest of what a refusal or failure is of: it would be so
        again until that changes.
    :ivar group: name of its class of hosts; empty: not baked.
    :ivar bytes: that it added to the repository; None: not known.
    :ivar seconds: that the bake took; None: not known.
    :ivar baked_at: seconds, Unix time; 0: not known.
    :ivar updated: when a builder last said something (seconds, Unix time).
    """

    image_id: str
    platform: str
    state: str
    stage: str = ''
    progress: float = 0.0
    reason: str = ''
    basis: str = ''
    group: str = ''
    bytes: int | None = None
    seconds: float | None = None
    baked_at: float = 0.0
    builder: str = ''
    updated: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class HostImage:
    """What a host says of one image; the states are those of a report.

    :ivar leases: servers there that have their disk on it; None: the host
        is too old to say.
    """

    state: str
    progress: float = 0.0
    error: str = ''
    serial: int | None = None
    leases: int | None = None


#: Of an image that servers of the host may or may not need.
_UNKNOWN: Final = HostImage('stale')


@dataclasses.dataclass(frozen=True, slots=True)
class HostMicrovm:
    """What a host says of one µVM; the states are those of a report.

    :ivar group: name of its class of hosts.
    :ivar bytes: on the host's disks.
    :ivar lanes: copies that the next servers can be resumed from.
    :ivar resumed: servers that were, since the agent started.
    :ivar fallbacks: servers that were booted instead.
    """

    image_id: str
    group: str
    state: str
    bytes: int = 0
    lanes: int = 0
    resumed: int = 0
    fallbacks: int = 0
    reason: str = ''


@dataclasses.dataclass(frozen=True)
class Host:
    """The newest report of a host (sizes in bytes).

    :ivar at: when it was made, by the host's clock, or when it came if that
        was before (seconds, Unix time).
    :ivar version: of the repository, as the host knows it.
    :ivar lazy_guests: ids of guests that need the export; None: unknown.
    :ivar platforms: that it runs µVMs of; None: it is too old to say.
    :ivar microvms: None: it is too old to say.
    """

    name: str
    at: float
    version: int
    software: str
    volume_bytes: int
    mirror_bytes: int
    free_bytes: int
    images: dict[str, HostImage]
    lazy_guests: list[str] | None = None
    platforms: list[str] | None = None
    microvms: list[HostMicrovm] | None = None


@dataclasses.dataclass(frozen=True)
class Observation:
    """What guests of a host read of an image in their first minutes.

    :ivar at: when it came (seconds, Unix time).
    :ivar reads: see :mod:`fastboot_common.observation`.
    """

    host: str
    serial: int
    at: float
    reads: str


def _guarded(
        method: Callable[Concatenate['Records', _P], _R],
) -> Callable[Concatenate['Records', _P], _R]:
    """Retry what may pass; what is left becomes Unavailable."""
    retried = db_api.wrap_db_retry(
        max_retries=8, retry_interval=0.05, inc_retry_interval=True,
        max_retry_interval=1, retry_on_deadlock=True,
        retry_on_disconnect=True,
        exception_checker=lambda error: 'is locked' in str(error))(method)

    @functools.wraps(method)
    def call(self: 'Records', /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return retried(self, *args, **kwargs)  # type: ignore
        except db_exception.DBNonExistentTable as error:
            raise exception.Unavailable(
                'the database has no tables of fastboot; run '
                '"fastboot-manage db sync"') from error
        except (db_exception.DBError, sa.exc.SQLAlchemyError) as error:
            words = str(error).partition('\n')[0]
            raise exception.Unavailable(
                f'the database does not answer as it should: {words:.300}',
            ) from error

    return call


class Records:
    """The records in one database; threads may share it.

    Connects when it is used. Everything raises Unavailable while the
    database is away, or has no tables.

    :param connection: SQLAlchemy URL.
    :param options: of :func:`oslo_db.sqlalchemy.engines.create_engine`.
    :raises ConfigError: the URL names no database that could be used.
    """

    def __init__(self, connection: str, **options: Any) -> None:
        if not connection:
            raise exception.ConfigError(
                '[database] connection is not set; give the SQLAlchemy URL '
                'of a MySQL or SQLite database')
        try:
            self._engine = _engine(connection, options)
        except (sa.exc.ArgumentError, ImportError) as error:
            raise exception.ConfigError(
                f'[database] connection: {error}') from error
        # By digest: most reports say the same as the one before, and as
        # other hosts'. What the last look at all hosts needed; replaced as
        # a whole, so that threads need no lock.
        self._decoded: dict[str, dict[str, HostImage]] = {}

    @_guarded
    def create(self) -> None:
        """Make the tables, or bring them to this program's version."""
        with self._engine.begin() as connection:
            tables.upgrade(connection)

    @_guarded
    def version(self) -> str | None:
        """The version that the tables have; None: there are none."""
        with self._engine.connect() as connection:
            return tables.revision(connection)

    @_guarded
    def build(self, image_id: str) -> Build | None:
        """What is known of the builds of an image."""
        rows = self._rows(sa.select(tables.BUILDS).where(
            tables.BUILDS.c.image_id == image_id))
        return Build(**rows[0]) if rows else None

    @_guarded
    def builds(self) -> list[Build]:
        """What is known of all images, by id."""
        return [Build(**row) for row in self._rows(
            sa.select(tables.BUILDS).order_by(tables.BUILDS.c.image_id))]

    @_guarded
    def note_build(self, image_id: str, *, state: str, stage: str = '',
                   progress: float = 0.0, error: str = '',
                   version: int | None = None, owner: str | None = None,
                   name: str | None = None, builder: str | None = None,
                   attempts: int | None = None,
                   boot_size: int | None = None) -> None:
        """Say how the build of an image goes, and answer a request for it.

        What is None stays as it was.

        :param state: one of ``BUILD_STATES``.
        :param progress: of the stage, 0 to 1.
        :param builder: the host that builds; this one if not given.
        :raises Invalid: there is no such state.
        """
        if state not in BUILD_STATES:
            raise exception.Invalid(f'not the state of a build: {state!r}')
        optional = {
            'version': version, 'attempts': attempts, 'boot_size': boot_size,
            'owner': owner and clean(owner, 64),
            'name': name and clean(name, 255),
        }
        values = {
            'state': state, 'stage': clean(stage, 64),
            'progress': _share(progress), 'error': clean(error, 1000),
            'builder': clean(builder or socket.gethostname(), 255),
            'updated': time.time(), 'requested': 0.0,
        } | {key: value for key, value in optional.items()
             if value is not None}
        self._upsert(tables.BUILDS, {'image_id': image_id}, values)

    @_guarded
    def note_request(self, image_id: str) -> None:
        """Say that a build was asked for, until a builder says something."""
        self._upsert(
            tables.BUILDS, {'image_id': image_id},
            {'requested': time.time()}, {'state': 'queued'})

    @_guarded
    def withdraw_request(self, image_id: str) -> None:
        """Say that what :meth:`note_request` said did not come about."""
        builds = tables.BUILDS
        with self._engine.begin() as connection:
            connection.execute(sa.update(builds).where(
                builds.c.image_id == image_id).values(requested=0.0))
            # Nobody ever built it: the row was the request's own.
            connection.execute(sa.delete(builds).where(
                builds.c.image_id == image_id, builds.c.updated == 0.0))

    @_guarded
    def forget_build(self, image_id: str) -> None:
        """Drop what is known of an image; nothing known is no error."""
        with self._engine.begin() as connection:
            for table in (tables.BUILDS, tables.OBSERVATIONS,
                          tables.MICROVMS):
                connection.execute(sa.delete(table).where(
                    table.c.image_id == image_id))

    @_guarded
    def microvms(self, image_id: str | None = None) -> list[Microvm]:
        """What is known of the µVMs of an image, or of all."""
        table = tables.MICROVMS
        found = sa.select(table).order_by(table.c.image_id, table.c.platform)
        return [Microvm(**row) for row in self._rows(
            found if image_id is None
            else found.where(table.c.image_id == image_id))]

    @_guarded
    def note_microvm(self, image_id: str, platform: str, *, state: str,
                     stage: str = '', progress: float = 0.0,
                     reason: str = '', basis: str | None = None,
                     group: str | None = None, size: int | None = None,
                     seconds: float | None = None,
                     baked_at: float | None = None) -> None:
        """Say how it is with the µVM of an image.

        What is None stays as it was. See :class:`Microvm`.

        :param state: one of ``MICROVM_STATES``.
        :param size: its bytes.
        :raises Invalid: there is no such state.
        """
        if state not in MICROVM_STATES:
            raise exception.Invalid(f'not the state of a µVM: {state!r}')
        optional = {'basis': basis, 'group': group, 'bytes': size,
                    'seconds': seconds, 'baked_at': baked_at}
        self._upsert(tables.MICROVMS, {
            'image_id': image_id, 'platform': platform}, {
                'state': state, 'stage': clean(stage, 64),
                'progress': _share(progress), 'reason': clean(reason, 1000),
                'builder': clean(socket.gethostname(), 255),
                'updated': time.time(),
            } | {name: value for name, value in optional.items()
                 if value is not None})

    @_guarded
    def forget_microvms(self, image_id: str,
                        states: Sequence[str] = MICROVM_STATES) -> None:
        """Drop what is known of the µVMs of an image in some states."""
        table = tables.MICROVMS
        with self._engine.begin() as connection:
            connection.execute(sa.delete(table).where(
                table.c.image_id == image_id, table.c.state.in_(states)))

    @_guarded
    def platforms(self) -> set[str]:
        """Those that any host reports."""
        column = tables.HOSTS.c.platforms
        return {text for row in self._rows(
            sa.select(column).distinct().where(column.is_not(None)))
            for text in json.loads(row['platforms']) or ()}

    @_guarded
    def note_host(self, report: dict[str, Any]) -> bool:
        """Keep a host's report unless there is a newer one.

        :param report: as an agent sends it, checked by
            :func:`fastboot_glance.reports.check`.
        :returns: whether it was kept.
        :raises Invalid: it is too long, or there are too many hosts already.
        """
        hosts = tables.HOSTS
        try:
            images = _encode(report['images'])
            microvms = _encode_microvms(report['microvms'])
        except exception.Invalid as error:
            raise exception.Invalid(
                f'host {report["host"]}: {error}') from error
        now = time.time()
        at = min(float(report['at']), now)
        values = {
            'at': at,
            'digest': hashlib.sha256(images).hexdigest(), 'images': images,
            'lazy_guests': json.dumps(report['lazy_guests']),
            'platforms': json.dumps(report['platforms']),
            'microvms': microvms,
        } | {key: report[key] for key in (
            'version', 'software', 'volume_bytes', 'mirror_bytes',
            'free_bytes')}
        # Reports may overtake each other, not by more than this: clocks are
        # set back, the host's or ours. Two statements, each complete by
        # itself: SQLite refuses to write after it has read.
        late = min(at + _OVERTAKEN, now)
        with self._engine.begin() as connection:
            if connection.execute(sa.update(hosts).where(
                    hosts.c.name == report['host'],
                    sa.or_(hosts.c.at <= at, hosts.c.at > late),
            ).values(**values)).rowcount:
                return True
        if self._rows(sa.select(sa.func.count().label('hosts')).select_from(
                hosts))[0]['hosts'] >= HOSTS_LIMIT:
            raise exception.Invalid(
                f'host {report["host"]}: there are {HOSTS_LIMIT} hosts '
                f'already; forget some with "fastboot-manage host forget"')
        with self._engine.begin() as connection:
            statement = self._insert(hosts, ['name'], {
                'name': report['host'], **values}, None)
            return bool(connection.execute(statement).rowcount)

    @_guarded
    def host(self, name: str) -> Host | None:
        """The newest report of a host."""
        rows = self._rows(sa.select(tables.HOSTS).where(
            tables.HOSTS.c.name == name))
        if not rows:
            return None
        row = rows[0]
        del row['digest']
        return Host(**_parsed(row) | {
            'images': _decode(name, row['images'])})

    @_guarded
    def hosts(self) -> list[Host]:
        """The newest reports of all hosts, by name."""
        hosts = tables.HOSTS
        rows = self._rows(sa.select(*[
            column for column in hosts.c if column.name != 'images'
        ]).order_by(hosts.c.name))
        known = self._decoded
        lacking = {row['digest'] for row in rows} - known.keys()
        fresh = {row['digest']: _decode(row['name'], row['images'])
                 for row in self._rows(sa.select(
                     hosts.c.name, hosts.c.digest, hosts.c.images).where(
                         hosts.c.digest.in_(lacking)))} if lacking else {}
        digests = [row.pop('digest') for row in rows]
        self._decoded = found = {
            # A report that came between the two looks is shown next time.
            digest: images for digest in digests
            if (images := fresh.get(digest, known.get(digest))) is not None}
        return [Host(**_parsed(row), images=found[digest])
                for row, digest in zip(rows, digests, strict=True)
                if digest in found]

    @_guarded
    def host_images(self, image_ids: set[str],
                    ) -> dict[str, dict[str, HostImage]]:
        """What each host that is known said last of some images, by the
        host's name. Where that cannot be read, it may have each of them."""
        hosts = tables.HOSTS
        with self._engine.connect().execution_options(
                yield_per=_AT_ONCE) as connection:
            return {row.name: _some(row.name, row.images, image_ids)
                    for row in connection.execute(
                        sa.select(hosts.c.name, hosts.c.images).order_by(
                            hosts.c.name))}

    @_guarded
    def forget_host(self, name: str) -> bool:
        """Drop a host's report, until it sends another.

        :returns: whether there was one.
        """
        with self._engine.begin() as connection:
            return bool(connection.execute(sa.delete(tables.HOSTS).where(
                tables.HOSTS.c.name == name)).rowcount)

    @_guarded
    def note_observation(self, told: dict[str, Any]) -> None:
        """Keep an observation, instead of the one before of that host, or
        of the oldest if the image has many.

        :param told: checked by :func:`fastboot_glance.observations.check`.
        :raises Invalid: too many wait already, of all images.
        """
        table = tables.OBSERVATIONS
        now = time.time()
        with self._engine.begin() as connection:
            connection.execute(sa.delete(table).where(sa.or_(
                table.c.at < now - _WAIT,
                sa.and_(table.c.image_id == told['image'],
                        table.c.host == told['host']))))
        if self._rows(sa.select(sa.func.count().label('rows')).select_from(
                table))[0]['rows'] >= ALL_OBSERVATIONS:
            raise exception.Invalid(
                f'host {told["host"]}: too many observations wait already')
        with self._engine.begin() as connection:
            connection.execute(sa.insert(table).values(
                image_id=told['image'], host=told['host'],
                serial=told['serial'], at=now,
                reads=told['reads'].encode()))
        old = self._rows(sa.select(table.c.at).where(
            table.c.image_id == told['image']).order_by(
                table.c.at.desc()).offset(IMAGE_OBSERVATIONS).limit(1))
        if old:
            with self._engine.begin() as connection:
                connection.execute(sa.delete(table).where(
                    table.c.image_id == told['image'],
                    table.c.at <= old[0]['at']))

    @_guarded
    def observations(self, image_id: str) -> list[Observation]:
        """What waits to get into an image's boot set, the oldest first."""
        table = tables.OBSERVATIONS
        return [Observation(row['host'], row['serial'], row['at'],
                            row['reads'].decode())
                for row in self._rows(sa.select(table).where(
                    table.c.image_id == image_id).order_by(table.c.at))]

    @_guarded
    def forget_observations(self, image_id: str,
                            found: list[Observation]) -> None:
        """Drop some; those that came since stay."""
        table = tables.OBSERVATIONS
        with self._engine.begin() as connection:
            for one in found:
                connection.execute(sa.delete(table).where(
                    table.c.image_id == image_id, table.c.host == one.host,
                    table.c.at <= one.at))

    def _rows(self, statement: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row._mapping)
                    for row in connection.execute(statement)]

    def _upsert(self, table: sa.Table, key: dict[str, str],
                values: dict[str, Any],
                first: dict[str, Any] | None = None) -> None:
        """Change a row or make it.

        :param key: that the row has.
        :param values: what the row gets.
        :param first: what it gets besides, if it is new.
        """
        row = {**(first or {}), **values, **key}
        with self._engine.begin() as connection:
            connection.execute(self._insert(table, list(key), row, values))

    def _insert(self, table: sa.Table, key: list[str], row: dict[str, Any],
                update: dict[str, Any] | None) -> Any:
        """An insert that changes the row (or, with None, leaves it) if it
        is there."""
        if self._engine.dialect.name == 'mysql':
            if update is None:
                return mysql.insert(table).values(row).prefix_with('IGNORE')
            return mysql.insert(table).values(row).on_duplicate_key_update(
                update)
        statement = sqlite.insert(table).values(row)
        if update is None:
            return statement.on_conflict_do_nothing(key)
        return statement.on_conflict_do_update(key, set_=update)


def _engine(connection: str, options: dict[str, Any]) -> sa.Engine:
    url = sa.make_url(connection)
    backend = url.get_backend_name()
    if backend == 'mysql':
        # Image names are any Unicode, also what "utf8" of MySQL cannot say.
        url = url.update_query_dict({'charset': 'utf8mb4'})
    elif backend == 'sqlite':
        url = url.update_query_dict({'timeout': '30'})
    else:
        raise sa.exc.ArgumentError(
            f'{backend} is not supported; use mysql+pymysql or sqlite')
    found: sa.Engine = engines.create_engine(
        url.render_as_string(hide_password=False), max_retries=0, **options)
    return found


def clean(text: str, limit: int) -> str:
    """Text that a database and a terminal take: at most `limit` characters,
    without control characters and halves of surrogate pairs."""
    return exception.plain(text[:limit])


def _share(progress: float) -> float:
    return min(max(progress, 0.0), 1.0) if math.isfinite(progress) else 0.0


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        key: json.loads(row[key] or 'null')
        for key in ('lazy_guests', 'platforms')
    } | {'microvms': _decode_microvms(row['name'], row['microvms'])}


def _encode(images: list[dict[str, Any]]) -> bytes:
    return _pack({one['id']: [one[key] for key in (
        'state', 'progress', 'error', 'serial', 'leases')]
        for one in images})


def _decode(host: str, blob: bytes) -> dict[str, HostImage]:
    return {key: HostImage(*values)
            for key, values in (_unpack(host, blob) or {}).items()}


def _some(host: str, blob: bytes, wanted: set[str]) -> dict[str, HostImage]:
    said = _unpack(host, blob)
    if said is None:
        return dict.fromkeys(wanted, _UNKNOWN)
    return {key: HostImage(*said[key]) for key in wanted & said.keys()}


def _encode_microvms(found: list[dict[str, Any]] | None) -> bytes | None:
    if found is None:
        return None
    return _pack([[one[key] for key in (
        'image', 'class', 'state', 'bytes', 'lanes', 'resumed', 'fallbacks',
        'reason')] for one in found])


def _decode_microvms(host: str,
                     blob: bytes | None) -> list[HostMicrovm] | None:
    return None if blob is None else [
        HostMicrovm(*values) for values in _unpack(host, blob) or ()]


def _pack(value: Any) -> bytes:
    data = json.dumps(value, sort_keys=True, separators=(',', ':')).encode()
    if len(data) > IMAGES_LIMIT:
        raise exception.Invalid(
            f'a report of {len(data)} bytes; at most {IMAGES_LIMIT} are kept')
    return zlib.compress(data)


def _unpack(host: str, blob: bytes) -> Any:
    """What a host said; None, if it cannot be read: one host must not
    keep the others' from being read."""
    try:
        return json.loads(
            zlib.decompressobj().decompress(blob, IMAGES_LIMIT))
    except (ValueError, zlib.error) as error:
        LOG.warning('host %s: its report cannot be read: %s', host, error)
        return None
