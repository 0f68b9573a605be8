"""Keyed hashes of prompts and answers."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("prompt_hash", "answer_hash"):
        op.add_column("audit", sa.Column(name, sa.Text))
