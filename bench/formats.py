# SPDX-License-Identifier: Apache-2.0
"""Suite ``formats``: one µVM in each of libvirt's save formats, in turn.

What is stored is uncompressed and as a stream, on all versions. The formats
that libvirt has since 11.2 are compared with it here, so that whether this
is right can be asked again with newer ones. Needs such a libvirt:
``tools/debian`` has one.
"""

import contextlib
import functools
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, Final

import libvirt

from bench import microvm, result, servers
from fastboot_common.microvm import clone
from fastboot_nova.microvm import disk

#: Ours first; the others are compared with it.
FORMATS: Final = ('raw', 'zstd', 'sparse')
#: Since when libvirt takes a format with each save.
_SINCE: Final = 11_002_000
_NAME: Final = 'formats'


def run(table: result.Table, path: pathlib.Path, runs: int,
        only: str | None) -> None:
    """Save a baked guest in each format; restore it from all of them."""
    if libvirt.getVersion() < _SINCE:
        raise SystemExit('formats: this libvirt has one format with each '
                         'save; 11.2 is needed')
    with servers.hypervisor() as found:
        bench = microvm.Bench(table, path, runs, found, False)
        baked = bench.artifact(microvm.MAIN)
        shutil.rmtree(bench.path / 'servers', ignore_errors=True)
        with bench.server(_NAME) as one:
            kept = _Kept(found, one, baked, bench.path / 'servers' / _NAME)
            for name in FORMATS:
                seconds = kept.save(name)
                table.add(f'{name}: file', kept.size(name) / microvm.MIB,
                          'MiB', note=f'saved in {seconds:.2f} s')
            _compare(bench, kept)


def _compare(bench: microvm.Bench, kept: '_Kept') -> None:
    cases = {name: functools.partial(kept.restore, name) for name in FORMATS}
    # What the first round finds in no cache is not measured.
    result.interleaved(1, cases)
    found = result.interleaved(bench.runs, cases)
    answers = {name: [answer for _, answer in found[name]]
               for name in FORMATS}
    for name in FORMATS:
        bench.median(f'{name}: call to all loaded',
                     [load for load, _ in found[name]])
        bench.median(f'{name}: call to first answer', answers[name])
    for name in FORMATS[1:]:
        bench.table.add(
            f'first answer: {name} / {FORMATS[0]}',
            result.ratio(answers[name], answers[FORMATS[0]]), 'ratio',
            runs=bench.runs)


class _Kept:
    """A guest that was baked, as files of several formats."""

    def __init__(self, found: Any, one: servers.Server, baked: pathlib.Path,
                 room: pathlib.Path) -> None:
        self._libvirt = found
        self._baked = baked
        self._room = room
        self._lane = one.furnish(baked)
        self._lane.dress(clone.instance(
            one.xml(), self._lane.description.machine))

    def _path(self, name: str) -> pathlib.Path:
        return self._room / f'saved-{name}'

    def size(self, name: str) -> int:
        """Bytes on disk."""
        return self._path(name).stat().st_blocks * 512

    def save(self, name: str) -> float:
        """Save the guest before its first instruction; seconds it took."""
        with self._restored(self._lane.path,
                            libvirt.VIR_DOMAIN_SAVE_PAUSED) as (domain, _):
            begun = time.monotonic()
            domain.saveParams({
                libvirt.VIR_DOMAIN_SAVE_PARAM_FILE: str(self._path(name)),
                libvirt.VIR_DOMAIN_SAVE_PARAM_IMAGE_FORMAT: name,
            }, libvirt.VIR_DOMAIN_SAVE_PAUSED)
            return time.monotonic() - begun

    def restore(self, name: str) -> tuple[float, float]:
        """Seconds from the call until all is loaded, and to its answer."""
        with self._restored(self._path(name),
                            libvirt.VIR_DOMAIN_SAVE_RUNNING) as (
                                domain, begun):
            loaded = time.monotonic() - begun
            while not servers.answers(domain, servers.PATIENCE):
                if time.monotonic() - begun > servers.PATIENCE:
                    raise RuntimeError(f'{name}: the guest says nothing')
            return loaded, time.monotonic() - begun

    @contextlib.contextmanager
    def _restored(self, path: pathlib.Path, flags: int
                  ) -> Iterator[tuple[Any, float]]:
        """The guest, and when it was called."""
        # What ran before has written to it.
        disk_path = self._room / 'disk'
        disk_path.unlink(missing_ok=True)
        disk.make(self._baked, disk_path, servers.DISK_SIZE)
        begun = time.monotonic()
        self._libvirt.restoreFlags(str(path), None, flags)
        domain = self._libvirt.lookupByName(_NAME)
        try:
            yield domain, begun
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
