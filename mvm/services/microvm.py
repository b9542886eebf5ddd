"""One microVM on this host: bringing it up and taking it down.

Each step observes before it acts, so that any of them can be repeated after a crash. What a step creates (a
process, a TAP, files) has a name that derives from the instance's row, which was written before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import structlog

from mvm.domain.addressing import BUILDER_OFFSET, TenantNetwork
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.pool import WorkerPool
from mvm.domain.refusals import out_of_memory, out_of_room
from mvm.domain.vmm import VmmState
from mvm.errors import Cancelled, Failed, GuestFault, GuestSilent, MvmError, NotAllowed, TimedOut, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel, GuestIdentity
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import BootSpec, Nic, VmmDriver
from mvm.services.networks import Networks
from mvm.services.runner import JobContext
from mvm.services.secrets import TenantSecrets
from mvm.services.snapshots import Slept, Snapshots, damaged, unusable

log = structlog.get_logger("mvm.lifecycle")

_CONSOLE_LINES = 12
_GUEST_S = 10.0
_GOES_ON_S = 2.0  # for one that may stand still again at once
_STEPS = ("verify image", "prepare disks", "connect network", "boot", "identify guest")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many boots at once, and the deadlines in seconds."""

    parallel_boots: int
    boot_deadline_s: float
    stop_grace_s: float


class MicroVms:
    """The steps, over the node's ports. The caller holds the instance's lock."""

    def __init__(
        self, *, store: NodeStore, clock: Clock, vmm: VmmDriver, guest: GuestChannel, networks: Networks,
        storage: NodeStorage, snapshots: Snapshots, secrets: TenantSecrets, cgroups: Cgroups, limits: Limits,
        authorized_key: str,
    ) -> None:  # fmt: skip
        self._store = store
        self._clock = clock
        self._vmm = vmm
        self._guest = guest
        self._networks = networks
        self._storage = storage
        self._cgroups = cgroups
        self._limits = limits
        self._authorized_key = authorized_key
        self._snapshots = snapshots
        self._secrets = secrets
        self._boots = threading.BoundedSemaphore(limits.parallel_boots)

    def prepare(self, instance: Instance, pool: WorkerPool) -> None:
        """What it keeps for its life is there: directory, keys, data disk."""
        self._storage.prepare(instance.ref, data_disk_mib=pool.resources.data_disk_mib)

    def bring_up(self, context: JobContext, instance: Instance, pool: WorkerPool, network: TenantNetwork) -> Instance:
        """Start `instance` and give it its identity; returns its row with process and revision.

        It is cloned from the pool's template where that is possible and wanted. Where the template cannot be restored
        it is booted, and so it is in pools that ask for it; a guest that stays silent past the deadline is booted once
        more. Raises what the ports raise, and `Failed` (``guest.panicked``, ``guest.ended``) with the console's last
        lines.
        """
        context.step(_STEPS[0], 0, len(_STEPS))
        if pool.revision is None:
            raise NotAllowed("pool.not_built", f"pool {pool.ref} has no image yet", hint=f"mvm pool build {pool.ref}",
                             subject=str(pool.ref))  # fmt: skip
        self._storage.revision(pool.revision)
        context.step(_STEPS[1], 1, len(_STEPS))
        self.prepare(instance, pool)
        if instance.status is Status.SLEEPING:  # and is to forget: also what a killed worker had begun to restore
            self._vmm.kill(instance.ref, None)
        self._snapshots.forget(instance.ref)
        context.step(_STEPS[2], 2, len(_STEPS))
        self._networks.connect(instance, network)
        with self._telling(instance.ref), self._boot_slot(context):
            if self._snapshots.clones(pool):
                self._snapshots.template(context, pool, pool.revision, uid=network.uid(BUILDER_OFFSET))
            context.step(_STEPS[3], 3, len(_STEPS))
            instance = self._launch(context, instance, pool, network, cold=False)
            try:
                self._await_guest(instance)
            except TimedOut:
                log.warning("guest silent, booting it once more", deadline_s=self._limits.boot_deadline_s)
                context.step("boot again", 3, len(_STEPS))
                self._vmm.kill(instance.ref, instance.process)
                instance = self._launch(context, instance, pool, network, cold=True)
                self._await_guest(instance)
        context.step(_STEPS[4], 4, len(_STEPS))
        with self._telling(instance.ref):
            self._identify(instance, network)
        self._secrets.try_refresh(instance)  # of one that was found running
        return instance

    def _launch(
        self, context: JobContext, instance: Instance, pool: WorkerPool, network: TenantNetwork, *, cold: bool
    ) -> Instance:
        """A guest runs, unless one does already: left by a worker that was killed, it is kept as it is."""
        ref = instance.ref
        running = self._vmm.processes().get(ref)
        if running:
            return self._store.save_instance(replace(instance, process=running[0]))
        cloned = not cold and self._snapshots.clones(pool)
        # What it runs comes first, so that a process found later is known for what it is.
        instance = self._store.save_instance(replace(instance, revision=pool.revision, cloned=cloned))
        spec = self.spec(instance, pool, network, fresh=True)
        self._secrets.given(ref, spec.secrets)
        if cloned:
            try:
                return self._store.save_instance(replace(instance, process=self._snapshots.clone(pool, spec)))
            except MvmError as error:
                if not unusable(error):
                    raise
                context.remark(f"booted, as it could not be cloned: {error.message} [{error.code}]")
                self._vmm.kill(ref, None)
                if damaged(error) and not self._base_of_sleeping(instance):
                    self._snapshots.drop_template(pool)
                return self._launch(context, instance, pool, network, cold=True)
        return self._store.save_instance(replace(instance, process=self._vmm.boot(spec)))

    def _base_of_sleeping(self, instance: Instance) -> bool:
        """Whether somebody sleeps on the template of `instance`: it may be all there is to wake from."""
        others = self._store.instances(pool=instance.ref.pool_ref)
        return any(i.status is Status.SLEEPING and i.cloned and i.revision == instance.revision for i in others)

    def spec(self, instance: Instance, pool: WorkerPool, network: TenantNetwork, *, fresh: bool = False) -> BootSpec:
        """What the driver needs to know of `instance`, with a `fresh` overlay or the one it has."""
        ref = instance.ref
        assert instance.revision is not None, "set before anything runs"
        files = self._storage.revision(instance.revision)
        return BootSpec(
            ref=ref,
            directory=self._storage.directory(ref),
            kernel=files.kernel,
            initramfs=files.initramfs,
            rootfs=files.rootfs,
            overlay=self._storage.fresh_overlay(ref, files.rootfs) if fresh else self._storage.overlay(ref),
            data_disk=self._storage.data_disk(ref),
            vcpus=pool.resources.vcpus,
            mem_mib=pool.resources.mem_mib,
            nic=Nic(network.tap(instance.offset), network.mac(instance.offset)),
            uid=network.uid(instance.offset),
            seccomp=pool.seccomp_policy,
            secrets=self._secrets.of(ref.tenant),
        )

    # --- warm and sleeping
    def warm(self, instance: Instance) -> None:
        """Its vCPUs stand still; it keeps everything."""
        with self._telling(instance.ref):
            self._snapshots.warm(instance)

    def sleep(
        self, context: JobContext, instance: Instance, pool: WorkerPool, network: TenantNetwork, *, force: bool
    ) -> Slept:
        """Its memory is on disk; no process and no TAP are left.

        A clone whose template is gone has nothing to be saved over as long as it is up: that is noted.
        """
        spec = self.spec(instance, pool, network)
        self._secrets.withdrawn(instance.ref, surely=not force)
        with context.undoing(partial(self._give_secrets_back, instance)), self._telling(instance.ref):
            try:
                slept = self._snapshots.sleep(context, instance, pool, spec, force=force)
            except MvmError as error:
                if instance.cloned and error.code in ("snapshot.other_base", "snapshot.not_found"):
                    self._store.put_note(instance.ref, Note.SLEEPLESS, {"run": instance.run})
                raise
        self._networks.disconnect(instance, network)
        return slept

    def _give_secrets_back(self, instance: Instance) -> None:
        if instance.status is Status.RUNNING:
            self._secrets.try_refresh(instance)

    def held(self, instance: Instance) -> int:
        """Bytes of memory that its VMM has to itself; 0 when it has ended."""
        return self._snapshots.held(instance)

    def resume(self, instance: Instance) -> Instance:
        """A warm instance runs again."""
        with self._telling(instance.ref):
            self._snapshots.resume(instance)
        self._secrets.try_refresh(instance)
        return instance

    def wake(
        self, context: JobContext, instance: Instance, pool: WorkerPool, network: TenantNetwork
    ) -> tuple[Instance, MvmError | None]:
        """A sleeping instance runs again, and what is not well with it all the same; on failure it has no process and
        no TAP, and its snapshot stays.

        One that may still have former secrets mounted finds an empty disk, and is given those of now as it runs.
        """
        again = context.job.step is not None  # by another worker, which was killed
        context.step("connect network", 0, 3)
        self._networks.connect(instance, network)
        with context.undoing(partial(self.put_back, instance, network)):
            spec = self.spec(instance, pool, network)
            stale = self._secrets.stale(instance.ref, spec.secrets)
            if stale:
                spec = replace(spec, secrets=None)
            else:
                self._secrets.given(instance.ref, spec.secrets, unsure=again)
            with self._telling(instance.ref):
                process, fault = self._snapshots.wake(context, instance, pool, spec)
        instance = replace(instance, process=process)
        if again or stale or fault:
            self._secrets.try_refresh(instance)
        return instance, fault

    def put_back(self, instance: Instance, network: TenantNetwork) -> None:
        """It sleeps on, or now: no process and no TAP, and what it slept in stays."""
        self._vmm.kill(instance.ref, None)
        self._secrets.withdrawn(instance.ref, surely=False)  # it may have run, and sleep anew
        self._networks.disconnect(instance, network)

    def has_snapshot(self, instance: Instance) -> bool:
        """Whether what it slept in is there."""
        return self._snapshots.kept(instance.ref)

    def forget_snapshot(self, instance: Instance) -> None:
        """What it slept in is of the past."""
        self._snapshots.forget(instance.ref)

    @contextmanager
    def _telling(self, ref: InstanceRef) -> Iterator[None]:
        """What fails since the VMM was ended for want of memory, or paused its guest for want of disk, says so."""
        try:
            yield
        except MvmError as error:
            if not isinstance(error, Cancelled) and self._cgroups.out_of_memory(ref):
                raise out_of_memory(ref) from None
            if isinstance(error, GuestSilent) and self._is_out_of_room(ref):
                raise out_of_room(ref) from None
            raise

    def _is_out_of_room(self, ref: InstanceRef) -> bool:
        """Whether its VMM has paused it because the host's disk is full."""
        try:
            return any(self._vmm.state(ref, one) is VmmState.IO_ERROR for one in self._vmm.processes().get(ref, ()))
        except (Failed, TimedOut, Unreachable):
            return False

    @contextmanager
    def _boot_slot(self, context: JobContext) -> Iterator[None]:
        """Booting is all CPU: no more at once than the host can do. Waiting for a slot can be cancelled."""
        while not self._boots.acquire(timeout=1.0):
            context.step("wait for a boot slot", 3, len(_STEPS))
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
        panicked = "Kernel panic" in tail
        what = "panicked" if panicked else "ended before its agent answered"
        return Failed(
            "guest.panicked" if panicked else "guest.ended",
            f"the guest of {instance.ref} {what}; its console's last lines:\n{tail or '(nothing)'}",
            hint=f"see: mvm instance logs {instance.ref}", subject=str(instance.ref), console=tail,
        )  # fmt: skip

    def _identify(self, instance: Instance, network: TenantNetwork) -> None:
        keys = self._storage.keys(instance.ref)
        identity = GuestIdentity(
            hostname=str(instance.ref.instance),
            machine_id=sha256(keys.host_public.encode()).hexdigest()[:32],
            mac=network.mac(instance.offset),
            address=f"{network.ip(instance.offset)}/{network.subnet.prefixlen}",
            gateway=str(network.gateway),
            now=self._clock.now(),
            ssh_host_key=keys.host_private,
            authorized_key=self._authorized_key,
            entropy=self._clock.random(64),
            data_disk=self._storage.data_disk(instance.ref) is not None,
            secrets=self._secrets.has(instance.ref),
        )
        try:
            self._guest.configure(instance.ref, self._storage.directory(instance.ref), identity, deadline_s=_GUEST_S)
        except Unreachable:
            raise self._boot_failed(instance) from None

    def let_go_on(self, instance: Instance) -> bool:
        """A guest that stands still though it should run goes on; whether it does, by its VMM's word."""
        if instance.process is None or not self._snapshots.let_run(instance, deadline_s=_GOES_ON_S):
            return False
        return self._vmm.state(instance.ref, instance.process) is VmmState.RUNNING

    def shut_down(self, instance: Instance) -> bool:
        """Ask the guest to power off; whether it did so within the grace time.

        One that stands still runs again for it. What does not, or answers anything else, is for the caller to end.
        """
        if instance.process is None:
            return False
        grace_s = self._limits.stop_grace_s
        if not self._snapshots.let_run(instance, deadline_s=min(_GUEST_S, grace_s)):
            return False
        try:
            self._guest.shutdown(instance.ref, self._storage.directory(instance.ref), deadline_s=min(_GUEST_S, grace_s))
        except GuestFault as fault:
            log.warning("guest does not shut down", instance=str(instance.ref), code=fault.code, why=fault.message)
            return False
        return self._vmm.wait_gone(instance.process, deadline_s=grace_s)

    def take_down(self, instance: Instance, network: TenantNetwork) -> None:
        """No process, no TAP, no files of the run."""
        self._vmm.kill(instance.ref, instance.process)
        self._networks.disconnect(instance, network)
        self._snapshots.forget(instance.ref)  # before its overlay, without which it could not be woken
        self._storage.clean_runtime(instance.ref)

    def remove(self, instance: Instance, network: TenantNetwork) -> None:
        """Nothing of it is left on the host, its data disk included."""
        self.take_down(instance, network)
        self._storage.remove(instance.ref)
