# SPDX-License-Identifier: Apache-2.0
"""MariaDB's files, and each service's tables.

Migrations cost a minute of two processors, so what they made is kept as
SQL, and taken from there when a sandbox begins afresh.
"""

import pathlib
import shutil
from collections.abc import Callable, Sequence

from cloud.config.identity import make_keys
from cloud.inside import Inside
from cloud.layout import PASSWORD, REGION, Layout
from cloud.packages import edition, recipe
from cloud.services import IDENTITY, KEYSTONE_DATABASE
from cloud.steps import Clock, Step

_DATABASES = ('keystone', 'glance', 'placement', 'nova_api', 'nova',
              'nova_cell0', 'neutron', 'fastboot')


class Databases:
    """The databases of a layout, and what was done in them once for all."""

    def __init__(self, layout: Layout, inside: Inside) -> None:
        self._layout = layout
        self._inside = inside
        self._edition = edition()

    def steps(self) -> list[Step]:
        """For `up`."""
        steps = [
            Step('mariadb files', self._mariadb_files, ('network',)),
            Step('databases', self._databases, ('mariadb',)),
            self.stamped(KEYSTONE_DATABASE, self._keystone),
            self._database('glance database', self._glance, 'glance'),
            self._database('placement database', self._placement,
                           'placement'),
            self._database('nova database', self._nova, 'nova_api', 'nova',
                           'nova_cell0'),
            self._database('neutron database', self._neutron, 'neutron'),
        ]
        if self._layout.options.fastboot:
            steps.append(Step('fastboot database', self._fastboot,
                              ('databases', 'fastboot code')))
        return steps

    def stamped(self, name: str, run: Callable[[], None],
                need: str = 'databases') -> Step:
        """A step that is over once for all, as long as the data are kept
        and the software is the same.
        """
        def once(clock: Clock) -> str:
            stamp = self._stamp(name)
            if stamp.exists() and stamp.read_text() == self._edition:
                return ''
            run()
            stamp.write_text(self._edition)
            return name
        return Step(name, once, (need,))

    def _stamp(self, name: str) -> pathlib.Path:
        return self._layout.data / 'done' / name.replace(' ', '-')

    def _mariadb_files(self, clock: Clock) -> str:
        directory = self._layout.data / 'mysql'
        for name in ('rabbit', 'redis', 'glance', 'done'):
            (self._layout.data / name).mkdir(parents=True, exist_ok=True)
        if (directory / 'installed').exists():
            return ''
        self._inside.run(
            'mariadb-install-db', '--no-defaults', '--user=root',
            f'--datadir={directory}', '--skip-test-db',
            '--auth-root-authentication-method=normal')
        (directory / 'installed').touch()
        return 'MariaDB has its files'

    def _databases(self, clock: Clock) -> str:
        users = ('localhost', '10.199.0.%')
        self._sql('\n'.join([
            *(f'create database if not exists {name} character set utf8mb4;'
              for name in _DATABASES),
            *(f"create user if not exists 'os'@'{where}' identified by "
              f"'{PASSWORD}'; grant all on *.* to 'os'@'{where}';"
              for where in users)]))
        return ''

    def _sql(self, text: str) -> None:
        self._inside.run(
            'mariadb', '--no-defaults', '-uroot',
            f'--socket={self._layout.mysql_socket}', feed=text)

    def _database(self, name: str, make: Callable[[], None],
                  *databases: str) -> Step:
        """A service's tables, made by its own program or from the last
        time.
        """
        def run() -> None:
            if not self._restored(name, databases):
                make()
                self.remember(databases)
        return self.stamped(name, run)

    def _dump(self, databases: Sequence[str]) -> pathlib.Path:
        return self._layout.cache / recipe() / f'{databases[0]}.sql'

    def _restored(self, name: str, databases: Sequence[str]) -> bool:
        file = self._dump(databases)
        # Where there is a stamp there are data, of whatever edition.
        if not file.exists() or self._stamp(name).exists():
            return False
        self._sql(file.read_text())
        return True

    def remember(self, databases: Sequence[str]) -> None:
        """Keep what was just made, for the next `--fresh`."""
        text = self._inside.run(
            'mariadb-dump', '--no-defaults', '-uroot', '--databases',
            '--add-drop-database', '--single-transaction',
            f'--socket={self._layout.mysql_socket}', *databases)
        file = self._dump(databases)
        for old in self._layout.cache.glob('*'):
            if old.name != recipe():
                shutil.rmtree(old)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix('.new')
        new.touch(mode=0o600)
        new.write_text(text)
        new.rename(file)

    def _manage(self, program: str, file: str, *words: str,
                accept: Sequence[int] = (0,)) -> None:
        self._inside.run(
            self._layout.bin(program), '--config-file',
            str(self._layout.etc / file), *words, accept=accept)

    def _keystone(self) -> None:
        make_keys(self._layout)
        if self._restored(KEYSTONE_DATABASE, ['keystone']):
            # With all accounts, which came later.
            self._stamp(IDENTITY).write_text(self._edition)
            return
        self._manage('keystone-manage', 'keystone/keystone.conf', 'db_sync')
        interfaces = ('public', 'internal', 'admin')
        self._manage(
            'keystone-manage', 'keystone/keystone.conf', 'bootstrap',
            '--bootstrap-password', PASSWORD, '--bootstrap-region-id',
            REGION, *(word for interface in interfaces for word in
                      (f'--bootstrap-{interface}-url',
                       self._layout.auth_url)))

    def _glance(self) -> None:
        self._manage('glance-manage', 'glance/glance-api.conf', 'db_sync')

    def _placement(self) -> None:
        self._manage('placement-manage', 'placement/placement.conf', 'db',
                     'sync')

    def _nova(self) -> None:
        for words in (('api_db', 'sync'),
                      ('cell_v2', 'map_cell0', '--database_connection',
                       self._layout.database('nova_cell0')),
                      ('db', 'sync')):
            self._manage('nova-manage', 'nova/nova.conf', *words)
        # 2: such a cell exists.
        self._manage('nova-manage', 'nova/nova.conf', 'cell_v2',
                     'create_cell', '--name', 'cell1', accept=(0, 2))

    def _neutron(self) -> None:
        self._manage('neutron-db-manage', 'neutron/neutron.conf', 'upgrade',
                     'heads')

    def _fastboot(self, clock: Clock) -> str:
        # Quick, and its migrations change with the checkout.
        self._manage('fastboot-manage', 'fastboot/fastboot.conf', 'db',
                     'sync')
        return 'fastboot database'
