# SPDX-License-Identifier: Apache-2.0
"""One target under atheris; started by run.py, in its virtual environment.

All other arguments are libFuzzer's: options, directories of inputs, or files
to try once.
"""

import argparse
import logging
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable

import atheris
import targets

#: What is looked into for new paths; beside our own, the parsers in Python
#: that do some of the work.
LOOKED_INTO = ['fastboot_common', 'fastboot_glance', 'fastboot_nova',
               'oslo_utils.imageutils', 'http.server']
#: Of memory that stays between inputs, MiB. Code under atheris 3.0.0 keeps
#: some Python objects of every comparison: 0.5 to 2.5 KB an input. That ours
#: keeps nothing is tests/unit/test_fuzz_corpus.py's to show.
KEPT = 512


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and libFuzzer's."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('target')
    parser.add_argument('--seconds', type=float, help='of CPU')
    parser.add_argument('--seeds', type=pathlib.Path,
                        help='directory that gets the seeds')
    return parser.parse_known_args()


def stop_after(seconds: float) -> None:
    """End in good order once they are used; libFuzzer counts only those of
    the clock, of which a busy machine gives us few."""
    signal.signal(signal.SIGPROF, lambda *_: os.kill(
        os.getpid(), signal.SIGUSR1))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def stop_when_full(target: Callable[[bytes], None]) -> Callable[[bytes],
                                                               None]:
    """A target after whose inputs the process ends in good order once what
    they left is too much, before libFuzzer takes it for the target's."""
    count = 0

    def run(data: bytes) -> None:
        nonlocal count
        target(data)
        count += 1
        if count % 64 == 0 and resident() > KEPT << 20:
            os.kill(os.getpid(), signal.SIGUSR1)
    return run


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = pathlib.Path('/proc/self/statm').read_text().split()[1]
    return int(pages) * os.sysconf('SC_PAGESIZE')


def main() -> None:
    """Does not return; the status is libFuzzer's."""
    args, others = parse()
    logging.disable()
    with atheris.instrument_imports(include=LOOKED_INTO):
        target = targets.find(args.target)
    for number, data in enumerate(target.seeds()):
        # Before memory is confined, whatever it loads once.
        target(data)
        if args.seeds:
            (args.seeds / f'seed-{number}').write_bytes(data)
    targets.confine()
    # To merge, it starts itself again by this name, through a shell.
    itself = shlex.join([sys.executable, __file__, args.target])
    atheris.Setup([itself, f'-max_len={target.longest}', *others],
                  stop_when_full(target))
    if args.seconds:
        stop_after(args.seconds)
    atheris.Fuzz()


if __name__ == '__main__':
    main()
