"""Uploaded files: the tensors of an analysis, and the factors made of them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _job_key() -> sa.Column[str]:
    return sa.Column("job_id", sa.String(36), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("upload", sa.String(64)))
    # In SQL: for SQLite alembic would build the table anew, and dropping the old one would cascade to all recordings.
    op.execute("ALTER TABLE jobs ADD COLUMN parent VARCHAR(36) REFERENCES jobs (id)")
    op.create_index("jobs_by_upload", "jobs", ["upload"])
    op.create_index("jobs_by_parent", "jobs", ["parent"])
    op.create_table(
        "tensors",
        _job_key(),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("shape", sa.JSON),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("reason", sa.String(32)),
        sa.Column("detail", sa.Text),
        sa.Column("notes", sa.JSON, nullable=False),
        sa.Column("exponent", sa.Integer, nullable=False),
        sa.Column("spectrum", sa.LargeBinary),
    )
    op.create_table("manifests", _job_key(), sa.Column("manifest", sa.JSON, nullable=False))


def downgrade() -> None:
    for table in ("manifests", "tensors"):
        op.drop_table(table)
    for index in ("jobs_by_parent", "jobs_by_upload"):
        op.drop_index(index, "jobs")
    for column in ("parent", "upload"):
        op.drop_column("jobs", column)
