"""Tenants' secrets: kept, given to guests as they start, and replaced in those that run.

What a guest has is known by a note on its instance: the epoch of its disk, 0 while it has been asked to let it go; and
what it may have kept in its sleep all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import structlog

from mvm.domain import lock_names
from mvm.domain.ids import InstanceRef, JobId, TenantId
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.secrets import Secrets, parse
from mvm.errors import Failed, GuestRefused, MvmError, NotAllowed, NotFound, TimedOut
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.locks import Locks
from mvm.ports.secrets import SecretStore
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore, Note
from mvm.ports.vmm import VmmDriver
from mvm.services.audit import Audit
from mvm.services.runner import JobContext

log = structlog.get_logger("mvm.secrets")

_GUEST_S = 10.0
_LOCK_S = 60.0
_CATCH_UP_S = 10.0  # after which a sweep asks no further guest


class TenantSecrets:
    """The secrets of this node's tenants. Values never leave it but for a guest's disk."""

    def __init__(
        self, *, store: NodeStore, secrets: SecretStore, locks: Locks, clock: Clock, vmm: VmmDriver,
        guest: GuestChannel, storage: NodeStorage, audit: Audit,
    ) -> None:  # fmt: skip
        self._store = store
        self._secrets = secrets
        self._locks = locks
        self._clock = clock
        self._vmm = vmm
        self._guest = guest
        self._storage = storage
        self._audit = audit

    def set(self, tenant: TenantId, content: bytes, actor: str) -> Mapping[str, Any]:
        """Keep what a secrets file holds, in place of all that was there; guests that start from now on have it.

        It is `actor` who asks, through the agent: no job ever holds secrets, so the audit trail has an entry for it.

        Raises `InvalidInput` (``secrets.*``), and nothing has changed.
        """
        values = parse(content)
        with self._changing(tenant):
            known = self._store.tenant(tenant)
            try:
                found = self._secrets.load(tenant)
            except Failed as error:
                if error.code != "secrets.damaged":
                    raise
                found = None  # whatever became of them, they are replaced
            epoch = max(known.secrets_epoch, found.epoch if found else 0) + 1
            with self._keeping(tenant, Secrets(epoch, self._clock.now(), values)):
                before = _told(known.secrets_epoch, found.values if found else {})
                self._audit.called(tenant, "tenant.set_secrets", actor, before, _told(epoch, values))
        self._audit.soon()
        return {"tenant_id": str(tenant), "secrets_epoch": epoch, "count": len(values)}

    def deliver(self, context: JobContext) -> Mapping[str, Any]:
        """Every running guest of the subject tenant has its secrets; with ``params.rotate`` under a new key and epoch.

        Guests that are paused or asleep have them before they run again. Fails (``secrets.not_delivered``) when some
        guest could not take them, after all were asked.
        """
        tenant = TenantId(context.job.subject)
        if context.job.params.get("rotate"):
            context.step("encrypt anew")
            self._rotate(tenant, context.job.job_id)
        epoch = self._epoch(self.of(tenant))
        context.changed(f"epoch={max(epoch - 1, 0)}", f"epoch={epoch}")
        running = [i.ref for i in self._store.instances(tenant=tenant) if i.status is Status.RUNNING or i.in_flight]
        reached, failed = [], {}
        for done, ref in enumerate(running):
            context.step("deliver to guests", done, len(running))
            try:
                with self._locks.hold(lock_names.instance(ref), deadline_s=_LOCK_S):
                    instance = self._store.instance(ref)
                    if instance.status is Status.RUNNING:
                        self.refresh(instance)
                        reached.append(str(ref))
            except NotFound:  # destroyed meanwhile
                continue
            except MvmError as error:
                log.warning("not delivered", instance=str(ref), code=error.code, why=error.message)
                failed[str(ref)] = error.message
        if failed:
            what = f"epoch {epoch} did not reach {len(failed)} of {len(running)} guests"
            raise Failed(
                "secrets.not_delivered", f"{what}; {next(iter(failed.values()))}",
                hint=f"it is tried again by itself; or: mvm tenant secrets rotate {tenant}", subject=str(tenant),
                secrets_epoch=epoch, reached=reached, failed=failed,
            )  # fmt: skip
        return {"tenant_id": str(tenant), "secrets_epoch": epoch, "reached": reached}

    def forget(self, tenant: TenantId) -> None:
        """The tenant has none."""
        self._secrets.remove(tenant)

    # --- one instance, whose lock the caller holds
    def of(self, tenant: TenantId) -> Secrets | None:
        """The tenant's secrets. Raises `Failed` (``secrets.damaged``), also for what is older than it should be."""
        recorded = self._store.tenant(tenant).secrets_epoch
        found = self._secrets.load(tenant)
        if self._epoch(found) < recorded:
            what = f"are of epoch {found.epoch}" if found else "are gone"
            raise Failed(
                "secrets.damaged", f"the stored secrets of tenant {tenant} {what}; the last were of epoch {recorded}",
                hint=f"set them again: mvm tenant secrets set {tenant} --from-file F", subject=str(tenant),
            )  # fmt: skip
        return found

    def given(self, ref: InstanceRef, secrets: Secrets | None, *, unsure: bool = False) -> None:
        """A guest is about to run with `secrets`; `unsure` whether one runs already, perhaps with others."""
        if secrets or self._noted(ref) is not None:
            self._note(ref, 0 if unsure else self._epoch(secrets))

    def has(self, ref: InstanceRef) -> bool:
        """Whether its guest was given some."""
        return bool(self._noted(ref))

    def withdrawn(self, ref: InstanceRef, *, surely: bool = True) -> None:
        """The guest is about to be asked to let them go; if not `surely` it may sleep with them, whatever it says."""
        note = self._store.note(ref, Note.SECRETS)
        if note is not None:
            self._note(ref, 0, kept=None if surely else int(note["epoch"] or note.get("kept", 0)))

    def stale(self, ref: InstanceRef, secrets: Secrets | None) -> bool:
        """Whether its guest may sleep with others than `secrets` mounted, under which the contents must not change."""
        kept = (self._store.note(ref, Note.SECRETS) or {}).get("kept")
        return kept is not None and kept != self._epoch(secrets)

    def refresh(self, instance: Instance) -> None:
        """The guest, which runs, has its tenant's secrets of now.

        Raises what the guest says when it cannot let go of the old ones; it still has them then.
        """
        ref, directory, secrets = instance.ref, self._storage.directory(instance.ref), self.of(instance.ref.tenant)
        if self._epoch(secrets) == (self._noted(ref) or 0) or instance.process is None:
            return
        try:
            self._guest.drop_secrets(ref, directory, deadline_s=_GUEST_S)
        except GuestRefused as error:
            raise Failed(
                "secrets.busy", f"the guest of {ref} keeps its secrets: {error.message}",
                hint="a process in it has a file open, or works, below /run/secrets", subject=str(ref),
            ) from None  # fmt: skip
        self._note(ref, 0)
        self._vmm.put_secrets(ref, instance.process, secrets)
        self._guest.mount_secrets(ref, directory, deadline_s=_GUEST_S)
        self._note(ref, self._epoch(secrets))
        log.info("secrets delivered", instance=str(ref), epoch=self._epoch(secrets))

    def try_refresh(self, instance: Instance) -> bool:
        """`refresh` where something else matters more; whether it worked. A sweep tries again."""
        try:
            self.refresh(instance)
        except MvmError as error:
            log.warning("secrets not delivered", instance=str(instance.ref), code=error.code, why=error.message)
            return False
        return True

    def catch_up(self) -> list[str]:
        """Running guests that lack their tenant's secrets of now are given them; which ones were tried.

        Some guests may answer none, for ever, and a sweep has other things to do: it takes a bounded time, and those
        come last that were tried in vain before.
        """
        end = self._clock.monotonic() + _CATCH_UP_S
        tried: list[str] = []
        for seen in self._lagging():
            if self._clock.monotonic() >= end:
                break
            with suppress(TimedOut, NotFound), self._locks.hold(lock_names.instance(seen.ref), deadline_s=0):
                instance = self._store.instance(seen.ref)
                if instance.status is Status.RUNNING:
                    tried.append(str(seen.ref))
                    if not self.try_refresh(instance):
                        note = self._store.note(seen.ref, Note.SECRETS) or {"epoch": 0}
                        self._store.put_note(seen.ref, Note.SECRETS, {**note, "tried": self._clock.now().isoformat()})
        return tried

    def _lagging(self) -> list[Instance]:
        """Running guests without their tenant's secrets of now; those first that were not tried, or long ago."""
        epochs = {tenant.id: tenant.secrets_epoch for tenant in self._store.tenants() if tenant.secrets_epoch}
        if not epochs:
            return []
        notes = self._store.notes(Note.SECRETS)
        lagging = [
            i for i in self._store.instances()
            if i.status is Status.RUNNING and i.in_flight is None
            and epochs.get(i.ref.tenant, 0) > int(notes.get(i.ref, {}).get("epoch", 0))
        ]  # fmt: skip
        return sorted(lagging, key=lambda i: str(notes.get(i.ref, {}).get("tried", "")))

    # --- inside
    def _rotate(self, tenant: TenantId, job: JobId) -> None:
        with self._changing(tenant):
            found = self.of(tenant)
            if found is None:
                raise NotAllowed("secrets.none", f"tenant {tenant} has no secrets", subject=str(tenant),
                                 hint=f"mvm tenant secrets set {tenant} --from-file F")  # fmt: skip
            if found.job != job:  # else this job was here before it was killed
                with self._keeping(tenant, Secrets(found.epoch + 1, self._clock.now(), found.values, job)):
                    pass  # the job has its entry when it ends

    def _changing(self, tenant: TenantId) -> AbstractContextManager[None]:
        return self._locks.hold(lock_names.secrets(tenant), deadline_s=_LOCK_S)

    @contextmanager
    def _keeping(self, tenant: TenantId, secrets: Secrets) -> Iterator[None]:
        """They are kept, with what is written within.

        The file first: one that is newer than the record is right, an older one was put there.
        """
        self._secrets.save(tenant, secrets)
        with self._store.transaction():
            self._store.put_tenant(replace(self._store.tenant(tenant), secrets_epoch=secrets.epoch))
            yield

    @staticmethod
    def _epoch(secrets: Secrets | None) -> int:
        return secrets.epoch if secrets else 0

    def _noted(self, ref: InstanceRef) -> int | None:
        note = self._store.note(ref, Note.SECRETS)
        return None if note is None else int(note["epoch"])

    def _note(self, ref: InstanceRef, epoch: int, *, kept: int | None = None) -> None:
        self._store.put_note(ref, Note.SECRETS, {"epoch": epoch} | ({} if kept is None else {"kept": kept}))


def _told(epoch: int, values: Mapping[str, str]) -> str:
    """What the audit trail may know of secrets: their names."""
    return f"epoch={epoch} names={','.join(sorted(values)) or '-'}"
