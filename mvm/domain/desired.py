"""The desired-state document, schema_version 1: what a coordinator asks of one node. Pure.

`SCHEMA` is the document in one table; reading, the published JSON schema and the tests all go by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from ipaddress import IPv4Network
from typing import Any

from mvm.domain.addressing import FIRST_OFFSET, TenantNetwork, parse_subnet
from mvm.domain.document import Array, Boolean, Choice, Field, Integer, Object, Problem, Text, join, refuse_all
from mvm.domain.egress import NO_EGRESS, Destination, Egress, EgressPolicy
from mvm.domain.ids import NodeId, PoolId, PoolRef, TenantId
from mvm.domain.pool import (
    MAX_COUNT, MAX_POLICY_S, DesiredCounts, ImageSource, InstanceResources, SeccompPolicy, SleepPolicy,
)  # fmt: skip
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota
from mvm.errors import InvalidInput, NotAllowed

SCHEMA_VERSION = 1
MAX_TENANTS = 4096
MAX_POOLS = 10_000  # of one tenant
_SECRETS_HASH = re.compile(r"[A-Za-z0-9:+/=_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class DesiredPool:
    """One pool as it should be. Fields that a `WorkerPool` has too are named and typed as there.

    `desired` is None when the document leaves the counts to the node's operator. Of its instances at most
    `max_unavailable` are down for the sake of a new revision.
    """

    ref: PoolRef
    source: ImageSource
    resources: InstanceResources = InstanceResources()
    desired: DesiredCounts | None = None
    compression: Compression = Compression.ZSTD
    sleep_policy: SleepPolicy = SleepPolicy()
    pinned: bool = False
    critical: bool = False
    seccomp_policy: SeccompPolicy = SeccompPolicy.BASELINE
    egress: EgressPolicy = NO_EGRESS
    metadata_enabled: bool = True
    max_unavailable: int = 1


@dataclass(frozen=True, slots=True)
class DesiredTenant:
    """One tenant as it should be. The pools of a `pinned` one are pinned, and it is not pruned."""

    id: TenantId
    network: TenantNetwork
    quota: Quota = Quota()
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


def _secrets_hash(text: str) -> str:
    if not _SECRETS_HASH.fullmatch(text):
        raise InvalidInput("desired.invalid", "is not a hash", hint="allowed: 1 to 128 of A-Z a-z 0-9 : + / = _ . -")
    return text


def _network(tenant_net_id: int, ipv4_subnet: IPv4Network) -> TenantNetwork:
    return TenantNetwork(tenant_net_id, ipv4_subnet)


def _egress(policy: Egress, allow: list[Any]) -> EgressPolicy:
    return EgressPolicy(policy, tuple(dict.fromkeys(allow)))


def _counts(running: int, warm: int | None, sleeping: int | None) -> DesiredCounts:
    return DesiredCounts(running, warm, sleeping)


_QUOTA = Quota()
_SHAPE = InstanceResources()
_SLEEP = SleepPolicy()
_ABOUT_QUOTA = {
    "max_vcpus": "vCPUs of running and warm instances", "max_mem_mib": "memory of running and warm instances",
    "max_running": "running instances", "max_warm": "warm instances", "max_pools": "pools",
    "max_instances_per_pool": "instances of one pool, whatever their status", "max_disk_gib": "all data disks",
}  # fmt: skip


def _name(kind: Callable[[str], Any]) -> Text:
    return Text(kind, kind.rule.pattern)  # type: ignore[attr-defined]


POOL = Object({
    "pool_id": Field(_name(PoolId), "the pool's name within its tenant"),
    "flake_ref": Field(Text(str), "what the image is built from, such as builtin:"),
    "profile": Field(Text(str), "which of its images"),
    "instance_resources": Field(Object({
        "vcpus": Field(Integer(1, 64), "vCPUs", _SHAPE.vcpus),
        "mem_mib": Field(Integer(96, 262_144), "memory", _SHAPE.mem_mib),
        "data_disk_mib": Field(Integer(0, 1_048_576), "a disk that survives stops; 0: none", _SHAPE.data_disk_mib),
    }, InstanceResources), "one instance's shape; cannot be changed later", _SHAPE),
    "desired_counts": Field(Object({
        "running": Field(Integer(0, MAX_COUNT), "how many run; alone: how many are up"),
        "warm": Field(Integer(0, MAX_COUNT), "how many are warm, exactly", None),
        "sleeping": Field(Integer(0, MAX_COUNT), "how many sleep, exactly", None),
    }, _counts), "how many instances; left out: the node's operator scales the pool", None),
    "seccomp_policy": Field(Choice(SeccompPolicy), "which system calls a VMM may make", SeccompPolicy.BASELINE),
    "snapshot_compression": Field(Choice(Compression), "how sleeping memory is packed", Compression.ZSTD),
    "metadata_enabled": Field(Boolean(), "whether guests may ask the metadata service", True),
    "pinned": Field(Boolean(), "its instances are never put to sleep, stopped or pruned", False),
    "critical": Field(Boolean(), "its instances are never touched, once they are there", False),
    "sleep_policy": Field(Object({
        "warm_after_s": Field(Integer(0, MAX_POLICY_S), "idle seconds until warm; 0: never", _SLEEP.warm_after_s),
        "sleep_after_s": Field(Integer(0, MAX_POLICY_S), "idle seconds until asleep; 0: never", _SLEEP.sleep_after_s),
        "min_running_s": Field(Integer(0, MAX_POLICY_S), "seconds it runs at least before", _SLEEP.min_running_s),
    }, SleepPolicy), "when idle instances are put away", _SLEEP),
    "egress": Field(Object({
        "policy": Field(Choice(Egress), "nothing, everything by NAT, or what is listed", Egress.NONE),
        "allow": Field(Array(Text(Destination.parse), 64), "CIDR[:PORT[/PROTO]], for policy allow", []),
    }, _egress), "what its guests reach outside their tenant", NO_EGRESS),
    "rollout": Field(Object({
        "max_unavailable": Field(Integer(1, MAX_COUNT), "instances down at once for a new revision", 1),
    }), "how a new revision goes through the pool", {"max_unavailable": 1}),
})  # fmt: skip

TENANT = Object({
    "tenant_id": Field(_name(TenantId), "the tenant's name"),
    "network": Field(Object({
        "tenant_net_id": Field(Integer(0, 4095), "never given twice in a cluster; names the bridge"),
        "ipv4_subnet": Field(Text(parse_subnet), "within 10.240.0.0/12, /16 to /29; its first address is the gateway"),
    }, _network), "mandatory: a node never derives a network by itself"),
    "quotas": Field(Object({
        name: Field(Integer(0, 1_000_000), about, getattr(_QUOTA, name)) for name, about in _ABOUT_QUOTA.items()
    }, Quota), "upper limits", _QUOTA),
    "secrets_hash": Field(Text(_secrets_hash, _SECRETS_HASH.pattern), "of the secrets it should have", None),
    "pinned": Field(Boolean(), "all its pools are pinned, and it is never pruned", False),
    "pools": Field(Array(POOL, MAX_POOLS), "its pools", []),
})  # fmt: skip

SCHEMA = Object({
    "schema_version": Field(Integer(SCHEMA_VERSION, SCHEMA_VERSION), "the version of this form"),
    "node_id": Field(_name(NodeId), "the node it is for; another one refuses it"),
    "generation": Field(Integer(0, 2**53 - 1), "grows; an older one is refused", None),
    "tenants": Field(Array(TENANT, MAX_TENANTS), "the tenants"),
    "prune_unknown_tenants": Field(Boolean(), "destroy tenants that are not listed", False),
    "prune_unknown_pools": Field(Boolean(), "destroy pools that their listed tenant does not list", False),
})  # fmt: skip


def json_schema() -> dict[str, Any]:
    """The published JSON schema (docs/desired-state.schema.json)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mvm desired state",
        "description": "What a coordinator asks of one node.",
        **SCHEMA.schema(),
    }


def parse(value: Any) -> DesiredState:
    """The document in a decoded JSON value.

    Raises one error that tells everything that is wrong: `InvalidInput` (``desired.invalid``), or `QuotaExceeded`
    (``desired.over_quota``) when it is only that tenants ask for more than their quota gives.
    """
    problems: list[Problem] = []
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:  # its other fields mean we know not what
        problems.append(Problem("$.schema_version", f"{version} is not known here: {SCHEMA_VERSION}"))
        refuse_all(problems)
    read = SCHEMA.read(value, "$", problems)
    tenants = [each for each in _items(read, "tenants")]
    _check_tenants(tenants, problems)
    refuse_all(problems)
    return DesiredState(
        node_id=read["node_id"], tenants=tuple(_tenant(each) for _, each in tenants), generation=read["generation"],
        prune_unknown_tenants=read["prune_unknown_tenants"], prune_unknown_pools=read["prune_unknown_pools"],
    )  # fmt: skip


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
                **{n: pool[n] for n in ("sleep_policy", "critical", "seccomp_policy", "egress", "metadata_enabled")},
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


def to_document(state: DesiredState) -> dict[str, Any]:
    """Inverse of `parse`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "node_id": str(state.node_id),
        **({} if state.generation is None else {"generation": state.generation}),
        "prune_unknown_tenants": state.prune_unknown_tenants,
        "prune_unknown_pools": state.prune_unknown_pools,
        "tenants": [_tenant_document(tenant) for tenant in state.tenants],
    }
