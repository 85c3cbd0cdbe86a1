# SPDX-License-Identifier: Apache-2.0
"""Running a flow with TaskFlow, and what its errors mean to us."""

from typing import Any

from taskflow import engines
from taskflow import exceptions as tf_exception

from fastboot_common import exception
from fastboot_glance import logbooks


def run(flow: Any, book: logbooks.Logbook, books: logbooks.Logbooks) -> None:
    """Run a flow, or what an earlier attempt left of it.

    :raises FastbootError: it failed; the error of the task.
    """
    try:
        engines.load(flow, flow_detail=book.flow, backend=books.backend,
                     engine='serial').run()
    except tf_exception.WrappedFailure as error:
        # It happened in another process; only its words came here.
        failure = error[0]
        kind = exception.Invalid if failure.check(exception.Invalid) \
            else exception.Unavailable
        raise kind(failure.exception_str) from error
    except tf_exception.StorageFailure as error:
        raise exception.Unavailable(
            f'the database of the logbooks: {error}') from error
