"""The desired-state document, schema_version 1: what a coordinator asks of one node. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network
from typing import Any

from mvm.domain.addressing import FIRST_OFFSET, TenantNetwork
from mvm.domain.desired_schema import SCHEMA
from mvm.domain.document import Problem, Problems, TooMany, join, read_whole, refuse_all
from mvm.domain.egress import NO_EGRESS, EgressPolicy
from mvm.domain.ids import NodeId, PoolRef, TenantId
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, SeccompPolicy, SleepPolicy
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota
from mvm.domain.vmm import OnExit
from mvm.errors import InvalidInput, NotAllowed

_SHAPE = InstanceResources()
_SLEEP = SleepPolicy()
_QUOTA = Quota()
_AS_THEY_ARE = ("sleep_policy", "critical", "seccomp_policy", "egress", "metadata_enabled", "on_exit")


@dataclass(frozen=True, slots=True)
class DesiredPool:
    """One pool as it should be. Fields that a `WorkerPool` has too are named and typed as there.

    `desired` is None when the document leaves the counts to the node's operator. Of its instances at most
    `max_unavailable` are down for the sake of a new revision.
    """

    ref: PoolRef
    source: ImageSource
    resources: InstanceResources = _SHAPE
    desired: DesiredCounts | None = None
    compression: Compression = Compression.ZSTD
    sleep_policy: SleepPolicy = _SLEEP
    pinned: bool = False
    critical: bool = False
    seccomp_policy: SeccompPolicy = SeccompPolicy.BASELINE
    egress: EgressPolicy = NO_EGRESS
    metadata_enabled: bool = True
    max_unavailable: int = 1
    on_exit: OnExit = OnExit.RESTART


@dataclass(frozen=True, slots=True)
class DesiredTenant:
    """One tenant as it should be. The pools of a `pinned` one are pinned, and none is pruned."""

    id: TenantId
    network: TenantNetwork
    quota: Quota = _QUOTA
    pools: tuple[DesiredPool, ...] = ()
    secrets_hash: str | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class DesiredState:
    """A whole document."""

    node_id: NodeId
    tenants: tuple[DesiredTenant, ...] = ()
    generation: int | None = None
    prune_unknown_tenants: bool = False
    prune_unknown_pools: bool = False


def parse(value: Any) -> DesiredState:
    """The document in a decoded JSON value.

    Raises one error that tells everything that is wrong: `InvalidInput` (``desired.invalid``), or `QuotaExceeded`
    (``desired.over_quota``) when it is only that tenants ask for more than their quota gives.
    """
    problems = Problems()
    read = read_whole(SCHEMA, value, problems)
    tenants = _items(read, "tenants")
    with suppress(TooMany):
        _check_tenants(tenants, problems)
    refuse_all(problems)
    return DesiredState(
        node_id=read["node_id"], tenants=tuple(_tenant(each) for _, each in tenants), generation=read["generation"],
        prune_unknown_tenants=read["prune_unknown_tenants"], prune_unknown_pools=read["prune_unknown_pools"],
    )  # fmt: skip


def asks_for(document: Mapping[str, Any], pool: PoolRef) -> bool:
    """Whether an accepted document lists `pool`."""
    return any(
        tenant["tenant_id"] == pool.tenant and any(each["pool_id"] == pool.pool for each in tenant.get("pools", ()))
        for tenant in document["tenants"]
    )


def changed_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[TenantId, str, str]]:
    """The tenants for whom two documents, of which the first may be empty, ask otherwise; with a name for either part.

    A name is a hash of what the document says of the tenant, and ``-`` when it does not list it.
    """
    before, after = _parts(old), _parts(new)
    named = ((name, before.get(name, "-"), after.get(name, "-")) for name in sorted({*before, *after}))
    return [(TenantId(name), was, now) for name, was, now in named if was != now]


def _parts(document: Mapping[str, Any]) -> dict[str, str]:
    texts = {each["tenant_id"]: json.dumps(each, sort_keys=True) for each in document.get("tenants", ())}
    return {name: f"document:{sha256(text.encode()).hexdigest()[:16]}" for name, text in texts.items()}


def _items(read: Any, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Those objects of an array that could be read, with their places."""
    found = read.get(name) if isinstance(read, dict) else None
    return [(at, each) for at, each in enumerate(found or []) if isinstance(each, dict)]


def _tenant(read: Mapping[str, Any]) -> DesiredTenant:
    return DesiredTenant(
        id=read["tenant_id"], network=read["network"], quota=read["quotas"], secrets_hash=read["secrets_hash"],
        pinned=read["pinned"],
        pools=tuple(
            DesiredPool(
                ref=PoolRef(read["tenant_id"], pool["pool_id"]),
                source=ImageSource(pool["flake_ref"], pool["profile"]),
                resources=pool["instance_resources"],
                desired=pool["desired_counts"],
                compression=pool["snapshot_compression"],
                pinned=pool["pinned"] or read["pinned"],
                max_unavailable=pool["rollout"]["max_unavailable"],
                **{n: pool[n] for n in _AS_THEY_ARE},
            )
            for pool in read["pools"]
        ),
    )  # fmt: skip


def _check_tenants(tenants: Sequence[tuple[int, dict[str, Any]]], problems: list[Problem]) -> None:
    paths = [f"$.tenants[{at}]" for at, _ in tenants]
    _check_unique([(f"{p}.tenant_id", t.get("tenant_id")) for p, (_, t) in zip(paths, tenants, strict=True)], problems)
    networks = [(f"{p}.network", t["network"]) for p, (_, t) in zip(paths, tenants, strict=True) if t.get("network")]
    _check_unique([(f"{path}.tenant_net_id", network.net_id) for path, network in networks], problems)
    _check_apart([(f"{path}.ipv4_subnet", network.subnet) for path, network in networks], problems)
    for path, (_, tenant) in zip(paths, tenants, strict=True):
        pools = [(f"{path}.pools[{at}]", pool) for at, pool in _items(tenant, "pools")]
        _check_unique([(f"{where}.pool_id", pool.get("pool_id")) for where, pool in pools], problems)
        for where, pool in pools:
            if "flake_ref" in pool and "profile" in pool:
                _check_source(where, pool, problems)
        _check_quota(path, tenant, pools, problems)


def _check_unique(values: Sequence[tuple[str, Any]], problems: list[Problem]) -> None:
    first: dict[Any, str] = {}
    for path, value in values:
        if value is not None and first.setdefault(value, path) != path:
            problems.append(Problem(path, f"{value} is also at {first[value]}"))


def _check_apart(subnets: Sequence[tuple[str, IPv4Network]], problems: list[Problem]) -> None:
    """Sorted by their beginnings, one overlaps an earlier one only if it begins before that one's end."""
    last: tuple[str, IPv4Network] | None = None
    for path, subnet in sorted(subnets, key=lambda each: (each[1].network_address, each[1].prefixlen)):
        if last and subnet.network_address <= last[1].broadcast_address:
            problems.append(Problem(path, f"{subnet} overlaps {last[1]} at {last[0]}"))
        else:
            last = (path, subnet)


def _check_source(path: str, pool: Mapping[str, Any], problems: list[Problem]) -> None:
    try:
        ImageSource(pool["flake_ref"], pool["profile"])
    except InvalidInput as error:
        name = "profile" if error.fields.get("field") == "profile" else "flake_ref"
        problems.append(Problem(join(path, name), f"{error.message}; {error.hint}"))


def _check_quota(
    path: str, tenant: Mapping[str, Any], pools: Sequence[tuple[str, dict[str, Any]]], problems: list[Problem]
) -> None:
    """What the pools want is within the tenant's own quota and subnet: pool by pool, and in sum."""
    quota: Quota | None = tenant.get("quotas")
    if quota is None:
        return

    def check(where: str, what: str, wanted: int, name: str) -> None:
        if wanted > getattr(quota, name):
            limit = f"quotas.{name} is {getattr(quota, name)}"
            problems.append(Problem(where, f"{wanted} {what}, and {limit}", quota=True))

    check(f"{path}.pools", "pools", len(pools), "max_pools")
    sums = dict.fromkeys(("running", "warm", "vcpus", "mem_mib", "disk_mib", "total"), 0)
    for where, pool in pools:
        counts, shape = pool.get("desired_counts"), pool.get("instance_resources")
        if counts is None or shape is None:
            continue
        check(f"{where}.desired_counts", "instances", counts.total, "max_instances_per_pool")
        in_memory = counts.running + (counts.warm or 0)
        for name, value in (
            ("running", counts.running), ("warm", counts.warm or 0), ("vcpus", in_memory * shape.vcpus),
            ("mem_mib", in_memory * shape.mem_mib), ("disk_mib", counts.total * shape.data_disk_mib),
            ("total", counts.total),
        ):  # fmt: skip
            sums[name] += value
    check(f"{path}.pools", "running instances in all", sums["running"], "max_running")
    check(f"{path}.pools", "warm instances in all", sums["warm"], "max_warm")
    check(f"{path}.pools", "vCPUs in all", sums["vcpus"], "max_vcpus")
    check(f"{path}.pools", "MiB of memory in all", sums["mem_mib"], "max_mem_mib")
    check(f"{path}.pools", "GiB of data disks in all", -(-sums["disk_mib"] // 1024), "max_disk_gib")
    network: TenantNetwork | None = tenant.get("network")
    if network and sums["total"] > len(network.offsets):
        problems.append(Problem(
            f"{path}.pools", f"{sums['total']} instances in all, and {network.subnet} has {len(network.offsets)} "
            f"addresses for guests, from .{FIRST_OFFSET} on", quota=True,
        ))  # fmt: skip


def digest(state: DesiredState) -> str:
    """Names the document's content."""
    return sha256(repr(state).encode()).hexdigest()


def check_for_node(state: DesiredState, node: NodeId, stored: DesiredState | None) -> None:
    """Raises unless the document is for `node` and not older than the one that is `stored` there."""
    if state.node_id != node:
        raise InvalidInput(
            "desired.other_node", f"$.node_id: the desired state is for node {state.node_id}, this is {node}",
            hint="send it to that node", field="node_id", value=state.node_id,
        )  # fmt: skip
    known = stored.generation if stored else None
    if known is not None and state.generation is not None and state.generation < known:
        raise NotAllowed(
            "desired.older_generation", f"$.generation: {state.generation} is older than {known}, which is known here",
            hint="send the newest document, with a generation that has grown", field="generation",
            value=state.generation, known=known,
        )  # fmt: skip
