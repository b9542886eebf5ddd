"""The sleep policy: idle instances go warm, then to sleep; when memory is short, the coldest sleep first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import structlog

from mvm.domain.idleness import Candidate, Choice, Decision, Sample, Watch, decide, observe
from mvm.domain.ids import InstanceRef, JobId, NodeId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.domain.pool import SleepPolicy, WorkerPool
from mvm.errors import Failed, MvmError, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.host import HostMemory
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import Snapshotting, VmmDriver
from mvm.services.disk_room import DiskRoom
from mvm.services.jobs import Jobs
from mvm.services.quotas import usage
from mvm.services.runner import JobContext
from mvm.services.snapshots import sleepless

log = structlog.get_logger("mvm.idle")

_ANSWER_S = 1.0  # for a guest to say what it does
_AT_ONCE = 8  # guests asked
_VERBS = {Choice.WARM: JobVerb.INSTANCE_WARM, Choice.SLEEP: JobVerb.INSTANCE_SLEEP}


class Idleness:
    """What is known of each instance is in the store's notes, so a restart forgets nobody's idleness."""

    def __init__(
        self, *, store: NodeStore, registry: Registry, jobs: Jobs, clock: Clock, vmm: VmmDriver, guest: GuestChannel,
        storage: NodeStorage, memory: HostMemory, room: DiskRoom, node_id: NodeId, reserve_percent: float,
        period_s: float,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._clock = clock
        self._vmm = vmm
        self._guest = guest
        self._storage = storage
        self._memory = memory
        self._room = room
        self._node_id = node_id
        self._reserve_percent = reserve_percent
        self._period_s = period_s

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """Ask the guests, decide, and submit what was decided (``asked``). A silent guest is kept as it is."""
        if not isinstance(self._vmm, Snapshotting):
            return {"changed": False, "short_mib": 0, "asked": []}
        context.step("ask guests", 0, 2)
        waiting = {job.subject: job.verb for job in self._registry.open_jobs(self._node_id)}
        pools = {pool.ref: pool for pool in self._store.pools()}
        up = [i for i in self._store.instances() if i.has_vmm]
        free = [i for i in up if i.in_flight is None and str(i.ref) not in waiting and governed(pools[i.ref.pool_ref])]
        short = self._short_mib()
        if short:  # what falls asleep already is memory on its way
            asleep_soon = [i for i in up if waiting.get(str(i.ref)) is JobVerb.INSTANCE_SLEEP]
            short = max(0, short - sum(self._frees_mib(i, pools) for i in asleep_soon))
        room = self._room.left() >> 20
        tight = room < sum(pools[i.ref.pool_ref].resources.mem_mib for i in up)
        samples = self._samples([i for i in free if i.status is Status.RUNNING])
        now, notes = self._clock.monotonic(), self._store.notes(Note.POLICY)
        awake = sleepless(self._store, free)
        candidates = [
            Candidate(
                ref=i.ref,
                status=i.status,
                watch=self._watch(i, notes.get(i.ref), samples.get(i.ref), now),
                policy=policy_of(pools[i.ref.pool_ref], sleepless=i.ref in awake),
                silent=i.status is Status.RUNNING and samples[i.ref] is None,
                frees_mib=self._frees_mib(i, pools) if short or tight else 0,
            )
            for i in free
        ]
        warm_room = self._warm_room({i.ref.tenant for i in free}, waiting)
        decisions = decide(candidates, now, short_mib=short, room_mib=room if tight else None, warm_room=warm_room)
        written = self._write_down(candidates, decisions, notes)
        context.step("submit", 1, 2)
        runs = {i.ref: i.run for i in free}
        asked = [
            self._submit(ref, decision, runs[ref], written[ref])
            for ref, decision in decisions.items()
            if decision.choice is not Choice.KEEP
        ]
        return {"changed": bool(asked), "short_mib": short, "asked": asked}

    def _warm_room(self, tenants: Collection[TenantId], waiting: Mapping[str, JobVerb]) -> dict[TenantId, int]:
        """How many more of each tenant may go warm, beside those that are and those that are asked to."""
        coming = Counter(TenantId(s.split("/")[0]) for s, verb in waiting.items() if verb is JobVerb.INSTANCE_WARM)
        rooms = {}
        for tenant in tenants:
            limit, used = self._store.tenant(tenant).quota.max_warm, usage(self._store, tenant).warm
            rooms[tenant] = limit - used - coming[tenant]
        return rooms

    def _short_mib(self) -> int:
        left = self._memory.left()
        return max(0, round(left.total_mib * self._reserve_percent / 100) - left.available_mib)

    def _frees_mib(self, instance: Instance, pools: Mapping[PoolRef, WorkerPool]) -> int:
        """What the host gains when it sleeps: the memory that only its VMM has."""
        assert isinstance(self._vmm, Snapshotting), "asked before"
        if instance.process is not None:
            try:
                return self._vmm.memory(instance.process).private >> 20
            except (Failed, Unreachable) as error:
                log.debug("memory unknown", instance=str(instance.ref), code=error.code)
        return pools[instance.ref.pool_ref].resources.mem_mib

    def _samples(self, running: Sequence[Instance]) -> dict[InstanceRef, Sample | None]:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="idle") as threads:
            return dict(zip((i.ref for i in running), threads.map(self._sample, running), strict=True))

    def _sample(self, instance: Instance) -> Sample | None:
        ref = instance.ref
        try:
            status = self._guest.status(ref, self._storage.directory(ref), deadline_s=_ANSWER_S)
        except MvmError as error:  # whatever it is, of such a guest is not known that it is idle
            log.info("guest kept", instance=str(ref), code=error.code, why=error.message)
            return None
        return Sample(
            self._clock.monotonic(), status.uptime_s, status.cpu_s, status.rx_bytes, status.tx_bytes, status.load,
            status.worker.value,
        )  # fmt: skip

    def _watch(self, instance: Instance, note: Mapping[str, Any] | None, sample: Sample | None, now: float) -> Watch:
        watch = observe(Watch.from_dict(note["watch"]) if note else None, instance.run, now, sample)
        if note and note["job_id"]:
            job = self._store.job(JobId(note["job_id"]))
            if job and job.state is JobState.FAILED:  # not again before it has been idle once more
                return replace(watch, idle_since=now)
        return watch

    def _write_down(
        self, candidates: Sequence[Candidate], decisions: Mapping[InstanceRef, Decision],
        notes: Mapping[InstanceRef, Mapping[str, Any]],
    ) -> dict[InstanceRef, dict[str, Any]]:  # fmt: skip
        """Note what is known and decided of each; ``acted`` is the last decision that was not to keep it."""
        at, written = self._clock.now().isoformat(), {}
        with self._store.transaction():
            for candidate in candidates:
                decision = decisions[candidate.ref]
                words = {"verb": decision.choice.value, "reason": decision.reason, "at": at}
                acted = words if decision.choice is not Choice.KEEP else notes.get(candidate.ref, {}).get("acted")
                note = {"watch": candidate.watch.to_dict(), "decision": words, "acted": acted, "job_id": None}
                self._store.put_note(candidate.ref, Note.POLICY, note)
                written[candidate.ref] = note
        return written

    def _submit(self, ref: InstanceRef, decision: Decision, run: str, note: dict[str, Any]) -> dict[str, Any]:
        job = self._jobs.submit(
            _VERBS[decision.choice], str(ref), self._node_id, params={"why": decision.reason, "run": run},
            reason=Reason.SLEEP_POLICY, actor="sleep policy", expires_s=4 * self._period_s,
        )  # fmt: skip
        self._store.put_note(ref, Note.POLICY, {**note, "job_id": job.job_id})
        log.info("asked", instance=str(ref), verb=decision.choice.value, why=decision.reason)
        return {"ref": str(ref), "verb": decision.choice.value, "why": decision.reason, "job_id": job.job_id}


def policy_of(pool: WorkerPool, *, sleepless: bool) -> SleepPolicy:
    """What holds for an instance of `pool`, which may be one that cannot be put to sleep."""
    return replace(pool.sleep_policy, sleep_after_s=0) if sleepless else pool.sleep_policy


def governed(pool: WorkerPool) -> bool:
    """Whether the sleep policy has anything to decide in it."""
    return not pool.protected and bool(pool.sleep_policy.warm_after_s or pool.sleep_policy.sleep_after_s)
