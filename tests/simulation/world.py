"""One node with all that is around it, and what events do to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvm.domain.identity import Identity, Place
from mvm.domain.ids import InstanceRef, JobId, NodeId, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.domain.scaling import proving
from mvm.domain.tenant import Quota
from mvm.domain.vmm import Ending, VmmState
from mvm.drivers.fake import Lie
from mvm.errors import Failed, GuestRefused, GuestSilent, MvmError, NotAllowed
from mvm.ports.guest import Worker
from mvm.ports.host import MemoryLeft
from mvm.services.jobs import Jobs
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.simulation import backups
from tests.simulation.actors import Actor, Killed, Process
from tests.simulation.backups import Backup
from tests.simulation.broker import Message, SimQueue, SimRegistry, away
from tests.simulation.events import Event
from tests.simulation.host import (
    ACTS,
    CLEANING,
    LOW,
    NONE_LEFT,
    PLENTY,
    ROOM,
    SHORT_MIB,
    WRITES,
    SimClock,
    SimHost,
    SimLocks,
    TrueTime,
)
from tests.simulation.store import MemoryStore

NODE = NodeId("n1")
HOLD_S = 60.0
SETTINGS = Settings(
    state_dir=Path("/nonexistent"), node_id=NODE, driver="fake", parallel_boots=1024, orphan_grace_s=60,
    manual_hold_s=HOLD_S, idleness_sweep_s=30, health_checks=2,
    keep_revisions=1,
)  # fmt: skip
V = JobVerb
SWEEPS = (
    V.SWEEP_STALE_PIDS, V.SWEEP_RECONCILE, V.SWEEP_ORPHANS, V.SWEEP_IDLENESS, V.SWEEP_HEALTH, V.SWEEP_DISK,
)  # fmt: skip
_INSTANCE = (V.INSTANCE_START, V.INSTANCE_STOP, V.INSTANCE_WARM, V.INSTANCE_SLEEP, V.INSTANCE_WAKE, V.INSTANCE_DESTROY)
_SCALING = (V.POOL_SCALE, V.NODE_RECONCILE, V.SWEEP_RECONCILE)
_STARTABLE = (Status.CREATED, Status.READY, Status.STOPPED)
_POOLED = ("create", "scale", "scale exactly", "bulk", "build", "update", "quota", "rotate", "tenant", "pool", "clean")
_SILENT, _REFUSED = GuestSilent("guest.silent", "no answer"), GuestRefused("guest.refused", "it says no")
_FAULTS: Sequence[tuple[str, MvmError]] = (
    *((f"guest.{name}", _SILENT) for name in ("hello", "configure", "wake", "settle")),
    *((f"guest.{name}", _REFUSED) for name in ("prepare_sleep", "shutdown", "configure")),
    *((f"vmm.{name}", Failed("vmm.failed", "it does not")) for name in ("boot", "clone", "restore", "save", "resume")),
    ("vmm.clone", Failed("snapshot.damaged", "memory differs")),
    ("vmm.kill", Failed("vmm.failed", "cannot be ended")), ("network.ensure_tap", Failed("network.failed", "no TAP")),
    ("network.remove_taps", Failed("network.failed", "busy")), ("storage.revision", Failed("revision.damaged", "is")),
    ("storage.fresh_overlay", Failed("storage.failed", "no overlay")), ("images.build", Failed("build.failed", "no")),
    *((f"guest.{name}", _SILENT) for name in ("ping", "status", "prepare_sleep")),
    *((f"storage.{name}", Failed("storage.failed", "cannot")) for name in ("remove_template", "remove_revision")),
    ("packets.change", Failed("firewall.refused", "no such set")), ("vmm.put_secrets", Failed("vmm.failed", "no")),
)  # fmt: skip
_SECONDS = (0.5, 3.0, 11.0, 31.0, 65.0)
_JUMPS = (-3600.0, -7.0, 7.0, 3600.0, 90_000.0)


class World:
    """The node n1, its processes and Redis. Made by `bases.py`; `perform` makes an event happen."""

    def __init__(self) -> None:
        self.clock = SimClock()
        self.locks = SimLocks(self)
        self.host = SimHost(self)
        self.store = MemoryStore(self.store_call)
        self.registry = SimRegistry(TrueTime(self.clock), self.redis_call)
        self.queue = SimQueue(lambda: self.clock.elapsed, self.clock.now, self.redis_call)
        self.processes = {name: Process(name) for name in ("worker", "urgent", "agent")}
        self.others: list[Process] = []
        self.current: Actor | None = None
        self.deadlines: dict[Actor, float] = {}
        self.redis_down = False
        self.accepted: list[JobId] = []
        self.excused: set[JobId] = set()
        self.lost: set[JobId] = set()
        """Jobs of which a message was lost on its way."""
        self.harmed: set[InstanceRef] = set()
        self.tainted: set[InstanceRef] = set()
        self.quotas: dict[TenantId, list[Quota]] = {}
        self.breaches: list[str] = []
        self.told: list[str] | None = None
        self.remembers = False
        self.backup: Backup | None = None
        self.identity = Identity("5e", NODE, "mvm", Place(1, 2))
        """What the state directory remembers of itself."""
        self.was_low = False
        self.forgot = self.was_full = False
        """Redis was away or lost something: it may cancel what it does not know to have begun."""
        self._acted: dict[str, list[Actor]] = {}
        self.past: list[tuple[float, Any, Any, int]] = []
        self._services: dict[str, NodeServices] = {}

    # --- what is asked of it on the way
    def call(self, point: str) -> None:
        """Some actor is about to call `point`."""
        actor = self.current
        if actor is None:
            return
        if self.store.in_transaction and not actor.doomed:
            return  # killed in a transaction is killed before it
        actor.call(point)
        if point in ACTS:
            self._acts(actor, point)

    def _acts(self, actor: Actor, point: str) -> None:
        if actor.late:
            self.breach(f"done twice: {actor.name} calls {point}, and had ended before")
        acted = self._acted.setdefault(actor.subject, [])
        if actor.subject.count("/") == 2 and actor in acted and acted[-1] is not actor:
            self.breach(f"two at work: {actor.name} calls {point}, and {acted[-1].name} has been at work since")
        if actor not in acted[-1:]:
            acted.append(actor)

    def inserted(self, instance: Instance) -> None:
        """Somebody makes one more: so none may be there that only has to be started."""
        actor, now, pool = self.current, self.clock.now(), self.store._pools[instance.ref.pool_ref]
        if actor is None or actor.verb not in _SCALING or pool.critical or actor.spare:
            return
        taken = {job.subject for job in self.registry.all_jobs().values() if not job.state.final}
        actor.spare = [
            i for i in self.rows().values() if i.ref.pool_ref == pool.ref and i.status in _STARTABLE
            and i.in_flight is None and str(i.ref) not in taken and i.created_at < actor.began
            and (i.last_stopped_at is None or i.last_stopped_at < actor.began)  # not only since it looked
            and (i.manual_override_until is None or i.manual_override_until <= now)
        ]  # fmt: skip

    def store_call(self, point: str) -> None:
        """As `call`, of the node's store, which may be on a full disk."""
        self.call(point)
        if self.host.disk_full and point in WRITES and self.current is not None:
            self.hurt(point)
            raise Failed("disk.full", "the node's store: database or disk is full", hint="free some space")

    def redis_call(self, point: str) -> None:
        """As `call`, of Redis, which may be away."""
        self.call(point)
        if self.redis_down:
            raise away(point.partition(".")[0].replace("queue", "broker"))

    def breach(self, what: str) -> None:
        """Something is so that may not be."""
        self.breaches.append(what)

    def hurt(self, point: str) -> None:
        """A fault happened there: what an undo leaves because it failed itself, is a sweep's business."""
        if point in CLEANING and self.current is not None:
            self.taint(self.current.subject)

    def taint(self, subject: str) -> None:
        """What is about `subject` may be half done until the run's end."""
        if subject.count("/") == 2:
            self.tainted.add(InstanceRef.parse(subject))
        elif subject:
            self.tainted.update(ref for ref in self.rows() if str(ref).startswith(f"{subject}/") or subject == NODE)

    def launched(self, ref: InstanceRef) -> None:
        """A VMM of `ref` has just been started."""
        if ref not in self.rows():
            return  # a template
        known = self.quotas.setdefault(ref.tenant, [self.store._tenants[ref.tenant].quota])
        limit = max(quota.max_running for quota in (*known, self.store._tenants[ref.tenant].quota))
        there = [m for r, m in self.host.machines.items() if r.tenant == ref.tenant and r in self.rows()]
        running = sum(not machine.paused for machine in there)
        if running > limit:
            self.breach(f"quota breach: {running} VMMs of {ref.tenant} run, at most {limit} may")

    @property
    def has_ill(self) -> bool:
        """Whether some guest is silent, lies or stands still, or has no TAP."""
        rows = (self.rows().get(ref) for ref in self.host.machines)
        taps = {self.store._tenants[row.ref.tenant].network.tap(row.offset) for row in rows if row}
        return not taps <= self.host.taps.keys() or any(
            machine.hung or machine.lies or machine.state is not VmmState.RUNNING
            for machine in self.host.machines.values()
        )

    # --- what it is made of
    def rows(self) -> dict[InstanceRef, Instance]:
        """The instances that the store knows, without asking it."""
        return self.store._instances

    def services(self, name: str) -> NodeServices:
        """The services of a process; it makes them once."""
        if name not in self._services:
            h = self.host
            ports = NodePorts(
                self.store, self.registry, self.queue, self.locks, self.clock, h.vmm, h.guest, h.network, h.packets,
                None, h.storage, h.images, h.memory, h.audit, h.cgroups, h.secrets,
            )  # fmt: skip
            self._services[name] = build_node(ports, SETTINGS, authorized_key="ssh-ed25519 AAAA sim")
        return self._services[name]

    def jobs(self) -> Jobs:
        """What a command has of the stack."""
        return Jobs(self.registry, self.queue, self.clock)

    def rolls(self) -> bool:
        """A rollout goes on by health checks."""
        return bool(proving({ref: pool.revision for ref, pool in self.store._pools.items()}, self.rows().values()))

    def actors(self) -> list[Actor]:
        """All that is at work."""
        return [actor for process in (*self.processes.values(), *self.others) for actor in process.actors]

    def tell(self, line: str) -> None:
        """A line of the trace, if somebody follows it."""
        if self.told is not None:
            self.told.append(line)

    # --- letting actors go on
    def step(self, actor: Actor, calls: int | None) -> None:
        """`actor` goes on."""
        if not actor.runnable:
            return
        self.current = actor
        try:
            actor.step(calls, alone=len(self.actors()) == 1)
        finally:
            self.current = None
        for tenant in self.store._tenants.values():
            if tenant.quota not in (had := self.quotas.setdefault(tenant.id, [])):
                had.append(tenant.quota)
        if not actor.done:
            self.tell(f"      {actor.name} stands before {actor.at}")
            return
        error = actor.error
        if isinstance(error, MvmError):
            self.tell(f"      {actor.name} ends: {error}")
        elif isinstance(error, Killed):
            self.tell(f"      {actor.name} is killed before {actor.at}")
        elif error is not None:
            self.breach(f"crashed: {actor.name}: {error!r}")
        else:
            self.tell(f"      {actor.name} ends{_outcome(actor.result)}")
            if isinstance(actor.result, Job) and actor.result.error and actor.result.error["code"] == "internal":
                self.breach(f"crashed: {actor.name} ended with an unexpected error")
            self._check_spare(actor)

    def _check_spare(self, actor: Actor) -> None:
        """Who made more has asked for all that could be started, unless it asks again, or its jobs were forgotten."""
        again = isinstance(actor.result, Job) and not actor.result.state.final
        if not actor.spare or actor.misled or again:
            return
        asked = {job.subject for job in self.registry.all_jobs().values()}
        for spare in actor.spare:
            if self.rows().get(spare.ref) == spare and str(spare.ref) not in asked:
                self.breach(f"not converging: {actor.name} made more, and {spare.ref} was {spare.status} and free")

    def begin(self, process: Process, name: str, work: Callable[[], object], calls: int | None = None) -> Actor:
        """A process begins something."""
        actor = Actor(process, name, work)
        self.step(actor, calls)
        return actor

    def outsider(self, name: str, work: Callable[[], object], calls: int | None) -> Actor:
        """A process of its own begins something; with `calls` it dies after so many."""
        process = Process(name.split()[0])
        self.others.append(process)
        actor = self.begin(process, name, work, calls)
        if calls is not None and not actor.done:
            self.kill(process)
        return actor

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        for actor in list(process.actors):
            self.taint(actor.subject)
            self.current = actor
            actor.kill()
            self.current = None
            self.tell(f"      {actor.name} is killed before {actor.at}")
        process.up = False
        self._services.pop(process.name, None)

    def start(self, process: Process) -> None:
        """A process that had ended begins anew, with what its like do at their begin."""
        process.up = True
        name = process.name
        if name == "agent":
            self.begin(process, "agent: take up", lambda: self.services(name).urgent.take_up())
            return
        self.queue.give_back(name)
        self.begin(process, f"{name}: send lost", lambda: self.services(name).jobs.send_lost(NODE, older_than_s=0))
        if name == "worker":
            self.begin(process, "worker: rules", lambda: self.services(name).networks.repair())
            self.heartbeat()

    def heartbeat(self) -> None:
        """The worker says that it lives."""
        if self.processes["worker"].up and not self.redis_down:
            self.services("worker").heartbeat.beat()

    def deliver(self, message: Message, calls: int | None = None) -> Actor:
        """Its worker takes a message."""
        name, job = "urgent" if message.urgent else "worker", message.job
        self.queue.take(message, name)
        known = self.store._jobs.get(job.job_id)
        actor = Actor(self.processes[name], f"{name}: {told_job(job)}", lambda: self.services(name).runner.run(job))
        actor.verb, actor.subject, actor.late = job.verb, job.subject, known is not None and known.state.final
        deaths = known.deaths if known else 0
        actor.forced = bool(job.params.get("force")) or deaths + 1 >= SETTINGS.job_worker_deaths
        actor.began = self.clock.now()
        actor.then = lambda: self.queue.ack(message)
        self.step(actor, calls)
        return actor

    def wake(self, ref: InstanceRef, calls: int | None) -> str:
        """Somebody asks the agent."""
        actor = Actor(
            self.processes["agent"], f"agent: wake {ref}", lambda: self.services("agent").urgent.wake(ref, "sim")
        )
        actor.subject = str(ref)
        self.step(actor, calls)
        return f"{ref}"

    def remember(self) -> None:
        """What Redis has on its disk by now."""
        if self.remembers and not self.redis_down:
            now = self.clock.elapsed
            self.past = [each for each in self.past if each[0] >= now - 1.0]
            self.past.append((now, self.registry.state(), self.queue.state(), len(self.accepted)))

    def forget(self, pick: int) -> str:
        """Redis has lost what it did within the last second, or a part of it."""
        if not self.past:
            return "nothing lost"
        _, registry, queue, count = self.past[pick % len(self.past)]
        self.forgot = True
        self.registry.set_state(registry)
        self.queue.set_state(queue)
        lost = self.accepted[count:]
        self.excused.update(lost)
        working = self.actors()
        for actor in working:
            actor.misled = True
        if not working:
            for name in ("worker", "urgent"):
                self.queue.give_back(name)
        return f"lost what was since, {len(lost)} jobs among it"

    # --- events
    def perform(self, event: Event) -> None:
        """Let it happen."""
        self.remember()
        told = getattr(self, f"_do_{event.name}")(event)
        if self.told is not None:
            self.told.append(f"{self.clock.elapsed:8.1f} s  {event.name}: {told}   <- {event}")
        self.others = [process for process in self.others if process.actors]

    def _ref(self, pick: int) -> InstanceRef | None:
        rows = list(self.rows())
        return rows[pick % len(rows)] if rows else None

    def _do_ask(self, event: Event) -> str:
        ref, pools = self._ref(event.pick), list(self.store._pools)
        if not pools or (ref is not None and event.value % 3):
            if ref is None:
                return "nobody"
            verb = _INSTANCE[event.value // 3 % len(_INSTANCE)]
            params = {"force": True} if event.value % 7 == 0 and verb is not V.INSTANCE_DESTROY else {}
            return self._submit(event, verb, str(ref), params)
        pool, value = pools[event.pick % len(pools)], event.value // 32
        match _POOLED[event.value // 3 % len(_POOLED)]:
            case "create":
                return self._submit(event, V.INSTANCE_CREATE, str(pool), {"count": 1 + value % 2})
            case "scale":
                return self._submit(event, V.POOL_SCALE, str(pool), {"running": value % 4})
            case "scale exactly":
                counts = {"running": value % 3, "warm": value // 4 % 2, "sleeping": value // 8 % 2}
                return self._submit(event, V.POOL_SCALE, str(pool), counts)
            case "bulk":
                verb = _INSTANCE[value % 5]
                refs = [str(r) for r in self.rows() if r.pool_ref == pool]
                return self._bulk(event, verb, refs, parallel=1 + value // 8 % 2) if refs else "nobody"
            case "build":
                return self._submit(event, V.POOL_BUILD, str(pool), {})
            case "update":
                source = {"flake_ref": "builtin:", "profile": ("minimal", "python")[value % 2]}
                params = (
                    {"pinned": True}, {"pinned": False}, {"critical": bool(value % 8 == 7)}, {"source": source},
                    {"on_exit": ("stop", "restart")[value % 2]},
                )  # fmt: skip
                return self._submit(event, V.POOL_UPDATE, str(pool), params[value // 2 % len(params)])
            case "quota":
                return self._submit(event, V.TENANT_UPDATE, pool.tenant, {"quota": {"max_running": 2 + value % 3}})
            case "rotate":
                return self._submit(event, V.TENANT_SECRETS, pool.tenant, {"rotate": True})
            case "clean":
                return self._submit(event, V.NODE_CLEAN, NODE, {"keep": 1 + value % 2, "dry_run": value % 8 == 7})
            case "tenant":
                return self._submit(event, (V.TENANT_CREATE, V.TENANT_DESTROY)[value % 2], "temp", {})
            case _:
                verb = (V.POOL_CREATE, V.POOL_DESTROY)[value % 2]
                params = {"flake_ref": "builtin:", "profile": "minimal", "desired": {"running": 1}}
                return self._submit(event, verb, f"{pool.tenant}/temp", params if verb is V.POOL_CREATE else {})

    def _submit(self, event: Event, verb: JobVerb, subject: str, params: dict[str, Any]) -> str:
        jobs = self.jobs()
        actor = self.outsider(
            f"command: {verb} {subject}", lambda: jobs.submit(verb, subject, NODE, params=params, actor="sim"),
            event.calls,
        )  # fmt: skip
        self._accept(actor)
        return f"{verb} {subject} {params or ''}"

    def _bulk(self, event: Event, verb: JobVerb, refs: list[str], *, parallel: int) -> str:
        jobs = self.jobs()
        actor = self.outsider(
            f"command: {verb} of {len(refs)}",
            lambda: jobs.submit_bulk(verb, refs, lambda _: NODE, parallel=parallel, actor="sim"), event.calls,
        )  # fmt: skip
        self._accept(actor)
        return f"{verb} of {len(refs)}, {parallel} at a time"

    def _accept(self, actor: Actor) -> None:
        if actor.done and actor.error is None and isinstance(actor.result, Job):
            self.accepted.append(actor.result.job_id)
            bulk = self.registry._bulks.get(actor.result.job_id)
            self.accepted += bulk.children if bulk else []

    def _do_deliver(self, event: Event) -> str:
        due = [
            message for name, process in self.processes.items() if process.up and name != "agent"
            for message in self.queue.due(name == "urgent")
        ] if not self.redis_down else []  # fmt: skip
        if not due:
            return "nothing is due"
        message = due[event.pick % len(due) if event.value % 4 == 0 else 0]
        self.deliver(message, event.calls)
        return told_job(message.job)

    def _do_go(self, event: Event) -> str:
        ready = [actor for actor in self.actors() if actor.runnable]
        if not ready:
            return "nothing stands still"
        actor = ready[event.pick % len(ready)]
        self.step(actor, event.calls)
        return actor.name

    def _do_beat(self, event: Event) -> str:
        verb = SWEEPS[event.pick % len(SWEEPS)]
        jobs = self.jobs()
        self.heartbeat()
        self.outsider(f"beat: {verb}", lambda: jobs.sweep(verb, every_s=15.0), event.calls)
        return verb.value

    def _do_time(self, event: Event) -> str:
        seconds = _SECONDS[event.pick % len(_SECONDS)]
        self.pass_time(seconds)
        return f"{seconds:g} s pass"

    def pass_time(self, seconds: float) -> None:
        """Time passes; who is down is started again, and the node is heard of."""
        self.clock.elapsed += seconds
        if seconds >= 3:
            self.restart()
        self.heartbeat()

    def restart(self) -> str:
        """Who is down is started again."""
        down = [process for process in self.processes.values() if not process.up]
        for process in down:
            self.start(process)
        return ", ".join(process.name for process in down) or "nobody is down"

    def _do_wake(self, event: Event) -> str:
        ref = self._ref(event.pick)
        return self.wake(ref, event.calls) if ref is not None and self.processes["agent"].up else "nobody"

    def _do_apply(self, event: Event) -> str:
        if not self.processes["agent"].up:
            return "the agent is down"
        content = document(event.pick, self.store)
        work = lambda: self.services("agent").view.desired_apply(  # noqa: E731
            content, prune=event.value % 8 == 0, expect=None, actor="sim"
        )
        self.begin(self.processes["agent"], "agent: apply", work, event.calls)
        return content.decode()

    def _do_secrets(self, event: Event) -> str:
        if not self.processes["agent"].up:
            return "the agent is down"
        tenants = list(self.store._tenants)
        if not tenants:
            return "nobody"
        tenant, content = tenants[event.pick % len(tenants)], f"KEY=v{event.value % 3}\n".encode()
        work = lambda: self.services("agent").view.set_secrets(tenant, content, "sim")  # noqa: E731
        self.begin(self.processes["agent"], f"agent: set secrets of {tenant}", work, event.calls)
        return tenant

    def _do_cancel(self, event: Event) -> str:
        known = [job.job_id for job in self.registry.all_jobs().values() if not job.state.final]
        if not known:
            return "nothing"
        job_id, jobs = known[event.pick % len(known)], self.jobs()
        self.outsider(f"command: cancel {job_id}", lambda: jobs.cancel(job_id), event.calls)
        return job_id

    def _do_crash(self, event: Event) -> str:
        process = list(self.processes.values())[event.pick % len(self.processes)]
        self.kill(process)
        return process.name

    def _do_restart(self, event: Event) -> str:
        return self.restart()

    def _do_reboot(self, event: Event) -> str:
        for process in (*self.processes.values(), *self.others):
            self.kill(process)
        self.harmed.update(self.rows())
        self.host.reboot()
        lost = self.forget(event.value) if event.pick % 2 else "Redis has kept everything"
        self.redis_down = False
        for name in ("worker", "urgent"):
            self.queue.give_back(name)
        return lost

    def _do_backup(self, event: Event) -> str:
        kept = backups.take(self)
        self.backup = kept or self.backup
        return "taken" if kept else "a job is at an instance"

    def _do_restore(self, event: Event) -> str:
        if self.backup is None:
            return "there is no backup"
        backups.put_back(self, self.backup)
        return "a new host has what the backup has"

    def _do_stack(self, event: Event) -> str:
        """``mvm down``, and ``mvm up`` again; what its workers held comes again. Guests must not notice."""
        before = {ref: (machine.process, machine.paused) for ref, machine in self.host.machines.items()}
        for process in (*self.processes.values(), *self.others):
            self.kill(process)
        told = self.host.down()
        if {ref: (machine.process, machine.paused) for ref, machine in self.host.machines.items()} != before:
            self.breach("lost: a guest has noticed that the stack went down")
        self.redis_down = False
        for name in ("worker", "urgent"):
            self.queue.give_back(name)
        if event.pick % 3 == 1:
            told += f"; {self._renamed(NodeId('renamed'))}"
        self.restart()
        return told

    def _renamed(self, name: NodeId) -> str:
        """Its host has been given another `name` before ``mvm up``: refused, or else no pool may be left behind."""
        try:
            self.identity.check_node(name)
        except NotAllowed as error:
            return f"up as {name} is refused ({error.code}), as {NODE} it is not"
        stranded = [str(pool.ref) for pool in self.store._pools.values() if pool.node_id != name]
        if stranded:
            self.breach(f"stranded: {stranded} are on {NODE}, and the node is {name} now")
        return f"up as {name}"

    def _do_redis(self, event: Event) -> str:
        if not self.redis_down:
            self.remember()
            self.redis_down = self.forgot = True
            return "is away"
        self.redis_down = False
        told = "is there again"
        if event.value % 3 == 0:
            told += f"; {self.forget(event.pick)}"
        if event.value % 2 == 0:
            for _, message in list(self.queue.taken.values()):
                self.queue.put(message)
            told += "; what workers have is delivered again"
        return told

    def _message(self, event: Event) -> Message | None:
        return self.queue.ready[event.pick % len(self.queue.ready)] if self.queue.ready else None

    def _do_lose(self, event: Event) -> str:
        message = self._message(event)
        if message is None:
            return "nothing"
        self.queue.ready.remove(message)
        self.lost.add(message.job.job_id)
        return told_job(message.job)

    def _do_duplicate(self, event: Event) -> str:
        there = [*self.queue.ready, *(message for _, message in self.queue.taken.values())]
        if not there:
            return "nothing"
        message = there[event.pick % len(there)]
        self.queue.put(message)
        return told_job(message.job)

    def _do_delay(self, event: Event) -> str:
        message = self._message(event)
        if message is None:
            return "nothing"
        self.queue.ready.remove(message)
        later = copy(message)
        object.__setattr__(later, "not_before", self.clock.elapsed + _SECONDS[event.value % len(_SECONDS)])
        self.queue.put(later)
        return told_job(message.job)

    def _do_fail(self, event: Event) -> str:
        point, error = _FAULTS[event.pick % len(_FAULTS)]
        self.host.fail(point, error, times=1 + event.value % 2)
        return f"{point}: {error.code}"

    def _do_full(self, event: Event) -> str:
        self.host.disk_full = not self.host.disk_full
        self.was_full = True
        return "the disk is full" if self.host.disk_full else "the disk has room again"

    def _do_silence(self, event: Event) -> str:
        ref = self._ref(event.pick)
        if ref is None:
            return "nobody"
        self.host.hang_guest(ref)
        return str(ref)

    def _do_busy(self, event: Event) -> str:
        ref = self._ref(event.pick)
        if ref is None or ref not in self.host.machines:
            return "nobody"
        worker = (Worker.BUSY, Worker.IDLE, Worker.UNKNOWN)[event.value % 3]
        self.host.work(ref, worker, cpu_s=float(event.value % 100))
        return f"{ref} is {worker}"

    def _do_low(self, event: Event) -> str:
        low, self.was_low = self.host.disk_free == ROOM, True
        self.host.disk_free = (LOW, NONE_LEFT)[event.value % 2] if low else ROOM
        return f"the disk has {self.host.disk_free >> 20} MiB left"

    def _do_memory(self, event: Event) -> str:
        total, left = PLENTY.total_mib, (PLENTY.available_mib, SHORT_MIB)[self.host.memory_left == PLENTY]
        self.host.memory_left = MemoryLeft(total, left)
        return f"the host has {left} MiB of memory left"

    def _do_untap(self, event: Event) -> str:
        there = {self.store._tenants[ref.tenant].network.tap(row.offset): ref for ref, row in self.rows().items()}
        taps = sorted(tap for tap in self.host.taps if tap in there)
        if not taps:
            return "there is none"
        tap = taps[event.pick % len(taps)]
        del self.host.taps[tap]
        self.harmed.add(there[tap])
        return f"somebody has removed {tap}"

    def _do_vmm(self, event: Event) -> str:
        refs = sorted(self.host.machines, key=str)
        if not refs:
            return "none runs"
        ref = refs[event.pick % len(refs)]
        (self.host.kill_process, self.host.exhaust, self.host.panic_guest)[event.value % 3](ref)
        self.harmed.add(ref)
        return f"of {ref} ends"

    def _guest(self, pick: int) -> InstanceRef | None:
        refs = sorted((ref for ref in self.host.machines if ref in self.rows()), key=str)
        return refs[pick % len(refs)] if refs else None

    def _do_end(self, event: Event) -> str:
        ref = self._guest(event.pick)
        if ref is None:
            return "nobody"
        how = (Ending.HALTED, Ending.REBOOTED)[event.value % 2]
        self.host.halt_guest(ref, how)
        self.harmed.add(ref)
        return f"{ref} has {how}"

    def _do_still(self, event: Event) -> str:
        ref = self._guest(event.pick)
        if ref is None:
            return "nobody"
        state = (VmmState.IO_ERROR, VmmState.IO_ERROR, VmmState.PAUSED, VmmState.BROKEN, VmmState.ENDED)[
            event.value % 5
        ]
        self.host.stall_guest(ref, state)
        self.harmed.add(ref)
        return f"the VMM of {ref} says {state}"

    def _do_lie(self, event: Event) -> str:
        ref = self._guest(event.pick)
        if ref is None:
            return "nobody"
        lie = (Lie.REFUSES, Lie.PRETENDS, None)[event.value % 3]
        self.host.lie(ref, lie)
        return f"the guest of {ref} {lie or 'is honest'}"

    def _do_clock(self, event: Event) -> str:
        jump = _JUMPS[event.pick % len(_JUMPS)]
        self.clock.set_by += jump
        return f"jumps by {jump:g} s"


def told_job(job: Job) -> str:
    """A job in a trace."""
    return f"{job.verb} {job.subject} ({job.job_id[-6:]})"


def _outcome(result: object) -> str:
    if isinstance(result, Job):
        return f": {result.state}{' ' + str(result.error['code']) if result.error else ''}"
    return ""


def document(pick: int, store: MemoryStore) -> bytes:
    """A desired-state document, one of a few, for the tenants that there are."""
    running = {"desired_counts": {"running": pick % 3}}
    exact = {"desired_counts": {"running": pick % 2, "warm": 1, "sleeping": pick // 2 % 2}}
    tenants = []
    for tenant in store._tenants.values():
        if tenant.id == "temp":
            continue
        pools = [
            {
                "pool_id": pool.ref.pool, "flake_ref": "builtin:",
                "profile": ("minimal", "python")[pick // 4 % 2],
                "instance_resources": {"vcpus": pool.resources.vcpus, "mem_mib": pool.resources.mem_mib},
                **(running if (pick // 8 + at) % 2 else exact),
            }
            for at, pool in enumerate(p for p in store._pools.values() if p.ref.tenant == tenant.id)
        ]  # fmt: skip
        network = {"tenant_net_id": tenant.network.net_id, "ipv4_subnet": str(tenant.network.subnet)}
        some = pools[: 1 + pick // 16 % 2]
        tenants.append({"tenant_id": tenant.id, "network": network, "quotas": asdict(tenant.quota), "pools": some})
    return json.dumps({"schema_version": 1, "node_id": NODE, "tenants": tenants}).encode()


__all__ = ["HOLD_S", "NODE", "SWEEPS", "Reason", "Status", "World"]
