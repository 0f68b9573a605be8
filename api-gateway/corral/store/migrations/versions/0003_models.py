"""The digests of catalogue models that corral.yaml gives none."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("recorded", sa.Double, nullable=False),
        sa.Column("node", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
