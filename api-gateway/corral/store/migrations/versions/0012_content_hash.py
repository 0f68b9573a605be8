"""The digest of a prompt and an answer that are kept, in the record that the chain covers."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("content_hash", sa.Text))
