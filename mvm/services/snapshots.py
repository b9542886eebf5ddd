"""Templates, clones, warm and sleeping instances: what a VMM with the `Snapshotting` ability adds to `MicroVms`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import structlog

from mvm.domain import lock_names
from mvm.domain.ids import InstanceId, InstanceRef, PoolRef, Revision
from mvm.domain.instance import Instance, ProcessIdentity
from mvm.domain.lifecycle import Status
from mvm.domain.pool import StartMode, WorkerPool
from mvm.domain.snapshot import SnapshotManifest
from mvm.errors import (
    Cancelled,
    Failed,
    Fenced,
    GuestFault,
    GuestGone,
    GuestSilent,
    MvmError,
    NotAllowed,
    NotFound,
    Overdue,
    QuotaExceeded,
    TimedOut,
    Unreachable,
)
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.locks import Locks
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import BootSpec, Presence, Snapshotting, TemplateSpec, VmmDriver
from mvm.services.disk_room import DiskRoom
from mvm.services.health import GuestHealth
from mvm.services.runner import JobContext

log = structlog.get_logger("mvm.snapshots")

_TEMPLATE_WAIT_S = 300.0
_GUEST_S = 10.0
_SAVING = "save memory"


class Slept(NamedTuple):
    """What an instance sleeps in. `ready` says whether its guest has written to its disks all that it had to: else some
    of that is in its memory alone.
    """

    manifest: SnapshotManifest
    ready: bool


class Woken(NamedTuple):
    """What has become of a sleeping instance: it runs. `fault` says what is not well all the same."""

    process: ProcessIdentity
    fault: MvmError | None = None


class Snapshots:
    """The steps. The caller holds the instance's lock; `template` takes the pool's."""

    def __init__(
        self, *, locks: Locks, clock: Clock, vmm: VmmDriver, guest: GuestChannel, storage: NodeStorage,
        room: DiskRoom, health: GuestHealth, boot_deadline_s: float, sleep_deadline_s: float,
    ) -> None:  # fmt: skip
        self._locks = locks
        self._clock = clock
        self._vmm = vmm
        self._guest = guest
        self._storage = storage
        self._room = room
        self._health = health
        self._boot_deadline_s = boot_deadline_s
        self._sleep_deadline_s = sleep_deadline_s

    def clones(self, pool: WorkerPool) -> bool:
        """Whether instances of `pool` start as clones here."""
        return pool.start is StartMode.CLONE and isinstance(self._vmm, Snapshotting)

    # --- templates
    def template(self, context: JobContext, pool: WorkerPool, revision: Revision, *, uid: int) -> None:
        """The pool's template at `revision` exists: booted once, to an agent that knows no identity, and saved.

        Its VMM runs as `uid`.
        """
        driver, into = self._driver(), self._storage.template(pool.ref, revision)
        if self._known(into) is not None:
            return
        ref = template_ref(pool.ref, revision)
        # Under the lock of an instance's name, so that no sweep takes its process and files for orphans.
        with self._locks.hold(lock_names.instance(ref), deadline_s=_TEMPLATE_WAIT_S):
            if self._known(into) is not None:
                return
            try:
                self._room.admit_template(pool.resources.mem_mib << 20)
            except QuotaExceeded as error:  # without one, instances are booted
                context.remark(error.message)
                return
            context.step("make template")
            try:
                with _naming_template(pool.ref, ref):
                    try:
                        spec, process = self._boot_template(pool, revision, uid)
                    except TimedOut:
                        log.warning("guest silent, booting the template once more", deadline_s=self._boot_deadline_s)
                        context.step("make template again")
                        spec, process = self._boot_template(pool, revision, uid)
                    driver.save_template(spec, process, revision=revision, into=into)
            finally:
                self._vmm.kill(ref, None)
                self._storage.remove(ref)

    def _boot_template(self, pool: WorkerPool, revision: Revision, uid: int) -> tuple[TemplateSpec, ProcessIdentity]:
        """A guest that is ready to be saved; one that was there before is gone."""
        ref, files = template_ref(pool.ref, revision), self._storage.revision(revision)
        self._vmm.kill(ref, None)
        self._storage.remove(ref)
        self._storage.prepare(ref, data_disk_mib=0)
        spec = TemplateSpec(
            ref=ref,
            directory=self._storage.directory(ref),
            kernel=files.kernel,
            initramfs=files.initramfs,
            rootfs=files.rootfs,
            overlay=self._storage.fresh_overlay(ref, files.rootfs),
            data_disk_mib=pool.resources.data_disk_mib,
            vcpus=pool.resources.vcpus,
            mem_mib=pool.resources.mem_mib,
            uid=uid,
            seccomp=pool.seccomp_policy,
        )
        process = self._driver().boot_template(spec)
        self._guest.hello(ref, spec.directory, deadline_s=self._boot_deadline_s)
        self._guest.settle(ref, spec.directory, deadline_s=_GUEST_S)
        return spec, process

    def drop_template(self, pool: WorkerPool) -> None:
        """The next start of an instance of the pool makes it anew."""
        assert pool.revision is not None, "it has been cloned"
        with self._locks.hold(lock_names.instance(template_ref(pool.ref, pool.revision)), deadline_s=_TEMPLATE_WAIT_S):
            self._driver().discard(self._storage.template(pool.ref, pool.revision))

    def _known(self, snapshot: Path) -> SnapshotManifest | None:
        try:
            return self._driver().manifest(snapshot)
        except (NotFound, Failed):
            return None

    # --- one instance
    def clone(self, pool: WorkerPool, spec: BootSpec) -> ProcessIdentity:
        """A running guest out of the pool's template that has not been told yet who it is."""
        driver = self._driver()
        assert pool.revision is not None, "its template is there"
        process = driver.clone(self._storage.template(pool.ref, pool.revision), spec, revision=pool.revision)
        driver.resume(spec.ref, process)
        return process

    def warm(self, instance: Instance) -> None:
        """Its vCPUs stand still."""
        self._driver().pause(instance.ref, _process(instance))

    def resume(self, instance: Instance) -> None:
        """A warm instance runs again, and knows what time it is."""
        self._driver().resume(instance.ref, _process(instance))
        self._tell_time(instance, secrets=False)  # those that it has it keeps

    def let_run(self, instance: Instance, *, deadline_s: float) -> bool:
        """An instance that stands still runs again, so that it can end; whether it runs.

        It may do so whatever its status is: a worker was killed as it made it warm, or put it to sleep. That it knows
        the time is for its own good.
        """
        if not isinstance(self._vmm, Snapshotting):
            return True
        process = _process(instance)
        try:
            if not self._vmm.paused(instance.ref, process):
                return True
            self._vmm.resume(instance.ref, process)
        except (TimedOut, Unreachable, Failed) as error:
            log.warning("does not run again", instance=str(instance.ref), code=error.code, why=error.message)
            return False
        try:
            self._tell_time(instance, secrets=False, deadline_s=deadline_s)
        except (TimedOut, Unreachable, Failed) as error:
            log.warning("guest not told the time", instance=str(instance.ref), code=error.code)
        return True

    def held(self, instance: Instance) -> int:
        """Bytes of memory that its VMM has to itself; 0 when it has ended."""
        try:
            return self._driver().memory(_process(instance)).private
        except Unreachable:
            return 0

    def sleep(self, context: JobContext, instance: Instance, pool: WorkerPool, spec: BootSpec, *, force: bool) -> Slept:
        """Its memory is on disk and its process has ended; on failure it is as it was.

        The guest is asked first to make itself small; unless with `force`, one that does not answer is not put to
        sleep.
        """
        driver, into, ref = self._driver(), self._storage.snapshot(instance.ref), instance.ref
        if self._vmm.observe(ref, instance.process) is Presence.ABSENT:
            if _SAVING in (
                context.job.step,
                context.left_at,
            ):  # a worker was killed: what it saved is whole, or not there
                return Slept(driver.manifest(into), ready=not force)
            raise Unreachable("vmm.gone", f"the VMM of {ref} has ended", hint="a sweep will record it as stopped")
        process = _process(instance)
        driver.discard(into)
        held = driver.memory(process).private
        with self._locks.hold(lock_names.DISK, deadline_s=_GUEST_S):
            self._room.admit_sleep(ref, held)
            context.step("prepare guest", 0, 3)
        paused = driver.paused(ref, process)
        with context.undoing(partial(self._undo_sleep, context, instance, paused=paused)):
            ready = False
            if not (paused and force):
                driver.resume(ref, process)  # a warm one too is asked
                ready = self._ask_to_sleep(instance, force=force)
            context.step(_SAVING, 1, 3)
            manifest = self._save(instance, process, pool, spec)
        log.info("asleep", bytes=manifest.size)
        return Slept(manifest, ready)

    def _undo_sleep(self, context: JobContext, instance: Instance, *, paused: bool) -> None:
        with suppress(Unreachable):  # what went wrong may be that it has ended
            if paused:
                self._driver().pause(instance.ref, _process(instance))
            elif context.job.step == _SAVING:  # it stood still meanwhile
                with suppress(GuestFault):
                    self._tell_time(instance, secrets=False)

    def _save(self, instance: Instance, process: ProcessIdentity, pool: WorkerPool, spec: BootSpec) -> SnapshotManifest:
        return self._driver().save(
            spec, process, template=self._base(instance, pool), revision=_revision(instance),
            into=self._storage.snapshot(instance.ref), compression=pool.compression,
        )  # fmt: skip

    def _ask_to_sleep(self, instance: Instance, *, force: bool) -> bool:
        """Whether the guest got ready, and has written to its disks what it had to."""
        try:
            self._guest.prepare_sleep(
                instance.ref, self._storage.directory(instance.ref), deadline_s=self._sleep_deadline_s
            )
        except GuestFault as error:
            if instance.status is Status.WARM:
                self._check(instance, error)
            if isinstance(error, GuestGone) and not force:
                raise
            if not force:
                raise Failed(
                    "guest.not_ready", f"the guest of {instance.ref} did not get ready to sleep: {error.message}",
                    hint=f"mvm instance sleep {instance.ref} --force", subject=str(instance.ref),
                ) from None  # fmt: skip
            log.warning("put to sleep without the guest's consent", why=error.message)
            return False
        else:
            if instance.status is Status.WARM:
                self._health.seen(instance, None)
            return True

    def _check(self, instance: Instance, fault: GuestFault) -> None:
        """A warm guest is checked when it is asked to sleep: else it stands still, and no sweep can ask it.

        One that says no may be at work, and is well. One that says no to everything is not.
        """
        if isinstance(fault, GuestSilent):
            self._health.seen(instance, fault.message)
        else:
            self._health.check(instance)

    def wake(self, context: JobContext, instance: Instance, pool: WorkerPool, spec: BootSpec) -> Woken:
        """A sleeping instance runs where it was, and knows what time it is; its snapshot stays for the caller.

        Once it has run it has written to its disks, which makes what it slept in unfit: from then on it is not
        cancelled, and one whose guest does not answer is put to sleep anew, as it is, and can be woken again. Where
        that fails too, it runs on. When its VMM ends, nothing is left to wake it from, and the snapshot goes.
        """
        driver = self._driver()
        context.step("verify and restore", 1, 3)
        process = driver.restore(
            self._storage.snapshot(instance.ref), self._base(instance, pool), spec, revision=_revision(instance)
        )
        context.step("tell the time", 2, 3)
        try:
            driver.resume(instance.ref, process)
            self._tell_time(replace(instance, process=process), secrets=spec.secrets is not None)
        except (GuestFault, TimedOut) as fault:
            if self._vmm.observe(instance.ref, process) is Presence.ABSENT:
                self.forget(instance.ref)
                raise
            if spec.secrets is not None:
                self._take_secrets_back(instance, process)
            try:
                self._save(instance, process, pool, spec)
            except (Failed, NotFound, TimedOut) as error:
                log.warning("runs on: it cannot sleep anew", instance=str(instance.ref), why=error.message)
                return Woken(process, fault if isinstance(fault, GuestFault) else _final(fault))
            raise
        return Woken(process)

    def _take_secrets_back(self, instance: Instance, process: ProcessIdentity) -> None:
        """What is saved is to be without secrets; of a guest that is silent for good, the disk at least is empty."""
        ref = instance.ref
        try:
            self._vmm.put_secrets(ref, process, None)
            self._guest.drop_secrets(ref, self._storage.directory(ref), deadline_s=_GUEST_S)
        except (GuestFault, TimedOut, Failed) as error:
            log.warning("asleep, perhaps with secrets in its memory", instance=str(ref), why=error.message)

    def kept(self, ref: InstanceRef) -> bool:
        """Whether the instance has something to wake from."""
        return isinstance(self._vmm, Snapshotting) and self._known(self._storage.snapshot(ref)) is not None

    def forget(self, ref: InstanceRef) -> None:
        """What the instance slept in is gone."""
        if isinstance(self._vmm, Snapshotting):
            self._vmm.discard(self._storage.snapshot(ref))

    def _base(self, instance: Instance, pool: WorkerPool) -> Path | None:
        return self._storage.template(pool.ref, _revision(instance)) if instance.cloned else None

    def _tell_time(self, instance: Instance, *, secrets: bool, deadline_s: float | None = None) -> None:
        self._guest.wake(
            instance.ref, self._storage.directory(instance.ref), now=self._clock.now(), entropy=self._clock.random(64),
            secrets=secrets, deadline_s=_GUEST_S if deadline_s is None else deadline_s,
        )  # fmt: skip
        log.debug("guest replied")

    def _driver(self) -> Snapshotting:
        if not isinstance(self._vmm, Snapshotting):
            raise NotAllowed(
                "vmm.no_snapshots", f"the {self._vmm.name} driver cannot snapshot", hint="use stop and start"
            )
        return self._vmm


@contextmanager
def _naming_template(pool: PoolRef, ref: InstanceRef) -> Iterator[None]:
    """What fails of a template says so: the instance that its VMM runs under exists for nobody else."""
    try:
        yield
    except (GuestFault, Failed, Unreachable, TimedOut) as error:
        if isinstance(error, Cancelled | Fenced | Overdue):
            raise
        name = f"the template of pool {pool}"
        error.message = error.message.replace(str(ref), name)
        error.hint = error.hint.replace(str(ref), name)
        error.fields = {**error.fields, "subject": str(pool), "template": True}
        raise


def template_ref(pool: PoolRef, revision: Revision) -> InstanceRef:
    """The name of the process that becomes a pool's template; no instance has it (theirs come from job ids)."""
    return pool.instance(InstanceId.from_bytes(sha256(f"template {pool} {revision}".encode()).digest()))


def sleepless(store: NodeStore, instances: Iterable[Instance]) -> frozenset[InstanceRef]:
    """Those that cannot be put to sleep in the run they are in: the template that they were cloned from is gone."""
    notes = store.notes(Note.SLEEPLESS)
    return frozenset(i.ref for i in instances if i.ref in notes and notes[i.ref]["run"] == i.run)


def unusable(error: MvmError) -> bool:
    """Whether a clone failed because of its template, so that a boot may do instead."""
    return isinstance(error, Failed | NotFound) and error.code.startswith(("snapshot.", "vmm.start_failed"))


def damaged(error: MvmError) -> bool:
    """Whether the template itself is at fault, for any instance."""
    return error.code.startswith("snapshot.")


def _final(error: MvmError) -> Failed:
    """The same, and no use in another try: what was tried is at work."""
    return Failed(error.code, error.message, hint=error.hint, **error.fields)


def _process(instance: Instance) -> ProcessIdentity:
    if instance.process is None:
        raise Unreachable("vmm.gone", f"{instance.ref} has no process", hint=f"mvm instance stop {instance.ref}")
    return instance.process


def _revision(instance: Instance) -> Revision:
    if instance.revision is None:
        raise Failed("snapshot.other_revision", f"{instance.ref} has no revision on record")
    return instance.revision
