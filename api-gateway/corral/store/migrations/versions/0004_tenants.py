"""Tenants, the networks of a key, the tenant of a record, and models that are switched off."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "disabled_models",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("disabled", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_disabled_models"),
    )
    op.add_column("keys", sa.Column("networks", sa.JSON))
    op.add_column("audit", sa.Column("tenant", sa.Text))
    op.create_index("ix_audit_tenant_seq", "audit", ["tenant", "seq"])
    # What there is already belongs to the tenant that its key names. An empty database stays empty, for a backup to
    # fill.
    keys = sa.table("keys", sa.column("id"), sa.column("tenant"), sa.column("created"))
    tenants = sa.table("tenants", sa.column("name"), sa.column("created"))
    audit = sa.table("audit", sa.column("key"), sa.column("tenant"))
    named = sa.select(keys.c.tenant, sa.func.min(keys.c.created)).group_by(keys.c.tenant)
    op.execute(tenants.insert().from_select(["name", "created"], named))
    owner = sa.select(keys.c.tenant).where(keys.c.id == audit.c.key).scalar_subquery()
    op.execute(audit.update().where(audit.c.key.is_not(None)).values(tenant=owner))
