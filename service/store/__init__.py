"""The database: tables, verbs on them, migrations. All SQL is here, and verbs never commit.

Whoever calls a verb owns the transaction: `with database.write.begin() as session: store.create_job(session, …)`.
"""

from service.store.database import Database, connect, migrate
from service.store.jobs import (
    Page,
    cancel_job,
    create_job,
    delete_job,
    get_job,
    list_jobs,
    rename_job,
)
from service.store.queue import (
    Token,
    anything_queued,
    claim_next,
    end,
    heartbeat,
    held_jobs,
    record_crash,
    record_progress,
    release,
)
from service.store.recordings import (
    Epoch,
    EpochRange,
    add_cuts,
    add_epochs,
    clear_recording,
    cuts,
    last_epoch,
    losses,
    recorded_epochs,
    spectra,
)
from service.store.tables import TERMINAL, JobRow, Status

__all__ = [
    "TERMINAL",
    "Database",
    "Epoch",
    "EpochRange",
    "JobRow",
    "Page",
    "Status",
    "Token",
    "add_cuts",
    "add_epochs",
    "anything_queued",
    "cancel_job",
    "claim_next",
    "clear_recording",
    "connect",
    "create_job",
    "cuts",
    "delete_job",
    "end",
    "get_job",
    "heartbeat",
    "held_jobs",
    "last_epoch",
    "list_jobs",
    "losses",
    "migrate",
    "record_crash",
    "record_progress",
    "recorded_epochs",
    "release",
    "rename_job",
    "spectra",
]
