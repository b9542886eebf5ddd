"""Instances: create, start, stop, destroy. Every caller comes here, by way of the `Runner`.

Each verb is a list of steps that observe before they act, so that any of them can be repeated after a crash.
What a verb will create (a process, a TAP, files) has names that derive from the instance's row, which is
written first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import structlog

from mvm.domain.addressing import TenantNetwork, free_offset
from mvm.domain.ids import InstanceId, InstanceRef, JobId, PoolRef
from mvm.domain.instance import InFlight, Instance
from mvm.domain.lifecycle import Status, Verb, landing
from mvm.domain.pool import WorkerPool
from mvm.errors import Cancelled, Failed, InvalidInput, MvmError, NotAllowed, NotFound, TimedOut, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel, GuestIdentity
from mvm.ports.locks import Locks
from mvm.ports.network import HostNetwork
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import BootSpec, Nic, VmmDriver
from mvm.services.quotas import admit_instances, admit_running
from mvm.services.runner import JobContext
from mvm.services.views import instance_view

log = structlog.get_logger("mvm.lifecycle")

MAX_CREATE = 1000
_LOCK_S = 300.0
_CONSOLE_LINES = 12
_GUEST_S = 10.0
_START_STEPS = ("verify image", "prepare disks", "connect network", "boot", "identify guest")


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    """How many boots at once, and the deadlines in seconds."""

    parallel_boots: int
    boot_deadline_s: float
    stop_grace_s: float


class Lifecycle:
    """The one API for instances."""

    def __init__(
        self, *, store: NodeStore, locks: Locks, clock: Clock, vmm: VmmDriver, guest: GuestChannel,
        network: HostNetwork, storage: NodeStorage, limits: LifecycleLimits, authorized_key: str,
    ) -> None:  # fmt: skip
        self._store = store
        self._locks = locks
        self._clock = clock
        self._vmm = vmm
        self._guest = guest
        self._network = network
        self._storage = storage
        self._limits = limits
        self._authorized_key = authorized_key
        self._boots = threading.BoundedSemaphore(limits.parallel_boots)

    # --- create
    def create(self, context: JobContext) -> Mapping[str, Any]:
        """Create ``params.count`` instances in the subject pool and prepare their disks."""
        count = context.job.params.get("count", 1)
        if not isinstance(count, int) or not 1 <= count <= MAX_CREATE:
            raise InvalidInput("instance.invalid_count", f"--count is {count}", hint=f"allowed: 1 to {MAX_CREATE}",
                               field="count", value=count)  # fmt: skip
        created = self.add(PoolRef.parse(context.job.subject), count, context.job.job_id)
        for done, instance in enumerate(created):
            context.step("prepare disks", done, count)
            self._prepare(instance.ref)
        network = self._store.tenant(created[0].ref.tenant).network
        return {"instances": [instance_view(network, self._store.instance(i.ref)) for i in created]}

    def add(self, ref: PoolRef, count: int, job_id: JobId) -> list[Instance]:
        """Write down `count` new instances of `ref`, if the quota admits them.

        Their ids derive from the job's, so that a job delivered again after a crash finds those it made.
        """
        ids = [InstanceId.from_bytes(sha256(f"{job_id} {n}".encode()).digest()) for n in range(count)]
        with self._store.transaction():
            pool, tenant = self._store.pool(ref), self._store.tenant(ref.tenant)
            existing = {i.ref: i for i in self._store.instances(tenant=ref.tenant)}
            refs = [ref.instance(i) for i in ids]
            missing = [r for r in refs if r not in existing]
            if missing:
                admit_instances(self._store, tenant, pool, len(missing))
            taken = {i.offset for i in existing.values()}
            for new in missing:
                offset = free_offset(tenant.network, taken)
                taken.add(offset)
                existing[new] = Instance(new, pool.node_id, offset, Status.CREATED, self._clock.now())
                self._store.insert_instance(existing[new])
        return [existing[r] for r in refs]

    def _prepare(self, ref: InstanceRef) -> None:
        pool = self._store.pool(ref.pool_ref)
        with self._locked(ref):
            instance = self._store.instance(ref)
            self._storage.prepare(ref, data_disk_mib=pool.resources.data_disk_mib)
            if instance.status is Status.CREATED:
                self._store.save_instance(replace(instance, status=landing(instance.status, Verb.PREPARE, ref)))

    # --- start
    def start(self, context: JobContext) -> Mapping[str, Any]:
        """Boot the subject instance; running once its agent has answered and taken its identity."""
        ref = InstanceRef.parse(context.job.subject)
        with self._locked(ref):
            instance = self._admit(ref, Verb.START, context)
            pool, network = self._store.pool(ref.pool_ref), self._store.tenant(ref.tenant).network
            try:
                instance = self._bring_up(context, instance, pool, network)
            except MvmError as error:
                self._take_down(instance, network)
                # Read again: the boot step has written the process since.
                failed = replace(self._store.instance(ref), in_flight=None, process=None)
                reason = failed.last_error if isinstance(error, Cancelled) else str(error)
                self._store.save_instance(replace(failed, last_error=reason))
                raise
            with context.ending(**instance_view(network, instance)):
                self._store.save_instance(instance)
        return {}

    def _bring_up(self, context: JobContext, instance: Instance, pool: WorkerPool, network: TenantNetwork) -> Instance:
        ref, steps = instance.ref, len(_START_STEPS)
        context.step(_START_STEPS[0], 0, steps)
        if pool.revision is None:
            raise NotAllowed("pool.not_built", f"pool {pool.ref} has no image yet", hint=f"mvm pool build {pool.ref}",
                             subject=str(pool.ref))  # fmt: skip
        files = self._storage.revision(pool.revision)
        context.step(_START_STEPS[1], 1, steps)
        self._storage.prepare(ref, data_disk_mib=pool.resources.data_disk_mib)
        context.step(_START_STEPS[2], 2, steps)
        self._network.ensure_tap(network, instance.offset)

        def boot() -> Instance:
            """Start the VMM unless it runs already (left by a worker that was killed)."""
            running = self._vmm.processes().get(ref)
            if running:
                process = running[0]
            else:
                spec = BootSpec(
                    ref=ref,
                    directory=self._storage.directory(ref),
                    kernel=files.kernel,
                    initramfs=files.initramfs,
                    rootfs=files.rootfs,
                    overlay=self._storage.fresh_overlay(ref, files.rootfs),
                    data_disk=self._storage.data_disk(ref),
                    vcpus=pool.resources.vcpus,
                    mem_mib=pool.resources.mem_mib,
                    nic=Nic(network.tap(instance.offset), network.mac(instance.offset)),
                )
                process = self._vmm.boot(spec)
            return self._store.save_instance(replace(self._store.instance(ref), process=process))

        with self._boot_slot(context):
            context.step(_START_STEPS[3], 3, steps)
            instance = boot()
            try:
                self._await_guest(instance)
            except TimedOut:
                log.warning("guest silent, booting it once more", deadline_s=self._limits.boot_deadline_s)
                context.step("boot again", 3, steps)
                self._vmm.kill(ref, instance.process)
                instance = boot()
                self._await_guest(instance)
        context.step(_START_STEPS[4], 4, steps)
        self._identify(instance, network)
        return instance.moved(
            Status.RUNNING, revision=pool.revision, last_error=None, last_started_at=self._clock.now()
        )

    @contextmanager
    def _boot_slot(self, context: JobContext) -> Iterator[None]:
        """Booting is all CPU: no more at once than the host can do. Waiting for a slot can be cancelled."""
        while not self._boots.acquire(timeout=1.0):
            context.step("wait for a boot slot", 3, len(_START_STEPS))
        try:
            yield
        finally:
            self._boots.release()

    def _await_guest(self, instance: Instance) -> None:
        directory = self._storage.directory(instance.ref)
        try:
            self._guest.hello(instance.ref, directory, deadline_s=self._limits.boot_deadline_s)
        except Unreachable:
            raise self._boot_failed(instance) from None

    def _boot_failed(self, instance: Instance) -> Failed:
        tail = self._vmm.console_tail(self._storage.directory(instance.ref), lines=_CONSOLE_LINES)
        what = "panicked" if "Kernel panic" in tail else "ended before its agent answered"
        return Failed(
            "guest.panicked" if what == "panicked" else "guest.ended",
            f"the guest of {instance.ref} {what}; its console's last lines:\n{tail or '(nothing)'}",
            hint=f"see: mvm instance logs {instance.ref}", subject=str(instance.ref), console=tail,
        )  # fmt: skip

    def _identify(self, instance: Instance, network: TenantNetwork) -> None:
        identity = GuestIdentity(
            hostname=str(instance.ref.instance),
            address=f"{network.ip(instance.offset)}/{network.subnet.prefixlen}",
            gateway=str(network.gateway),
            now=self._clock.now(),
            ssh_host_key=self._storage.keys(instance.ref).host_private,
            authorized_key=self._authorized_key,
            entropy=self._clock.random(64),
        )
        try:
            self._guest.configure(instance.ref, self._storage.directory(instance.ref), identity, deadline_s=_GUEST_S)
        except Unreachable:
            raise self._boot_failed(instance) from None

    # --- stop and destroy
    def stop(self, context: JobContext) -> Mapping[str, Any]:
        """Shut the subject instance down: cleanly within the grace time, unless ``params.force``."""
        ref = InstanceRef.parse(context.job.subject)
        with self._locked(ref):
            instance = self._admit(ref, Verb.STOP, context)
            network = self._store.tenant(ref.tenant).network
            try:
                context.step("shut down guest", 0, 2)
            except Cancelled:
                self._store.save_instance(replace(instance, in_flight=None))
                raise
            clean = not context.job.params.get("force") and self._shut_down(instance)
            # From here on it is not cancelled half way.
            self._take_down(instance, network)
            stopped = replace(
                self._store.instance(ref).moved(Status.STOPPED), process=None, last_stopped_at=self._clock.now()
            )
            with context.ending(clean=clean, **instance_view(network, stopped)):
                self._store.save_instance(stopped)
        return {}

    def destroy(self, context: JobContext) -> Mapping[str, Any]:
        """Remove the subject instance with everything it has, whatever its status."""
        ref = InstanceRef.parse(context.job.subject)
        with self._locked(ref):
            instance = self._admit(ref, Verb.DESTROY, context)
            self._take_down(instance, self._store.tenant(ref.tenant).network)
            self._storage.remove(ref)
            with context.ending(ref=str(ref)):
                self._store.delete_instance(ref)
        return {}

    def _shut_down(self, instance: Instance) -> bool:
        """Ask the guest to power off; whether it did so in time."""
        process = instance.process
        if process is None:
            return False
        try:
            self._guest.shutdown(
                instance.ref, self._storage.directory(instance.ref), deadline_s=min(_GUEST_S, self._limits.stop_grace_s)
            )
        except (TimedOut, Unreachable):
            return False
        return self._vmm.wait_gone(process, deadline_s=self._limits.stop_grace_s)

    def _take_down(self, instance: Instance, network: TenantNetwork) -> None:
        """No process, no TAP, no files of the run."""
        self._vmm.kill(instance.ref, self._store.instance(instance.ref).process)
        self._network.remove_taps(frozenset({network.tap(instance.offset)}))
        self._storage.clean_runtime(instance.ref)

    # --- found gone
    def mark_gone(self, seen: Instance, reason: str) -> bool:
        """Record that a running instance's process was found gone, and clean up; False if it changed meanwhile."""
        with self._locks.hold(f"instance {seen.ref}", deadline_s=0):
            try:
                instance = self._store.instance(seen.ref)
            except NotFound:
                return False
            if instance.generation != seen.generation or instance.in_flight:
                return False
            self._take_down(instance, self._store.tenant(seen.ref.tenant).network)
            self._store.save_instance(
                instance.moved(Status.STOPPED, process=None, last_error=reason, last_stopped_at=self._clock.now())
            )
            return True

    # --- shared
    def _locked(self, ref: InstanceRef) -> Any:
        return self._locks.hold(f"instance {ref}", deadline_s=_LOCK_S)

    def _admit(self, ref: InstanceRef, verb: Verb, context: JobContext) -> Instance:
        """Check the table and the quota and mark the instance as this job's, in one transaction.

        We hold the instance's lock, so a job that is still marked here lost its worker; ours takes over.
        """
        with self._store.transaction():
            instance = self._store.instance(ref)
            landing(instance.status, verb, ref)
            if verb is Verb.START:
                # Not counting this instance itself: a crashed start may have left its mark.
                self._store.save_instance(replace(instance, in_flight=None))
                instance = self._store.instance(ref)
                admit_running(self._store, self._store.tenant(ref.tenant), self._store.pool(ref.pool_ref))
            return self._store.save_instance(replace(instance, in_flight=InFlight(context.job.job_id, verb)))
