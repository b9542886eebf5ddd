"""Why instances are as they are, what comes next, and what they cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvm.domain.actions import Request
from mvm.domain.idleness import Candidate, Watch
from mvm.domain.idleness import outlook as idle_outlook
from mvm.domain.ids import InstanceRef, NodeId, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState
from mvm.domain.lifecycle import Status
from mvm.domain.planner import Outcome
from mvm.domain.pool import WorkerPool
from mvm.domain.scaling import rests
from mvm.domain.snapshot import SnapshotManifest
from mvm.domain.vmm import told, why_still
from mvm.errors import Failed, NotFound, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import MemoryUse, Snapshotting, VmmDriver
from mvm.services.health import GuestHealth
from mvm.services.idle import governed, policy_of
from mvm.services.snapshots import sleepless

if TYPE_CHECKING:  # it leads back here
    from mvm.services.reconcile import Reconcile


class Insight:
    """Reads what others have written down; changes nothing."""

    def __init__(
        self, store: NodeStore, registry: Registry, vmm: VmmDriver, storage: NodeStorage, clock: Clock,
        node_id: NodeId, health: GuestHealth, reconcile: Reconcile,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._vmm = vmm
        self._storage = storage
        self._clock = clock
        self._node_id = node_id
        self._health = health
        self._reconcile = reconcile

    # --- why
    def obstacles(self, tenant: TenantId) -> Mapping[str, list[dict[str, Any]]]:
        """By pool of one tenant, what keeps it from its counts now; nothing for a pool that is at them."""
        found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for remark in self._reconcile.outlook(tenant).remarks:
            found[str(remark.subject)].append(remark.to_dict())
        return found

    def unwell(self, instances: Collection[Instance]) -> Mapping[InstanceRef, str]:
        """Those of `instances` whose guests are not well, as one that has lost its network, and why."""
        return self._health.ill(instances)

    def explain(self, ref: InstanceRef) -> dict[str, Any]:
        """Its last job and error, what the sleep policy last decided and on what grounds, and what comes next."""
        instance = self._store.instance(ref)
        pool = self._store.pool(ref.pool_ref)
        last, note = self._store.last_job(str(ref)), self._store.note(ref, Note.POLICY)
        held = instance.held_until(self._clock.now(), pool.scaled_at)
        outlook = self._reconcile.outlook(ref.tenant)
        return {
            "ref": str(ref),
            "status": instance.status.value,
            "because": _because(self._store.last_job(str(ref), state=JobState.SUCCEEDED)),
            "last_job": _job(last),
            "last_error": instance.last_error,
            "ended": instance.ended.value if instance.ended else None,
            "stalled": instance.stalled.value if instance.stalled else None,
            "waiting": self._waiting(ref),
            "health": self._health.explain(instance),
            "policy": {**asdict(pool.sleep_policy), "pinned": pool.pinned, "critical": pool.critical},
            "decision": dict(note["decision"]) if note and _concerns(note, instance, pool) else None,
            "acted": dict(note["acted"]) if note and note["acted"] else None,
            "sample": self._sample(instance, note),
            "next": self._next(instance, pool, note, outlook),
            "held_until": held.isoformat() if held else None,
            "obstacles": [remark.to_dict() for remark in outlook.remarks if remark.subject == pool.ref],
        }

    def _waiting(self, ref: InstanceRef) -> list[dict[str, Any]]:
        """Jobs of it that are queued; none are known while the registry is away."""
        try:
            return [
                {"job_id": str(job.job_id), "verb": job.verb.value, "reason": job.reason.value}
                for job in self._registry.open_jobs(self._node_id)
                if job.subject == str(ref)
            ]
        except Unreachable:
            return []

    def _sample(self, instance: Instance, note: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if note is None or note["watch"]["last"] is None or note["watch"]["run"] != instance.run:
            return None
        watch = Watch.from_dict(note["watch"])
        assert watch.last is not None, "seen above"
        now = self._clock.monotonic()
        return {
            "age_s": round(now - watch.last.at, 1),
            "idle_s": round(now - watch.idle_since, 1),
            "cpu_percent": round(100 * watch.cpu, 1),
            "rx_bytes_s": round(watch.rx),
            "tx_bytes_s": round(watch.tx),
            "load": watch.last.load,
            "worker": watch.last.worker,
        }

    def _next(
        self, instance: Instance, pool: WorkerPool, note: Mapping[str, Any] | None, outlook: Outcome
    ) -> dict[str, Any]:
        if instance.in_flight:
            return _nothing(f"its job {instance.in_flight.job_id} ({instance.in_flight.verb}) is at work")
        if instance.status is Status.SLEEPING:
            return _nothing(f"it sleeps until somebody asks: mvm instance wake {instance.ref}")
        if instance.stalled:
            return _nothing(f"{why_still(instance.stalled)[0]}; it goes on by itself as soon as that is over")
        if not instance.has_vmm:
            return self._coming(instance, pool, outlook)
        ill = self._health.explain(instance)
        if ill and not ill["well"]:
            return self._replacing(instance, pool, outlook, ill["reason"])
        if not isinstance(self._vmm, Snapshotting):
            return _nothing(f"the {self._vmm.name} driver cannot snapshot")
        if pool.protected:
            return _nothing(f"the sleep policy leaves it alone: its pool is {pool.protected}")
        if note is None or note["watch"]["run"] != instance.run:
            return _nothing("the sleep policy has not looked at it yet")
        now = self._clock.monotonic()
        watch = Watch.from_dict(note["watch"])
        awake = bool(sleepless(self._store, [instance]))
        policy = policy_of(pool, sleepless=awake)
        coming = idle_outlook(Candidate(instance.ref, instance.status, watch, policy), now)
        if coming is None and awake:
            return _nothing("it cannot sleep in this run: the template that it was cloned from is gone")
        if coming is None:
            return _nothing("its pool's sleep policy is off")
        choice, wait = coming
        at = (self._clock.now() + timedelta(seconds=wait)).isoformat()
        reason = f"if it stays idle; seen last: {note['decision']['reason']}"
        return {"verb": choice.value, "in_s": round(wait, 1), "at": at, "reason": reason}

    def _coming(self, instance: Instance, pool: WorkerPool, outlook: Outcome) -> dict[str, Any]:
        """What becomes of one that is down."""
        how = f"{told(instance.ended, None)[0]}; " if instance.ended else ""
        if planned := _planned(instance, outlook):
            return {**planned, "reason": how + planned["reason"]}
        if rests(pool.on_exit, instance):
            return _nothing(f"{how}it rests: its pool's on_exit is stop")
        if held := self._held(instance, pool):
            return _nothing(f"{how}it stays {instance.status} {held}")
        if instance.ended and pool.desired is None:
            how += "its pool was never scaled, so "
        kept = f"; the pool is kept at {pool.desired}" if pool.desired else ""
        why = [remark.text for remark in outlook.news if remark.subject == pool.ref and remark.cause.counts]
        return _nothing(how + "; ".join([f"it stays {instance.status} until it is started{kept}", *why]))

    def _held(self, instance: Instance, pool: WorkerPool) -> str | None:
        """Until when a person's word keeps reconcile from it."""
        held = instance.held_until(self._clock.now(), pool.scaled_at)
        if held is None or pool.desired is None:
            return None
        end = f"mvm pool scale {pool.ref} {pool.desired.flags}"
        return f"until {held:%Y-%m-%d %H:%M:%S} UTC, as a person left it; to end that: {end}"

    def _replacing(self, instance: Instance, pool: WorkerPool, outlook: Outcome, reason: str) -> dict[str, Any]:
        if pool.critical or pool.pinned:
            return _nothing(f"{reason}; its pool is {'critical' if pool.critical else 'pinned'}, so nobody stops it")
        if pool.desired is None:
            return _nothing(f"{reason}; its pool was never scaled, so nobody replaces it")
        if held := self._held(instance, pool):
            return _nothing(f"{reason}; it is not replaced {held}")
        planned = _planned(instance, outlook)
        if planned is None:
            return _nothing(f"{reason}; reconcile does not replace it yet")
        return {**planned, "reason": f"{reason}; reconcile replaces it: {planned['reason']}"}

    # --- how much
    def stats(self, ref: InstanceRef) -> dict[str, Any]:
        """Bytes and seconds: what it holds now, its snapshot, and how its last sleep and wake went."""
        instance, pool = self._store.instance(ref), self._store.pool(ref.pool_ref)
        ram = pool.resources.mem_mib << 20
        slept, woke = self._store.note(ref, Note.SLEPT), self._store.note(ref, Note.WOKE)
        use = self._use(instance)
        asleep = self._manifest(self._storage.snapshot(ref)) if instance.status is Status.SLEEPING else None
        template = None
        if instance.cloned and instance.revision is not None:
            template = self._manifest(self._storage.template(pool.ref, instance.revision))
        size = asleep.size if asleep else slept["bytes"] if slept else None
        return {
            "ref": str(ref),
            "status": instance.status.value,
            "ram_bytes": ram,
            "memory": {"rss_bytes": use.rss, "pss_bytes": use.pss, "private_bytes": use.private} if use else None,
            "snapshot_bytes": size,
            "snapshot_ratio": round(size / ram, 5) if size is not None else None,
            "snapshot": {"kind": asleep.kind.value, "compression": asleep.compression.value} if asleep else None,
            "sleep_s": slept["seconds"] if slept else None,
            "slept_at": slept["at"] if slept else None,
            "wake_s": woke["seconds"] if woke else None,
            "woke_from": woke["from"] if woke else None,
            "woke_at": woke["at"] if woke else None,
            "template": {"id": template.id, "bytes": template.size} if template else None,
        }

    def memory(self) -> dict[str, Any]:
        """Of the node: how many are running, warm and sleeping, the memory they hold, and what is saved, in bytes."""
        instances = self._store.instances()
        counts = Counter(instance.status for instance in instances)
        slept = self._store.notes(Note.SLEPT)
        uses = [use for use in map(self._use, instances) if use is not None]
        saved = [
            max(0, slept[i.ref]["held"] - slept[i.ref]["bytes"])
            for i in instances
            if i.status is Status.SLEEPING and i.ref in slept
        ]
        return {
            "running": counts[Status.RUNNING],
            "warm": counts[Status.WARM],
            "sleeping": counts[Status.SLEEPING],
            "memory_bytes": {
                "in_use": sum(use.pss for use in uses),
                "saved_by_sleeping": sum(saved),
                "saved_by_sharing": sum(use.rss - use.pss for use in uses),
            },
        }

    def _use(self, instance: Instance) -> MemoryUse | None:
        if instance.process is None or not instance.has_vmm or not isinstance(self._vmm, Snapshotting):
            return None
        try:
            return self._vmm.memory(instance.process)
        except (Failed, Unreachable):  # it has ended; a sweep will record it
            return None

    def _manifest(self, directory: Path) -> SnapshotManifest | None:
        if not isinstance(self._vmm, Snapshotting):
            return None
        try:
            return self._vmm.manifest(directory)
        except (NotFound, Failed):  # removed, or damaged: then a wake says so
            return None


def _concerns(note: Mapping[str, Any], instance: Instance, pool: WorkerPool) -> bool:
    """Whether what the sleep policy noted is about the run that an instance is in, and would be decided again."""
    return instance.has_vmm and note["watch"]["run"] == instance.run and governed(pool)


def _planned(instance: Instance, outlook: Outcome) -> dict[str, Any] | None:
    """What reconcile asks of it next, and when, if that is known; None if it does not ask for anything."""
    for action in outlook.actions:
        if isinstance(action, Request) and action.ref == instance.ref:
            return {"verb": action.verb.value, "in_s": None, "at": None, "reason": f"the next pass: {action.why}"}
    for remark in outlook.remarks:
        if remark.failure and remark.failure.subject == str(instance.ref) and remark.until:
            verb = remark.failure.verb.removeprefix("instance.")
            return {"verb": verb, "in_s": None, "at": remark.until.isoformat(), "reason": remark.text}
    return None


def _because(job: Job | None) -> str:
    if job is None:
        return "no job that brought it here is remembered"
    ended = f" at {job.finished_at:%Y-%m-%d %H:%M:%S} UTC" if job.finished_at else ""
    why = f" ({job.params['why']})" if "why" in job.params else ""
    return f"{job.verb} by {job.actor}, reason {job.reason}{why}: {job.state}{ended}"


def _job(job: Job | None) -> dict[str, Any] | None:
    if job is None:
        return None
    data = job.to_dict()
    return {
        name: data[name] for name in ("job_id", "verb", "reason", "actor", "state", "submitted_at", "finished_at")
    } | {"error": data["error"]["code"] if data["error"] else None}


def _nothing(reason: str) -> dict[str, Any]:
    return {"verb": None, "in_s": None, "at": None, "reason": reason}
