"""Which key made a key; not known of those that there are."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("maker", sa.String(10)))
    op.create_index("ix_keys_maker", "keys", ["maker"])
