# SPDX-License-Identifier: Apache-2.0
"""Digest of the code that a target runs; started by run.py.

Figures of a target can be added up as long as it is the same.
"""

import hashlib
import logging
import pathlib
import sys

import targets

ROOT = pathlib.Path(__file__).resolve().parents[2]


def loaded() -> list[pathlib.Path]:
    """Our modules in this process."""
    tops = [*ROOT.glob('fastboot_*'), ROOT / 'tests']
    files = {pathlib.Path(module.__file__).resolve()
             for module in list(sys.modules.values())
             if getattr(module, '__file__', None)}
    return sorted(file for file in files - {pathlib.Path(__file__).resolve()}
                  if any(file.is_relative_to(top) for top in tops))


def main() -> None:
    """What is loaded only when it is used is, after the seeds."""
    logging.disable()
    target = targets.find(sys.argv[1])
    for data in target.seeds():
        target(data)
    digest = hashlib.sha256()
    for file in loaded():
        digest.update(f'{file.relative_to(ROOT)}\0'.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    print(digest.hexdigest()[:16])


if __name__ == '__main__':
    main()
