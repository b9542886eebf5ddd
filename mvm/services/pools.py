"""Worker pools: create, update, build, scale, destroy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mvm.domain import lock_names
from mvm.domain.audit import told
from mvm.domain.egress import EgressPolicy
from mvm.domain.ids import PoolRef, Revision
from mvm.domain.pool import (
    DesiredCounts,
    ImageSource,
    InstanceResources,
    SeccompPolicy,
    StartMode,
    WorkerPool,
    checked_user_data,
)
from mvm.domain.snapshot import Compression
from mvm.domain.vmm import OnExit
from mvm.errors import Failed, NotAllowed, NotFound
from mvm.ports.images import ImageBuilder
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.services.disk import LOCK_S
from mvm.services.disk_room import DiskRoom
from mvm.services.membership import check_whole, known_to_all
from mvm.services.networks import Networks
from mvm.services.quotas import admit_counts, admit_pool
from mvm.services.reconcile import Reconcile
from mvm.services.runner import JobContext
from mvm.services.views import pool_view

_BUILD_WAIT_S = 1800.0
_BUILD_TRIES = 3


def changed(pool: WorkerPool, params: Mapping[str, Any]) -> WorkerPool:
    """`pool` with what ``params`` has of ``start, compression, seccomp_policy, egress, pinned, critical, on_exit``,
    ``metadata_enabled, user_data`` and ``sleep_policy``, which may be a part of one.
    """
    values: dict[str, Any] = {
        name: params[name] for name in ("pinned", "critical", "metadata_enabled") if name in params
    }
    if "start" in params:
        values["start"] = StartMode(params["start"])
    if "compression" in params:
        values["compression"] = Compression(params["compression"])
    if params.get("desired"):
        values["desired"] = DesiredCounts(**params["desired"])
    if "source" in params:
        values["source"] = ImageSource(**params["source"])
        values["built"] = pool.built or (pool.source if pool.revision else None)
    if "seccomp_policy" in params:
        values["seccomp_policy"] = SeccompPolicy.parse(params["seccomp_policy"])
    if "on_exit" in params:
        values["on_exit"] = OnExit(params["on_exit"])
    if "egress" in params:
        values["egress"] = EgressPolicy.from_dict(params["egress"])
    if "user_data" in params:
        values["user_data"] = checked_user_data(params["user_data"].encode())
    return replace(pool, sleep_policy=replace(pool.sleep_policy, **params.get("sleep_policy", {})), **values)


class Pools:
    """Pools live on one node, which the registry knows."""

    def __init__(
        self, store: NodeStore, registry: Registry, images: ImageBuilder, storage: NodeStorage, locks: Locks,
        reconcile: Reconcile, networks: Networks, room: DiskRoom, *, shared: bool = False,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._images = images
        self._storage = storage
        self._locks = locks
        self._reconcile = reconcile
        self._networks = networks
        self._room = room
        self._shared = shared  # the registry, with other nodes

    def create(self, context: JobContext) -> Mapping[str, Any]:
        """Create the subject pool from ``params.flake_ref``, ``profile``, ``resources`` and what `update` takes."""
        job, params = context.job, context.job.params
        pool = changed(
            WorkerPool(
                ref=PoolRef.parse(job.subject),
                source=ImageSource(params["flake_ref"], params["profile"]),
                resources=InstanceResources(**params.get("resources", {})),
                node_id=job.node_id,
                created_at=job.submitted_at,
            ),
            params,
        )
        self._networks.check(pool.egress)
        if self._shared:
            check_whole(self._registry, self._store)
        other = self._registry.pool_node(pool.ref)
        if other not in (None, pool.node_id):
            raise NotAllowed(
                "pool.exists", f"pool {pool.ref} exists already, on node {other}",
                hint="destroy it there first, or choose another name", field="pool", value=str(pool.ref),
            )  # fmt: skip
        with self._store.transaction():
            tenant = self._store.tenant(pool.ref.tenant)
            try:
                known = self._store.pool(pool.ref)
            except NotFound:
                admit_pool(self._store, tenant, pool)
                self._store.put_pool(pool)
            else:
                if known.created_at != job.submitted_at:  # else: ours, left by a crash
                    raise NotAllowed(
                        "pool.exists",
                        f"pool {pool.ref} exists already",
                        hint=f"see: mvm pool info {pool.ref}",
                        field="pool",
                        value=str(pool.ref),
                    )
        with context.undoing(partial(self._undo_create, pool)):
            self._networks.redirect(None, pool)
            self._registry.place_pool(pool.ref, pool.node_id)
        return pool_view(self._store, pool)

    def undo_create(self, context: JobContext) -> None:
        """What a create has written down that will not be done to its end is gone, unless somebody uses it."""
        try:
            pool = self._store.pool(PoolRef.parse(context.job.subject))
        except NotFound:
            return
        if pool.created_at == context.job.submitted_at:
            self._undo_create(pool)

    def _undo_create(self, pool: WorkerPool) -> None:
        """A pool exists for all or for none."""
        with known_to_all(self._locks):
            if self._store.instances(pool=pool.ref):
                return
            self._registry.unplace_pool(pool.ref, pool.node_id)
            self._store.delete_pool(pool.ref)
        self._networks.redirect(pool, None)

    def update(self, context: JobContext) -> Mapping[str, Any]:
        """Change how the subject pool's instances start and sleep and what they reach; the rest stays."""
        with self._store.transaction():
            before = self._store.pool(PoolRef.parse(context.job.subject))
            pool = changed(before, context.job.params)
            if pool.egress != before.egress:
                self._networks.check(pool.egress)
            self._store.put_pool(pool)
        context.changed(*told(before.to_dict(), pool.to_dict(), context.job.params))
        if pool.egress == before.egress and "egress" in context.job.params:
            self._networks.repair()  # perhaps this job's own, delivered again
        self._networks.redirect(before, pool)
        return pool_view(self._store, pool)

    def build(self, context: JobContext) -> Mapping[str, Any]:
        """Build the subject pool's image; instances started from now on use the new revision."""
        pool = self._store.pool(PoolRef.parse(context.job.subject))
        # Pools of one source share the work: the second finds the revision there.
        with self._locks.hold(lock_names.build(pool.source), deadline_s=_BUILD_WAIT_S):
            for _ in range(_BUILD_TRIES):
                revision = self._images.build(pool.source, context.step, self._room.admit_build)
                with self._locks.hold(lock_names.IMAGES, deadline_s=LOCK_S):
                    if revision in self._storage.revisions():  # else it was cleaned away just now
                        return self._built(pool, revision)
        raise Failed(
            "image.build_failed", f"revision {revision.short} was removed again as soon as it was built",
            hint="what removes it? see: mvm job list --subject NODE --all", subject=str(pool.ref),
        )  # fmt: skip

    def _built(self, pool: WorkerPool, revision: Revision) -> Mapping[str, Any]:
        with self._store.transaction():
            pool = self._store.pool(pool.ref).at(revision, pool.source)
            self._store.put_pool(pool)
        return pool_view(self._store, pool)

    def scale(self, context: JobContext) -> Mapping[str, Any]:
        """Set the subject pool's desired counts and submit the jobs that lead there (``jobs`` in the result).

        ``params.running`` stays when it is left out; ``warm`` and ``sleeping`` are then the sleep policy's business.
        Whatever people did to the pool's instances before does not hold any more.
        """
        ref, params = PoolRef.parse(context.job.subject), context.job.params
        with self._store.transaction():
            pool, tenant = self._store.pool(ref), self._store.tenant(ref.tenant)
            before = pool.desired or DesiredCounts()
            running = before.running if params.get("running") is None else params["running"]
            wanted = DesiredCounts(running, params.get("warm"), params.get("sleeping"))
            pool = replace(pool, desired=wanted, scaled_at=context.job.submitted_at)
            others = [i for i in self._store.instances(tenant=ref.tenant) if i.ref.pool_ref != ref]
            admit_counts(tenant, pool, others)
            self._store.put_pool(pool)
        context.changed(str(before), str(wanted))
        submitted = self._reconcile.pool(pool, context.job, actor=context.job.actor)
        if submitted.note:
            context.remark(submitted.note)
        return {**pool_view(self._store, pool), **submitted.to_dict()}

    def destroy(self, context: JobContext) -> Mapping[str, Any]:
        """Remove a pool that has no instances, and its templates. Its image stays, others may use it."""
        ref = PoolRef.parse(context.job.subject)
        self._check_empty(ref)
        pool = self._store.pool(ref)
        with context.undoing(partial(self._undo_destroy, ref)):
            self._networks.redirect(pool, None)
            self._storage.drop_templates(ref)
            with known_to_all(self._locks):
                self._registry.unplace_pool(ref, context.job.node_id)
                with context.ending(ref=str(ref)):
                    self._check_empty(ref)
                    self._store.delete_pool(ref)
        return {}

    def _undo_destroy(self, ref: PoolRef) -> None:
        """What is still there is there for all."""
        pool = self._store.pool(ref)
        self._registry.place_pool(ref, pool.node_id)
        self._networks.redirect(None, pool)

    def _check_empty(self, ref: PoolRef) -> None:
        count = len(self._store.instances(pool=self._store.pool(ref).ref))
        if count:
            raise NotAllowed("pool.not_empty", f"pool {ref} has {count} instances",
                             hint=f"destroy them first: mvm instance destroy {ref} --all",
                             subject=str(ref), instances=count)  # fmt: skip
