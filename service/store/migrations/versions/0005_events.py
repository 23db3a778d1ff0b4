"""Events of jobs, in order, and deliveries to webhooks. Jobs that exist get the events that their rows tell of."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

# An earlier epoch has an earlier number, and two numbers are before all of them.
BACKFILL = (
    "UPDATE epochs SET sequence = epoch + 3",
    "UPDATE jobs SET sequence = 2 + COALESCE((SELECT max(epoch) + 1 FROM epochs WHERE job_id = jobs.id), 0)",
    "INSERT INTO events SELECT id, 1, 'status', created_at, 'queued', 0 FROM jobs",
    "INSERT INTO events SELECT id, 2, 'status', started_at, 'running', attempt FROM jobs WHERE started_at IS NOT NULL",
    "INSERT INTO events SELECT id, sequence + 1, 'error', finished_at, status, attempt FROM jobs"
    " WHERE status = 'failed'",
    "INSERT INTO events SELECT id, sequence + 2, 'completed', finished_at, status, attempt FROM jobs"
    " WHERE status IN ('succeeded', 'failed', 'canceled')",
    "UPDATE jobs SET sequence = sequence + 2 WHERE status IN ('succeeded', 'failed', 'canceled')",
)


def upgrade() -> None:
    for table in ("jobs", "epochs"):
        op.add_column(table, sa.Column("sequence", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(36), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("name", sa.String(12), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
    )
    for statement in BACKFILL:
        op.execute(statement)
    op.create_index("epochs_in_order", "epochs", ["job_id", "sequence"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("job_id", sa.String(36), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("event", sa.String(12), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("next_at", sa.BigInteger, nullable=False),
        sa.Column("log", sa.JSON, nullable=False),
    )
    op.create_index("deliveries_due", "deliveries", ["state", "next_at"])
    op.create_index("deliveries_by_job", "deliveries", ["job_id"])


def downgrade() -> None:
    for table in ("deliveries", "events"):
        op.drop_table(table)
    op.drop_index("epochs_in_order", "epochs")
    for table in ("epochs", "jobs"):
        op.drop_column(table, "sequence")
