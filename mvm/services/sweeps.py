"""Housekeeping that Beat asks for: what is recorded as running but gone. And sweeps follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from mvm.domain import lock_names
from mvm.domain.findings import StalePid, StalePidResult
from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance
from mvm.domain.vmm import Ending, told
from mvm.errors import TimedOut, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Presence, VmmDriver
from mvm.services.audit import Audit
from mvm.services.lifecycle import Lifecycle
from mvm.services.recovery import Recovery
from mvm.services.runner import Handler, JobContext
from mvm.services.secrets import TenantSecrets

log = structlog.get_logger("mvm.sweeps")

_CONSOLE_BYTES = 1 << 20  # of a running guest's console that are kept


def alone(locks: Locks, handler: Handler) -> Handler:
    """`handler` for a sweep, which does nothing while another one of its kind is still at work on this node."""

    def run(context: JobContext) -> Mapping[str, Any]:
        try:
            with locks.hold(lock_names.sweep(context.job.verb), deadline_s=0):
                return handler(context)
        except TimedOut as error:
            if error.fields.get("lock") != lock_names.sweep(context.job.verb):
                raise
            return {"changed": False, "skipped": "the one before is still at work"}

    return run


class StalePids:
    """Instances whose process ended without us, and what else the node has to catch up with."""

    def __init__(
        self, *, store: NodeStore, registry: Registry, vmm: VmmDriver, storage: NodeStorage, lifecycle: Lifecycle,
        secrets: TenantSecrets, audit: Audit, node_id: NodeId, keep_jobs: int, cgroups: Cgroups, recovery: Recovery,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._vmm = vmm
        self._storage = storage
        self._lifecycle = lifecycle
        self._secrets = secrets
        self._audit = audit
        self._node_id = node_id
        self._keep_jobs = keep_jobs
        self._cgroups = cgroups
        self._recovery = recovery

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """Instances recorded running whose process is gone become stopped, with the reason; consoles are kept short."""
        context.step("compare processes", 0, 1)
        gone = []
        for instance in self._store.instances():
            if not instance.has_vmm or instance.in_flight:
                continue
            if self._vmm.observe(instance.ref, instance.process) is not Presence.ABSENT:
                self._vmm.trim_console(self._storage.directory(instance.ref), keep=_CONSOLE_BYTES)
                continue
            ended, reason, code = self._ended(instance)
            try:
                if self._lifecycle.mark_gone(context.job, instance, reason, ended, code):
                    gone.append(StalePid(str(instance.ref), f"{reason} [{code}]", ended.value))
                    log.warning("instance gone", instance=str(instance.ref), ended=ended.value, why=reason)
            except TimedOut:
                continue  # a job holds it and will see for itself
        settled = self._recovery.left(context.job)
        self._secrets.catch_up()
        self._publish_ends()
        self._audit.complete()
        self._store.forget_jobs(keep=self._keep_jobs)
        return StalePidResult(gone, settled).to_dict()

    def _ended(self, instance: Instance) -> tuple[Ending, str, str]:
        """How its run ended, in words, and the code of that."""
        pid = instance.process.pid if instance.process else None
        if self._cgroups.out_of_memory(instance.ref):
            why = f"VMM process {pid or '?'} reached its memory limit and was ended by the host's kernel"
            return Ending.CRASHED, why, "vmm.out_of_memory"
        ended = self._vmm.ending(self._storage.directory(instance.ref))
        return ended, *told(ended, pid)

    def _publish_ends(self) -> None:
        """Tell the registry of jobs that ended while it was away."""
        try:
            for job in self._registry.open_jobs(self._node_id):
                known = self._store.job(job.job_id)
                if known is not None and known.state.final:
                    self._registry.update(known)
        except Unreachable:
            return
