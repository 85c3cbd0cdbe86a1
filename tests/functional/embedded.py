# SPDX-License-Identifier: Apache-2.0
"""libvirt's embedded driver, for a test.

It lives in the process that opens it, and what it left running ends with
that: so all happens in a child.
"""

import multiprocessing
import pathlib
import tempfile
import threading
import time
import traceback

_SECONDS = 200


def run(scenario, *arguments):
    """Call `scenario(room, *arguments)` in a child.

    :param scenario: a function of a test's module; gets a directory.
    :raises AssertionError: it failed, and how.
    """
    context = multiprocessing.get_context('spawn')
    told = context.Queue()
    with tempfile.TemporaryDirectory(prefix='fb') as room:
        child = context.Process(
            target=_tell, args=(scenario, pathlib.Path(room), arguments,
                                told))
        child.start()
        try:
            words = told.get(timeout=_SECONDS)
        finally:
            child.join(3)
            child.kill()
            child.join()
    assert not words, words


def _tell(scenario, room, arguments, told):
    try:
        scenario(room, *arguments)
        told.put('')
    except BaseException:
        told.put(traceback.format_exc())


def opened(room):
    """The driver's URI and a connection to it."""
    import libvirt
    etc = room / 'root' / 'etc'
    etc.mkdir(parents=True)
    (etc / 'qemu.conf').write_text(
        'stdio_handler = "file"\ncgroup_controllers = []\n'
        'security_driver = "none"\nuser = "root"\ngroup = "root"\n')
    libvirt.virEventRegisterDefaultImpl()

    def events():
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=events, daemon=True).start()
    uri = f'qemu:///embed?root={room}/root'
    return uri, libvirt.open(uri)


def wait_for(question, seconds=60):
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, 'it did not come true'
        time.sleep(0.05)
