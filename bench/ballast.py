# SPDX-License-Identifier: Apache-2.0
"""Free memory that is there at once, as a host's is.

A machine that is a virtual one itself may have to ask for it: where its
hypervisor takes back what has been free for two seconds (free page
reporting), the first touch of a GiB takes 2.6 s, and of what was freed just
now 0.13 s. A guest that is resumed touches 0.3 GiB at once.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator

_TICK = 0.02


@contextlib.contextmanager
def held(count: int, needed: Callable[[], bool]) -> Iterator[None]:
    """Have memory, and free it when it is needed.

    :param count: bytes.
    :param needed: asked many times a second, in a thread.
    """
    memory = _touched(count)
    over = threading.Event()

    def watch() -> None:
        with memory:
            while not needed() and not over.wait(_TICK):
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def touch(count: int) -> None:
    """Have memory there for what starts now.

    :param count: bytes.
    """
    _touched(count).close()


def _touched(count: int) -> mmap.mmap:
    memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, count, mmap.PAGESIZE):
        memory[offset] = 1
    return memory
