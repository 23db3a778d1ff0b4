"""Members of sweeps: which job trains an experiment along with others."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # In SQL: for SQLite alembic would build the table anew, and dropping the old one would cascade to all recordings.
    op.execute("ALTER TABLE jobs ADD COLUMN batch VARCHAR(36) REFERENCES jobs (id)")
    op.create_index("jobs_by_batch", "jobs", ["batch"])


def downgrade() -> None:
    op.drop_index("jobs_by_batch", "jobs")
    op.drop_column("jobs", "batch")
