"""No change of a table: checkpoints say from here on what is older than the chain.

A control of before takes such a checkpoint for none, and would go on without signing: it must refuse to begin.
"""

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing."""
