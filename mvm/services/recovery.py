"""Bringing instances to rest whose job will not be done to its end."""

from __future__ import annotations

import structlog

from mvm.domain import lock_names
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.job import Job
from mvm.domain.recovery import Act, settled
from mvm.errors import Failed, NotFound, TimedOut, Unreachable
from mvm.ports.locks import Locks
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Presence, VmmDriver
from mvm.services.audit import Audit
from mvm.services.microvm import MicroVms
from mvm.services.runner import JobContext

log = structlog.get_logger("mvm.recovery")

_LOCK_S = 60.0


class Recovery:
    """Over the mark of a job in an instance's row, which was written before the job did anything to the instance."""

    def __init__(self, store: NodeStore, locks: Locks, vmm: VmmDriver, microvms: MicroVms, audit: Audit) -> None:
        self._store = store
        self._locks = locks
        self._vmm = vmm
        self._microvms = microvms
        self._audit = audit

    def undo(self, context: JobContext) -> None:
        """The subject instance rests again, if it is marked as the job's."""
        ref = InstanceRef.parse(context.job.subject)
        with self._locks.hold(lock_names.instance(ref), deadline_s=_LOCK_S):
            try:
                instance = self._store.instance(ref)
            except NotFound:
                return
            if instance.in_flight and instance.in_flight.job_id == context.job.job_id:
                context.found(ref, instance)
                self._store.save_instance(self._settled(instance))

    def left(self, sweep: Job) -> list[str]:
        """Instances marked by jobs that have ended, or that nobody knows, rest again; returns their refs."""
        found = []
        for seen in self._store.instances():
            if seen.in_flight and self._over(seen):
                try:
                    if self._settle(sweep, seen):
                        found.append(str(seen.ref))
                except TimedOut:
                    continue  # somebody is at work on it
        return found

    def _over(self, instance: Instance) -> bool:
        job = self._store.job(instance.in_flight.job_id) if instance.in_flight else None
        return job is None or job.state.final

    def _settle(self, sweep: Job, seen: Instance) -> bool:
        with self._locks.hold(lock_names.instance(seen.ref), deadline_s=0):
            instance = self._store.instance(seen.ref)
            if instance.generation != seen.generation:
                return False
            rests = self._settled(instance)
            with self._store.transaction():
                self._store.save_instance(rests)
                self._audit.changed(sweep, seen.ref, instance, why="its job had ended in the middle", code="job.left")
            return True

    def _settled(self, instance: Instance) -> Instance:
        """Do what brings it to rest; returns its row as it then is."""
        assert instance.in_flight is not None, "the callers have looked"
        network = self._store.tenant(instance.ref.tenant).network
        process = self._vmm.observe(instance.ref, instance.process) is not Presence.ABSENT
        snapshot = self._microvms.has_snapshot(instance)
        act, status = settled(instance.status, instance.in_flight.verb, process=process, snapshot=snapshot)
        log.warning("brought to rest", instance=str(instance.ref), act=act.value, status=status.value)
        if act is Act.TAKE_DOWN:
            self._microvms.take_down(instance, network)
        elif act is Act.PUT_BACK:
            self._microvms.put_back(instance, network)
        elif act is Act.PAUSE:
            self._microvms.warm(instance)
        elif act is Act.RESUME:
            try:
                self._microvms.resume(instance)
            except (Failed, TimedOut, Unreachable) as error:  # that guest or VMM is silent is another's business
                log.warning("guest not told the time", instance=str(instance.ref), code=error.code)
        why = f"{instance.in_flight.verb} was left in the middle [job.left]"
        return instance.moved(status, process=instance.process if status.has_vmm else None, last_error=why)
