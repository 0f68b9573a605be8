"""Keys, nodes, audit and the spool's watermarks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(10), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.Column("rpm", sa.BigInteger),
        sa.Column("tpm", sa.BigInteger),
        sa.Column("concurrency", sa.BigInteger),
        sa.Column("daily_tokens", sa.BigInteger),
        sa.Column("monthly_tokens", sa.BigInteger),
        sa.Column("class", sa.String(16), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double),
        sa.Column("revoked", sa.Double),
        sa.Column("last_used", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    op.create_table(
        "key_verifiers",
        sa.Column("verifier", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(10), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double),
        sa.PrimaryKeyConstraint("verifier", name="pk_key_verifiers"),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name="fk_key_verifiers_key_id", ondelete="CASCADE"),
    )
    op.create_index("ix_key_verifiers_key_id", "key_verifiers", ["key_id"])
    op.create_table(
        "nodes",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("memory", sa.BigInteger),
        sa.Column("max_models", sa.Integer),
        sa.Column("accelerator", sa.String(8)),
        sa.Column("source", sa.String(8), nullable=False),
        sa.Column("draining", sa.Boolean, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_nodes"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.Column("ts", sa.Double, nullable=False),
        *(sa.Column(name, sa.Text) for name in ("gw", "key", "addr", "api", "route", "method", "model")),
        sa.Column("status", sa.Integer),
        sa.Column("outcome", sa.Text),
        sa.Column("node", sa.Text),
        sa.Column("attempts", sa.Integer),
        *(sa.Column(name, sa.BigInteger) for name in ("req_bytes", "resp_bytes", "prompt_tokens", "tokens")),
        *(sa.Column(name, sa.Double) for name in ("queue_ms", "ttft_ms", "ms")),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
        sa.UniqueConstraint("id", name="uq_audit_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_ts", "audit", ["ts"])
    op.create_index("ix_audit_key_seq", "audit", ["key", "seq"])
    op.create_index("ix_audit_model_seq", "audit", ["model", "seq"])
    op.create_table(
        "spool_watermarks",
        sa.Column("gateway", sa.String(63), nullable=False),
        sa.Column("segment", sa.String(64), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("gateway", "segment", name="pk_spool_watermarks"),
    )
