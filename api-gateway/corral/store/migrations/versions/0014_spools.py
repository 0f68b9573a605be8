"""Up to when each gateway's records are here: what one left open waits for the others."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "spools",
        sa.Column("gateway", sa.String(63), nullable=False),
        sa.Column("shipped", sa.Double, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("gateway", name="pk_spools"),
    )
