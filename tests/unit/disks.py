# SPDX-License-Identifier: Apache-2.0
"""Small repositories and disks, and reading them back the slow way."""

import concurrent.futures
import hashlib
import os
import pathlib
import random

import numpy as np

from fastboot_common import (
    extents,
    manifest,
    pack,
    publish,
    repository,
    store,
)
from fastboot_common.store.local import LocalStore

BLOCK = 4096


def make_repository(path, block_size=BLOCK):
    path.mkdir(parents=True)
    repository.init(LocalStore(path), block_size)
    return open_repository(path)


def open_repository(path):
    return repository.Repository(LocalStore(path))


def disk(size, seed, zeros=0.3, pool=0, block=BLOCK):
    """Random blocks, a share of them zeros; `pool`: from so many different
    ones that all seeds share."""
    rng = random.Random(seed)
    data = bytearray(size)
    for start in range(0, size, block):
        length = min(block, size - start)
        if rng.random() < zeros:
            continue
        source = random.Random(f'pool {rng.randrange(pool)}') if pool else rng
        data[start:start + length] = source.randbytes(block)[:length]
    return bytes(data)


def write_raw(path, data, block=BLOCK):
    """A sparse file with these bytes."""
    with path.open('wb') as file:
        file.truncate(len(data))
        for start in range(0, len(data), block):
            part = data[start:start + block]
            if part.strip(b'\0'):
                file.seek(start)
                file.write(part)
    return path


def make_draft(image_id, size, block_size=BLOCK, boot=()):
    return manifest.Manifest(
        image_id=image_id, name=f'name of {image_id}', virtual_size=size,
        block_size=block_size, root='', packs=[],
        extents=np.empty(0, extents.DTYPE),
        boot=np.array(boot, np.int64), os_hash={'sha512': 'ab' * 64},
        source={'format': 'raw', 'size': size})


def put(repo, work, image_id, data, boot=(), **options):
    """Publish bytes as an image."""
    work = pathlib.Path(work)
    work.mkdir(exist_ok=True)
    raw = write_raw(work / f'{image_id}-{os.urandom(4).hex()}.raw', data,
                    repo.block_size)
    publisher = publish.Publisher(repo, work / 'cache', threads=2, level=1,
                                  boot_level=1)
    try:
        return publisher.publish(
            raw, make_draft(image_id, len(data), repo.block_size, boot),
            **options)
    finally:
        raw.unlink()


def read_back(repo, image):
    """An image's bytes, out of manifest and packs, all digests proven."""
    found = repo.read_manifest(image.manifest)
    size = repo.block_size
    whole = bytearray(found.block_count * size)
    root = hashlib.sha256()
    plain = {}
    for row in found.extents.tolist():
        first, count, position, ordinal = row
        ref = found.packs[position]
        index = repo.pack_index(ref)
        for inner in range(count):
            frame = int(index.frame_of(np.array([ordinal + inner]))[0])
            key = ref.digest, frame
            if key not in plain:
                plain[key] = index.decode(frame, repo.pack_read(ref.digest)(
                    *index.extent(frame)))
            at = (ordinal + inner - int(index.first[frame])) * size
            data = plain[key][at:at + size]
            digest = hashlib.sha256(data).digest()
            assert digest == index.digests[ordinal + inner].tobytes()
            assert data.strip(b'\0')
            root.update((first + inner).to_bytes(8, 'little') + digest)
            start = (first + inner) * size
            whole[start:start + size] = data
    assert root.hexdigest() == found.root
    assert publish.content_root(found, repo.pack_index) == found.root
    assert not bytes(whole[found.virtual_size:]).strip(b'\0')
    return bytes(whole[:found.virtual_size])


def data_blocks(data, block=BLOCK):
    """The numbers of the blocks that are not zeros."""
    return [number for number in range(-(-len(data) // block))
            if data[number * block:(number + 1) * block].strip(b'\0')]


def replace_pack(repo, ref, room):
    """Give a pack of random blocks others, and an index that is right for them
    but says that they are those that were there."""
    index = repo.pack_index(ref)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        writer = pack.PackWriter(room, BLOCK, 1, pool)
        for digest in index.digests:
            writer.add(digest.tobytes(), memoryview(os.urandom(BLOCK)))
        assert writer.finish().size == ref.size
    writer.path.replace(
        repo.store._root / store.object_name('packs', ref.digest))


def make_pack(directory, chunks, block_size=BLOCK, pool=None):
    """A pack of blocks: reference, bytes."""
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        writer = pack.PackWriter(directory, block_size, 1, executor)
        for chunk in chunks:
            writer.add(hashlib.sha256(chunk).digest(), memoryview(chunk))
        ref = writer.finish()
    data = writer.path.read_bytes()
    writer.abandon()
    return ref, data
