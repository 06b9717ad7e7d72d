"""Run by alembic: runs the migrations on the connection that `upgrade` hands over."""

from __future__ import annotations

from alembic import context

from handfast.authority.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite takes part in a transaction with its schema changes, too: one begun by BEGIN IMMEDIATE, as ours is.
    transactional_ddl=True,
)
context.run_migrations()
