# SPDX-License-Identifier: Apache-2.0
"""The software: Debian's packages, OpenStack's, and fastboot itself."""

import hashlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

from cloud.layout import REPOSITORY, Layout
from cloud.steps import StepError

_HERE = pathlib.Path(__file__).parent
_CONSTRAINTS = _HERE / 'constraints.txt'
_REQUIREMENTS = _HERE / 'requirements.txt'
#: What of the checkout makes up the installed fastboot.
_SOURCES = ('fastboot_common', 'fastboot_glance', 'fastboot_nova', 'nova',
            'etc', 'setup.cfg', 'setup.py', 'pyproject.toml',
            'requirements.txt')


def edition() -> str:
    """Changes with OpenStack's versions."""
    return hashlib.sha256(_CONSTRAINTS.read_bytes()).hexdigest()[:16]


def recipe() -> str:
    """Changes with anything that decides what new databases contain."""
    digest = hashlib.sha256(_CONSTRAINTS.read_bytes())
    for name in ('databases.py', 'accounts.py', 'layout.py', 'config'):
        for file in sorted([_HERE / name, *(_HERE / name).glob('*.py')]):
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def debian(layout: Layout) -> None:
    """Install what bindep.txt's profile `sandbox` lists.

    :raises StepError: not possible.
    """
    _run(layout, [REPOSITORY / 'tools' / 'prepare', 'sandbox'])


def openstack(layout: Layout) -> bool:
    """Make the virtual environment, unless it is there.

    :return: whether anything was installed.
    :raises StepError: not possible.
    """
    stamp = layout.venv / 'requirements.installed'
    wanted = hashlib.sha256(_CONSTRAINTS.read_bytes()
                            + _REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    if not (layout.venv / 'bin' / 'pip').exists():
        _run(layout, ['/usr/bin/python3', '-m', 'venv', layout.venv])
    pip(layout, '-r', str(_REQUIREMENTS))
    # uWSGI embeds the interpreter that compiled it: a wheel from pip's
    # cache may have been made for another one.
    if not (layout.venv / 'bin' / 'uwsgi').exists():
        pip(layout, '--no-cache-dir', '--no-binary', 'uwsgi', 'uwsgi')
    stamp.write_text(wanted)
    return True


def fastboot(layout: Layout) -> bool:
    """Install the checkout as a package, unless this very one is.

    Not editable: the driver's shim must lie in Nova's own tree.

    :return: whether anything was installed.
    :raises StepError: not possible.
    """
    stamp = layout.venv / 'fastboot.installed'
    code = checkout_digest()
    if stamp.exists() and stamp.read_text() == code:
        return False
    pip(layout, '-r', str(REPOSITORY / 'requirements.txt'), 'setuptools',
        'wheel')
    # setuptools would find files of earlier builds in the checkout's own
    # build directory, and install them too.
    build = layout.state / 'build'
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    config = build / 'distutils.cfg'
    config.write_text(f'[build]\nbuild_base = {build}\n')
    pip(layout, '--no-deps', '--force-reinstall', '--no-build-isolation',
        str(REPOSITORY), DIST_EXTRA_CONFIG=str(config),
        GIT_INDEX_FILE=str(_index(layout, build)),
        SKIP_GENERATE_AUTHORS='1', SKIP_WRITE_GIT_CHANGELOG='1')
    stamp.write_text(code)
    return True


def _index(layout: Layout, build: pathlib.Path) -> pathlib.Path:
    """An index for git that knows files which were not added yet, too.

    pbr installs data files only if git knows them.
    """
    index = build / 'index'
    git = ('git', '-C', REPOSITORY)
    for words in (('read-tree', 'HEAD'), ('add', '--intent-to-add', '.')):
        _run(layout, [*git, *words], GIT_INDEX_FILE=str(index))
    return index


def installed_code(layout: Layout) -> str:
    """Changes with the installed fastboot; empty: none is."""
    stamp = layout.venv / 'fastboot.installed'
    return stamp.read_text() if stamp.exists() else ''


def checkout_digest() -> str:
    """Changes with any file of fastboot in the checkout."""
    digest = hashlib.sha256()
    for top in _SOURCES:
        root = REPOSITORY / top
        files = sorted(root.rglob('*')) if root.is_dir() else [root]
        for file in files:
            if file.is_file() and file.suffix != '.pyc':
                content = file.read_bytes()
                name = file.relative_to(REPOSITORY)
                digest.update(f'{name} {len(content)}\n'.encode())
                digest.update(content)
    return digest.hexdigest()


def pip(layout: Layout, *words: str, **variables: str) -> None:
    """Install with pip, within the constraints.

    :raises StepError: pip fails.
    """
    _run(layout, [layout.bin('pip'), 'install', '--quiet',
                  '--disable-pip-version-check', '--constraint',
                  _CONSTRAINTS, *words], **variables)


def _run(layout: Layout, words: Sequence[str | os.PathLike[str]],
         **variables: str) -> None:
    log = layout.log / 'packages.log'
    with log.open('a') as file:
        print('#', *words, file=file, flush=True)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, cwd='/', timeout=1800,
            env={**os.environ, **variables})
    if done.returncode:
        last = '\n'.join(log.read_text().splitlines()[-15:])
        raise StepError(f'{os.fspath(words[0])} failed; {log} ends with\n'
                        f'{last}')
