"""The chain of the audit trail, its checkpoints, and usage by day."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("pos", sa.BigInteger))
    op.add_column("audit", sa.Column("leaf", sa.LargeBinary(32)))
    op.create_index("ix_audit_gw_pos", "audit", ["gw", "pos"], unique=True)
    streams = op.create_table(
        "audit_streams",
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("pos", sa.BigInteger, nullable=False),
        sa.Column("link", sa.LargeBinary(32), nullable=False),
        sa.Column("signed", sa.BigInteger, nullable=False),
        sa.Column("signed_link", sa.LargeBinary(32), nullable=False),
        sa.Column("dropped", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("stream", name="pk_audit_streams"),
    )
    op.create_table(
        "audit_checkpoints",
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("ts", sa.Double, nullable=False),
        sa.Column("line", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit_checkpoints"),
    )
    op.create_table(
        "spool_begun",
        sa.Column("gateway", sa.String(63), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("since", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("gateway", name="pk_spool_begun"),
    )
    whole = ("requests", "refused", "failed", "estimated", "prompt_tokens", "tokens")
    op.create_table(
        "usage",
        sa.Column("day", sa.String(10), nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("tenant", "key", "model")),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in whole),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("queue_seconds", "node_seconds")),
        sa.PrimaryKeyConstraint("day", "tenant", "key", "model", name="pk_usage"),
    )
    # What there is already stands outside of the chain, and is known by its number.
    older = op.get_bind().execute(sa.text("SELECT max(seq) FROM audit")).scalar()
    if older:
        none = bytes(32)
        row = {"stream": "", "pos": older, "link": none, "signed": 0, "signed_link": none, "dropped": 0}
        op.bulk_insert(streams, [row])
