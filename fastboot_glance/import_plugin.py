# SPDX-License-Identifier: Apache-2.0
"""The import plugin: runs in glance-api and asks for a build of each image.

An upload matters more than its cache. So the plugin's task only puts the
image's id into a list in memory; a thread takes it to the jobboard. It
changes no image and raises nothing, whatever is broken. What is lost with
the process, or does not fit in the list, notifications and audit find.

Its options are the group ``[jobboard]`` in ``glance-image-import.conf``.
"""

import logging
import queue
import threading
from typing import Any, Final

from oslo_config import cfg
from taskflow import task
from taskflow.patterns import linear_flow

LOG = logging.getLogger(__name__)

_WAITING: Final = 1000
#: Seconds between attempts to reach the jobboard.
_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 60.0


class Poster:
    """Takes ids of images to the jobboard, in a thread of its own."""

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        self._queue: queue.Queue[str] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, image_id: str) -> None:
        """Have a build asked for, soon. Never waits."""
        try:
            self._queue.put_nowait(image_id)
        except queue.Full:
            LOG.warning('fastboot: no job for image %s: the jobboard has '
                        'been away for long; the audit will find it',
                        image_id)
        with self._lock:
            # A worker that was forked has no threads of its parent's.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name='fastboot-poster', daemon=True)
                self._thread.start()

    def _run(self) -> None:
        board: Any = None
        wait = _FIRST_WAIT
        while True:
            image_id = self._queue.get()
            while True:
                try:
                    board = board or self._connect()
                    board.post(image_id, 'imported')
                    wait = _FIRST_WAIT
                    break
                except Exception as error:  # a broken configuration, too
                    LOG.warning(
                        'fastboot: no job for image %s yet, the next '
                        'attempt is in %d s: %s', image_id, wait, error)
                    threading.Event().wait(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)

    def _connect(self) -> Any:
        # Here, and not when Glance imports us: it may take a while, or fail.
        from fastboot_common.conf import jobboard
        from fastboot_glance import jobs

        self._conf.register_opts(jobboard.OPTS, group=jobboard.GROUP)
        return jobs.Board(self._conf)


_POSTER: Final = Poster(cfg.CONF)


class _Post(task.Task):
    """Asks for a build."""

    def __init__(self, task_id: str, image_id: str) -> None:
        super().__init__(name=f'fastboot-post-{task_id}')
        self._image_id = image_id

    def execute(self) -> None:
        try:
            _POSTER.put(self._image_id)
        except Exception:
            LOG.exception('fastboot: no job for image %s', self._image_id)


def get_flow(**kwargs: Any) -> Any:
    """The flow that Glance adds to an import.

    :param kwargs: what Glance passes to every plugin, among it ``task_id``
        and ``image_id``.
    """
    return linear_flow.Flow('fastboot').add(
        _Post(str(kwargs.get('task_id')), str(kwargs['image_id'])))
