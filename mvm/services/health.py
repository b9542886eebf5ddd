"""The health sweep: asks the agent of each running guest whether it is there, and remembers who was not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import structlog

from mvm.domain.findings import HealthResult, Ill, Stalled
from mvm.domain.health import Health
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.scaling import proving
from mvm.errors import GuestGone, MvmError
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.network import HostNetwork
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import Presence, VmmDriver
from mvm.services.runner import JobContext

if TYPE_CHECKING:  # it leads back here
    from mvm.services.stalls import Stalls

log = structlog.get_logger("mvm.health")

_AT_ONCE = 8  # guests asked
_YOUNG_S = 5.0  # so soon after its start, that a guest answers says no more than its start did


class GuestHealth:
    """A guest is ill once `limit` checks in a row have failed. What to do about it is reconcile's business."""

    def __init__(
        self, *, store: NodeStore, clock: Clock, vmm: VmmDriver, guest: GuestChannel, network: HostNetwork,
        storage: NodeStorage, limit: int, answer_s: float,
    ) -> None:  # fmt: skip
        self._store = store
        self._vmm = vmm
        self._clock = clock
        self._guest = guest
        self._network = network
        self._storage = storage
        self.limit = limit
        self._answer_s = answer_s

    def sweep(self, context: JobContext, stalls: Stalls) -> Mapping[str, Any]:
        """Check all that are up and have no job. A note is written of those that are, or were, not well, and of those
        for which a rollout waits.

        A warm one stands still: of it is only seen whether it has its network. When one does not answer, its VMM is
        asked why: for a guest that stands still it is no check that it failed, and `stalls` sees to it.
        """
        context.step("ask guests", 0, 1)
        instances = self._store.instances()
        there = [i for i in instances if i.has_vmm and i.in_flight is None]
        waited = {i.ref for i in self._proving(instances)}
        asked = [i for i in there if i.status is Status.RUNNING]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="health") as threads:
            reasons = dict(zip((i.ref for i in asked), threads.map(self._why, asked), strict=True))
            silent = [i for i in asked if reasons[i.ref] is not None]
            states = dict(zip((i.ref for i in silent), threads.map(stalls.state, silent), strict=True))
        taps = self._network.taps()
        networks = {tenant.id: tenant.network for tenant in self._store.tenants()}
        notes, failing, stalled = self._store.notes(Note.HEALTH), [], list[Stalled]()
        now_at = {instance.ref: instance.generation for instance in self._store.instances()}
        for instance in there:
            ref, network = instance.ref, networks.get(instance.ref.tenant)
            if now_at.get(ref) != instance.generation:
                continue  # a job has it, or had: what was seen may be of its doing
            reason = reasons.get(ref)
            if reason is not None and (stood := stalls.meet(context.job, instance, states[ref])):
                stalled.append(stood)
                continue  # no fault of its guest's
            if reason is None and instance.stalled:
                stalls.over(context.job, instance)
            if reason is None and network is not None and network.tap(instance.offset) not in taps:
                reason = f"its network interface {network.tap(instance.offset)} is gone"
            if reason is None and (instance.status is Status.WARM or self._is_young(instance)):
                continue  # that it is well is not known
            now = self._remember(instance, notes.get(ref), reason, proves=ref in waited)
            if now.misses:
                why = now.why_ill(instance, self.limit)
                failing.append(Ill(str(ref), now.misses, why is not None, reason or ""))
                if now.misses == self.limit:
                    log.warning("guest is not well", instance=str(ref), why=why)
        return HealthResult(len(asked), failing, stalled).to_dict()

    def seen(self, instance: Instance, reason: str | None) -> None:
        """A check that was made by the way: why `instance` did not pass it, or that it did (None)."""
        self._remember(instance, self._store.note(instance.ref, Note.HEALTH), reason)

    def check(self, instance: Instance) -> None:
        """As `seen`: `instance` can be asked now, though it stands still when sweeps come."""
        self.seen(instance, self._why(instance))

    def doubts(self, instance: Instance) -> bool:
        """Whether the last check that `instance` had in this run failed."""
        note = self._store.note(instance.ref, Note.HEALTH)
        return note is not None and bool(note["misses"]) and note["run"] == instance.run

    def _remember(
        self, instance: Instance, note: Mapping[str, Any] | None, reason: str | None, *, proves: bool = False
    ) -> Health:
        before = Health.from_dict(note) if note else Health(instance.run)
        now = before.seen(instance.run, self._clock.now(), reason)
        if now != before or (note is None and proves):
            self._store.put_note(instance.ref, Note.HEALTH, now.to_dict())
        return now

    def _is_young(self, instance: Instance) -> bool:
        started = instance.last_started_at
        return started is not None and 0 <= (self._clock.now() - started).total_seconds() < _YOUNG_S

    def _why(self, instance: Instance) -> str | None:
        try:
            self._guest.ping(instance.ref, self._storage.directory(instance.ref), deadline_s=self._answer_s)
        except MvmError as error:
            if isinstance(error, GuestGone) and self._vmm.observe(instance.ref, instance.process) is Presence.ABSENT:
                return None  # the stale-PID sweep's business
            return f"its agent does not answer ({error.code})"
        return None

    def ill(self, instances: Collection[Instance]) -> Mapping[InstanceRef, str]:
        """Those of `instances` whose guests are not well, and why."""
        notes = self._store.notes(Note.HEALTH)
        known = ((i, Health.from_dict(notes[i.ref])) for i in instances if i.ref in notes) if notes else ()
        return {i.ref: why for i, health in known if (why := health.why_ill(i, self.limit))}

    def unproven(self, instances: Collection[Instance]) -> frozenset[InstanceRef]:
        """Those of `instances` for which a rollout waits: no check of this run was passed, or the last one was not."""
        waited = self._proving(instances)
        notes = self._store.notes(Note.HEALTH) if waited else {}
        return frozenset(
            i.ref for i in waited if i.ref not in notes or not Health.from_dict(notes[i.ref]).proves(i)
        )  # fmt: skip

    def _proving(self, instances: Collection[Instance]) -> Collection[Instance]:
        return proving({pool.ref: pool.revision for pool in self._store.pools()}, instances)

    def explain(self, instance: Instance) -> dict[str, Any] | None:
        """What is wrong with it, if the last check found something."""
        note = self._store.note(instance.ref, Note.HEALTH)
        if note is None or not note["misses"] or note["run"] != instance.run or not instance.has_vmm:
            return None
        health = Health.from_dict(note)
        return {
            "well": health.why_ill(instance, self.limit) is None, "failed_checks": health.misses, "of": self.limit,
            "since": health.since, "reason": health.reason,
        }  # fmt: skip
