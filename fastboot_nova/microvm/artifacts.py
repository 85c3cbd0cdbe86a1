# SPDX-License-Identifier: Apache-2.0
"""The artifacts of a host, unpacked from the mirror.

Each is a directory named by the digest of its manifest, so another version of
a µVM is another one, and nobody's lane changes under him. One that is not
whole has no description, or a name that begins with a dot.
"""

import collections
import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Callable

from fastboot_common import contents, exception, files, journal
from fastboot_common.microvm import artifact, shelf


class Artifacts:
    """Their directory. Use from one thread at a time.

    :param path: of it. What is not whole in there is removed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        files.make_directory(path)
        for directory in path.iterdir():
            if not _is_whole(directory):
                shutil.rmtree(directory)

    def names(self) -> set[str]:
        """The digests of the manifests of those that are here."""
        return {one.name for one in self._path.iterdir()
                if not one.name.startswith('.')}

    def directory(self, entry: journal.Image) -> pathlib.Path:
        """Where a µVM is, or would be."""
        return self._path / entry.manifest

    def has(self, entry: journal.Image) -> bool:
        """Whether a µVM is here."""
        return _is_whole(self.directory(entry))

    def make(self, entry: journal.Image, microvms: contents.Source,
             image: journal.Image, images: contents.Source,
             progress: Callable[[int], None] = lambda count: None) -> None:
        """Unpack a µVM; see :func:`fastboot_common.microvm.shelf.take`.

        :raises Corrupt: image or µVM are not what they were.
        :raises NoSpace: no room for it.
        """
        if self.has(entry):
            return
        self.remove(entry.manifest)
        target = self.directory(entry)
        room = target.with_name(f'.{target.name}')
        files.make_directory(room)
        try:
            shelf.take(entry, microvms, image, images, room, progress)
            room.rename(target)
        except BaseException:
            shutil.rmtree(room, ignore_errors=True)
            raise
        files.sync_directory(self._path)

    def remove(self, name: str) -> int:
        """Remove one, its description first.

        :returns: bytes freed.
        """
        directory = self._path / name
        freed = files.disk_used(directory)
        files.remove(directory / artifact.DESCRIPTION)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        return freed

    def prove(self, name: str) -> None:
        """Compare one with its digests.

        :raises Corrupt: it is not what it was.
        :raises NotFound: it is not here.
        """
        directory = self._path / name
        for part, expected in artifact.read(directory).parts.items():
            with open(directory / part, 'rb') as file:
                found = hashlib.file_digest(file, 'sha256').hexdigest()
            if found != expected.sha256:
                raise exception.Corrupt(
                    f'{directory / part}: its digest is another')


def counted(path: pathlib.Path) -> 'collections.Counter[str]':
    """How many µVMs of each image are unpacked, for one who only looks.

    :param path: of the directory with artifacts and mirror.
    """
    found: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(FileNotFoundError, exception.Corrupt):
        state = journal.State.from_json(
            (path / 'mirror' / 'state.json').read_bytes(), str(path))
        for entry in state.images.values():
            if _is_whole(path / 'artifacts' / entry.manifest):
                found[shelf.Name.of(entry).image] += 1
    return found


def _is_whole(directory: pathlib.Path) -> bool:
    return (not directory.name.startswith('.')
            and (directory / artifact.DESCRIPTION).exists())
