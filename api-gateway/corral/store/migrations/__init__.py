"""Alembic migrations, applied when control starts."""
