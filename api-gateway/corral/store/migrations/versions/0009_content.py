"""Prompts and answers of keys that they are kept for."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("content", sa.Boolean))
    op.create_table(
        "audit_content",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("ts", sa.Double, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_content"),
    )
    op.create_index("ix_audit_content_ts", "audit_content", ["ts"])
