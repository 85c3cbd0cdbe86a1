# SPDX-License-Identifier: Apache-2.0
"""Feeding parsers with bytes that someone damaged or made up."""

import contextlib
import random
import resource

import pytest

from fastboot_common import exception

#: Address space that a parser may need on top of what the process has.
ROOM = 1 << 30


@contextlib.contextmanager
def bounded():
    """Allocations that a small input does not justify fail in here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def variants(data, count=300, seed=1):
    """Bytes that are nearly `data`, and some that are not at all."""
    rng = random.Random(seed)
    yield b''
    for length in {1, 7, len(data) // 2, len(data) - 1}:
        yield data[:max(length, 0)]
    yield data + b'\0'
    yield data + data
    for size in (1, 64, 512, 4096):
        yield rng.randbytes(size)
        yield bytes(size)
        yield b'\xff' * size
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            kind = rng.randrange(4)
            at = rng.randrange(max(len(changed), 1))
            if kind == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                changed[at:at + 8] = rng.choice(
                    (b'\xff' * 8, bytes(8), b'\x80' + bytes(7)))
            elif kind == 2:
                del changed[at:at + rng.randrange(1, 64)]
            else:
                changed[at:at] = rng.randbytes(rng.randrange(1, 16))
            if not changed:
                break
        yield bytes(changed)


def survives(parse, data, allowed=(exception.Corrupt,), count=300):
    """`parse` of anything near `data` returns, or raises what is allowed.

    :returns: what it made of those that it took.
    """
    taken = []
    with bounded():
        for variant in variants(data, count):
            try:
                taken.append((variant, parse(variant)))
            except allowed:
                continue
            except BaseException as error:
                pytest.fail(f'{error!r} for {variant[:200]!r}')
    return taken
