# SPDX-License-Identifier: Apache-2.0
"""The SQL tables of the records, and how a database gets them.

Versions are Alembic revisions in ``migrations/versions``; their table has a
name of our own, because TaskFlow's logbooks live in the same database.
Reading and writing rows is :mod:`fastboot_glance.records`.
"""

import pathlib
from typing import Any, Final

import sqlalchemy as sa
from alembic import command, config, migration, script
from sqlalchemy.dialects import mysql

VERSION_TABLE: Final = 'fastboot_version'
#: Ids and host names are told apart by case; names are any Unicode.
OPTIONS: Final = {
    'mysql_engine': 'InnoDB', 'mysql_charset': 'utf8mb4',
    'mysql_collate': 'utf8mb4_bin',
}
BLOB: Final = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), 'mysql')

METADATA: Final = sa.MetaData()

#: What builders say of an image, and whether somebody asked for a build.
BUILDS: Final = sa.Table(
    'builds', METADATA,
    sa.Column('image_id', sa.String(64), primary_key=True),
    sa.Column('name', sa.String(255), nullable=False, default=''),
    sa.Column('owner', sa.String(64), nullable=False, default=''),
    sa.Column('state', sa.String(16), nullable=False),
    sa.Column('stage', sa.String(64), nullable=False, default=''),
    sa.Column('progress', sa.Double, nullable=False, default=0.0),
    sa.Column('error', sa.String(1000), nullable=False, default=''),
    sa.Column('version', sa.Integer),
    sa.Column('boot_size', sa.BigInteger),
    sa.Column('builder', sa.String(255), nullable=False, default=''),
    sa.Column('attempts', sa.Integer, nullable=False, default=0),
    sa.Column('updated', sa.Double, nullable=False, default=0.0),
    sa.Column('requested', sa.Double, nullable=False, default=0.0),
    **OPTIONS)

#: The newest report of each compute host. Its images are one compressed
#: value: they change together, and always come together.
HOSTS: Final = sa.Table(
    'hosts', METADATA,
    sa.Column('name', sa.String(255), primary_key=True),
    sa.Column('at', sa.Double, nullable=False),
    sa.Column('version', sa.Integer, nullable=False),
    sa.Column('software', sa.String(64), nullable=False),
    sa.Column('volume_bytes', sa.BigInteger, nullable=False),
    sa.Column('mirror_bytes', sa.BigInteger, nullable=False),
    sa.Column('free_bytes', sa.BigInteger, nullable=False),
    sa.Column('digest', sa.String(64), nullable=False),
    sa.Column('images', BLOB, nullable=False),
    sa.Column('lazy_guests', sa.Text),
    sa.Column('platforms', sa.Text),
    sa.Column('microvms', BLOB),
    **OPTIONS)

#: What builders say of the µVM of an image for a platform of hosts.
MICROVMS: Final = sa.Table(
    'microvms', METADATA,
    sa.Column('image_id', sa.String(64), primary_key=True),
    sa.Column('platform', sa.String(255), primary_key=True),
    sa.Column('state', sa.String(16), nullable=False),
    sa.Column('stage', sa.String(64), nullable=False, default=''),
    sa.Column('progress', sa.Double, nullable=False, default=0.0),
    sa.Column('reason', sa.String(1000), nullable=False, default=''),
    sa.Column('basis', sa.String(64), nullable=False, default=''),
    sa.Column('group', sa.String(64), nullable=False, default=''),
    sa.Column('bytes', sa.BigInteger),
    sa.Column('seconds', sa.Double),
    sa.Column('baked_at', sa.Double, nullable=False, default=0.0),
    sa.Column('builder', sa.String(255), nullable=False, default=''),
    sa.Column('updated', sa.Double, nullable=False, default=0.0),
    **OPTIONS)

#: The newest observation of each host and image, until a boot set has it.
OBSERVATIONS: Final = sa.Table(
    'observations', METADATA,
    sa.Column('image_id', sa.String(64), primary_key=True),
    sa.Column('host', sa.String(255), primary_key=True),
    sa.Column('serial', sa.Integer, nullable=False),
    sa.Column('at', sa.Double, nullable=False),
    sa.Column('reads', BLOB, nullable=False),
    **OPTIONS)


def _config(connection: Any) -> config.Config:
    found = config.Config()
    found.set_main_option('script_location', str(
        pathlib.Path(__file__).parent / 'migrations').replace('%', '%%'))
    found.attributes['connection'] = connection
    return found


def head() -> str:
    """The revision that this program works with."""
    scripts = script.ScriptDirectory.from_config(_config(None))
    return str(scripts.get_current_head())


def revision(connection: sa.Connection) -> str | None:
    """The revision that a database has; None: it has no tables."""
    found: str | None = migration.MigrationContext.configure(
        connection, opts={'version_table': VERSION_TABLE},
    ).get_current_revision()
    return found


def upgrade(connection: sa.Connection) -> None:
    """Bring a database to :func:`head`; nothing to do is no error."""
    command.upgrade(_config(connection), 'head')
