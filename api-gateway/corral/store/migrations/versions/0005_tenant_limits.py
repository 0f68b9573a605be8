"""The limits that a tenant's keys share."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("rpm", "tpm", "concurrency", "daily_tokens", "monthly_tokens"):
        op.add_column("tenants", sa.Column(name, sa.BigInteger))
