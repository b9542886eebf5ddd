"""The versions of the node's store: what each one added. A new store is made by all of them."""

from __future__ import annotations

import sqlite3

from mvm.domain.layout import STATE_VERSION
from mvm.domain.migration import Migration, due

_RECORDS = """
CREATE TABLE tenants (id TEXT PRIMARY KEY, doc TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE net_ids (net_id INTEGER PRIMARY KEY);
CREATE TABLE pools (ref TEXT PRIMARY KEY, tenant TEXT NOT NULL, doc TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE instances (ref TEXT PRIMARY KEY, tenant TEXT NOT NULL, pool TEXT NOT NULL,
    generation INTEGER NOT NULL, doc TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX instances_by_pool ON instances (pool);
CREATE INDEX instances_by_tenant ON instances (tenant);
CREATE TABLE jobs (id TEXT PRIMARY KEY, final INTEGER NOT NULL, doc TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX jobs_open ON jobs (id) WHERE final = 0
"""
# Stores of version 1 may have them already: they were made where they were missing, without a version of their own.
_NOTES_AND_TRAILS = """
CREATE TABLE IF NOT EXISTS notes (ref TEXT NOT NULL, kind TEXT NOT NULL, doc TEXT NOT NULL,
    PRIMARY KEY (ref, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit_heads (tenant TEXT PRIMARY KEY, seq INTEGER NOT NULL,
    hash TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit_pending (tenant TEXT NOT NULL, seq INTEGER NOT NULL, line TEXT NOT NULL,
    PRIMARY KEY (tenant, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS desired (id INTEGER PRIMARY KEY CHECK (id = 1), doc TEXT NOT NULL)
"""

# Both never change, so the many updates of a job touch neither index.
_JOBS_BY_SUBJECT = """
ALTER TABLE jobs ADD COLUMN subject TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN submitted_at TEXT NOT NULL DEFAULT '';
UPDATE jobs SET subject = doc ->> 'subject', submitted_at = doc ->> 'submitted_at';
CREATE INDEX jobs_by_subject ON jobs (subject, submitted_at, id);
CREATE INDEX jobs_by_age ON jobs (submitted_at, id)
"""


def version(db: sqlite3.Connection) -> int:
    """The version of a store; 0 for an empty one."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def migrate(db: sqlite3.Connection) -> None:
    """Within a transaction of the caller's: the store is of this mvm's version.

    Raises `NotAllowed` (``state.version``) when it is of a newer one.
    """
    for migration in due(STORE, version(db)):
        migration.apply(db)
    db.execute(f"PRAGMA user_version = {STATE_VERSION}")


def _run(script: str, db: sqlite3.Connection) -> None:
    for statement in script.split(";"):
        db.execute(statement)


STORE: tuple[Migration[sqlite3.Connection], ...] = (
    Migration(1, "tenants, pools, instances and jobs", lambda db: _run(_RECORDS, db)),
    Migration(2, "notes, audit trails and desired states", lambda db: _run(_NOTES_AND_TRAILS, db)),
    Migration(3, "jobs by subject and by age", lambda db: _run(_JOBS_BY_SUBJECT, db)),
)
