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

import atheris
import targets

#: What is looked into for new paths; beside our own, the parsers in Python
#: that do some of the work.
LOOKED_INTO = ['fastboot_common', 'fastboot_glance', 'fastboot_nova',
               'oslo_utils.imageutils', 'http.server']


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
    atheris.Setup([itself, f'-max_len={target.longest}', *others], target)
    if args.seconds:
        stop_after(args.seconds)
    atheris.Fuzz()


if __name__ == '__main__':
    main()
