"""Jobs, and what an experiment records."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _job_key() -> sa.Column[str]:
    return sa.Column("job_id", sa.String(36), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    _create_jobs()
    _create_recordings()


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200)),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("heartbeat", sa.BigInteger, nullable=False),
        sa.Column("worker", sa.String(64)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("error", sa.JSON),
        sa.Column("environment", sa.JSON),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_index("jobs_by_owner", "jobs", ["owner", "kind", "created_at", "id"])
    op.create_index("jobs_in_line", "jobs", ["status", "priority", "created_at", "id"])


def _create_recordings() -> None:
    op.create_table(
        "epochs",
        _job_key(),
        sa.Column("epoch", sa.Integer, primary_key=True),
        sa.Column("train_loss", sa.Double, nullable=False),
        sa.Column("validation_loss", sa.Double),
        sa.Column("train_r2", sa.Double),
        sa.Column("validation_r2", sa.Double),
    )
    op.create_table(
        "spectra",
        _job_key(),
        sa.Column("layer", sa.String(8), primary_key=True),
        sa.Column("epoch", sa.Integer, primary_key=True),
        sa.Column("weights", sa.LargeBinary, nullable=False),
        sa.Column("updates", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "cuts",
        _job_key(),
        sa.Column("layer", sa.String(8), primary_key=True),
        sa.Column("losses", sa.LargeBinary, nullable=False),
        sa.Column("r2", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    for table in ("cuts", "spectra", "epochs", "jobs"):
        op.drop_table(table)
