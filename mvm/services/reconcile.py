"""Bringing a node to what was asked of it: load, plan, submit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import structlog

from mvm.domain import lock_names
from mvm.domain.actions import (
    Action,
    Build,
    Create,
    CreatePool,
    CreateTenant,
    DestroyPool,
    DestroyTenant,
    Errand,
    Request,
    UpdatePool,
    UpdateTenant,
    Why,
    errand,
    ready,
    scope,
)  # fmt: skip
from mvm.domain.desired import DesiredState, parse
from mvm.domain.ids import InstanceRef, JobId, NodeId, Revision, TenantId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.passes import Rest, begun
from mvm.domain.planner import Observed, Outcome, as_parameters, decide
from mvm.domain.plans import Plan
from mvm.domain.pool import WorkerPool
from mvm.domain.remarks import Cause, Remark, told
from mvm.domain.room import Room
from mvm.domain.scaling import PoolNeed, scale
from mvm.domain.tries import FAILURES, asked_again_at, failures_before
from mvm.errors import QuotaExceeded, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.host import HostMemory
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.disk_room import DiskRoom
from mvm.services.health import GuestHealth
from mvm.services.jobs import Asked, Jobs
from mvm.services.lifecycle import Lifecycle
from mvm.services.runner import JobContext
from mvm.services.snapshots import sleepless

log = structlog.get_logger("mvm.reconcile")

_VERBS = {JobVerb(f"instance.{verb}"): verb for verb in Verb if verb is not Verb.PREPARE}
_LOCK_S = 120.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """What one pass asked for: the jobs' ids, and what kept it from asking for more, as remarks and in words."""

    jobs: tuple[JobId, ...] = ()
    note: str | None = None
    remarks: tuple[Remark, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        obstacles = [remark.to_dict() for remark in self.remarks]
        return {"jobs": list(self.jobs), "note": self.note, "obstacles": obstacles}


class Reconcile:
    """Decides with `domain.planner` and submits what can be done at once; the next pass does what that makes possible.

    Passes follow each other: what one has submitted, the next one counts where it will land.
    """

    def __init__(
        self, *, store: NodeStore, registry: Registry, jobs: Jobs, lifecycle: Lifecycle, locks: Locks, clock: Clock,
        node_id: NodeId, health: GuestHealth, room: DiskRoom, memory: HostMemory, uplink: bool, period_s: float,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._locks = locks
        self._clock = clock
        self._node_id = node_id
        self._health = health
        self._room = room
        self._memory = memory
        self._uplink = uplink
        self._period_s = period_s

    def desired(self) -> DesiredState:
        """The document that was accepted last; one that asks for nothing if there was none."""
        document = self._store.desired()
        return parse(document) if document is not None else DesiredState(self._node_id)

    def observe(self, desired: DesiredState) -> Observed:
        """What there is. Jobs that wait in a queue count as in flight."""
        return self._observe(self._registry.open_jobs(self._node_id), desired)

    def outlook(self, tenant: TenantId) -> Outcome:
        """What the next pass would do for one tenant, and what keeps its pools from their counts."""
        desired = self.desired()
        own = replace(desired, tenants=tuple(each for each in desired.tenants if each.id == tenant))
        try:
            open_jobs = self._registry.open_jobs(self._node_id)
        except Unreachable:
            open_jobs = []
        mine = [job for job in open_jobs if job.subject.split("/")[0] == tenant]
        observed = self._observe(mine, own, tenant)
        outcome = decide(own, observed)
        resting = self._resting(self._failed(outcome.actions, observed))
        return decide(own, replace(observed, resting=resting)) if resting else outcome

    def _observe(self, open_jobs: Sequence[Job], desired: DesiredState, tenant: TenantId | None = None) -> Observed:
        queued = {job.subject: InFlight(job.job_id, _VERBS[job.verb]) for job in open_jobs if job.verb in _VERBS}
        instances = self._store.instances(tenant=tenant)
        tenants = tuple(each for each in self._store.tenants() if tenant in (None, each.id))
        known = {each.id for each in tenants}
        new = [wanted for wanted in desired.tenants if wanted.id not in known]
        reserved, net_ids = self._registry.networks() if new else ((), frozenset[int]())
        return Observed(
            now=self._clock.now(),
            tenants=tenants,
            pools=tuple(self._store.pools(tenant)),
            instances=tuple(replace(i, in_flight=i.in_flight or queued.get(str(i.ref))) for i in instances),
            jobs=frozenset(
                (job.verb, job.subject) for job in open_jobs if job.verb.value.startswith(("tenant.", "pool."))
            ),
            unhealthy=frozenset(self._health.ill(instances)),
            sleepless=sleepless(self._store, instances),
            unproven=self._health.unproven(instances),
            uplink=self._uplink,
            host_mib=self._memory.left().total_mib,
            can_build=self._room.has_room_to_build(),
            reserved=tuple(reserved),
            net_ids=net_ids,
        )

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """One pass over this node; with ``params.prune`` also over what the document does not list.

        With ``params.expect`` it is only done when it is the plan with that fingerprint. What earlier passes asked for
        and is not done yet is told as ``under_way``: whoever waits until nothing is left to do waits for that too, and
        for the health checks with which a rollout goes on (``rolling``, see `scaling.Scaled`). ``obstacles`` are what
        keeps pools from their counts, each with its cause (`domain.remarks`); ``remarks`` the same in words, and
        ``blocked`` those of what the document asks for and cannot be done now.
        """
        desired = self.desired()
        if context.job.params.get("prune"):
            desired = replace(desired, prune_unknown_tenants=True, prune_unknown_pools=True)
        with self._locks.hold(lock_names.RECONCILE, deadline_s=_LOCK_S):
            open_jobs = self._registry.open_jobs(self._node_id)
            wanted, observed = replace(desired, generation=None), self._observe(open_jobs, desired)
            whole = plan = Plan.make(wanted, observed)
            if expect := context.job.params.get("expect"):
                plan.check_current(expect)
            failed = self._failed(plan.actions, observed)
            if context.job.verb.is_sweep and (resting := self._resting(failed)):  # a person wants it tried now
                plan = Plan.make(wanted, replace(observed, resting=resting))
            now = ready(plan.actions)
            self._unscale(now)
            actor = "reconcile" if context.job.verb.is_sweep else context.job.actor
            asked, notes = self._asked(now, failed, context.job)
            group = (
                self._jobs.submit_group(asked, self._node_id, reason=Reason.RECONCILE, actor=actor) if asked else None
            )
        called = [InstanceRef.parse(each.subject) for each in asked if each.verb in _VERBS]
        remarks = (*notes, *begun(plan.remarks, now, called))
        if asked:
            log.info("submitted", jobs=len(asked), waiting=len(whole.actions) - len(now))
        return {
            "changed": bool(asked), "bulk": group.job_id if group else None, "jobs": len(asked),
            "waiting": len(whole.actions) - len(now),
            "under_way": [j.job_id for j in open_jobs if j.verb is JobVerb.BULK and j.reason is Reason.RECONCILE],
            "remarks": [str(remark) for remark in told(remarks)],
            "obstacles": [remark.to_dict() for remark in remarks],
            "blocked": [str(remark) for remark in remarks if _is_blocked(remark, desired)],
            "rolling": plan.rolling,
            "pools": sorted({str(scope(action)) for action in now}),
        }  # fmt: skip

    def _failed(self, actions: Iterable[Action], observed: Observed) -> dict[Errand, Job]:
        """Of what `actions` ask for, the last jobs that reconcile asked for and that failed."""
        instances = {instance.ref: instance for instance in observed.instances}
        revisions = {pool.ref: pool.revision for pool in observed.pools}
        failed: dict[Errand, Job] = {}
        for action in actions:
            verb, subject = errand(action)
            if isinstance(action, Create):
                continue
            if isinstance(action, Request):
                instance = instances[action.ref]
                if not self._has_failed(action, instance, revisions[action.ref.pool_ref]):
                    continue
            last = self._store.last_job(subject)
            if last is None or last.verb is not verb or last.state is not JobState.FAILED:
                continue
            if last.reason is Reason.RECONCILE:
                failed[verb, subject] = last
        return failed

    def _has_failed(self, action: Request, instance: Instance, revision: Revision | None) -> bool:
        """Whether the last job of `instance` may have failed at what `action` asks for.

        That a warm guest does not answer when it is to sleep was a check of its health: after some it is replaced.
        """
        if (action.verb, action.status) == (Verb.SLEEP, Status.WARM) and self._health.doubts(instance):
            return False
        return instance.last_error is not None and not (action.verb is Verb.START and instance.revision != revision)

    def _resting(self, failed: Mapping[Errand, Job]) -> dict[Errand, Rest]:
        """What of `failed` is not to be asked for yet."""
        now = self._clock.now()
        return {
            asked: Rest((last.error or {}).get("code", "unknown"), until)
            for asked, last in failed.items()
            if (until := asked_again_at(last, now, self._period_s))
        }

    def _unscale(self, actions: Iterable[Action]) -> None:
        """What goes is not filled up again meanwhile by a pass that does not prune."""
        going = {
            action.ref.pool_ref for action in actions if isinstance(action, Request) and action.why is Why.UNLISTED
        }
        for ref in going:
            with self._store.transaction():
                self._store.put_pool(replace(self._store.pool(ref), desired=None))

    def pool(self, pool: WorkerPool, job: Job, *, actor: str) -> Submitted:
        """One pool that a person has just scaled. A person may stop what is pinned or critical."""
        if pool.desired is None:
            return Submitted()
        with self._locks.hold(lock_names.RECONCILE, deadline_s=_LOCK_S):
            tenant = self._store.tenant(pool.ref.tenant)
            observed = self._observe(self._registry.open_jobs(self._node_id), DesiredState(self._node_id))
            shapes = {each.ref: each.resources for each in observed.pools if each.ref.tenant == tenant.id}
            room = Room.of(
                tenant.quota,
                tenant.network,
                shapes,
                [i for i in observed.instances if i.ref.tenant == tenant.id],
                host_mib=observed.host_mib,
            )
            need = replace(PoolNeed.of(pool, pool.desired, pool), pinned=False, critical=False)
            there = [i for i in observed.instances if i.ref.pool_ref == pool.ref]
            scaled = scale(need, there, room, now=observed.now, sleepless=observed.sleepless)
            if scaled.actions and pool.revision is None:
                remark = Remark(pool.ref, Cause.NO_IMAGE, pool.desired.total)
                return Submitted(note=remark.text, remarks=(remark,))
            asked, notes = self._asked(scaled.actions, self._failed(scaled.actions, observed), job)
            jobs = [
                self._jobs.submit(
                    each.verb, each.subject, self._node_id, params=each.params, reason=Reason.RECONCILE, actor=actor
                ).job_id
                for each in asked
            ]  # fmt: skip
        news = (*notes, *told(scaled.remarks))
        note = "; ".join([*(remark.text for remark in news), *self._overruled(pool)])
        return Submitted(tuple(jobs), note or None, news)

    def _overruled(self, pool: WorkerPool) -> Iterator[str]:
        """Where the document has other counts than a person has just given."""
        for wanted in (each for tenant in self.desired().tenants for each in tenant.pools if each.ref == pool.ref):
            if wanted.desired and wanted.desired != pool.desired:
                yield f"the node's desired state asks for {wanted.desired}, and the next pass goes back to that"

    def _asked(
        self, actions: Iterable[Action], failed: Mapping[Errand, Job], job: Job
    ) -> tuple[list[Asked], list[Remark]]:
        """The jobs that do `actions`, each with how many before it had `failed`. Instances to be created are written
        down by now, so that they are counted.
        """
        asked: list[Asked] = []
        notes: list[Remark] = []
        for action in actions:
            if not isinstance(action, Create):
                one, last = job_for(action), failed.get(errand(action))
                counted = {FAILURES: failures_before(last) + 1} if last else {}
                asked.append(one._replace(params={**one.params, **counted}))
                continue
            try:
                created = self._lifecycle.add(action.pool, action.count, job)
            except QuotaExceeded as error:
                limit = error.fields.get("field")
                notes.append(Remark(action.pool, Cause.QUOTA, action.count, limit=str(limit) if limit else None))
                log.warning("cannot create", pool=str(action.pool), error=error.message)
                continue
            asked += [Asked(JobVerb.INSTANCE_START, str(instance.ref)) for instance in created]
        return asked, notes


def _is_blocked(remark: Remark, desired: DesiredState) -> bool:
    """Whether it keeps something from being done that the document asks for."""
    listed = {tenant.id for tenant in desired.tenants} | {p.ref for tenant in desired.tenants for p in tenant.pools}
    return remark.cause.blocks and remark.subject in listed


def job_for(action: Action) -> Asked:
    """The job that does what `action` says; not for `Create`, which has one for each instance."""
    verb, subject = errand(action)
    return Asked(verb, subject, _params(action))


def _params(action: Action) -> dict[str, Any]:
    match action:
        case CreateTenant(tenant):
            network, quota = tenant.network, asdict(tenant.quota)
            return {"net_id": network.net_id, "subnet": str(network.subnet), "quota": quota, "adopt": True}
        case UpdateTenant(_, _, limits):
            return {"quota": asdict(limits)}
        case CreatePool(wanted):
            shape = {"resources": asdict(wanted.resources), **asdict(wanted.source)}
            return {**as_parameters(wanted), **shape}
        case UpdatePool(_, changes):
            return {change.name: change.after for change in changes}
        case Request(why=why):
            return {"why": why.value} if why in (Why.UNHEALTHY, Why.REBOOTED) else {}
        case DestroyTenant() | Build() | DestroyPool():
            return {}
        case Create():
            raise AssertionError("it has a job for each instance")
