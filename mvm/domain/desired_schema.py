"""The form of the desired-state document in one table: reading, the published JSON schema and tests go by it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.document import Array, Boolean, Choice, Field, Integer, Object, Text
from mvm.domain.egress import MAX_DESTINATIONS, NO_EGRESS, Destination, Egress, EgressPolicy
from mvm.domain.ids import NodeId, PoolId, TenantId
from mvm.domain.pool import MAX_COUNT, MAX_POLICY_S, DesiredCounts, InstanceResources, SeccompPolicy, SleepPolicy
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota
from mvm.domain.vmm import OnExit
from mvm.errors import InvalidInput

SCHEMA_VERSION = 1
MAX_TENANTS = 4096
MAX_POOLS = 10_000  # of one tenant
_SECRETS_HASH = re.compile(r"[A-Za-z0-9:+/=_.-]{1,128}")


def _secrets_hash(text: str) -> str:
    if not _SECRETS_HASH.fullmatch(text):
        raise InvalidInput("desired.invalid", "is not a hash", hint="allowed: 1 to 128 of A-Z a-z 0-9 : + / = _ . -")
    return text


def _network(tenant_net_id: int, ipv4_subnet: IPv4Network) -> TenantNetwork:
    return TenantNetwork(tenant_net_id, ipv4_subnet)


def _egress(policy: Egress, allow: list[Any]) -> EgressPolicy:
    return EgressPolicy(policy, tuple(dict.fromkeys(allow)))


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
    }, DesiredCounts), "how many instances; left out: the node's operator scales the pool", None),
    "seccomp_policy": Field(Choice(SeccompPolicy), "which system calls a VMM may make", SeccompPolicy.BASELINE),
    "snapshot_compression": Field(Choice(Compression), "how sleeping memory is packed", Compression.ZSTD),
    "metadata_enabled": Field(Boolean(), "whether guests may ask the metadata service", True),
    "pinned": Field(Boolean(), "nobody but a person stops its instances or puts them away; not pruned", False),
    "critical": Field(Boolean(), "its instances are started, and otherwise left to people; not pruned", False),
    "on_exit": Field(Choice(OnExit), "what follows when a guest halts or reboots by itself", OnExit.RESTART),
    "sleep_policy": Field(Object({
        "warm_after_s": Field(Integer(0, MAX_POLICY_S), "idle seconds until warm; 0: never", _SLEEP.warm_after_s),
        "sleep_after_s": Field(Integer(0, MAX_POLICY_S), "idle seconds until asleep; 0: never", _SLEEP.sleep_after_s),
        "min_running_s": Field(Integer(0, MAX_POLICY_S), "seconds it runs at least before", _SLEEP.min_running_s),
    }, SleepPolicy), "when idle instances are put away", _SLEEP),
    "egress": Field(Object({
        "policy": Field(Choice(Egress), "nothing, everything by NAT, or what is listed", Egress.NONE),
        "allow": Field(Array(Text(Destination.parse), MAX_DESTINATIONS), "CIDR[:PORT[/PROTO]], for policy allow", []),
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
    "pinned": Field(Boolean(), "all its pools are pinned, and none is pruned", False),
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
    """The published JSON schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mvm desired state",
        "description": "What a coordinator asks of one node.",
        **SCHEMA.schema(),
    }


def schema_text() -> str:
    """The content of docs/desired-state.schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"
