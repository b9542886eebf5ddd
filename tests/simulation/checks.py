"""What has to be so: after every event, and once everything has come to rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mvm.domain.desired import DesiredState
from mvm.domain.ids import InstanceRef, JobId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.domain.planner import Outcome, decide
from mvm.domain.room import usage_of
from mvm.domain.scaling import at_counts
from mvm.domain.vmm import Ending, VmmState
from tests.simulation.world import NODE, SETTINGS, World

_UP = (Status.RUNNING, Status.WARM)


_FORESEEN = (
    "quota.exceeded",
    "disk.low",
    "instance.invalid_transition",
    "pool.exists",
    "pool.no_uplink",
    "pool.not_built",
    "tenant.exists",
    "tenant.net_id_used",
    "tenant.subnet_full",
    "tenant.subnet_overlap",
)
"""How a job ends that should not have been asked for: what it needed was known not to be there."""


def had_to_fail(world: World, before: Mapping[JobId, Job]) -> list[str]:
    """Jobs that sweeps have asked for and that could not succeed, though nobody else did anything since `before`."""
    if any(not job.state.final and job.reason is Reason.MANUAL for job in before.values()):
        return []
    return [
        f"asked in vain: {job.verb} {job.subject}: {job.error['message']}"
        for job_id, job in world.registry.all_jobs().items()
        if job_id not in before
        and job.reason in (Reason.RECONCILE, Reason.SLEEP_POLICY)
        and job.error is not None
        and job.error["code"] in _FORESEEN
    ]


def after_event(world: World) -> list[str]:
    """Breaches that can be seen at once, of instances that nobody works on."""
    return [*world.breaches, *_quotas(world), *_at_rest(world), *_jobs_known(world)]


def _quotas(world: World) -> Iterator[str]:
    for tenant in world.store._tenants.values():
        had = world.quotas.setdefault(tenant.id, [])
        if tenant.quota not in had:
            had.append(tenant.quota)
        shapes = {pool.ref: pool.resources for pool in world.store._pools.values() if pool.ref.tenant == tenant.id}
        used = usage_of(shapes, [i for i in world.rows().values() if i.ref.tenant == tenant.id])
        most = max(q.max_running for q in had), max(q.max_warm for q in had)
        if used.running > most[0] or used.warm > most[1]:
            yield f"quota breach: {tenant.id} has {used.running} running and {used.warm} warm, may have {most}"


def _busy(world: World) -> set[str]:
    at_work = {actor.subject for actor in world.actors()}
    at_work |= {job.subject for job in world.store._jobs.values() if not job.state.final}  # or will be tried again
    return at_work | {name.removeprefix("instance ") for name in world.locks.held}


def _at_rest(world: World) -> Iterator[str]:
    busy = _busy(world)
    for ref, row in world.rows().items():
        if str(ref) in busy or ref in world.tainted:
            continue
        if row.in_flight is not None:
            job = world.store._jobs.get(row.in_flight.job_id)
            if job is not None and job.state.final:
                yield f"stuck: {ref} is still held by {row.in_flight.verb}, which has ended"
            continue
        if row.status in _UP:
            if ref not in world.harmed:
                yield from _up(world, ref, row)
        else:
            world.harmed.discard(ref)
            yield from _down(world, ref, row)


def _up(world: World, ref: InstanceRef, row: Instance) -> Iterator[str]:
    machine, tap, warm = world.host.machines.get(ref), _tap(world, row), row.status is Status.WARM
    if machine is None:
        yield f"stores disagree: {ref} is {row.status} and has no process, though none was ended"
    elif machine.process != row.process:
        yield f"stores disagree: {ref} is recorded as {row.process} and runs as {machine.process}"
    elif (machine.still if warm else machine.paused) is not warm:  # what its VMM has halted stands still as well
        yield f"stores disagree: {ref} is {row.status} and {'paused' if machine.paused else 'not paused'}"
    if tap not in world.host.taps and not _only_told(world, ref):
        yield f"stores disagree: {ref} is {row.status} and has no TAP"


def _only_told(world: World, ref: InstanceRef) -> bool:
    """Nobody replaces an ill instance there."""
    pool = world.store._pools[ref.pool_ref]
    return bool(pool.protected) or pool.desired is None


def _down(world: World, ref: InstanceRef, row: Instance) -> Iterator[str]:
    host, asleep = world.host, row.status is Status.SLEEPING
    files = host.files.get(ref)
    if ref in host.machines:
        yield f"leak: {ref} is {row.status} and has a process"
    if _tap(world, row) in host.taps:
        yield f"leak: {ref} is {row.status} and has a TAP"
    if ref in host.groups:
        yield f"leak: {ref} is {row.status} and has a control group"
    if files and files.runtime and not asleep:  # a sleeping one keeps its overlay, and what a wake in vain left beside
        yield f"leak: {ref} is {row.status} and has {sorted(files.runtime)}"
    if (host.layout.snapshot(ref) in host.saved) is not asleep:
        yield f"{'lost' if asleep else 'leak'}: {ref} is {row.status} and has {'no' if asleep else 'a'} snapshot"


def _tap(world: World, row: Instance) -> str:
    return world.store._tenants[row.ref.tenant].network.tap(row.offset)


def _jobs_known(world: World) -> Iterator[str]:
    """Nobody may have an accepted job forgotten, whatever happens; but by a Redis that lost its disk."""
    known = world.registry.all_jobs()
    for job_id in world.accepted:
        if job_id not in known and job_id not in world.excused:
            yield f"job lost: {job_id} is not known any more"


def left_lying(world: World) -> list[str]:
    """Who is killed leaves what it had taken to its successor: only a message that was really lost needs a sweep.

    Not so the children of a bulk job: who is killed between taking the next one and sending it leaves that to a sweep.
    """
    if world.forgot or world.was_full:
        return []
    known = world.registry.all_jobs()
    mine = [known[job_id] for job_id in world.accepted if job_id in known and job_id not in world.lost]
    return [
        f"job left lying: {job.verb} {job.subject} is {job.state} and has no message"
        for job in mine
        if not job.state.final and job.parent is None and job.verb is not JobVerb.BULK
    ]


# --- once everything is quiet


def at_the_end(world: World) -> list[str]:
    """What is not as it should be when faults are over and sweeps have had their time: of the first kind that is."""
    world.tainted.clear()
    world.harmed.clear()
    for look in (after_event, _jobs, _guests, _host, _images, _plan, _agreement, _trails):
        breaches = list(look(world))
        if breaches:
            return breaches
    return []


def _guests(world: World) -> Iterator[str]:
    """Whoever should run does, and no reboot is told that was none."""
    for ref, row in world.rows().items():
        machine = world.host.machines.get(ref)
        if row.status is Status.RUNNING and machine is not None and machine.state is not VmmState.RUNNING:
            yield f"stands still: {ref} should run, there is room, and its VMM says {machine.state}"
        if row.stalled is not None:
            yield f"stands still: {ref} is told as {row.stalled}"
        if row.ended is Ending.REBOOTED and world.host.endings.get(world.host.layout.instance(ref)) is not row.ended:
            yield f"stores disagree: {ref} is told as {row.ended}"


def _jobs(world: World) -> Iterator[str]:
    known = world.registry.all_jobs()
    for job in known.values():
        own = world.store._jobs.get(job.job_id)
        if not job.state.final:
            yield f"job stuck: {job.verb} {job.subject} ({job.job_id}) is {job.state}"
        elif own is not None and own.state is not job.state and not _excused(world, own, job):
            yield f"stores disagree: {job.verb} {job.subject} is {own.state} at the node, {job.state} in the registry"
    for job in world.store._jobs.values():
        if not job.state.final:
            yield f"job stuck: {job.verb} {job.subject} ({job.job_id}) is {job.state} at the node"
    for ref, row in world.rows().items():
        if row.in_flight is not None:
            yield f"stuck: {ref} is held by {row.in_flight}"


def _excused(world: World, own: Job, job: Job) -> bool:
    """A registry that had forgotten the job may have cancelled it; and what could not begin may be either."""
    return job.state is JobState.CANCELLED and (world.forgot or own.state is JobState.FAILED)


def _host(world: World) -> Iterator[str]:
    host, rows = world.host, world.rows()
    up = {ref for ref, row in rows.items() if row.status in _UP}
    asleep = {host.layout.snapshot(ref) for ref, row in rows.items() if row.status is Status.SLEEPING}
    taps = {tap for ref in up if (tap := _tap(world, rows[ref])) in host.taps or not _only_told(world, ref)}
    pools = {(pool.ref.tenant, pool.ref.pool) for pool in world.store._pools.values()}
    saved = {path for path in host.saved if not path.is_relative_to(host.layout.templates)}
    templates = {
        path for path in host.saved if path.is_relative_to(host.layout.templates)
        and path.relative_to(host.layout.templates).parts[:2] not in pools
    }  # fmt: skip
    for what, there, owned in (
        ("processes", set(host.machines), up),
        ("TAPs", set(host.taps), taps),
        ("control groups", set(host.groups), up),
        ("snapshots", saved, asleep),
        ("templates without a pool", templates, set()),
        ("held locks", set(world.locks.held), set()),
    ):  # fmt: skip
        if there != owned:
            yield f"leak: {what} differ: {sorted(map(str, there ^ owned))}"
    networks = {tenant.id: tenant.network for tenant in world.store._tenants.values()}
    needed, allowed = {networks[ref.tenant].bridge for ref in up}, {network.bridge for network in networks.values()}
    if not needed <= set(host.bridges) <= allowed:  # a reboot leaves none, and each comes with the next instance
        yield f"leak: bridges are {sorted(host.bridges)}, and should be {sorted(allowed)}"
    strangers = set(host.files) - set(rows)
    if strangers:
        yield f"leak: directories of {sorted(map(str, strangers))}"
    different = host.packets.differences(world.services("worker").networks.expected())
    if different:
        yield f"leak: rules differ: {different[:3]}"


def _images(world: World) -> Iterator[str]:
    """What pools and instances need of images is there; and when space is low, nothing else."""
    host = world.host
    for pool in world.store._pools.values():
        if pool.revision is not None and pool.revision not in host.revisions:
            yield f"lost: the image of {pool.ref} is gone"
    for ref, row in world.rows().items():
        if row.status not in (*_UP, Status.SLEEPING) or row.revision is None:
            continue
        if row.revision not in host.revisions:
            yield f"lost: {ref} is {row.status} on an image that is gone"
        if row.status is Status.SLEEPING:
            asleep, template = host.saved[host.layout.snapshot(ref)], host.layout.template(ref.pool_ref, row.revision)
            base = asleep.manifest.template
            if base is not None and (template not in host.saved or host.saved[template].manifest.id != base):
                yield f"lost: {ref} sleeps on a template that is gone"
    if world.was_low:
        found, _ = world.services("worker").view._disk._decide(SETTINGS.keep_revisions)
        if found.revisions or found.templates:
            yield f"leak: not cleaned up: {found.revisions} {found.templates}"


def _agreement(world: World) -> Iterator[str]:
    """What the node has, the registry knows."""
    for tenant in world.store._tenants.values():
        known = world.registry._tenants.get(tenant.id)
        if known is None or known.network != tenant.network:
            yield f"stores disagree: the registry has {tenant.id} with {known and known.network}"
    for pool in world.store._pools:
        if world.registry._pools.get(pool) != NODE:
            yield f"stores disagree: the registry does not know where {pool} is"
    for tenant_id in world.registry._tenants.keys() - world.store._tenants.keys():
        yield f"stores disagree: only the registry knows {tenant_id}"
    for pool in world.registry._pools.keys() - world.store._pools.keys():
        yield f"stores disagree: only the registry knows {pool}"


def _trails(world: World) -> Iterator[str]:
    for tenant_id in list(world.store._heads):
        verdict = world.services("agent").view.audit_verify(tenant_id)
        if not verdict["whole"]:
            yield f"audit: the trail of {tenant_id} is not whole: {verdict['findings'][:2]}"


def _plan(world: World) -> Iterator[str]:
    reconcile = world.services("worker").view._desired._reconcile
    desired = reconcile.desired()
    outcome = decide(desired, reconcile.observe(desired))
    if outcome.actions:
        yield f"not converged: {'; '.join(map(str, outcome.actions[:3]))}"
    yield from _without_a_reason(world, desired, outcome)
    if outcome.rolling:
        yield f"not converged: {outcome.remarks}"


def _without_a_reason(world: World, desired: DesiredState, outcome: Outcome) -> Iterator[str]:
    """A pool that is not at its counts says what keeps it from them."""
    listed = {pool.ref: pool.desired for tenant in desired.tenants for pool in tenant.pools}
    named = {remark.subject for remark in outcome.remarks if remark.cause.counts}
    for ref, pool in world.store._pools.items():
        counts = listed.get(ref) or pool.desired
        there = [row for row in world.rows().values() if row.ref.pool_ref == ref]
        if counts is not None and not pool.pinned and not at_counts(counts, there) and ref not in named:
            yield f"no reason: {ref} is not at {counts}: {[row.status.value for row in there]}"
