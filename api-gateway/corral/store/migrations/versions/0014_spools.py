"""Who may still settle a request that the edge gave to another gateway, and up to when gateways' records are here."""

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
        sa.Column("life", sa.Integer, nullable=False),
        sa.Column("shipped", sa.Double, nullable=False),
        sa.Column("heard", sa.Double, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("gateway", name="pk_spools"),
    )
    op.create_table(
        "audit_holders",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("gateway", sa.String(63), nullable=False),
        sa.Column("life", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", "gateway", name="pk_audit_holders"),
    )
    # In the place of spool_begun: by gateway alone, who began again and again was waited for anew each time.
    op.create_table(
        "spool_begins",
        sa.Column("gateway", sa.String(63), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("since", sa.Double, nullable=False),
        sa.Column("life", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("gateway", "seq", name="pk_spool_begins"),
    )
    op.execute("INSERT INTO spool_begins (gateway, seq, since, life) SELECT gateway, seq, since, 0 FROM spool_begun")
    op.drop_table("spool_begun")
