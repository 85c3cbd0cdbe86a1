# SPDX-License-Identifier: Apache-2.0
"""Runs migrations in the connection that the caller gives; Alembic runs it."""

from alembic import context

from fastboot_glance import tables

context.configure(
    connection=context.config.attributes['connection'],
    target_metadata=tables.METADATA, version_table=tables.VERSION_TABLE,
    render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
