"""Alembic's entry point; the connection comes from `corral.store.database.Database.migrate`."""

from alembic import context

from corral.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# The transaction is the caller's: a migration that fails leaves nothing behind.
context.run_migrations()
