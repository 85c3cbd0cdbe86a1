# SPDX-License-Identifier: Apache-2.0
"""Logbooks: how far the flow of each job is, in TaskFlow's tables.

One for each job, by the job's uuid, made by the builder that first claims
it: those who post jobs need no database. They are gone with their jobs.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

from taskflow import exceptions as tf_exception
from taskflow import states
from taskflow.persistence import backends, models

from fastboot_common import exception
from fastboot_glance import jobs

_NAME: Final = 'fastboot-build'
#: Of a flow's metadata: how often it was begun, and when it may be again
#: (seconds, Unix time).
_ATTEMPTS: Final = 'attempts'
_NOT_BEFORE: Final = 'not_before'
#: Seconds that anybody puts a flow off.
LONGEST_WAIT: Final = 600.0


class Logbooks:
    """The logbooks in the database. Threads may share them.

    Everything raises Unavailable while the database is away.
    """

    def __init__(self, connection: str) -> None:
        """Connect when used.

        :param connection: SQLAlchemy URL.
        :raises ConfigError: there is none.
        """
        if not connection:
            raise exception.ConfigError(
                '[database] connection is not set; give the SQLAlchemy URL '
                'of the builders\' database')
        self._options = {'connection': connection}
        self._found: Any = None

    @property
    def backend(self) -> Any:
        """TaskFlow's own handle, for its engines."""
        if self._found is None:
            with _translated():
                self._found = backends.fetch(self._options)
        return self._found

    def create(self) -> None:
        """Make the tables, or bring them to TaskFlow's version."""
        with self._use() as connection:
            connection.upgrade()

    def open(self, job: jobs.Job) -> 'Logbook':
        """The logbook of a job, a new one if it has none."""
        with self._use() as connection:
            try:
                book = connection.get_logbook(job.uuid)
            except tf_exception.NotFound:
                book = models.LogBook(_NAME, job.uuid)
                flow = models.FlowDetail(job.image_id, job.uuid)
                flow.meta = {}
                book.add(flow)
                connection.save_logbook(book)
            return Logbook(self, next(iter(book)))

    def save(self, flow: Any) -> None:
        """Write a flow's metadata."""
        with self._use() as connection:
            connection.update_flow_details(flow)

    def remove(self, job_id: str) -> None:
        """Remove the logbook of a job; none is no error."""
        with self._use() as connection, \
                contextlib.suppress(tf_exception.NotFound):
            connection.destroy_logbook(job_id)

    def list(self) -> set[str]:
        """Uuids of the jobs that have one."""
        with self._use() as connection:
            return {book.uuid for book in connection.get_logbooks(lazy=True)
                    if book.name == _NAME}

    @contextlib.contextmanager
    def _use(self) -> Iterator[Any]:
        with _translated(), contextlib.closing(
                self.backend.get_connection()) as connection:
            yield connection


class Logbook:
    """The logbook of one job."""

    def __init__(self, books: Logbooks, flow: Any) -> None:
        self._books = books
        #: TaskFlow's details of the flow.
        self.flow = flow

    @property
    def attempts(self) -> int:
        """How often the flow was begun."""
        return int((self.flow.meta or {}).get(_ATTEMPTS, 0))

    @property
    def begun(self) -> bool:
        """Whether an attempt came as far as the flow."""
        return self.flow.state is not None

    @property
    def done(self) -> bool:
        """Whether the flow came to its end."""
        return bool(self.flow.state == states.SUCCESS)

    @property
    def wait(self) -> float:
        """Seconds until it may be begun again.

        0 if they are many more than anybody says: his clock was wrong.
        """
        left = float((self.flow.meta or {}).get(_NOT_BEFORE, 0)) - time.time()
        return left if left < 2 * LONGEST_WAIT else 0.0

    def begin(self) -> None:
        """Count an attempt, before anything can go wrong in it."""
        self._note(attempts=self.attempts + 1)

    def take_back(self) -> None:
        """Count the last attempt as none: it was not the image's fault."""
        self._note(attempts=self.attempts - 1)

    def put_off(self, seconds: float) -> None:
        """Let nobody begin it again before."""
        self._note(not_before=time.time() + seconds)

    def _note(self, **values: float) -> None:
        self.flow.meta = {**(self.flow.meta or {}), **values}
        self._books.save(self.flow)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except tf_exception.NotFound:
        raise
    except tf_exception.TaskFlowException as error:
        raise exception.Unavailable(
            f'the database of the logbooks does not answer: '
            f'{error.__cause__ or error}') from error
