"""What lies on a node's disk, whose it is, and what of it nobody needs. Pure. Sizes are in bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mvm.domain.ids import PoolRef, Revision, TenantId
from mvm.domain.instance import Instance
from mvm.domain.pool import WorkerPool
from mvm.errors import InvalidInput

MAX_KEEP = 32

Template = tuple[PoolRef, Revision]


class Kind(StrEnum):
    """What something on the disk is."""

    REVISION = "revisions"
    TEMPLATE = "templates"
    OVERLAY = "overlays"
    DATA_DISK = "data_disks"
    SNAPSHOT = "snapshots"
    LOG = "logs"
    CACHE = "caches"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Space:
    """Of the fullest file system that the state directory is on: where it is mounted, all of it, and what is free."""

    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One thing on the disk and the blocks that it takes there; `shared` are those counted with something else."""

    kind: Kind
    name: str
    bytes: int
    shared: int = 0
    pool: PoolRef | None = None
    revision: Revision | None = None


class Level(StrEnum):
    """How the disk is: there is room; it is to be cleaned; nothing large is begun any more."""

    OK = "ok"
    LOW = "low"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Watermarks:
    """With less than `low` free the node cleans up by itself; `reserve` is left free by builds and sleeps."""

    low: int
    reserve: int

    def level(self, free: int) -> Level:
        """How a disk with so much free space is."""
        return Level.FULL if free < self.reserve else Level.LOW if free < self.low else Level.OK


@dataclass(frozen=True, slots=True)
class Row:
    """What a pool has of one kind. Without a pool it is several pools', without a tenant several tenants' or none's."""

    tenant: TenantId | None
    pool: PoolRef | None
    kind: Kind
    count: int
    bytes: int
    shared: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "tenant": self.tenant, "pool": str(self.pool) if self.pool else None, "kind": self.kind.value,
            "count": self.count, "bytes": self.bytes, "shared_bytes": self.shared,
        }  # fmt: skip


def rows(stored: Iterable[Stored], users: Mapping[Revision, Collection[PoolRef]]) -> tuple[Row, ...]:
    """`stored` by tenant, pool and kind; a revision that several pools use is counted once, as common to them."""
    found: dict[tuple[str, str, Kind], tuple[TenantId | None, PoolRef | None, Counter[str]]] = {}
    for item in stored:
        tenant, pool = _owner(item, users)
        _, _, sums = found.setdefault((tenant or "", str(pool or ""), item.kind), (tenant, pool, Counter()))
        sums.update(count=1, bytes=item.bytes, shared=item.shared)
    return tuple(
        Row(tenant, pool, kind, sums["count"], sums["bytes"], sums["shared"])
        for (_, _, kind), (tenant, pool, sums) in sorted(found.items(), key=lambda each: each[0])
    )


def _owner(item: Stored, users: Mapping[Revision, Collection[PoolRef]]) -> tuple[TenantId | None, PoolRef | None]:
    if item.pool is not None:
        return item.pool.tenant, item.pool
    pools = set(users.get(item.revision, ())) if item.revision else set()
    tenants = {pool.tenant for pool in pools}
    return (
        next(iter(tenants)) if len(tenants) == 1 else None,
        next(iter(pools)) if len(pools) == 1 else None,
    )


def users(pools: Iterable[WorkerPool], instances: Iterable[Instance]) -> Mapping[Revision, Collection[PoolRef]]:
    """By revision the pools that name it, now or formerly, or have an instance on it."""
    found: defaultdict[Revision, set[PoolRef]] = defaultdict(set)
    for pool in pools:
        for revision in pool.revisions:
            found[revision].add(pool.ref)
    for instance in instances:
        if instance.revision and _uses(instance):
            found[instance.revision].add(instance.ref.pool_ref)
    return found


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What may go, and why the rest of the revisions stays."""

    revisions: tuple[Revision, ...]
    templates: tuple[Template, ...]
    kept: Mapping[Revision, str]


def cleaning(
    pools: Sequence[WorkerPool], instances: Sequence[Instance], revisions: Collection[Revision],
    templates: Collection[Template], *, keep: int, building: bool,
) -> Cleaning:  # fmt: skip
    """What nobody needs of the `revisions` and `templates` that there are.

    Each pool keeps its newest `keep` revisions, and those that its instances run, are warm or sleep on; while one of
    them has a job, all. Templates stay and go with their pool's revisions. Revisions that no pool ever named stay while
    an image is `building`: one may be it.
    """
    busy = {instance.ref.pool_ref for instance in instances if instance.in_flight}
    kept: dict[Revision, str] = {}
    bases: set[Template] = set()
    for pool in pools:
        for place, revision in enumerate(pool.revisions):
            if place < keep or pool.ref in busy or revision == pool.revision:
                kept.setdefault(revision, _why(pool, revision, keep))
                bases.add((pool.ref, revision))
    for instance in instances:
        if instance.revision and _uses(instance):
            kept.setdefault(instance.revision, f"{instance.ref} is {instance.status} on it")
            bases.add((instance.ref.pool_ref, instance.revision))
    named = {revision for pool in pools for revision in pool.revisions}
    if building:
        kept.update((revision, "an image is being built") for revision in revisions if revision not in {*named, *kept})
    return Cleaning(
        tuple(sorted(set(revisions) - kept.keys())),
        tuple(sorted(set(templates) - bases)),
        {revision: kept[revision] for revision in sorted(revisions) if revision in kept},
    )


def _why(pool: WorkerPool, revision: Revision, keep: int) -> str:
    if revision == pool.revision:
        return f"pool {pool.ref} starts from it"
    return f"one of the newest {keep} of pool {pool.ref}" if keep > 1 else f"pool {pool.ref} has an instance with a job"


def _uses(instance: Instance) -> bool:
    return instance.status.is_up or instance.in_flight is not None


def checked_keep(value: object) -> int:
    """`value` if it is a sensible number of revisions to keep; raises `InvalidInput` (``disk.invalid_keep``)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_KEEP:
        raise InvalidInput(
            "disk.invalid_keep", f"--keep is {str(value)[:40]}", hint=f"allowed: 1 to {MAX_KEEP}", field="keep",
            value=str(value)[:40],
        )  # fmt: skip
    return value


def size(count: int) -> str:
    """`count` bytes for people."""
    value = float(count)
    for unit in ("B", "K", "M"):
        if abs(value) < 1024:
            return f"{value:.0f}{unit}" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}G"
