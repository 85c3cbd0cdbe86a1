# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads: ``fastboot_…`` in base units, no ids as labels."""

from collections.abc import Callable
from typing import Any, Final

import prometheus_client

from fastboot_common import journal
from fastboot_common.microvm import activation

#: Phases of a resume, and who asks for one may have more; the last three are
#: of Nova's driver, and of lanes that nobody gave back.
_PHASES: Final = frozenset((
    'begin', 'define', 'dress', 'load', 'plug', 'activate', 'wait', 'end',
    *activation.STAGES, 'take', 'disk', 'lost'))
_SECONDS: Final = (.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30)


class Metrics:
    """The metrics of one agent, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.hits = self._counter('hits', 'Guests that got an image')
        self.misses = self._counter(
            'misses', 'Guests that did not, and took the stock path',
            'reason')
        self.acquire_seconds = self._histogram(
            'acquire_seconds', 'Time of acquires that hit')
        self.thaw_bytes = self._counter(
            'thaw_bytes', 'Bytes that acquires put into volumes')
        self.ensures = self._counter(
            'ensure_requests', 'Reads of guests that the volume did not '
            'have', 'result')
        self.ensure_bytes = self._counter(
            'ensure_bytes', 'Bytes of these reads')
        self.ensure_seconds = self._histogram(
            'ensure_seconds', 'Time of these reads')
        self.observations = self._counter(
            'observations', 'First minutes of guests that the centre was '
            'told of')
        self.sync_bytes = self._counter(
            'sync_bytes', 'Bytes of boot sets that came')
        self.hydrate_bytes = self._counter(
            'hydrate_bytes', 'Bytes that hydration put into volumes')
        self.evictions = self._counter(
            'evictions', 'Images that left a volume')
        self.evicted_bytes = self._counter(
            'evicted_bytes', 'Bytes that this freed')
        self.resumed = self._counter(
            'resumed_guests', 'Guests that paused and were resumed')
        self.rebooted = self._counter(
            'rebooted_guests', 'Resumed guests that rebooted and were '
            'started')
        self.microvm_resumes = self._counter(
            'microvm_resumes', 'Servers that were resumed')
        self.microvm_fallbacks = self._counter(
            'microvm_fallbacks', 'Servers that were booted after all, by '
            'the phase that ended their resume', 'phase')
        self.microvm_misses = self._counter(
            'microvm_misses', 'Servers that got no lane', 'reason')
        self.microvm_seconds = self._histogram(
            'microvm_seconds', 'Time from the call to the end of each '
            'phase of resumes', 'phase')
        self.microvms = self._gauge(
            'microvms', 'µVMs by their state on this host', 'state')
        self.images = self._gauge(
            'images', 'Images by their state on this host', 'state')
        self._gauges = {
            name: self._gauge(name, text) for name, text in (
                ('volume_bytes', 'Disk space that volumes take'),
                ('mirror_bytes', 'Disk space that the mirror takes'),
                ('free_bytes', 'Free space of the file system'),
                ('version', 'Version of the repository on this host'))}
        self._leases = self._gauge('leases', 'Leases of images')
        self._serials = self._gauge(
            'serials_left', 'Entries that the journal of the repository can '
            'still have before no image can be registered')

    def _counter(self, name: str, text: str, *labels: str,
                 ) -> prometheus_client.Counter:
        return prometheus_client.Counter(
            f'fastboot_{name}', text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str,
               ) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(
            f'fastboot_{name}', text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str,
                   ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f'fastboot_{name}', text, labels, buckets=_SECONDS,
            registry=self.registry)

    def follow(self, name: str, text: str,
               value: Callable[[], float]) -> None:
        """A gauge that is asked for its value."""
        self._gauge(name, text).set_function(value)

    def note(self, report: dict[str, Any], leases: int) -> None:
        """Set the gauges from a report."""
        for name, gauge in self._gauges.items():
            gauge.set(report[name])
        self._leases.set(leases)
        self._serials.set(journal.serials_left(report['version']))
        self.images.clear()
        for image in report['images']:
            self.images.labels(image['state']).inc()
        self.microvms.clear()
        for one in report['microvms']:
            self.microvms.labels(one['state']).inc()

    def note_resume(self, well: bool, phase: str,
                    seconds: dict[str, float]) -> None:
        """Count a resume, or a fallback.

        :param phase: that it ended in.
        :param seconds: from the call to the end of each phase.
        """
        if well:
            self.microvm_resumes.inc()
        else:
            self.microvm_fallbacks.labels(_known(phase)).inc()
        for name, value in seconds.items():
            self.microvm_seconds.labels(_known(name)).observe(value)

    def serve(self, address: str, port: int) -> None:
        """Answer Prometheus, in a thread."""
        prometheus_client.start_http_server(port, address, self.registry)


def _known(phase: str) -> str:
    """The phase, if it is one of few: what callers say makes no labels."""
    return phase if phase in _PHASES else 'other'
