"""The cluster's registry in Redis; the keys are described in `redis_scripts`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Network
from time import monotonic
from typing import Any

from mvm.domain.addressing import allocate
from mvm.domain.ids import JobId, NodeId, PoolRef, TenantId
from mvm.domain.job import Job, JobState, JobVerb, by_age
from mvm.domain.layout import STATE_VERSION
from mvm.domain.refusals import job_not_found, tenant_exists
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_scripts import (
    CLAIM_SWEEP,
    NEXT_CHILDREN,
    REBUILDING,
    RELEASE,
    REMOVE_TENANT,
    RESERVE_TENANT,
    UNPLACE_POOL,
    UPDATE_JOB,
    WITHDRAW_TENANT,
)
from mvm.drivers.registry_migrations import VERSION_KEY
from mvm.errors import Failed, MvmError, NotAllowed, TimedOut, error_from_dict
from mvm.ports.registry import NodeRecord

_KEEP_JOB_S = 7 * 86400
_KEEP_SWEEP_S = 3600
_PAGE = 500
_BLOCK_S = 2.0
_RESERVE_TRIES = 64


class RedisRegistry:
    """ports/registry.py over Redis."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    # --- nodes
    def heartbeat(self, record: NodeRecord) -> None:
        """See ports/registry.py."""
        doc = {
            "node_id": record.node_id,
            "address": record.address,
            "last_seen_at": record.last_seen_at.isoformat(),
            "facts": dict(record.facts),
        }
        self._link.command("HSET", "mvm:nodes", record.node_id, json.dumps(doc))

    def nodes(self) -> Sequence[NodeRecord]:
        """See ports/registry.py."""
        docs = [json.loads(raw) for raw in self._link.command("HVALS", "mvm:nodes")]
        return sorted(
            (
                NodeRecord(NodeId(d["node_id"]), d["address"], datetime.fromisoformat(d["last_seen_at"]), d["facts"])
                for d in docs
            ),
            key=lambda record: record.node_id,
        )

    def live_nodes(self, since: datetime) -> Sequence[NodeId]:
        """See ports/registry.py."""
        return [record.node_id for record in self.nodes() if record.last_seen_at >= since]

    def forget_node(self, node: NodeId) -> None:
        """See ports/registry.py."""
        self._link.command("HDEL", "mvm:nodes", node)

    # --- tenants and placement
    def reserve_tenant(
        self, tenant: TenantId, net_id: int | None, subnet: IPv4Network | None, quota: Quota, now: datetime
    ) -> Tenant:
        """See ports/registry.py. Optimistic: chosen here, then taken only if nobody else came first."""
        for _ in range(_RESERVE_TRIES):
            known, given = self._link.pipeline([("HVALS", "mvm:tenants"), ("SMEMBERS", "mvm:net_ids")])
            tenants = [Tenant.from_dict(json.loads(raw)) for raw in known]
            if any(t.id == tenant for t in tenants):
                raise tenant_exists(tenant)
            network = allocate(
                net_id, subnet, used_ids={int(n) for n in given}, taken=[t.network.subnet for t in tenants]
            )
            new = Tenant(tenant, network, quota, now)
            said = self._link.command(
                "EVAL", RESERVE_TENANT, 0, tenant, json.dumps(new.to_dict()), network.net_id, len(tenants)
            )
            if said == b"ok":
                return new
            if said == b"exists":
                raise tenant_exists(tenant)
        raise Failed("registry.busy", "too many tenants are being created at once", hint="try again")

    def restore(self, tenants: Sequence[Tenant], pools: Mapping[PoolRef, NodeId], net_ids: frozenset[int]) -> None:
        """See ports/registry.py."""
        commands: list[Sequence[str | int]] = [
            ("HSETNX", "mvm:tenants", t.id, json.dumps(t.to_dict())) for t in tenants
        ]
        commands += [("HSETNX", "mvm:pools", str(ref), node) for ref, node in pools.items()]
        given = net_ids | {t.network.net_id for t in tenants}
        commands += [("SADD", "mvm:net_ids", *sorted(given))] if given else []
        commands.append(("SET", VERSION_KEY, STATE_VERSION, "NX"))  # one that was emptied has lost that, too
        self._link.pipeline(commands)

    def rebuilding_s(self, *, used: bool, within_s: float) -> float:
        """See ports/registry.py."""
        left_ms: int = self._link.command("EVAL", REBUILDING, 0, int(within_s * 1000) if used else 0)
        return left_ms / 1000

    def tenant(self, tenant: TenantId) -> Tenant | None:
        """See ports/registry.py."""
        raw = self._link.command("HGET", "mvm:tenants", tenant)
        return Tenant.from_dict(json.loads(raw)) if raw else None

    def networks(self) -> tuple[Sequence[Tenant], frozenset[int]]:
        """See ports/registry.py."""
        known, given = self._link.pipeline([("HVALS", "mvm:tenants"), ("SMEMBERS", "mvm:net_ids")])
        tenants = [Tenant.from_dict(json.loads(raw)) for raw in known]
        return sorted(tenants, key=lambda tenant: tenant.id), frozenset(int(net_id) for net_id in given)

    def withdraw_tenant(self, reserved: Tenant) -> None:
        """See ports/registry.py."""
        record = json.dumps(reserved.to_dict())
        self._link.command("EVAL", WITHDRAW_TENANT, 0, reserved.id, record, reserved.network.net_id)

    def put_tenant(self, tenant: Tenant) -> None:
        """See ports/registry.py."""
        self._link.pipeline(
            [
                ("HSET", "mvm:tenants", tenant.id, json.dumps(tenant.to_dict())),
                ("SADD", "mvm:net_ids", tenant.network.net_id),
            ]
        )

    def remove_tenant(self, tenant: TenantId, node: NodeId) -> None:
        """See ports/registry.py."""
        self._link.command("EVAL", REMOVE_TENANT, 0, tenant, node)

    def place_pool(self, pool: PoolRef, node: NodeId) -> None:
        """See ports/registry.py."""
        self._link.command("HSET", "mvm:pools", str(pool), node)

    def unplace_pool(self, pool: PoolRef, node: NodeId) -> None:
        """See ports/registry.py."""
        self._link.command("EVAL", UNPLACE_POOL, 0, str(pool), node)

    def pool_node(self, pool: PoolRef) -> NodeId | None:
        """See ports/registry.py."""
        raw = self._link.command("HGET", "mvm:pools", str(pool))
        return NodeId(raw.decode()) if raw else None

    # --- jobs
    def record(self, jobs: Sequence[Job], *, hold: frozenset[JobId] = frozenset()) -> None:
        """See ports/registry.py."""
        commands: list[Sequence[str | int]] = []
        for job in jobs:
            commands += [
                ("SET", f"mvm:job:{job.job_id}", job.to_json(), "EX", 4 * _KEEP_JOB_S),
                (
                    "ZADD",
                    "mvm:sweeps" if job.verb.is_sweep else "mvm:jobs",
                    int(job.submitted_at.timestamp() * 1000),
                    job.job_id,
                ),
                ("SADD", f"mvm:open:{job.node_id}", job.job_id),
            ]
            if job.verb is JobVerb.BULK:
                total, parallel = job.progress.total, job.params.get("parallel") or job.progress.total
                bulk = f"mvm:bulk:{job.job_id}"
                commands.append(("HSET", bulk, "total", total, "done", 0, "failed", 0, "parallel", parallel))
            elif job.parent:
                commands.append(("RPUSH", f"mvm:bulk:{job.parent}:children", job.job_id))
                if job.job_id in hold:
                    commands.append(("RPUSH", f"mvm:bulk:{job.parent}:held", job.job_id))
        now = datetime.now(UTC).timestamp()
        for index, keep in (("mvm:jobs", _KEEP_JOB_S), ("mvm:sweeps", _KEEP_SWEEP_S)):
            commands.append(("ZREMRANGEBYSCORE", index, "-inf", int((now - keep) * 1000)))
        self._link.pipeline([("MULTI",), *commands, ("EXEC",)])

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs as their node knows them, with which a part of the registry was lost; they replace what is here."""
        commands: list[Sequence[str | int]] = []
        for job in jobs:
            keep = _KEEP_JOB_S if job.state.final else 4 * _KEEP_JOB_S
            commands.append(("SET", f"mvm:job:{job.job_id}", job.to_json(), "EX", keep))
            commands.append(("ZADD", "mvm:jobs", int(job.submitted_at.timestamp() * 1000), job.job_id))
            if not job.state.final:
                commands.append(("SADD", f"mvm:open:{job.node_id}", job.job_id))
        for start in range(0, len(commands), _PAGE):
            self._link.pipeline(commands[start : start + _PAGE])

    def job(self, job_id: JobId) -> Job | None:
        """See ports/registry.py."""
        raw = self._link.command("GET", f"mvm:job:{job_id}")
        return Job.from_dict(json.loads(raw)) if raw else None

    def jobs(self, *, state: JobState | None = None, subject: str | None = None, limit: int = 200) -> Sequence[Job]:
        """See ports/registry.py. Reads in pages, so a filter costs as many pages as it skips."""
        found = self._matching(self._get(self._link.command("ZREVRANGE", "mvm:sweeps", 0, -1)), state, subject)
        for start in itertools.count(0, _PAGE):
            ids = self._link.command("ZREVRANGE", "mvm:jobs", start, start + _PAGE - 1)
            found += self._matching(self._get(ids), state, subject)
            if len(found) >= limit or len(ids) < _PAGE:
                return sorted(found, key=by_age, reverse=True)[:limit]
        raise AssertionError("unreachable: the pages end")

    @staticmethod
    def _matching(jobs: Sequence[Job], state: JobState | None, subject: str | None) -> list[Job]:
        return [
            job
            for job in jobs
            if state in (None, job.state)
            and (subject is None or job.subject == subject or job.subject.startswith(subject + "/"))
        ]

    def children(self, parent: JobId) -> Sequence[Job]:
        """See ports/registry.py."""
        return self._get(self._link.command("LRANGE", f"mvm:bulk:{parent}:children", 0, -1))

    def open_jobs(self, node: NodeId) -> Sequence[Job]:
        """See ports/registry.py."""
        return sorted(self._get(self._link.command("SMEMBERS", f"mvm:open:{node}")), key=by_age)

    def _get(self, ids: Sequence[bytes]) -> list[Job]:
        if not ids:
            return []
        raws = self._link.command("MGET", *(b"mvm:job:" + job_id for job_id in ids))
        return [Job.from_dict(json.loads(raw)) for raw in raws if raw]

    def update(self, job: Job) -> Job | None:
        """See ports/registry.py."""
        return self._updated(_update(job))

    def _updated(self, command: Sequence[str | int]) -> Job | None:
        ended = self._link.command(*command)
        return Job.from_dict(json.loads(ended)) if ended else None

    def update_and_ask(self, job: Job) -> bool:
        """See ports/registry.py."""
        return bool(self._link.pipeline([_update(job), ("EXISTS", f"mvm:cancel:{job.job_id}")])[1])

    def next_children(self, parent: JobId) -> Sequence[Job]:
        """See ports/registry.py."""
        return self._get(self._link.command("EVAL", NEXT_CHILDREN, 0, parent))

    def held_children(self, parent: JobId) -> frozenset[JobId]:
        """See ports/registry.py."""
        return frozenset(JobId(raw.decode()) for raw in self._link.command("LRANGE", f"mvm:bulk:{parent}:held", 0, -1))

    def request_cancel(self, job_id: JobId) -> Job:
        """See ports/registry.py."""
        job = self.job(job_id)
        if job is None:
            raise job_not_found(job_id)
        if job.state.final:
            raise NotAllowed(
                "job.finished", f"job {job_id} is {job.state} already", hint=f"see: mvm job show {job_id}",
                subject=job_id, state=job.state.value,
            )  # fmt: skip
        self._link.command("SET", f"mvm:cancel:{job_id}", 1, "EX", _KEEP_JOB_S)
        if job.verb is JobVerb.BULK:
            self._link.command("DEL", f"mvm:bulk:{job_id}:held")
            for child in self.children(job_id):
                if not child.state.final:
                    self._cancel_one(child)
        else:
            self._cancel_one(job)
        return self.job(job_id) or job

    def _cancel_one(self, job: Job) -> None:
        """Flag first, then the state: a worker that takes it in between sees the flag, and it is the worker's then."""
        self._link.command("SET", f"mvm:cancel:{job.job_id}", 1, "EX", _KEEP_JOB_S)
        if job.state is JobState.QUEUED:
            self._updated(_update(job.with_(state=JobState.CANCELLED, finished_at=datetime.now(UTC)), only_queued=True))

    def cancel_requested(self, job_id: JobId) -> bool:
        """See ports/registry.py."""
        return bool(self._link.command("EXISTS", f"mvm:cancel:{job_id}"))

    def expired_jobs(self, now: datetime) -> Sequence[Job]:
        """See ports/registry.py."""
        keys = self._link.command("KEYS", "mvm:open:*")  # one per node
        found = [job for key in keys for job in self._get(sorted(self._link.command("SMEMBERS", key)))]
        return [job for job in found if job.state is JobState.QUEUED and job.expires_at and job.expires_at <= now]

    def expire(self, job: Job) -> None:
        """See ports/registry.py."""
        self._updated(_update(job, only_queued=True))

    def refuse(self, task_id: str, error: MvmError) -> None:
        """See ports/registry.py."""
        self._link.command("SET", f"mvm:refused:{task_id}", json.dumps(error.to_dict()), "EX", _KEEP_JOB_S)

    def refusal(self, task_id: str) -> MvmError | None:
        """See ports/registry.py."""
        raw = self._link.command("GET", f"mvm:refused:{task_id}")
        return error_from_dict(json.loads(raw)) if raw else None

    def follow(self, job_ids: Sequence[JobId], *, deadline_s: float | None) -> Iterator[Job]:
        """See ports/registry.py."""
        end = None if deadline_s is None else monotonic() + deadline_s
        last: dict[bytes, bytes] = {}
        open_ids: dict[bytes, JobId] = {}
        for job_id in dict.fromkeys(job_ids):
            tail = self._link.command("XREVRANGE", f"mvm:events:{job_id}", "+", "-", "COUNT", 1)
            job = self.job(job_id)
            if job is None:
                raise job_not_found(job_id)
            if not job.state.final:
                key = f"mvm:events:{job_id}".encode()
                last[key], open_ids[key] = (tail[0][0] if tail else b"0-0"), job_id
            yield job
        while open_ids:
            left = _BLOCK_S if end is None else min(_BLOCK_S, end - monotonic())
            if left <= 0:
                raise TimedOut(
                    "job.wait_timeout", f"not finished after {deadline_s:g} s: {', '.join(open_ids.values())}",
                    hint="the job goes on; wait again with: mvm job wait " + next(iter(open_ids.values())),
                )  # fmt: skip
            keys = list(open_ids)
            grown: Any = self._link.command(
                "XREAD", "BLOCK", max(1, int(left * 1000)), "STREAMS", *keys, *(last[key] for key in keys),
                timeout_s=left + 3,
            )  # fmt: skip
            for key, entries in grown or ():
                last[key] = entries[-1][0]
                job = self.job(open_ids[key])
                if job is None:
                    raise job_not_found(open_ids[key])
                if job.state.final:
                    del open_ids[key]
                yield job

    # --- sweeps
    def tick(self, every_s: float) -> int:
        """See ports/registry.py."""
        seconds, micros = self._link.command("TIME")
        return (int(seconds) * 1000 + int(micros) // 1000) // int(every_s * 1000)

    def claim_sweep(self, verb: str, node: NodeId, job: JobId, *, tick: int, every_s: float, ttl_s: float) -> bool:
        """See ports/registry.py."""
        return bool(self._link.command(
            "EVAL", CLAIM_SWEEP, 0, f"{verb}:{node}", job, tick, int(every_s * 1000), int(ttl_s * 1000)
        ))  # fmt: skip

    def release_sweep(self, verb: str, node: NodeId, job: JobId) -> None:
        """See ports/registry.py."""
        self._link.command("EVAL", RELEASE, 0, f"mvm:sweep:{verb}:{node}", job)


def _update(job: Job, *, only_queued: bool = False) -> Sequence[str | int]:
    return (
        "EVAL", UPDATE_JOB, 0, job.job_id, job.to_json(), job.state, int(job.state.final),
        job.node_id, job.parent or "", datetime.now(UTC).isoformat(),
        _KEEP_SWEEP_S if job.verb.is_sweep else _KEEP_JOB_S, int(only_queued),
    )  # fmt: skip
