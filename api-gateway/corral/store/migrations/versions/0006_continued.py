"""The nodes that wrote an answer, where one went on with what another had begun."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("continued", sa.Text))
