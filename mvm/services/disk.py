"""The node's disk: what lies on it and whose, cleaning it up, and the sweep that does so when space is low."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from mvm.domain import lock_names
from mvm.domain.disk import Cleaning, Kind, Level, Stored, checked_keep, cleaning, rows, size, users
from mvm.domain.findings import DiskResult, Kept, Removed
from mvm.domain.ids import NodeId
from mvm.domain.job import JobVerb
from mvm.ports.locks import Locks
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.services.disk_room import DiskRoom
from mvm.services.runner import JobContext

log = structlog.get_logger("mvm.disk")

LOCK_S = 300.0


class Disk:
    """Reports and cleans. Nothing that a tenant has put there is ever removed: only images and what is made of them."""

    def __init__(
        self, *, store: NodeStore, storage: NodeStorage, locks: Locks, room: DiskRoom, node_id: NodeId, keep: int
    ) -> None:
        self._store = store
        self._storage = storage
        self._locks = locks
        self._room = room
        self._node_id = node_id
        self._keep = keep

    def report(self) -> dict[str, Any]:
        """By tenant, pool and kind what is there, in bytes that are allocated; with the space that is left."""
        stored = self._storage.usage()
        found = rows(stored, users(self._store.pools(), self._store.instances()))
        tenants: Counter[str] = Counter({tenant.id: 0 for tenant in self._store.tenants()})
        for row in found:
            if row.tenant:
                tenants[row.tenant] += row.bytes
        return {
            "node_id": str(self._node_id),
            **self.space(),
            "used_bytes": sum(row.bytes for row in found),
            "shared_bytes": sum(row.shared for row in found),
            "kinds": self._kinds(stored),
            "tenants": dict(sorted(tenants.items())),
            "items": [row.to_dict() for row in found],
        }

    def space(self) -> dict[str, Any]:
        """What is left of the disk, and how that is."""
        space, marks = self._storage.space(), self._room.marks
        return {
            "path": space.path, "total_bytes": space.total, "free_bytes": space.free, "low_bytes": marks.low,
            "reserve_bytes": marks.reserve, "level": marks.level(space.free).value,
        }  # fmt: skip

    def clean(self, context: JobContext) -> Mapping[str, Any]:
        """Remove what nobody needs beyond ``params.keep`` revisions of each pool; with ``params.dry_run`` only tell."""
        params = context.job.params
        keep = checked_keep(params.get("keep", self._keep))
        context.step("look for what is not needed", 0, 2)
        return self._clean(context, keep, dry_run=bool(params.get("dry_run"))).to_dict()

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """Clean up when space is low; else nothing is removed that might be wanted again."""
        context.step("measure", 0, 2)
        if self._room.level() is not Level.OK:
            result = self._clean(context, self._keep, dry_run=False)
            log.warning("disk is low", free=size(result.free), freed=size(result.freed), level=result.level)
        else:
            free, kinds = self._storage.space().free, self._kinds(self._storage.usage())
            result = DiskResult(free=free, level=Level.OK.value, kinds=kinds)
        return result.to_dict()

    def _clean(self, context: JobContext, keep: int, *, dry_run: bool) -> DiskResult:
        with self._locks.hold(lock_names.IMAGES, deadline_s=LOCK_S):
            stored = self._storage.usage()
            sizes = {(item.kind, item.pool, item.revision): item.bytes for item in stored}
            found, building = self._decide(keep)
            others = self._storage.shared_with_others()
            revisions = () if others else found.revisions
            removed = [
                Removed(kind.value, name, sizes.get((kind, pool, revision), 0))
                for kind, name, pool, revision in (
                    *(
                        (Kind.TEMPLATE, f"{pool}@{revision.short}", pool, revision)
                        for pool, revision in found.templates
                    ),
                    *((Kind.REVISION, str(revision), None, revision) for revision in revisions),
                )
            ]
            if not dry_run:
                context.step("remove", 1, 2)
                for template in found.templates:
                    self._storage.remove_template(*template)
                for revision in revisions:
                    self._storage.remove_revision(revision)
                packages = 0 if building or others else self._storage.remove_packages(self._storage.revisions())
                removed += [Removed(Kind.CACHE.value, "packages of no kept revision", packages)] if packages else []
        kept = [Kept(revision, why) for revision, why in found.kept.items()]
        kept += [Kept(revision, f"{others} may be another node's, too") for revision in found.revisions if others]
        free = self._storage.space().free
        return DiskResult(
            tuple(removed), tuple(kept), free, self._room.marks.level(free).value, dry_run, self._kinds(stored)
        )

    def _kinds(self, stored: Sequence[Stored]) -> dict[str, int]:
        kinds: Counter[str] = Counter({kind.value: 0 for kind in Kind})
        for item in stored:
            kinds[item.kind.value] += item.bytes
        return dict(kinds)

    def _decide(self, keep: int) -> tuple[Cleaning, bool]:
        # What is there is read before the store: a revision that comes meanwhile is not looked at.
        revisions, templates = self._storage.revisions(), self._storage.templates()
        with self._store.transaction():
            pools, instances = self._store.pools(), self._store.instances()
            building = any(job.verb is JobVerb.POOL_BUILD for job in self._store.unfinished_jobs())
        return cleaning(pools, instances, revisions, templates, keep=keep, building=building), building
