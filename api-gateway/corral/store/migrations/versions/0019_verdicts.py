"""Which files can be continued, as control has found; it finds it anew where that is not known."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "verdicts",
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("said", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_verdicts"),
    )
