# SPDX-License-Identifier: Apache-2.0
"""µVMs: what builders say of them, and what hosts have."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = 'r004'
down_revision = 'r003'

_OPTIONS: Any = {
    'mysql_engine': 'InnoDB', 'mysql_charset': 'utf8mb4',
    'mysql_collate': 'utf8mb4_bin',
}


def upgrade() -> None:
    """Make the table and the columns; hosts that have not reported since
    have none."""
    op.create_table(
        'microvms',
        sa.Column('image_id', sa.String(64), primary_key=True),
        sa.Column('platform', sa.String(255), primary_key=True),
        sa.Column('state', sa.String(16), nullable=False),
        sa.Column('stage', sa.String(64), nullable=False),
        sa.Column('progress', sa.Double, nullable=False),
        sa.Column('reason', sa.String(1000), nullable=False),
        sa.Column('basis', sa.String(64), nullable=False),
        sa.Column('group', sa.String(64), nullable=False),
        sa.Column('bytes', sa.BigInteger),
        sa.Column('seconds', sa.Double),
        sa.Column('baked_at', sa.Double, nullable=False),
        sa.Column('builder', sa.String(255), nullable=False),
        sa.Column('updated', sa.Double, nullable=False),
        **_OPTIONS)
    op.add_column('hosts', sa.Column('platforms', sa.Text))
    op.add_column('hosts', sa.Column('microvms', sa.LargeBinary().with_variant(
        mysql.MEDIUMBLOB(), 'mysql')))
