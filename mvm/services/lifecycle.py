"""Instances: create, start, stop, destroy. Every caller comes here, by way of the `Runner`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from typing import Any

from mvm.domain import lock_names
from mvm.domain.addressing import TenantNetwork, free_offset
from mvm.domain.desired import asks_for
from mvm.domain.ids import InstanceId, InstanceRef, PoolRef
from mvm.domain.instance import InFlight, Instance
from mvm.domain.job import Job, JobVerb, Reason
from mvm.domain.lifecycle import Status, Verb, landing
from mvm.domain.vmm import Ending, VmmState
from mvm.errors import Cancelled, Fenced, GuestFault, InvalidInput, MvmError, NotFound
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.store import NodeStore, Note
from mvm.services.audit import Audit
from mvm.services.microvm import MicroVms
from mvm.services.quotas import admit_instances, admit_running, admit_warm
from mvm.services.runner import JobContext
from mvm.services.views import instance_view

MAX_CREATE = 1000
_LOCK_S = 300.0
_UNUSED = (Status.CREATED, Status.READY)
_UNWRITTEN = "its guest did not get ready, and may have written to memory alone what it was to write to its disks"


class Lifecycle:
    """The one API for instances: the table, the quotas, the locks and the records, around the steps of `MicroVms`."""

    def __init__(
        self, store: NodeStore, locks: Locks, clock: Clock, microvms: MicroVms, audit: Audit, *, manual_hold_s: float
    ) -> None:
        self._store = store
        self._locks = locks
        self._clock = clock
        self._microvms = microvms
        self._audit = audit
        self._manual_hold = timedelta(seconds=manual_hold_s)

    def create(self, context: JobContext) -> Mapping[str, Any]:
        """Create ``params.count`` instances in the subject pool and prepare their disks: all of them, or none."""
        count = context.job.params.get("count", 1)
        if not isinstance(count, int) or not 1 <= count <= MAX_CREATE:
            raise InvalidInput("instance.invalid_count", f"--count is {count}", hint=f"allowed: 1 to {MAX_CREATE}",
                               field="count", value=count)  # fmt: skip
        created = self.add(PoolRef.parse(context.job.subject), count, context.job)
        network = self._store.tenant(created[0].ref.tenant).network
        with context.undoing(partial(self._undo_create, created, network)):
            for done, instance in enumerate(created):
                context.step("prepare disks", done, count)
                self._prepare(instance.ref)
        for instance in created:
            context.found(instance.ref, None)
        return {"instances": [instance_view(network, self._store.instance(i.ref)) for i in created]}

    def undo_create(self, context: JobContext) -> None:
        """What a create made that will not be done to its end is gone, but for what somebody uses already."""
        made = self._refs(context.job, PoolRef.parse(context.job.subject), context.job.params.get("count", 1))
        known = {i.ref: i for i in self._store.instances(pool=PoolRef.parse(context.job.subject))}
        unused = [i for ref in made if (i := known.get(ref)) and i.in_flight is None and i.status in _UNUSED]
        if unused:
            self._undo_create(unused, self._store.tenant(unused[0].ref.tenant).network)

    @staticmethod
    def _refs(job: Job, pool: PoolRef, count: int) -> list[InstanceRef]:
        digests = (sha256(f"{job.job_id} {n}".encode()).digest() for n in range(count))
        return [pool.instance(InstanceId.from_bytes(digest)) for digest in digests]

    def _undo_create(self, created: Iterable[Instance], network: TenantNetwork) -> None:
        for instance in created:
            with self._locked(instance.ref):
                self._microvms.remove(instance, network)
                self._store.delete_instance(instance.ref)

    def add(self, ref: PoolRef, count: int, job: Job) -> list[Instance]:
        """Write down `count` new instances of `ref`, if the quota admits them.

        Their ids derive from the job's, so that a job delivered again after a crash finds those it made.
        """
        refs = self._refs(job, ref, count)
        with self._store.transaction():
            pool, tenant = self._store.pool(ref), self._store.tenant(ref.tenant)
            existing = {i.ref: i for i in self._store.instances(tenant=ref.tenant)}
            missing = [r for r in refs if r not in existing]
            if missing:
                admit_instances(self._store, tenant, pool, len(missing))
            taken = {i.offset for i in existing.values()}
            for new in missing:
                offset = free_offset(tenant.network, taken)
                taken.add(offset)
                existing[new] = Instance(new, pool.node_id, offset, Status.CREATED, self._clock.now())
                self._store.insert_instance(existing[new])
                if job.verb is not JobVerb.INSTANCE_CREATE:  # whose end tells of those that it made
                    self._audit.changed(job, new, None, why="too few instances")
        return [existing[r] for r in refs]

    def _prepare(self, ref: InstanceRef) -> None:
        with self._locked(ref):
            instance = self._store.instance(ref)
            self._microvms.prepare(instance, self._store.pool(ref.pool_ref))
            if instance.status is Status.CREATED:
                self._store.save_instance(replace(instance, status=landing(instance.status, Verb.PREPARE, ref)))

    def start(self, context: JobContext) -> Mapping[str, Any]:
        """Start the subject instance; running once its agent has answered and taken its identity.

        A warm or sleeping one wakes; with ``params.force`` a sleeping one forgets its memory and starts anew.
        """
        with self._claimed(context, Verb.START) as instance:
            ref = instance.ref
            pool, network = self._store.pool(ref.pool_ref), self._store.tenant(ref.tenant).network
            if instance.status is Status.WARM or (
                instance.status is Status.SLEEPING and not context.job.params.get("force")
            ):
                self._rouse(context, instance)
                return {}
            self._tell_unwritten(context, instance)
            with context.undoing(partial(self._undo_start, ref, network)):
                instance = self._microvms.bring_up(context, instance, pool, network)
            running = instance.moved(Status.RUNNING, last_error=None, last_started_at=self._clock.now())
            with context.ending(**instance_view(network, running)):
                self._store.save_instance(running)
        return {}

    def _undo_start(self, ref: InstanceRef, network: TenantNetwork) -> None:
        instance = self._store.instance(ref)  # the boot step has written the process since
        if instance.status is Status.SLEEPING and self._microvms.has_snapshot(instance):
            return  # nothing has begun: it sleeps on
        self._microvms.take_down(instance, network)
        # A sleeping one that was to forget its memory has: there is nothing left to wake it from.
        status = Status.STOPPED if instance.status is Status.SLEEPING else instance.status
        self._store.save_instance(replace(instance, process=None, status=status))

    def wake(self, context: JobContext) -> Mapping[str, Any]:
        """The subject instance, warm or sleeping, runs again where it was."""
        with self._claimed(context, Verb.WAKE) as instance:
            self._rouse(context, instance)
        return {}

    def _rouse(self, context: JobContext, instance: Instance) -> None:
        ref = instance.ref
        network, began = self._store.tenant(ref.tenant).network, self._clock.monotonic()
        if instance.status is Status.WARM:
            instance = self._resume(context, instance)
        else:
            instance = self._wake(context, instance, network)
        running = instance.moved(Status.RUNNING, last_error=None, last_started_at=self._clock.now())
        took = round(self._clock.monotonic() - began, 4)
        note = {"seconds": took, "from": instance.status.value, "at": self._clock.now().isoformat()}
        with context.ending(seconds=took, **instance_view(network, running)):
            self._store.save_instance(running)
            self._store.put_note(ref, Note.WOKE, note)
        # Only now: a wake that is delivered again needs it.
        self._microvms.forget_snapshot(running)

    def _wake(self, context: JobContext, instance: Instance, network: TenantNetwork) -> Instance:
        """A sleeping instance runs again, also one whose guest is not well and that could not be put to sleep anew.

        One whose VMM has ended as it ran has nothing left to wake from: it stops. So does one that a killed worker
        woke, when its VMM ended with the host: its disk has outrun what it slept in.
        """
        try:
            woken, fault = self._microvms.wake(context, instance, self._store.pool(instance.ref.pool_ref), network)
        except Fenced:
            raise
        except MvmError as error:
            context.check_lease()
            has_run = error.code == "snapshot.other_disk" and context.job.deaths > 0
            gone = not error.code.startswith("snapshot.") and not self._microvms.has_snapshot(instance)
            if has_run or gone:
                self._microvms.take_down(instance, network)
                self._store.save_instance(
                    replace(instance, status=Status.STOPPED, process=None, last_stopped_at=self._clock.now())
                )
            raise
        if fault is not None:
            context.check_lease()
            self._store.save_instance(replace(woken, status=Status.RUNNING, last_started_at=self._clock.now()))
            self._microvms.forget_snapshot(woken)
            raise fault
        return woken

    def _resume(self, context: JobContext, instance: Instance) -> Instance:
        """A warm instance runs again. Where only its guest does not answer it runs all the same, and is found ill."""
        try:
            return self._microvms.resume(instance)
        except Fenced:
            raise
        except MvmError as error:
            context.check_lease()
            if isinstance(error, GuestFault):
                self._store.save_instance(replace(instance, status=Status.RUNNING, last_started_at=self._clock.now()))
            else:
                self._microvms.warm(instance)
            raise

    def warm(self, context: JobContext) -> Mapping[str, Any]:
        """The subject instance's vCPUs stand still; it keeps its memory."""
        with self._claimed(context, Verb.WARM) as instance:
            _check_run(context, instance)
            self._microvms.warm(instance)
            warm = instance.moved(Status.WARM)
            with context.ending(**instance_view(self._store.tenant(instance.ref.tenant).network, warm)):
                self._store.save_instance(warm)
        return {}

    def sleep(self, context: JobContext) -> Mapping[str, Any]:
        """The subject instance's memory is on disk; ``params.force`` does not wait for its guest's consent."""
        with self._claimed(context, Verb.SLEEP) as instance:
            _check_run(context, instance)
            ref, began = instance.ref, self._clock.monotonic()
            pool, network = self._store.pool(ref.pool_ref), self._store.tenant(ref.tenant).network
            held = self._microvms.held(instance)
            manifest, ready = self._microvms.sleep(
                context, instance, pool, network, force=bool(context.job.params.get("force"))
            )
            asleep = instance.moved(Status.SLEEPING, process=None, last_stopped_at=self._clock.now())
            took = round(self._clock.monotonic() - began, 4)
            note = {
                "seconds": took,
                "bytes": manifest.size,
                "held": held,
                "at": self._clock.now().isoformat(),
                "ready": ready,
            }
            if not ready:
                context.remark(f"asleep by force: {_UNWRITTEN}, and only a wake keeps that")
            with context.ending(snapshot_bytes=manifest.size, seconds=took, **instance_view(network, asleep)):
                self._store.save_instance(asleep)
                self._store.put_note(ref, Note.SLEPT, note)
        return {}

    def stop(self, context: JobContext) -> Mapping[str, Any]:
        """Shut the subject instance down: cleanly within the grace time, unless ``params.force``."""
        with self._claimed(context, Verb.STOP) as instance:
            network = self._store.tenant(instance.ref.tenant).network
            context.step("shut down guest", 0, 2)
            forced = bool(context.job.params.get("force"))
            clean = not forced and self._microvms.shut_down(instance)
            self._tell_unwritten(context, instance)
            if instance.has_vmm and not (clean or forced):
                context.remark("its guest did not shut down in time and was ended: what it had not written is lost")
            self._microvms.take_down(instance, network)  # no step of its own: not cancelled half way
            stopped = instance.moved(Status.STOPPED, process=None, last_stopped_at=self._clock.now())
            with context.ending(clean=clean, **instance_view(network, stopped)):
                self._store.save_instance(stopped)
        return {}

    def _tell_unwritten(self, context: JobContext, instance: Instance) -> None:
        """Of one that was put to sleep by force, and whose memory goes now. An older mvm did not note it."""
        note = self._store.note(instance.ref, Note.SLEPT)
        if instance.status is Status.SLEEPING and note and not note.get("ready", True):
            context.remark(f"it slept by force: {_UNWRITTEN}; that is lost")

    def destroy(self, context: JobContext) -> Mapping[str, Any]:
        """Remove the subject instance with everything it has, whatever its status."""
        with self._claimed(context, Verb.DESTROY) as instance:
            self._microvms.remove(instance, self._store.tenant(instance.ref.tenant).network)
            with context.ending(ref=str(instance.ref)):
                self._store.delete_instance(instance.ref)
        return {}

    def mark_gone(self, job: Job, seen: Instance, reason: str, ended: Ending, code: str = "vmm.gone") -> bool:
        """Record that a running instance's run has `ended`, and clean up; False if it changed meanwhile."""
        with self._unchanged(seen) as instance:
            if instance is None:
                return False
            self._microvms.take_down(instance, self._store.tenant(seen.ref.tenant).network)
            gone = instance.moved(
                Status.STOPPED, process=None, last_error=f"{reason} [{code}]", last_stopped_at=self._clock.now(),
                manual_override_until=None, ended=ended,
            )  # fmt: skip
            with self._store.transaction():
                self._store.save_instance(gone)
                self._audit.changed(job, instance.ref, instance, why=reason, code=code)
            return True

    def mark_stalled(self, job: Job, seen: Instance, state: VmmState, reason: str, code: str) -> bool:
        """Record that a running instance's VMM says `state`; False if it changed meanwhile."""
        with self._unchanged(seen) as instance:
            if instance is None:
                return False
            with self._store.transaction():
                self._store.save_instance(replace(instance, stalled=state, last_error=f"{reason} [{code}]"))
                self._audit.changed(job, instance.ref, instance, why=reason, code=code)
            return True

    def let_go_on(self, job: Job, seen: Instance, why: str) -> bool:
        """A running instance that stood still runs again; False if it does not, or changed meanwhile."""
        with self._unchanged(seen) as instance:
            if instance is None or not self._microvms.let_go_on(instance):
                return False
            with self._store.transaction():
                self._store.save_instance(replace(instance, stalled=None, last_error=None))
                self._audit.changed(job, instance.ref, instance, why=why, code="vmm.resumed")
            return True

    @contextmanager
    def _unchanged(self, seen: Instance) -> Iterator[Instance | None]:
        """Its lock, which nobody may hold, and its row, unless that is not what was `seen` any more."""
        with self._locks.hold(lock_names.instance(seen.ref), deadline_s=0):
            try:
                instance = self._store.instance(seen.ref)
            except NotFound:
                instance = None
            yield instance if instance and instance.generation == seen.generation else None

    def _locked(self, ref: InstanceRef) -> AbstractContextManager[None]:
        return self._locks.hold(lock_names.instance(ref), deadline_s=_LOCK_S)

    @contextmanager
    def _claimed(self, context: JobContext, verb: Verb) -> Iterator[Instance]:
        """Hold the subject instance for this job: its lock, and its mark in the row.

        If the job fails, the mark goes and the reason stays.
        """
        ref = InstanceRef.parse(context.job.subject)
        with self._locked(ref):
            claimed = self._admit(ref, verb, context)
            context.leased(claimed)
            try:
                yield claimed
            except Fenced:
                raise
            except Exception as error:
                context.check_lease()
                failed = self._store.instance(ref)
                if context.unrecorded or self._given_up(failed, verb, context.job):
                    raise  # the row is not true: its mark stays, by which `Recovery` brings it to rest
                kept = failed.last_error if isinstance(error, Cancelled) else _reason(error)
                self._store.save_instance(replace(failed, in_flight=None, last_error=kept, manual_override_until=None))
                raise

    def _admit(self, ref: InstanceRef, verb: Verb, context: JobContext) -> Instance:
        """Check the table and the quota and mark the instance as the job's, in one transaction.

        We hold the instance's lock, so a job that is still marked here lost its worker; ours takes over.
        """
        # What a machine forgets when it fails, it forgets together with the claim.
        in_memory = verb is Verb.WAKE and self._store.instance(ref).status is Status.WARM
        with self._store.transaction(durable=not in_memory):
            instance = self._store.instance(ref)
            context.found(ref, instance)
            self._check_current(context.job, instance, verb)
            mark = instance.in_flight
            left = self._store.job(mark.job_id) if mark else None
            if mark and verb not in (Verb.STOP, Verb.DESTROY) and self._given_up(instance, mark.verb, left):
                instance = replace(instance, status=Status.STOPPED, process=None)
            landing(instance.status, verb, ref)
            context.left_at = left.step if left and left.job_id != context.job.job_id else None
            if verb in (Verb.START, Verb.WAKE, Verb.WARM) and instance.in_flight:
                # A mark that a crash left: the quota must not count this instance twice.
                instance = self._store.save_instance(replace(instance, in_flight=None))
            if verb in (Verb.START, Verb.WAKE):
                admit_running(
                    self._store, self._store.tenant(ref.tenant), self._store.pool(ref.pool_ref),
                    from_memory=instance.status is Status.WARM,
                )  # fmt: skip
            if verb is Verb.WARM:
                admit_warm(self._store, self._store.tenant(ref.tenant))
            context.record()
            flight = InFlight(context.job.job_id, verb)
            lease = instance.lease + 1
            return self._store.save_instance(
                replace(instance, in_flight=flight, lease=lease, **self._hold(context.job))
            )

    def _given_up(self, instance: Instance, verb: Verb, job: Job | None) -> bool:
        """It sleeps by its row, and `job`, which was to drop what it slept in, has done so and could not record it."""
        drops = verb in (Verb.STOP, Verb.DESTROY) or bool(verb is Verb.START and job and job.params.get("force"))
        return drops and instance.status is Status.SLEEPING and not self._microvms.has_snapshot(instance)

    def _check_current(self, job: Job, instance: Instance, verb: Verb) -> None:
        """Raises `Cancelled` when reconcile would not decide `job` any more, for what people have said since.

        A pass's jobs are a group's; a person's `pool scale`, which may stop what is pinned, asks by itself.
        """
        mark = instance.in_flight
        if job.reason is not Reason.RECONCILE or (mark and mark.job_id == job.job_id):
            return
        pool = self._store.pool(instance.ref.pool_ref)
        until = instance.held_until(self._clock.now(), pool.scaled_at)
        spoke = instance.manual_override_at or (until - self._manual_hold if until else None)
        if until and spoke and spoke > job.submitted_at:
            raise Cancelled("policy.outdated", f"a person has changed {instance.ref} since this was decided")
        if job.parent and verb not in (Verb.START, Verb.WAKE) and (pool.pinned or pool.critical):
            raise Cancelled("policy.outdated", f"{instance.ref} stays: its pool has become pinned or critical")
        if job.parent and verb is Verb.DESTROY and (document := self._store.desired()) and asks_for(document, pool.ref):
            raise Cancelled("policy.outdated", f"{instance.ref} stays: the desired state asks for its pool again")

    def _hold(self, job: Job) -> dict[str, Any]:
        """What a person does holds for a while: reconcile leaves the instance as it then is.

        What reconcile does ends that: it acts where nothing holds, or because a person has spoken since. The sleep
        policy changes where an instance is, not that a person wants it up.
        """
        if job.reason is Reason.SLEEP_POLICY:
            return {}
        if job.reason not in (Reason.MANUAL, Reason.URGENT):
            return {"manual_override_until": None, "manual_override_at": None}
        return {
            "manual_override_until": self._clock.now() + self._manual_hold,
            "manual_override_at": job.submitted_at,
        }


def _check_run(context: JobContext, instance: Instance) -> None:
    """Raises `Cancelled` when the job is about a run (``params.run``) that has ended: it was woken meanwhile."""
    if context.job.params.get("run", instance.run) != instance.run:
        raise Cancelled("policy.outdated", f"{instance.ref} was started or woken since this was decided")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, MvmError) else "an unexpected error [internal]"
