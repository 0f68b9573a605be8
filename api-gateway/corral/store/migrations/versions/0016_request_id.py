"""Records are found by their request's id. On PostgreSQL the index is there already (`corral.store.database`)."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_audit_request_id_seq", "audit", ["request_id", "seq"], if_not_exists=True)
