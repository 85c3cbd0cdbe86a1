# SPDX-License-Identifier: Apache-2.0
"""Staging: what a build has on this machine, one directory an image.

``<workdir>/staging/<image id>/`` holds ``image.part`` while it comes, then
``image``, proven, ``capture``, the trace of its boots, and ``microvm``, what
was baked of it. A builder that
died leaves all but its lock, and the next one on this machine goes on from
there. What lives only as long as its process is in ``<workdir>/t-…/``: a
short name, because UNIX sockets lie below it.
"""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Final

import numpy as np
from oslo_log import log as logging

from fastboot_common import exception, files, trace
from fastboot_glance import capture

LOG = logging.getLogger(__name__)

_ROOT: Final = 'staging'
_TEMPORARY: Final = 't-'
_ATTEMPTS: Final = 10
#: What commands keep in the directory that is their builder's, too, and the
#: seconds after which it is theirs no more: their longest takes minutes.
_STRAYS: Final = ('blob-*', 'bake-*')
_STRAY: Final = 86400.0


class Stage:
    """The directory of one image, ours until the context ends."""

    def __init__(self, path: pathlib.Path, work: pathlib.Path) -> None:
        self._path = path
        #: The image as Glance has it, once it is proven.
        self.image = path / 'image'
        #: For temporary files; gone with the context.
        self.work = work
        #: What was baked.
        self.microvm = path / 'microvm'
        self._capture = path / 'capture'

    def read_capture(self, digest: str) -> capture.Capture | None:
        """The capture that an earlier attempt made, if it is of this image.

        :param digest: of the image's file.
        """
        try:
            with np.load(self._capture, allow_pickle=False) as found:
                header = json.loads(str(found['header']))
                reads = np.asarray(found['trace'])
            if header.pop('digest') != digest or reads.dtype != trace.DTYPE:
                raise ValueError('it is of another image')
            return capture.Capture(trace=reads, **header)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a damaged file makes numpy say
            LOG.warning('%s: not used: %s', self._capture, error)
            return None

    def keep_capture(self, digest: str, found: capture.Capture) -> None:
        """Keep a capture for a later attempt.

        :raises NoSpace: there is no room.
        """
        header = {
            'digest': digest, 'state': found.state, 'reason': found.reason,
            'end': found.end, 'seconds': found.seconds,
            'devices': found.devices}
        data = io.BytesIO()
        np.savez_compressed(data, trace=found.trace,
                            header=np.array(json.dumps(header)))
        files.write_atomically(self._capture, data.getvalue())

    def drop_file(self) -> None:
        """Remove the image, as far as it came, and leave what is small."""
        for path in self._path.glob(f'{self.image.name}*'):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove it all: nothing of it is needed any more."""
        shutil.rmtree(self._path, ignore_errors=True)


@contextlib.contextmanager
def open_stage(workdir: pathlib.Path, image_id: str) -> Iterator[Stage]:
    """The directory of an image, with what an earlier attempt left in it.

    :raises Busy: another process on this machine has it.
    :raises NoSpace: it cannot be made.
    """
    path = workdir / _ROOT / str(uuid.UUID(image_id))
    work = workdir / f'{_TEMPORARY}{secrets.token_hex(2)}'
    with contextlib.ExitStack() as exits:
        try:
            files.make_directory(path.parent)
            for directory in (path, work):
                exits.callback(os.close, _lock(directory))
        except OSError as error:
            raise exception.NoSpace(f'{path}: {error.strerror}') from error
        exits.callback(shutil.rmtree, work, ignore_errors=True)
        yield Stage(path, work)


def _lock(path: pathlib.Path) -> int:
    """Lock a directory that another may be removing.

    :raises Busy: another process has it.
    """
    for _ in range(_ATTEMPTS):
        path.mkdir(exist_ok=True, mode=0o750)
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(fd)
            raise exception.Busy(
                f'{path}: another builder on this machine has it') from None
        if fd >= 0:
            os.close(fd)
    raise exception.Busy(f'{path}: others keep removing it')


def sweep(workdir: pathlib.Path, wanted: set[str]) -> int:
    """Remove what dead builders left of images that nobody builds any more.

    :param wanted: ids of the images that have a job.
    :returns: how many there were.
    """
    count = 0
    for path in (*workdir.glob(f'{_TEMPORARY}*'),
                 *workdir.glob(f'{_ROOT}/*')):
        if path.name in wanted:
            continue
        with contextlib.suppress(exception.Busy):
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            count += 1
    for path in (found for name in _STRAYS for found in workdir.glob(name)):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STRAY:
                shutil.rmtree(path, ignore_errors=True)
                count += 1
    return count


def drop_file(workdir: pathlib.Path, image_id: str) -> None:
    """Remove the file of an image, if nobody has its directory."""
    with contextlib.suppress(exception.Busy, exception.NoSpace), \
            open_stage(workdir, image_id) as stage:
        stage.drop_file()


def remove(workdir: pathlib.Path, image_id: str) -> None:
    """Remove the directory of an image, if nobody has it.

    Who is no image of Glance's has none.
    """
    with contextlib.suppress(exception.Busy, exception.NoSpace, ValueError), \
            open_stage(workdir, image_id) as stage:
        stage.discard()
