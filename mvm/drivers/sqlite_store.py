"""The node's store: SQLite in WAL mode. What a call has written is on the disk when it returns.

Records are JSON documents; the columns beside them are what is looked up by. One connection per thread reads. One for
all writes, in turn: each connection has a cache of its own, which is void once another has written.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from mvm.domain.audit import Link
from mvm.domain.ids import InstanceRef, JobId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState
from mvm.domain.layout import STATE_VERSION
from mvm.domain.migration import refuse_newer
from mvm.domain.pool import WorkerPool
from mvm.domain.refusals import not_found
from mvm.domain.tenant import Tenant
from mvm.drivers import sqlite_errors, store_migrations
from mvm.drivers.group_commit import GroupCommit
from mvm.errors import Fenced, NotAllowed
from mvm.ports.store import Note

_PUT_JOB = """
INSERT INTO jobs (id, final, doc, subject, submitted_at) VALUES (?1, ?2, ?3, ?3 ->> 'subject', ?3 ->> 'submitted_at')
ON CONFLICT (id) DO UPDATE SET final = ?2, doc = ?3
WHERE final = 0 AND coalesce(doc ->> 'attempt', 0) + coalesce(doc ->> 'deaths', 0) <= ?4
"""
_BUSY_MS = 10_000


@lru_cache(256)  # every job's end asks for its tenant's or its pool's
def _tenant(doc: str) -> Tenant:
    return Tenant.from_dict(json.loads(doc))


@lru_cache(256)
def _pool(doc: str) -> WorkerPool:
    return WorkerPool.from_dict(json.loads(doc))


class SqliteStore:
    """ports/store.py over one file. Creates it when it is not there.

    Raises `NotAllowed` (``state.version``) for a file of another version, of which ``mvm up`` migrates the older ones,
    and what `sqlite_errors.translated` tells when SQLite cannot read or write it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._commit = GroupCommit(path)
        self._local = threading.local()
        self._turn = threading.RLock()  # SQLite lets writers wait by sleeping, ever longer
        self._writing: sqlite3.Connection | None = None
        with self._translated():
            with self.transaction():
                db = self._db()
                _refuse_older(path, db)
                store_migrations.migrate(db)

    def _db(self) -> sqlite3.Connection:
        """The connection by which the calling thread reads: within its transaction, the one that writes."""
        if self._within:
            return self._writer()
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = self._connect()
        return db

    def _writer(self) -> sqlite3.Connection:
        """For whoever has the turn."""
        if self._writing is None:
            self._writing = self._connect()
        return self._writing

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    @property
    def _within(self) -> bool:
        return getattr(self._local, "within", False)

    def close(self) -> None:
        """Close the calling thread's connection and the one that writes; they are opened again when needed."""
        with self._turn:
            for db in (getattr(self._local, "db", None), self._writing):
                if db is not None:
                    db.close()
            self._local.db = self._writing = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise sqlite_errors.translated(self._path, error) from error

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """See ports/store.py."""
        with self._translated():
            with self._turn:
                db = self._writer()
                db.execute("BEGIN IMMEDIATE")
                self._local.within = True
                try:
                    yield
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:  # a full disk may have ended it
                        db.execute("ROLLBACK")
                    raise
                finally:
                    self._local.within = False
            if durable:
                self._reach_disk()

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        with self._translated():
            return self._db().execute(sql, values).fetchall()

    def _write(self, sql: str, *values: Any, durable: bool = True) -> int:
        with self._translated():
            with self._turn:
                changed = self._writer().execute(sql, values).rowcount
            if durable and not self._within:
                self._reach_disk()
            return changed

    def _reach_disk(self) -> None:
        """Return once what this thread has committed is on the disk."""
        try:
            self._commit.reached()
        except OSError as error:
            raise sqlite_errors.of_disk(self._path, error) from error

    # --- tenants
    def tenants(self) -> Sequence[Tenant]:
        """See ports/store.py."""
        return [Tenant.from_dict(json.loads(doc)) for (doc,) in self._rows("SELECT doc FROM tenants ORDER BY id")]

    def tenant(self, tenant: TenantId) -> Tenant:
        """See ports/store.py."""
        rows = self._rows("SELECT doc FROM tenants WHERE id = ?", tenant)
        if not rows:
            raise not_found("tenant", tenant)
        return _tenant(rows[0][0])

    def put_tenant(self, tenant: Tenant) -> None:
        """See ports/store.py."""
        self._write("INSERT OR IGNORE INTO net_ids VALUES (?)", tenant.network.net_id)
        self._write("INSERT OR REPLACE INTO tenants VALUES (?, ?)", tenant.id, json.dumps(tenant.to_dict()))

    def delete_tenant(self, tenant: TenantId) -> None:
        """See ports/store.py."""
        self._write("DELETE FROM tenants WHERE id = ?", tenant)

    def given_net_ids(self) -> frozenset[int]:
        """See ports/store.py."""
        return frozenset(net_id for (net_id,) in self._rows("SELECT net_id FROM net_ids"))

    # --- pools
    def pools(self, tenant: TenantId | None = None) -> Sequence[WorkerPool]:
        """See ports/store.py."""
        where, values = ("WHERE tenant = ?", (tenant,)) if tenant else ("", ())
        rows = self._rows(f"SELECT doc FROM pools {where} ORDER BY ref", *values)
        return [WorkerPool.from_dict(json.loads(doc)) for (doc,) in rows]

    def pool(self, ref: PoolRef) -> WorkerPool:
        """See ports/store.py."""
        rows = self._rows("SELECT doc FROM pools WHERE ref = ?", str(ref))
        if not rows:
            raise not_found("pool", ref)
        return _pool(rows[0][0])

    def put_pool(self, pool: WorkerPool) -> None:
        """See ports/store.py."""
        doc = json.dumps(pool.to_dict())
        self._write("INSERT OR REPLACE INTO pools VALUES (?, ?, ?)", str(pool.ref), pool.ref.tenant, doc)

    def delete_pool(self, ref: PoolRef) -> None:
        """See ports/store.py."""
        self._write("DELETE FROM pools WHERE ref = ?", str(ref))

    # --- instances
    def instances(self, tenant: TenantId | None = None, pool: PoolRef | None = None) -> Sequence[Instance]:
        """See ports/store.py."""
        where, values = "", cast("tuple[str, ...]", ())
        if pool is not None:
            where, values = "WHERE pool = ?", (str(pool),)
        elif tenant is not None:
            where, values = "WHERE tenant = ?", (str(tenant),)
        rows = self._rows(f"SELECT doc, generation FROM instances {where} ORDER BY ref", *values)
        return [Instance.from_dict(json.loads(doc), generation) for doc, generation in rows]

    def instance(self, ref: InstanceRef) -> Instance:
        """See ports/store.py."""
        rows = self._rows("SELECT doc, generation FROM instances WHERE ref = ?", str(ref))
        if not rows:
            raise not_found("instance", ref)
        return Instance.from_dict(json.loads(rows[0][0]), rows[0][1])

    def insert_instance(self, instance: Instance) -> None:
        """See ports/store.py."""
        ref = instance.ref
        doc = json.dumps(instance.to_dict())
        changed = self._write(
            "INSERT OR IGNORE INTO instances VALUES (?, ?, ?, ?, ?)",
            str(ref), ref.tenant, str(ref.pool_ref), instance.generation, doc,
        )  # fmt: skip
        if not changed:
            raise NotAllowed("instance.exists", f"instance {ref} exists already", subject=str(ref))

    def save_instance(self, instance: Instance) -> Instance:
        """See ports/store.py."""
        saved = replace(instance, generation=instance.generation + 1)
        changed = self._write(
            "UPDATE instances SET doc = ?, generation = ? WHERE ref = ? AND generation = ?",
            json.dumps(saved.to_dict()), saved.generation, str(saved.ref), instance.generation,
        )  # fmt: skip
        if not changed:
            self.instance(instance.ref)  # gone altogether: says so
            raise NotAllowed(
                "instance.changed", f"instance {instance.ref} was changed by somebody else meanwhile",
                hint="try again", subject=str(instance.ref), generation=instance.generation,
            )  # fmt: skip
        return saved

    def lease(self, ref: InstanceRef) -> int | None:
        """See ports/store.py."""
        rows = self._rows("SELECT doc ->> 'lease' FROM instances WHERE ref = ?", str(ref))
        return (rows[0][0] or 0) if rows else None

    def delete_instance(self, ref: InstanceRef) -> None:
        """See ports/store.py."""
        self._write("DELETE FROM notes WHERE ref = ?", str(ref))
        self._write("DELETE FROM instances WHERE ref = ?", str(ref))

    def notes(self, kind: Note) -> Mapping[InstanceRef, Mapping[str, Any]]:
        """See ports/store.py."""
        rows = self._rows("SELECT ref, doc FROM notes WHERE kind = ?", kind)
        return {InstanceRef.parse(ref): json.loads(doc) for ref, doc in rows}

    def note(self, ref: InstanceRef, kind: Note) -> Mapping[str, Any] | None:
        """See ports/store.py."""
        rows = self._rows("SELECT doc FROM notes WHERE ref = ? AND kind = ?", str(ref), kind)
        return cast("Mapping[str, Any]", json.loads(rows[0][0])) if rows else None

    def put_note(self, ref: InstanceRef, kind: Note, note: Mapping[str, Any]) -> None:
        """See ports/store.py."""
        self._write(
            "INSERT OR REPLACE INTO notes SELECT ref, ?, ? FROM instances WHERE ref = ?",
            kind, json.dumps(note), str(ref),
        )  # fmt: skip

    # --- the desired state
    def desired(self) -> Mapping[str, Any] | None:
        """See ports/store.py."""
        rows = self._rows("SELECT doc FROM desired")
        return cast("Mapping[str, Any]", json.loads(rows[0][0])) if rows else None

    def put_desired(self, document: Mapping[str, Any]) -> None:
        """See ports/store.py."""
        self._write("INSERT OR REPLACE INTO desired VALUES (1, ?)", json.dumps(document))

    # --- jobs
    def job(self, job_id: JobId) -> Job | None:
        """See ports/store.py."""
        rows = self._rows("SELECT doc FROM jobs WHERE id = ?", job_id)
        return Job.from_dict(json.loads(rows[0][0])) if rows else None

    def jobs(self) -> Sequence[Job]:
        """Every job that this node remembers, oldest first."""
        return [Job.from_dict(json.loads(doc)) for (doc,) in self._rows("SELECT doc FROM jobs ORDER BY id")]

    def put_job(self, job: Job) -> None:
        """See ports/store.py."""
        # One that is not final goes to the disk with the next write: a commit is mostly waiting for that.
        written = self._write(_PUT_JOB, job.job_id, job.state.final, job.to_json(), job.run, durable=job.state.final)
        if not written:
            raise Fenced("job.taken_over", f"job {job.job_id} was taken over by another worker",
                         hint=f"see: mvm job show {job.job_id}", subject=job.job_id)  # fmt: skip

    def last_job(self, subject: str, *, state: JobState | None = None) -> Job | None:
        """See ports/store.py."""
        rows = self._rows(
            "SELECT doc FROM jobs WHERE subject = ?1 AND (?2 IS NULL OR doc ->> 'state' = ?2) "
            "ORDER BY submitted_at DESC, id DESC LIMIT 1", subject, state,
        )  # fmt: skip
        return Job.from_dict(json.loads(rows[0][0])) if rows else None

    def unfinished_jobs(self) -> Sequence[Job]:
        """See ports/store.py."""
        return [
            Job.from_dict(json.loads(doc)) for (doc,) in self._rows("SELECT doc FROM jobs WHERE final = 0 ORDER BY id")
        ]

    # --- audit trails
    def audit_head(self, tenant: TenantId) -> Link | None:
        """See ports/store.py."""
        rows = self._rows("SELECT seq, hash FROM audit_heads WHERE tenant = ?", tenant)
        return Link(*rows[0]) if rows else None

    def put_audit(self, tenant: TenantId, line: str, head: Link) -> None:
        """See ports/store.py."""
        self._write("INSERT OR REPLACE INTO audit_heads VALUES (?, ?, ?)", tenant, head.seq, head.hash)
        self._write("INSERT INTO audit_pending VALUES (?, ?, ?)", tenant, head.seq, line)

    def pending_audit(self, tenant: TenantId) -> Sequence[str]:
        """See ports/store.py."""
        return [line for (line,) in self._rows("SELECT line FROM audit_pending WHERE tenant = ? ORDER BY seq", tenant)]

    def drop_audit(self, tenant: TenantId, count: int) -> None:
        """See ports/store.py."""
        self._write(
            "DELETE FROM audit_pending WHERE tenant = ? AND seq IN "
            "(SELECT seq FROM audit_pending WHERE tenant = ? ORDER BY seq LIMIT ?)",
            tenant, tenant, count,
        )  # fmt: skip

    def unwritten_trails(self) -> Sequence[TenantId]:
        """See ports/store.py."""
        return [TenantId(tenant) for (tenant,) in self._rows("SELECT DISTINCT tenant FROM audit_pending")]

    def forget_jobs(self, *, keep: int) -> int:
        """See ports/store.py."""
        newest = "SELECT submitted_at, id FROM jobs ORDER BY submitted_at DESC, id DESC LIMIT 1 OFFSET ?"
        return self._write(f"DELETE FROM jobs WHERE final = 1 AND (submitted_at, id) <= ({newest})", keep)


def _refuse_older(path: Path, db: sqlite3.Connection) -> None:
    """A part of the stack does not migrate: ``mvm up`` does, while nobody else has the store open."""
    found = store_migrations.version(db)
    refuse_newer(path, found)
    if 0 < found < STATE_VERSION:
        raise NotAllowed(
            "state.version", f"{path} is of version {found}; this mvm needs version {STATE_VERSION}",
            hint="mvm down, then mvm up: that brings it up to date", found=found, expected=STATE_VERSION,
        )  # fmt: skip
