# SPDX-License-Identifier: Apache-2.0
"""The root disk of an instance that is a copy of a baked guest.

The guest has its file system mounted, with what its first boot wrote; so the
disk is a copy of just that, on top of the same image.
"""

import pathlib

from fastboot_common import exception, qemu
from fastboot_common.microvm import artifact


def make(directory: pathlib.Path, path: pathlib.Path, size: int, *,
         backing: tuple[pathlib.Path, str] | None = None) -> None:
    """Make the disk.

    :param directory: of the artifact.
    :param path: of the disk, which must not be there.
    :param size: bytes, not less than the image's.
    :param backing: file and format of the image here, if it is not where
        it was baked.
    :raises Invalid: the image is larger.
    :raises Corrupt: the artifact is damaged.
    :raises Exists: there is a disk.
    :raises CommandFailed: QEMU cannot do it.
    """
    description = artifact.read(directory)
    if size < description.virtual_size:
        raise exception.Invalid(
            f'{size} bytes; the image has {description.virtual_size}')
    with artifact.copied(directory, description, artifact.DISK, path):
        if backing:
            qemu.rename_backing(path, *backing)
        if size > description.virtual_size:
            qemu.grow(path, size)
