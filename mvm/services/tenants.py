"""Tenants: create, update, destroy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mvm.domain.addressing import allocate, parse_net_id, parse_subnet
from mvm.domain.audit import told
from mvm.domain.ids import TenantId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.refusals import tenant_exists
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import InvalidInput, NotAllowed, NotFound
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.membership import check_whole, known_to_all, remind
from mvm.services.networks import Networks
from mvm.services.runner import JobContext
from mvm.services.secrets import TenantSecrets
from mvm.services.views import tenant_view


class Tenants:
    """The registry gives a tenant its network; the node keeps a copy."""

    def __init__(
        self, store: NodeStore, registry: Registry, locks: Locks, networks: Networks, secrets: TenantSecrets,
        *, shared: bool = False,
    ) -> None:  # fmt: skip
        self._store = store
        self._locks = locks
        self._registry = registry
        self._networks = networks
        self._secrets = secrets
        self._shared = shared  # the registry, with other nodes

    def create(self, context: JobContext) -> Mapping[str, Any]:
        """Create the subject tenant with ``params.net_id``, ``subnet`` and ``quota``, each optional."""
        job = context.job
        tenant_id, params = TenantId(job.subject), job.params
        net_id, subnet = params.get("net_id"), params.get("subnet")
        context.step("reserve network", 0, 2)
        here = self._here(tenant_id)
        # A tenant made at the very moment this job was asked for is this job's, left by a crash.
        # And one that another node has too is adopted, for a desired state that gives it the same network.
        if here is not None and not _is_of(job, here):
            raise tenant_exists(tenant_id)
        if self._shared:
            check_whole(self._registry, self._store)
        with known_to_all(self._locks):
            remind(self._registry, self._store, self._networks.used_net_ids() if here is None else frozenset())
            known = self._registry.tenant(tenant_id) or here
            if known is None or not _is_of(job, known):
                known = self._registry.reserve_tenant(
                    tenant_id,
                    parse_net_id(net_id) if net_id is not None else None,
                    parse_subnet(subnet) if subnet is not None else None,
                    _quota(Quota(), params.get("quota") or {}),
                    job.submitted_at,
                )
        with context.undoing(partial(self._undo_create, known, job)):
            self._check_free(known, job)
            self._forget_namesake(tenant_id)
            context.step("create bridge", 1, 2)
            self._networks.open(known.network)
            with context.ending(**tenant_view(self._store, known)):
                self._check_free(known, job)
                self._store.put_tenant(known)
        return {}

    def _here(self, tenant_id: TenantId) -> Tenant | None:
        try:
            return self._store.tenant(tenant_id)
        except NotFound:
            return None

    def _check_free(self, new: Tenant, job: Job) -> None:
        """The node's own word, whatever the registry gave: no tenant of its store has this id or network.

        Raises `NotAllowed`: ``tenant.exists``, ``tenant.net_id_used``, ``tenant.subnet_overlap``.
        """
        here = self._here(new.id)
        if here is not None and (not _is_of(job, here) or here.network != new.network):
            raise tenant_exists(new.id)
        others = [tenant.network for tenant in self._store.tenants() if tenant.id != new.id]
        used = {network.net_id for network in others}
        if here is None and not _adopts(job.params, new):  # an adopted one may have been here before
            used |= self._store.given_net_ids()
        network = new.network
        allocate(network.net_id, network.subnet, used_ids=used, taken=[other.subnet for other in others])

    def undo_create(self, context: JobContext) -> None:
        """What a create has reserved that will not be done to its end is given back, unless the tenant is there."""
        known = self._registry.tenant(TenantId(context.job.subject))
        if known is not None and _is_of(context.job, known):
            self._undo_create(known, context.job)

    def _undo_create(self, known: Tenant, job: Job) -> None:
        """A tenant exists for all or for none. One that `job` did not reserve, but adopt, stays where it is.

        The bridge goes first: once the net id is given back, it may be another tenant's.
        """
        if self._here(known.id) is not None:
            return
        self._networks.close(known)
        if known.created_at == job.submitted_at:
            self._registry.withdraw_tenant(known)
            self._registry.restore([], {}, self._store.given_net_ids())  # it may have got one that was never free

    def withdraw_ghosts(self) -> list[TenantId]:
        """Tenants that a job of this node has reserved and could neither make nor give back are given back now."""
        here = {tenant.id for tenant in self._store.tenants()}
        found = []
        for ghost in self._registry.networks()[0]:
            job = self._store.last_job(ghost.id) if ghost.id not in here else None
            if job is not None and _left_by(job, ghost):
                self._undo_create(ghost, job)
                found.append(ghost.id)
        return found

    def update(self, context: JobContext) -> Mapping[str, Any]:
        """Change the quota; what runs already is left alone, even above a lowered limit."""
        with self._store.transaction():
            before = self._store.tenant(TenantId(context.job.subject))
            asked = context.job.params.get("quota") or {}
            tenant = replace(before, quota=_quota(before.quota, asked))
            self._store.put_tenant(tenant)
        context.changed(*told(before.quota.to_dict(), tenant.quota.to_dict(), asked))
        self._registry.put_tenant(tenant)
        return tenant_view(self._store, tenant)

    def destroy(self, context: JobContext) -> Mapping[str, Any]:
        """Remove a tenant that has no pools and no instances; its net id is never given again."""
        tenant_id = TenantId(context.job.subject)
        try:
            tenant = self._store.tenant(tenant_id)
        except NotFound:
            ghost = self._registry.tenant(tenant_id)
            if ghost is None:
                raise
            # A heartbeat reminded the registry of it in the very moment it was destroyed.
            self._networks.close(ghost)
            self._registry.remove_tenant(tenant_id, context.job.node_id)
            return {"tenant_id": str(tenant_id)}
        self._check_empty(tenant)
        if self._shared:
            check_whole(self._registry, self._store)
        context.step("remove bridge", 0, 1)
        with context.undoing(partial(self._undo_destroy, tenant)):
            self._networks.close(tenant)
            with known_to_all(self._locks):
                self._registry.remove_tenant(tenant.id, context.job.node_id)
                with context.ending(tenant_id=str(tenant.id)):
                    self._check_empty(tenant)
                    self._secrets.forget(tenant.id)  # not before it is certain that the tenant goes
                    self._store.delete_tenant(tenant.id)
        return {}

    def _undo_destroy(self, tenant: Tenant) -> None:
        """What is still there is there for all."""
        self._registry.restore([self._store.tenant(tenant.id)], {}, frozenset())
        self._networks.open(tenant.network)

    def _forget_namesake(self, tenant_id: TenantId) -> None:
        """A new tenant begins without secrets, whatever a former one of its name left behind."""
        if self._here(tenant_id) is None:
            self._secrets.forget(tenant_id)

    def _check_empty(self, tenant: Tenant) -> None:
        pools = self._store.pools(tenant.id)
        if pools:
            instances = len(self._store.instances(tenant=tenant.id))
            raise NotAllowed(
                "tenant.not_empty", f"tenant {tenant.id} has {len(pools)} pools and {instances} instances",
                hint=f"destroy them first: mvm instance destroy {pools[0].ref} --all; mvm pool destroy {pools[0].ref}",
                subject=str(tenant.id), pools=len(pools), instances=instances,
            )  # fmt: skip


def _left_by(job: Job, ghost: Tenant) -> bool:
    ended = job.state.final and job.state is not JobState.SUCCEEDED
    return ended and job.verb is JobVerb.TENANT_CREATE and ghost.created_at == job.submitted_at


def _is_of(job: Job, known: Tenant) -> bool:
    """Whether `job` has made it, or is to make it here as it is."""
    return known.created_at == job.submitted_at or _adopts(job.params, known)


def _adopts(params: Mapping[str, Any], known: Tenant) -> bool:
    given = (params.get("net_id"), params.get("subnet"))
    return bool(params.get("adopt")) and given == (known.network.net_id, str(known.network.subnet))


def _quota(base: Quota, changes: Mapping[str, int]) -> Quota:
    unknown = sorted(set(changes) - set(base.to_dict()))
    if unknown:
        raise InvalidInput("tenant.invalid_quota", f"there is no quota {unknown[0]}",
                           hint=f"allowed: {', '.join(base.to_dict())}", field=unknown[0])  # fmt: skip
    return replace(base, **changes)
