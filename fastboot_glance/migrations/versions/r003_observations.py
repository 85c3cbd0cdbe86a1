# SPDX-License-Identifier: Apache-2.0
"""What guests read in their first minutes, until boot sets have it."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = 'r003'
down_revision = 'r002'

_OPTIONS: Any = {
    'mysql_engine': 'InnoDB', 'mysql_charset': 'utf8mb4',
    'mysql_collate': 'utf8mb4_bin',
}


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        'observations',
        sa.Column('image_id', sa.String(64), primary_key=True),
        sa.Column('host', sa.String(255), primary_key=True),
        sa.Column('serial', sa.Integer, nullable=False),
        sa.Column('at', sa.Double, nullable=False),
        sa.Column('reads', sa.LargeBinary().with_variant(
            mysql.MEDIUMBLOB(), 'mysql'), nullable=False),
        **_OPTIONS)
