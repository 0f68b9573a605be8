"""Whether the tokens of an audit row are estimates, as those of an answer that was cut are."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("estimated", sa.Boolean))
