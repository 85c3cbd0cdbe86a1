# SPDX-License-Identifier: Apache-2.0
"""What a repository is made of; whoever serves it may have made it up.

Digests are made right again before the parser sees them: a fuzzer finds no
preimages, but whoever publishes can write any.
"""

import functools
import hashlib
import json
import pathlib
import struct
import tempfile

import numpy as np
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from disks import make_pack
from kit import File, Parts, Target

from fastboot_common import (
    exception,
    extents,
    journal,
    manifest,
    pack,
    repository,
    signing,
    store,
    trace,
)

BLOCK = 4096
CONFIG = {'format': repository.FORMAT, 'version': 1, 'block_size': BLOCK,
          'id': '3b0f3f52-5a4c-4f5e-9d2b-0d4a3a1c1f11'}
TIME = '2026-01-02T03:04:05+00:00'
PRIVATE = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))


def encode(value):
    return json.dumps(value).encode()


def deep(depth):
    """JSON that is nested nearly, or more, than a parser bears."""
    return b'[' * depth + b']' * depth


# config.json

def read_config(data):
    name, size = repository.read_config(data)
    assert repository.read_config(encode(
        {**CONFIG, 'id': name, 'block_size': size})) == (name, size)


def config_seeds():
    return [encode(CONFIG), encode({**CONFIG, 'version': 2}),
            encode({**CONFIG, 'id': 7}), deep(900), deep(2000)]


# Journal: config.json, head.json, entries and a checkpoint's state

class Store:
    """Objects in memory."""

    def __init__(self):
        self.objects = {'config.json': encode(CONFIG)}

    def get(self, name, limit=64 << 20, check=None):
        store.validate_name(name)
        if name not in self.objects:
            raise exception.NotFound(name)
        data = self.objects[name]
        if len(data) > limit:
            raise exception.Corrupt(name)
        return store.proven(data, check)


def follow(data):
    """Fold a journal whose entries are lines; the first line is head.json."""
    served = serve(*data.split(b'\n'))
    state = repository.Repository(served).state()
    kept = journal.State.from_json(state.to_json(), 'x')
    assert kept == state
    assert kept.to_json() == state.to_json()
    for gone in kept.removed.values():
        assert state.by_serial(gone.image.serial) and gone.age
    for image in kept.images.values():
        assert '/' not in image.domain
        assert journal.find(kept, image.image_id) == image
        store.object_name('manifests', image.manifest)
    for digest, size in kept.packs.items():
        store.object_name('packs', digest)
        assert 0 < size < 1 << 63


def serve(head, *lines):
    served, previous = Store(), None
    if head:
        served.objects['head.json'] = head
    for number, line in enumerate(lines, 1):
        data = chained(served, line, number, previous)
        served.objects[store.entry_name(number)] = data
        previous = hashlib.sha256(data).hexdigest()
    return served


def chained(served, line, number, previous):
    """A line as an entry that follows, unless it says something else."""
    try:
        entry = json.loads(line)
        return filled(served, entry, number, previous) \
            if isinstance(entry, dict) else line
    except (ValueError, RecursionError):
        return line


def filled(served, entry, number, previous):
    entry = {'format': journal.FORMAT, 'version': journal.VERSION,
             'number': number, 'previous': previous, 'checkpoint': 0,
             'time': TIME, 'signature': None, **entry}
    if isinstance(entry.get('state'), dict):
        state = encode({'version': number - 1, 'previous': previous,
                        **entry['state']})
        entry['state'] = hashlib.sha256(state).hexdigest()
        served.objects[store.object_name('states', entry['state'])] = state
    return encode(entry)


IMAGE = {'image_id': 'a', 'name': 'n', 'manifest': 'ab' * 32,
         'manifest_size': 10, 'virtual_size': 512, 'visibility': 'public',
         'owner': '', 'os_hash': {'sha512': 'ff'}}
PACK = {'digest': 'cd' * 32, 'size': 7}
REGISTER = {'kind': 'register', 'image': IMAGE, 'packs': [PACK]}
DEREGISTER = {'kind': 'deregister', 'image_id': 'a'}
REPACK = {'kind': 'repack', 'retired': ['cd' * 32], 'manifests': {
    'a': {'manifest': 'ef' * 32, 'manifest_size': 9}},
    'packs': [{'digest': '01' * 32, 'size': 9}]}
DROP = {'kind': 'drop', 'packs': ['cd' * 32], 'serials': [1]}
STATE = {
    'version': 1, 'previous': None, 'checkpoint': 0,
    'images': {'a': {**IMAGE, 'serial': 1}}, 'packs': {'cd' * 32: 7},
    'removed': {'2': {'image': {**IMAGE, 'serial': 2}, 'time': TIME}},
    'retired': {'cd' * 32: TIME}}
CHECKPOINT = {'kind': 'checkpoint', 'state': {
    key: STATE[key] for key in STATE if key not in ('version', 'previous')}}


def lines(*entries, head=b''):
    return b'\n'.join([head, *map(encode, entries)])


def follow_seeds():
    private = {**IMAGE, 'visibility': 'private', 'owner': 'p', 'image_id': 'b'}
    return [
        lines(REGISTER, REPACK, DEREGISTER, DROP),
        lines({**REGISTER, 'image': private}, head=b'{"version": 1}'),
        lines(DROP, CHECKPOINT, {**DEREGISTER, 'checkpoint': 2},
              head=b'{"version": 3}'),
        lines(CHECKPOINT, head=b'{"version": 1}'),
        lines({**REGISTER, 'packs': [{**PACK, 'size': 10 ** 30}]}),
        lines(REGISTER, {**DEREGISTER, 'time': '2026-01-02\ud80003:04+00:00'}),
        b'\n{"kind":' + deep(900) + b'}', b'\n{"kind":' + deep(990) + b'}',
        b'{"version":' + deep(990) + b'}\n']


def read_state(data):
    state = journal.State.from_json(data, 'state')
    assert journal.State.from_json(state.to_json(), 'x') == state


def state_seeds():
    return [encode(STATE), journal.State().to_json(), deep(990),
            encode({**STATE, 'version': 10 ** 30}),
            encode(STATE).replace(b'"version": 1', b'"version": 1e999')]


# Signatures

@functools.cache
def trusted():
    """The signer, and who trusts it."""
    private, public = File(), File()
    signer = signing.Signer(private.holding(PRIVATE.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption())))
    return signer, signing.Trust([public.holding(public_pem(PRIVATE))])


def public_pem(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM,
        serialization.PublicFormat.SubjectPublicKeyInfo)


def check_signature(data):
    """An entry: as it is (-), or signed by us before (+)."""
    signer, trust = trusted()
    ours, entry = data[:1] == b'+', data[1:]
    if ours:
        entry = sign(signer, entry)
    trust.check(entry, 1, CONFIG['id'])
    found = json.loads(entry)
    assert ours or without_signature(found) in (
        without_signature(one) for one in map(json.loads, signed()))


def sign(signer, entry):
    try:
        return signer.sign(entry, CONFIG['id'])
    except (ValueError, TypeError, RecursionError):
        raise exception.Corrupt('nothing that can be signed') from None


def without_signature(entry):
    return journal.canonical({**entry, 'signature': None})


def entry_bytes():
    return journal.make(journal.State(), 'deregister', {'image_id': 'a'})


@functools.cache
def signed():
    body = json.loads(entry_bytes()) | {'time': TIME}
    return [trusted()[0].sign(encode(body), CONFIG['id'])]


def signature_seeds():
    return [b'+' + signed()[0], b'-' + signed()[0], b'-' + entry_bytes(),
            b'+' + signed()[0].replace(b'"a"', deep(980))]


@functools.cache
def key_file():
    return File()


def read_keys(data):
    path = key_file().holding(data)
    try:
        signing.Trust([path])
    except exception.ConfigError:
        signing.Signer(path)


def key_seeds():
    pem = serialization.Encoding.PEM
    return [public_pem(PRIVATE), PRIVATE.private_bytes(
        pem, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()), PRIVATE.private_bytes(
        pem, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b'x')), RSA]


#: A key of a kind that nobody wants here.
RSA = b'''-----BEGIN PUBLIC KEY-----
MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAL+c7oCSnQjiFmXK/uzcfoA+ei2/uQfh
pz3rfZk4gANUuh+p3en7+/sD4oT4GHMEmXrKg+rqxhMQrfF/8pBYFO0CAwEAAQ==
-----END PUBLIC KEY-----
'''


# Packs

def reader(data):
    def read(offset, length):
        if offset < 0 or length < 0 or offset + length > len(data):
            raise exception.Corrupt('the store: ends before')
        return data[offset:offset + length]
    return read


TRAILER = struct.Struct('<QII32s8s')


def mended(data):
    """A pack whose digests are right, wherever it says that they are."""
    if len(data) < TRAILER.size:
        return data
    offset, frames, count, _digest, magic = TRAILER.unpack(
        data[-TRAILER.size:])
    body, index = data[:offset], bytearray(data[offset:-TRAILER.size])
    size = pack.FRAME_DTYPE.itemsize
    for row in range(min(frames, len(index) // size)):
        start, length = struct.unpack_from('<QI', index, row * size)
        index[row * size + 16:row * size + 48] = hashlib.sha256(
            body[start:start + length]).digest()
    return body + index + TRAILER.pack(
        offset, frames, count, hashlib.sha256(index).digest(), magic)


def read_pack(data):
    data = mended(data)
    ref, size = pack.read_ref('ab' * 32, len(data), reader(data))
    index = pack.PackIndex.load(ref, reader(data), size)
    done = 0
    for frame in range(len(index.frames)):
        plain = index.decode(frame, reader(data)(*index.extent(frame)))
        first, after = index.first[frame:frame + 2].tolist()
        assert len(plain) == (after - first) * size
        assert index.frame_of(np.arange(first, after)).tolist() == [
            frame] * (after - first)
        done += after - first
    assert done == ref.blocks == len(index.digests)


@functools.cache
def pack_seeds():
    chunks = [struct.pack('<Q', number).ljust(BLOCK, b'\1')
              for number in range(130)]
    with tempfile.TemporaryDirectory() as name:
        return [make_pack(pathlib.Path(name), chunks[:count])[1]
                for count in (3, 130, 1)]


def read_frame(data):
    """Two bytes of the length that is expected, and a frame."""
    parts = Parts(data)
    length = parts.number(2)
    plain = pack.decompress(parts.rest(), length, 'frame')
    assert len(plain) == length


def frame_seeds():
    plain = b'fastboot' * 100
    sizes = struct.pack('<H', len(plain))
    return [sizes + zstandard.ZstdCompressor(**options).compress(plain)
            for options in ({}, {'write_content_size': False},
                            {'write_checksum': True, 'level': 19})]


# Manifests

def read_manifest(data):
    found = manifest.Manifest.unpack(data, hashlib.sha256(data).hexdigest())
    again = found.pack()
    assert manifest.Manifest.unpack(
        again, hashlib.sha256(again).hexdigest()).pack() == again
    extents.validate(found.extents, found.block_count,
                     [ref.blocks for ref in found.packs])
    assert ((found.boot >= 0) & (found.boot < found.block_count)).all()
    numbers, packs, ordinals = extents.locate(found.extents, found.boot)
    assert len(numbers) == len(packs) == len(ordinals) <= len(found.boot)
    part = next(extents.pieces(found.extents, 64), None)
    if part is not None:
        assert 0 < extents.total(part) <= 64
        assert len(extents.expand(part)[0]) == extents.total(part)


def manifest_bytes(header, arrays, magic=manifest.MAGIC):
    """A manifest with these sections, whatever they hold."""
    sections, body = {}, b''
    compressor = zstandard.ZstdCompressor(level=1)
    for name, size in (('extents', 20), ('boot', 12), ('trace', 24)):
        raw = arrays.get(name, b'')
        packed = compressor.compress(raw)
        sections[name] = {'offset': len(body), 'length': len(packed),
                          'raw_length': len(raw),
                          'records': len(raw) // size}
        body += packed
    text = encode({'sections': sections, **header})
    return struct.pack('<8sII', magic, 1, len(text)) + text + body


HEADER = {
    'image_id': 'a', 'name': 'n', 'virtual_size': 600 * BLOCK - 512,
    'block_size': BLOCK, 'root': '12' * 32, 'os_hash': {'sha512': 'ff'},
    'source': {'format': 'raw', 'size': 5},
    'capture': {'state': 'booted', 'reason': None},
    'packs': [{'digest': 'ab' * 32, 'size': 1 << 20, 'blocks': 600,
               'index_offset': 900_000, 'index_digest': 'cd' * 32}]}
EXTENTS = struct.pack('<QIIIQIII', 0, 7, 0, 9, 8, 1, 0, 16)
BOOT = struct.pack('<QIQI', 8, 2, 0, 3)
READS = struct.pack('<QQIIQQII', 0, 4096, 512, 0, 9, 0, 4096, 0)


def manifest_seeds():
    arrays = {'extents': EXTENTS, 'boot': BOOT, 'trace': READS}
    return [
        manifest_bytes(HEADER, arrays),
        manifest_bytes(HEADER, {}),
        manifest_bytes({**HEADER, 'virtual_size': 8 << 40}, arrays),
        manifest_bytes({**HEADER, 'os_hash': [[None, 1], ['a', 2]]}, arrays),
        manifest_bytes({**HEADER, 'source': 'x' * 7}, arrays)]


def read_sections(data):
    """Lengths of two sections (records), blocks, and all three sections."""
    parts = Parts(data)
    counts = parts.number(1), parts.number(1)
    header = {**HEADER, 'virtual_size': parts.number(3) * BLOCK}
    read_manifest(manifest_bytes(header, {
        'extents': parts.take(counts[0] * 20),
        'boot': parts.take(counts[1] * 12), 'trace': parts.rest()}))


def section_seeds():
    head = bytes([2, 2]) + (600).to_bytes(3, 'little')
    return [head + EXTENTS + BOOT + READS,
            bytes([2, 0, 0, 0, 128]) + EXTENTS, bytes(5)]


# Traces

def read_trace(data):
    """Eight bytes of the image's size, and records."""
    parts = Parts(data)
    size, records = parts.number(8), parts.rest()
    found = trace.unpack(records, size)
    assert trace.pack(found, size) == records
    assert replayed(found, size) == len(found)
    if len(found) and size < 1 << 32:
        blocks = trace.boot_set(found, BLOCK, size)
        assert len(np.unique(blocks)) == len(blocks)
        assert trace.statistics(found, BLOCK)['unique_bytes'] == (
            len(blocks) * BLOCK)
        merged = trace.merge([found, found])
        assert trace.unpack(trace.pack(merged, size), size).size == (
            2 * len(found))


def replayed(found, size):
    return trace.replay_commands(found, size).count('\n')


def trace_seeds():
    return [struct.pack('<Q', 1 << 20) + READS, bytes(8),
            struct.pack('<Q', (1 << 64) - 1) + READS]


@functools.cache
def log_file():
    return File()


def read_log(data):
    """Where the log is cut (two bytes), and the log.

    Read in two goes, it says what it says in one.
    """
    parts = Parts(data)
    cut, log = parts.number(2), parts.rest()
    followed = trace.LogReader(log_file().holding(log[:cut]))
    first = followed.read()
    log_file().holding(log)
    both = np.concatenate([first, followed.read()])
    whole = trace.parse_log(log_file().path)
    assert both[['offset', 'length']].tolist() == (
        whole[['offset', 'length']].tolist())
    assert (np.diff(whole['time'].astype(np.int64)) >= 0).all()
    if len(whole):
        size = int((whole['offset'] + whole['length']).max())
        assert (trace.unpack(trace.pack(whole, size), size) == whole).all()


LINE = (b'%s.%06d connection=1 Read id=%d offset=0x%x count=0x%x ...\n')


def log_seeds():
    reads = b''.join(
        LINE % (when, number, number, number * 512, 512)
        for number, when in enumerate(
            (b'2026-01-02 03:04:05', b'2026-01-02 03:04:06')))
    return [b'\x50\0' + reads, b'\0\0' + reads.replace(b'2026', b'0001'),
            b'\0\0' + reads.replace(b'-01-', b'-13-'),
            b'\0\0' + LINE % (b'2026-01-02 03:04:05', 1, 1, 1 << 63, 512)]


TARGETS = (
    Target('config', read_config, config_seeds),
    Target('journal', follow, follow_seeds, longest=4096),
    Target('state', read_state, state_seeds),
    Target('signature', check_signature, signature_seeds, longest=4096),
    Target('keys', read_keys, key_seeds, (exception.ConfigError,)),
    Target('pack', read_pack, pack_seeds, longest=6000),
    Target('frame', read_frame, frame_seeds),
    Target('manifest', read_manifest, manifest_seeds),
    Target('sections', read_sections, section_seeds),
    Target('trace', read_trace, trace_seeds),
    Target('log', read_log, log_seeds),
)
