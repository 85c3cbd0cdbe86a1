# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads: ``fastboot_…`` in base units, no ids as labels."""

from collections.abc import Callable
from typing import Any, Final

import prometheus_client

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
        self.images = self._gauge(
            'images', 'Images by their state on this host', 'state')
        self._gauges = {
            name: self._gauge(name, text) for name, text in (
                ('volume_bytes', 'Disk space that volumes take'),
                ('mirror_bytes', 'Disk space that the mirror takes'),
                ('free_bytes', 'Free space of the file system'),
                ('version', 'Version of the repository on this host'))}
        self._leases = self._gauge('leases', 'Leases of images')

    def _counter(self, name: str, text: str, *labels: str,
                 ) -> prometheus_client.Counter:
        return prometheus_client.Counter(
            f'fastboot_{name}', text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str,
               ) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(
            f'fastboot_{name}', text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str,
                   ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f'fastboot_{name}', text, buckets=_SECONDS,
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
        self.images.clear()
        for image in report['images']:
            self.images.labels(image['state']).inc()

    def serve(self, address: str, port: int) -> None:
        """Answer Prometheus, in a thread."""
        prometheus_client.start_http_server(port, address, self.registry)
