"""The audit trails: entries are written down with what they tell of, and appended by whoever comes next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import structlog

from mvm.domain.audit import START, AuditEntry, Kind, Link, chained, config_hash, cut_off, read_line, tenant_of, verify
from mvm.domain.ids import InstanceRef, NodeId, PoolRef, Revision, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, Reason
from mvm.domain.lifecycle import Status
from mvm.errors import InvalidInput, MvmError, NotFound
from mvm.ports.audit import AuditLog, AuditTrail
from mvm.ports.clock import Clock
from mvm.ports.store import NodeStore
from mvm.services.precedence import Precedence

log = structlog.get_logger("mvm.audit")

_GATHER_S = 0.5  # in which entries come together into one append; and whoever waited for a wake has its answer
_FOLLOW_S = 0.2
_PENDING = "not yet written"


class Audit:
    """Entries get their place in the chain in the store's transaction that makes true what they tell of.

    There they wait until they are appended to the tenant's trail: nothing is lost between the two, and nothing twice.
    """

    def __init__(
        self, store: NodeStore, trails: AuditLog, clock: Clock, precedence: Precedence, node_id: NodeId
    ) -> None:
        self._store = store
        self._trails = trails
        self._clock = clock
        self._precedence = precedence
        self._node_id = node_id
        self._lock = threading.Lock()
        self._asked = False
        self._at_work = False

    # --- writing; within a transaction
    def job_ended(
        self, job: Job, touched: Mapping[str, Instance | None], change: tuple[str | None, str | None] = (None, None)
    ) -> None:
        """`job`, in its final state, and the instances it `touched`, as they were when it came to them.

        A job that touched none has an entry of its subject, with the `change` of it.
        """
        tenant = tenant_of(job)
        if tenant is None:
            return
        if not touched:
            self._put(tenant, self._entry(job, Kind.JOB, job.subject, before=change[0], after=change[1]))
        for subject, before in touched.items():
            self._put(tenant, self._changed(job, Kind.JOB, InstanceRef.parse(subject), before))

    def changed(
        self, job: Job, ref: InstanceRef, before: Instance | None, *, why: str, code: str | None = None
    ) -> None:
        """What `job`, one that goes over many instances, changed of this one by the way."""
        self._put(ref.tenant, self._changed(job, Kind.SWEEP, ref, before, why=why, code=code, result="succeeded"))

    def called(self, tenant: TenantId, method: str, actor: str, before: str, after: str) -> None:
        """What `actor` changed of `tenant` by a call of `method`."""
        config, revision = self._configured(tenant)
        self._put(tenant, AuditEntry(
            at=self._clock.now(), node_id=self._node_id, kind=Kind.CALL, actor=actor, reason=Reason.MANUAL.value,
            verb=method, subject=tenant, result="succeeded", before=before, after=after, config=config,
            revision=revision,
        ))  # fmt: skip

    def _changed(self, job: Job, kind: Kind, ref: InstanceRef, before: Instance | None, **changes: Any) -> AuditEntry:
        try:
            now: Instance | None = self._store.instance(ref)
        except NotFound:
            now = None
        seen = now or before
        after = now.status if now else Status.DESTROYED if before else None
        return self._entry(
            job, kind, str(ref), before=before.status.value if before else None, after=after.value if after else None,
            generation=seen.generation if seen else None, revision=seen.revision if seen else None, **changes,
        )  # fmt: skip

    def _entry(self, job: Job, kind: Kind, subject: str, **changes: Any) -> AuditEntry:
        config, revision = self._configured(subject)
        why = job.params.get("why")
        values: dict[str, Any] = {
            "why": str(why) if why is not None else None,
            "result": job.state.value,
            "code": str(job.error["code"]) if job.error else None,
            **changes,
            "revision": changes.get("revision") or revision,
        }
        return AuditEntry(
            at=job.finished_at or self._clock.now(), node_id=self._node_id, kind=kind, actor=job.actor,
            reason=job.reason.value, verb=job.verb.value, subject=subject, job_id=job.job_id, parent=job.parent,
            config=config, **values,
        )  # fmt: skip

    def _configured(self, subject: str) -> tuple[str | None, Revision | None]:
        tenant, *names = subject.split("/")
        try:
            if not names:
                return config_hash(self._store.tenant(TenantId(tenant))), None
            pool = self._store.pool(PoolRef.parse(f"{tenant}/{names[0]}"))
        except (NotFound, InvalidInput):  # there is none of that name, any more or ever
            return None, None
        return config_hash(pool), pool.revision

    def _put(self, tenant: TenantId, entry: AuditEntry) -> None:
        line, head = chained(entry, self._store.audit_head(tenant) or self._adopted(tenant))
        self._store.put_audit(tenant, line, head)

    def _adopted(self, tenant: TenantId) -> Link:
        """The end of a trail that a store before this one had; nearly always there is none."""
        with self._trails.hold(tenant) as trail:
            for line in reversed(trail.tail(100)):
                entry = read_line(line)
                if entry is not None:
                    return Link(entry["seq"], entry["hash"])
        return START

    # --- appending
    def soon(self) -> None:
        """Append what waits, without the caller waiting for it."""
        with self._lock:
            self._asked = True
            if self._at_work:
                return
            self._at_work = True
        threading.Thread(target=self._work, name="audit", daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                threading.Event().wait(_GATHER_S)
                with self._lock:
                    if not self._asked:
                        self._at_work = False
                        return
                    self._asked = False
                self._precedence.given()
                try:
                    self.complete()
                except MvmError as error:  # the store does not answer; whoever comes next tries again
                    log.warning("audit entries wait", code=error.code, error=error.message)
        except BaseException:  # a bug ends this thread, and not those to come
            with self._lock:
                self._at_work = False
            raise

    def complete(self) -> None:
        """Append what waits, of every tenant. What cannot be appended now waits on."""
        for tenant in self._store.unwritten_trails():
            try:
                with self._trails.hold(tenant) as trail:
                    self._complete(tenant, trail)
            except MvmError as error:
                log.warning("audit entries wait", tenant=tenant, code=error.code, error=error.message)

    def _complete(self, tenant: TenantId, trail: AuditTrail) -> None:
        half = trail.half()
        if half:
            self._note_recovery(tenant, half)
        pending = self._store.pending_audit(tenant)
        left = _not_in(trail, pending)
        if left:
            trail.append(left)
        self._store.drop_audit(tenant, len(pending))

    def _note_recovery(self, tenant: TenantId, half: bytes) -> None:
        cut = cut_off(half)
        entry = AuditEntry(
            at=self._clock.now(), node_id=self._node_id, kind=Kind.RECOVERED, actor="mvm", reason="recovery",
            verb="audit.recover", subject=tenant, result="succeeded", cut=cut,
        )  # fmt: skip
        with self._store.transaction():
            waiting = (read_line(line.encode()) or {} for line in self._store.pending_audit(tenant))
            if not any(each.get("cut") == cut for each in waiting):  # else: noted, and killed before it was cut
                self._put(tenant, entry)

    # --- reading
    def tail(self, tenant: TenantId, count: int, *, follow: bool) -> Generator[Sequence[Mapping[str, Any]], None, None]:
        """The last `count` entries; with `follow` also what comes, and an empty list when for a while nothing does."""
        self._check_known(tenant)
        entries, shown = self._last(tenant, count)
        yield entries
        pause = threading.Event()
        while follow:
            pause.wait(_FOLLOW_S)
            head = self._store.audit_head(tenant)
            if head is None or head.seq == shown:
                yield []
            else:
                entries, shown = self._last(tenant, head.seq - shown, after=shown)
                yield entries

    def _last(self, tenant: TenantId, count: int, *, after: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The last `count` entries, and those that came since they were counted; and the number of the last."""
        self.complete()
        with self._trails.hold(tenant) as trail:
            waiting = [line.encode() for line in _not_in(trail, self._store.pending_audit(tenant))]
            head = self._store.audit_head(tenant) or START
            if after:
                count = max(count, head.seq - after)
            lines = [*trail.tail(count), *waiting][-count:]
        entries = [read_line(line) or _damaged(line) for line in lines]
        numbers = [entry["seq"] for entry in entries if entry["seq"] is not None]
        return [entry for entry in entries if entry["seq"] is None or entry["seq"] > after], max([after, *numbers])

    def verify(self, tenant: TenantId, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Whether the trail is whole, up to the entry that the store has last; ``findings`` say what is not.

        Long trails take minutes, in which nobody appends: what `check` raises between two files ends it.
        """
        self._check_known(tenant)
        self.complete()
        with self._trails.hold(tenant) as trail:
            head = self._store.audit_head(tenant)
            pending = _not_in(trail, self._store.pending_audit(tenant))
            waiting = [line for line in pending if head and _number(line) <= head.seq]
            files = [(_PENDING, "".join(f"{line}\n" for line in waiting).encode())] if waiting else []
            verdict = verify(_checked(chain(trail.files(), files), check), head)
        return {
            "tenant_id": tenant,
            "node_id": self._node_id,
            "whole": not verdict.findings,
            "entries": verdict.entries,
            "pending": len(waiting),
            "head": {"seq": head.seq, "hash": head.hash} if head else None,
            "findings": [finding.to_dict() for finding in verdict.findings],
        }

    def _check_known(self, tenant: TenantId) -> None:
        """Raises `NotFound` for a tenant that is not and never was."""
        if self._store.audit_head(tenant) is None:
            with self._trails.hold(tenant) as trail:
                if trail.tail(1) or trail.half():
                    return
            self._store.tenant(tenant)


def _not_in(trail: AuditTrail, pending: Sequence[str]) -> Sequence[str]:
    """Those of `pending` that are not in `trail`: whoever appended some may not have come to drop them."""
    last = next((line.decode(errors="replace") for line in trail.tail(1)), None)
    done = pending.index(last) + 1 if last in pending else 0
    return pending[done:]


def _checked(files: Iterable[tuple[str, bytes]], check: Callable[[], None]) -> Iterator[tuple[str, bytes]]:
    """The same, with a `check` before each."""
    for each in files:
        check()
        yield each


def _damaged(line: bytes) -> dict[str, Any]:
    return {"seq": None, "kind": "damaged", "text": line[:512].decode("ascii", errors="backslashreplace")}


def _number(line: str) -> int:
    entry = read_line(line.encode())
    return int(entry["seq"]) if entry else 0
