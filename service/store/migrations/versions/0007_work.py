"""How much work each tensor of an analysis is, so that its progress is a sum over what is done."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("ALTER TABLE tensors ADD COLUMN work BIGINT NOT NULL DEFAULT 0")


def downgrade() -> None:
    op.drop_column("tensors", "work")
