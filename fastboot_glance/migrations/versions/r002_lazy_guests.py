# SPDX-License-Identifier: Apache-2.0
"""Guests that need the export, as hosts report them."""

import sqlalchemy as sa
from alembic import op

revision = 'r002'
down_revision = 'r001'


def upgrade() -> None:
    """Add the column; hosts that have not reported since have none."""
    op.add_column('hosts', sa.Column('lazy_guests', sa.Text))
