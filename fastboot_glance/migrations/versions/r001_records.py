# SPDX-License-Identifier: Apache-2.0
"""Builds and hosts."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = 'r001'
down_revision = None

_OPTIONS: Any = {
    'mysql_engine': 'InnoDB', 'mysql_charset': 'utf8mb4',
    'mysql_collate': 'utf8mb4_bin',
}


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        'builds',
        sa.Column('image_id', sa.String(64), primary_key=True),
        sa.Column('name', sa.String(255), nullable=False),
        sa.Column('owner', sa.String(64), nullable=False),
        sa.Column('state', sa.String(16), nullable=False),
        sa.Column('stage', sa.String(64), nullable=False),
        sa.Column('progress', sa.Double, nullable=False),
        sa.Column('error', sa.String(1000), nullable=False),
        sa.Column('version', sa.Integer),
        sa.Column('boot_size', sa.BigInteger),
        sa.Column('builder', sa.String(255), nullable=False),
        sa.Column('attempts', sa.Integer, nullable=False),
        sa.Column('updated', sa.Double, nullable=False),
        sa.Column('requested', sa.Double, nullable=False),
        **_OPTIONS)
    op.create_table(
        'hosts',
        sa.Column('name', sa.String(255), primary_key=True),
        sa.Column('at', sa.Double, nullable=False),
        sa.Column('version', sa.Integer, nullable=False),
        sa.Column('software', sa.String(64), nullable=False),
        sa.Column('volume_bytes', sa.BigInteger, nullable=False),
        sa.Column('mirror_bytes', sa.BigInteger, nullable=False),
        sa.Column('free_bytes', sa.BigInteger, nullable=False),
        sa.Column('digest', sa.String(64), nullable=False),
        sa.Column('images', sa.LargeBinary().with_variant(
            mysql.MEDIUMBLOB(), 'mysql'), nullable=False),
        **_OPTIONS)
