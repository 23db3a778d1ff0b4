"""Jobs that survive: whose turn it is, jobs suspected of killing their worker, checkpoints, counts beyond 32 bits."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("submission", sa.String(64), nullable=False, server_default=""))
    op.execute("UPDATE jobs SET submission = owner")
    op.add_column("jobs", sa.Column("turn", sa.BigInteger))
    op.add_column("jobs", sa.Column("suspect", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("checkpoint", sa.String(64)))
    op.create_index("jobs_by_turn", "jobs", ["turn"])
    op.create_index("jobs_by_submission", "jobs", ["submission", "turn"])
    if op.get_bind().dialect.name != "sqlite":  # SQLite's integers have 64 bits whatever they are called.
        for column in ("done", "total"):
            op.alter_column("jobs", column, type_=sa.BigInteger)


def downgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        for column in ("done", "total"):
            op.alter_column("jobs", column, type_=sa.Integer)
    for index in ("jobs_by_submission", "jobs_by_turn"):
        op.drop_index(index, "jobs")
    for column in ("checkpoint", "suspect", "turn", "submission"):
        op.drop_column("jobs", column)
