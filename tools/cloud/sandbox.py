# SPDX-License-Identifier: Apache-2.0
"""Up, down and what lies between: services in their order.

`up` makes true what the layout says: it starts what does not run, restarts
what runs with another configuration or code, stops what no longer belongs,
and leaves the rest alone. So it also repairs.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping

from cloud import config, jobs, node, packages
from cloud.layout import Layout, Node, load
from cloud.network import Network
from cloud.process import Record, Records, spawn
from cloud.process import stop as stop_process
from cloud.resources import make_ssh_key
from cloud.rest import Rest
from cloud.services import Service, environment, table
from cloud.steps import Clock, Step, StepError, run

#: Seconds that a service is given to start.
PATIENCE = 120.0
_LINES = 15


class Sandbox:
    """A sandbox cloud of a layout."""

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self.layout = layout
        self.records = Records(layout.run)
        self.clock = clock
        self._rest = Rest()
        self.services = {service.name: service
                         for service in table(layout, self._rest)}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from changing the same sandbox.

        :raises StepError: one is about to.
        """
        self.layout.state.mkdir(parents=True, exist_ok=True)
        with (self.layout.state / 'lock').open('w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StepError('another tools/sandbox works on '
                                f'{self.layout.state}') from None
            yield

    # --- up ---------------------------------------------------------------

    def up(self, fresh: bool) -> None:
        """Bring everything up.

        :param fresh: without the data of earlier runs.
        :raises StepError: of the first thing that failed.
        """
        if fresh or not node.intact(self.layout, self.records):
            # As it was made: the new layout may lack some of its services.
            Sandbox(load(self.layout.state), self.clock).down()
        if fresh:
            self._wipe_data()
        for directory in (self.layout.log, self.layout.run,
                          self.layout.data, self.layout.etc):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.layout.save()
        self._software()
        make_ssh_key(self.layout)
        node.make_points(self.layout)
        config.write(self.layout)
        self._stop_strangers()
        run(self.steps(), self.clock)

    def steps(self) -> list[Step]:
        """All that `up` does after the software is there."""
        return [*self._foundation(),
                *jobs.steps(self.layout, self.records, self._rest),
                *self._starts()]

    def _software(self) -> None:
        packages.debian(self.layout)
        self.clock.say('packages of Debian are there')
        if packages.openstack(self.layout):
            self.clock.say('OpenStack is installed')

    def _foundation(self) -> list[Step]:
        def make(which: Node) -> Step:
            def start(clock: Clock) -> str:
                node.start(self.layout, self.records, which, clock)
                return ''
            return Step(f'node {which.name}', start)

        def links(clock: Clock) -> str:
            network = Network(self.layout, self.records)
            network.build()
            network.shape(self.layout.options.link_rate)
            return 'namespaces and links'

        def code(clock: Clock) -> str:
            return 'fastboot is installed' \
                if packages.fastboot(self.layout) else ''

        nodes = [make(which) for which in self.layout.nodes]
        steps = [*nodes, Step('network', links,
                              tuple(step.name for step in nodes))]
        if self.layout.options.fastboot:
            steps.append(Step('fastboot code', code))
        return steps

    def _starts(self) -> list[Step]:
        with_code = ('fastboot code',) if self.layout.options.fastboot else ()
        return [
            Step(service.name,
                 functools.partial(self._ensure, service),
                 (*service.needs, *(with_code if service.code else ()),
                  *(('network',) if service.node else ())))
            for service in self.services.values()
        ]

    def _ensure(self, service: Service, clock: Clock) -> str:
        """Start a service, unless it runs just as it would be started."""
        record = self.records.get(service.name)
        if record and record.alive:
            if record.fingerprint == self._fingerprint(service):
                self._await(service, record)
                return ''
            self._stop(record)
        self._start(service)
        return service.name

    def _start(self, service: Service) -> None:
        target = node.target(self.records, service.node) \
            if service.node else 0
        record = spawn(
            self.records, service.name, service.argv,
            self.layout.log / f'{service.name}.log', target=target,
            node=service.node,
            env={**environment(self.layout), **service.env},
            fingerprint=self._fingerprint(service))
        self._await(service, record)

    def _await(self, service: Service, record: Record) -> None:
        """Until it is up.

        :raises StepError: it ended, or takes too long.
        """
        in_time = self.clock.wait(
            lambda: not record.alive or service.ready(record), PATIENCE, .15)
        if not record.alive:
            raise StepError(f'{service.name} ended:\n{excerpt(record)}')
        if not in_time:
            raise StepError(f'{service.name} is not up after {PATIENCE:.0f} '
                            f's:\n{excerpt(record)}')

    def _fingerprint(self, service: Service) -> str:
        """Changes with all that a service is started with."""
        parts = [service.argv, sorted(service.env.items())]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for file in service.files:
            digest.update(file.read_bytes() if file.exists() else b'-')
        if service.code and self.layout.options.fastboot:
            digest.update(packages.installed_code(self.layout).encode())
        return digest.hexdigest()[:16]

    # --- down -------------------------------------------------------------

    def down(self) -> None:
        """Stop everything; what was kept stays."""
        alive = [record for record in self.records
                 if record.alive and not record.name.startswith('node@')]
        # Nova's computes first: they would wonder where their guests are.
        computes = [record for record in alive
                    if record.name.startswith('nova-compute@')]
        run([self._stopping(record) for record in computes], self.clock)
        self._end_guests()
        run(self._in_order(alive), self.clock)
        for record in self.records:
            if record.name.startswith('node@'):
                node.stop(record)
            self.records.forget(record.name)
        for file in self.layout.run.glob('*.s*'):
            file.unlink()  # sockets
        node.remove_points(self.layout)

    def _end_guests(self) -> None:
        """They write what they have, which the end of a node would not."""
        def guests() -> list[int]:
            return [pid for record in self.records
                    if record.name.startswith('node@')
                    for pid in node.guests(record)]

        for pid in guests():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.clock.wait(lambda: not guests(), 10)

    def _in_order(self, alive: list[Record]) -> list[Step]:
        """Each service ends after those that need it."""
        users: dict[str, list[str]] = {record.name: [] for record in alive}
        graph = {step.name: step.needs for step in self.steps()}
        for record in alive:
            for need in closure(graph, record.name):
                if need in users:
                    users[need].append(record.name)
        return [self._stopping(record, tuple(users[record.name]))
                for record in alive]

    def _stopping(self, record: Record, after: tuple[str, ...] = ()) -> Step:
        def end(clock: Clock) -> str:
            self._stop(record)
            return ''
        return Step(record.name, end, after)

    def _stop(self, record: Record) -> None:
        service = self.services.get(record.name)
        if service:
            gentle = stop_process(record, service.signum,
                                  patience=service.patience,
                                  group=service.group)
        else:
            gentle = stop_process(record)
        if not gentle:
            self.clock.say(f'{record.name} had to be killed')
        self.records.forget(record.name)

    def _stop_strangers(self) -> None:
        """Stop what an earlier layout had and this one has not."""
        for record in self.records:
            if record.name not in self.services \
                    and not record.name.startswith('node@'):
                self._stop(record)

    def wipe(self) -> None:
        """Remove all but the software."""
        shutil.rmtree(self.layout.data, ignore_errors=True)
        for name in ('nodes', 'log', 'etc', 'run', 'ssh', 'build'):
            shutil.rmtree(self.layout.state / name, ignore_errors=True)
        for name in ('openrc', 'clouds.yaml', 'options.json'):
            (self.layout.state / name).unlink(missing_ok=True)

    def _wipe_data(self) -> None:
        shutil.rmtree(self.layout.data, ignore_errors=True)
        shutil.rmtree(self.layout.state / 'nodes', ignore_errors=True)

    # --- single services --------------------------------------------------

    def service(self, name: str) -> Service:
        """A service of this layout.

        :raises StepError: there is none of that name.
        """
        try:
            return self.services[name]
        except KeyError:
            raise StepError(
                f'there is no service {name}, but '
                f'{", ".join(sorted(self.services))}') from None

    def stop(self, name: str) -> None:
        """Stop a service, and what it needs not.

        :raises StepError: there is none of that name.
        """
        record = self.records.get(self.service(name).name)
        if record:
            self._stop(record)

    def start(self, name: str) -> None:
        """Start a service that does not run.

        :raises StepError: there is none of that name, or it ends.
        """
        self._ensure(self.service(name), self.clock)


def closure(graph: Mapping[str, Iterable[str]], name: str) -> set[str]:
    """All that a step needs, directly or not.

    >>> sorted(closure({'a': ['b'], 'b': ['c'], 'c': []}, 'a'))
    ['b', 'c']
    """
    found: set[str] = set()
    new = list(graph[name]) if name in graph else []
    while new:
        need = new.pop()
        if need not in found:
            found.add(need)
            new += graph.get(need, ())
    return found


def excerpt(record: Record) -> str:
    """The last lines that a process logged, with their numbers."""
    log = pathlib.Path(record.log)
    lines = log.read_text(errors='replace').splitlines()
    first = max(len(lines) - _LINES, 0)
    return '\n'.join(f'  {log}:{number}: {line}' for number, line in
                     enumerate(lines[first:], first + 1))
