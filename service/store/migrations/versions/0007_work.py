"""How much work each tensor of an analysis is, so that its progress is a sum over what is done."""

import math

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

TENSORS = sa.table(
    "tensors",
    *(sa.column(name) for name in ("job_id", "position", "status", "work")),
    sa.column("shape", sa.JSON),
)


def upgrade() -> None:
    op.execute("ALTER TABLE tensors ADD COLUMN work BIGINT NOT NULL DEFAULT 0")
    connection = op.get_bind()
    matrices = sa.select(TENSORS.c.job_id, TENSORS.c.position, TENSORS.c.shape).where(TENSORS.c.status != "skipped")
    for job_id, position, shape in connection.execute(matrices).all():
        m, n = shape[0], math.prod(shape[1:])
        here = (TENSORS.c.job_id == job_id, TENSORS.c.position == position)
        connection.execute(sa.update(TENSORS).where(*here).values(work=max(m * n * min(m, n) // 10**7, 1)))


def downgrade() -> None:
    op.drop_column("tensors", "work")
