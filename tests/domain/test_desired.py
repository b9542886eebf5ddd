"""The desired-state document: everything that is wrong at once, each with its path."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.desired import DesiredPool, DesiredState, DesiredTenant, check_for_node, digest, parse
from mvm.domain.desired_schema import json_schema, schema_text
from mvm.domain.document import MAX_BYTES, check_size, decode_json
from mvm.domain.egress import Destination, Egress, EgressPolicy
from mvm.domain.ids import NodeId, PoolId, PoolRef, TenantId
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, SeccompPolicy, SleepPolicy
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota
from mvm.errors import InvalidInput, MvmError, NotAllowed, QuotaExceeded
from tests.support.fleets import desired_states

DOCS = Path(__file__).resolve().parents[2] / "docs"

MINIMAL: dict[str, Any] = {
    "schema_version": 1,
    "node_id": "n1",
    "tenants": [
        {
            "tenant_id": "acme",
            "network": {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/24"},
            "pools": [{"pool_id": "web", "flake_ref": "builtin:", "profile": "minimal"}],
        }
    ],
}


def problems(value: Any) -> dict[str, str]:
    with pytest.raises(MvmError) as caught:
        parse(value)
    errors = caught.value.fields["errors"]
    assert isinstance(errors, list)
    found = {error["path"]: error["message"] for error in errors}
    assert len(found) == len(errors)
    for path, message in found.items():
        assert f"{path}: {message}" in caught.value.message
    return found


def changed(path: str, value: Any) -> dict[str, Any]:
    """`MINIMAL` with another value at a path such as ``tenants.0.pools.0.pinned``."""
    made = deepcopy(MINIMAL)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = made
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[last] = value
    return made


def document(state: DesiredState) -> dict[str, Any]:
    """A state in the document's words."""
    return {
        "schema_version": 1, "node_id": state.node_id, "generation": 3,
        "prune_unknown_tenants": state.prune_unknown_tenants, "prune_unknown_pools": state.prune_unknown_pools,
        "tenants": [
            {
                "tenant_id": t.id, "quotas": asdict(t.quota), "pinned": t.pinned,
                "network": {"tenant_net_id": t.network.net_id, "ipv4_subnet": str(t.network.subnet)},
                "pools": [
                    {
                        "pool_id": p.ref.pool, **asdict(p.source), "instance_resources": asdict(p.resources),
                        "pinned": p.pinned, "critical": p.critical, "sleep_policy": asdict(p.sleep_policy),
                        "rollout": {"max_unavailable": p.max_unavailable}, "egress": p.egress.to_dict(),
                        **({} if p.desired is None else {"desired_counts": counts(p.desired)}),
                    }
                    for p in t.pools
                ],
            }
            for t in state.tenants
        ],
    }  # fmt: skip


def counts(wanted: DesiredCounts) -> dict[str, int]:
    return {name: count for name, count in asdict(wanted).items() if count is not None}


@given(desired_states())
def test_what_is_written_is_read(state: DesiredState) -> None:
    assert parse(json.loads(json.dumps(document(state)))) == replace(state, generation=3)


def test_what_is_left_out_has_its_default() -> None:
    pool = DesiredPool(PoolRef(TenantId("acme"), PoolId("web")), ImageSource("builtin:", "minimal"))
    tenant = DesiredTenant(TenantId("acme"), TenantNetwork(7, parse_subnet("10.240.7.0/24")), pools=(pool,))
    assert parse(MINIMAL) == DesiredState(NodeId("n1"), (tenant,))


def test_every_field_is_carried() -> None:
    made = deepcopy(MINIMAL)
    made["tenants"][0] |= {"secrets_hash": "sha256:ab12", "quotas": {"max_running": 9}}
    made["tenants"][0]["pools"][0] |= {
        "instance_resources": {"vcpus": 2, "mem_mib": 128, "data_disk_mib": 8},
        "desired_counts": {"running": 2, "warm": 1, "sleeping": 0},
        "seccomp_policy": "strict", "snapshot_compression": "lz4", "metadata_enabled": False, "pinned": True,
        "critical": True, "sleep_policy": {"warm_after_s": 0},
        "egress": {"policy": "allow", "allow": ["192.0.2.0/24:443/tcp"]}, "rollout": {"max_unavailable": 2},
    }  # fmt: skip
    (tenant,) = parse(made).tenants
    assert (tenant.secrets_hash, tenant.quota) == ("sha256:ab12", Quota(max_running=9))
    assert tenant.pools == (
        DesiredPool(
            PoolRef(TenantId("acme"), PoolId("web")), ImageSource("builtin:", "minimal"), InstanceResources(2, 128, 8),
            DesiredCounts(2, 1, 0), Compression.LZ4, SleepPolicy(warm_after_s=0), pinned=True, critical=True,
            seccomp_policy=SeccompPolicy.STRICT, metadata_enabled=False, max_unavailable=2,
            egress=EgressPolicy(Egress.ALLOW, (Destination.parse("192.0.2.0/24:443/tcp"),)),
        ),
    )  # fmt: skip


def test_a_pinned_tenants_pools_are_pinned() -> None:
    assert parse(changed("tenants.0.pinned", True)).tenants[0].pools[0].pinned


POOL = "tenants.0.pools.0"


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("schema_version", 2, "$.schema_version", "2 is not allowed: 1"),
        ("schema_version", True, "$.schema_version", "true is not allowed: whole numbers, 1"),
        ("generation", -1, "$.generation", "-1 is not allowed: 0 to 9007199254740991"),
        ("node_id", "N 1", "$.node_id", "'N 1' is not the id of a node; allowed: 1 to 63 of"),
        ("tenants", {}, "$.tenants", "an object of 0 fields is not an array"),
        ("tenants.0", 5, "$.tenants[0]", "5 is not an object"),
        ("tenants.0.network", None, "$.tenants[0].network", "null is not an object"),
        ("tenants.0.network.tenant_net_id", 4096, "$.tenants[0].network.tenant_net_id", "4096 is not allowed: 0 to"),
        ("tenants.0.network.ipv4_subnet", "10.0.0.0/24", "$.tenants[0].network.ipv4_subnet", "outside the cluster's"),
        ("tenants.0.quotas.max_vcpus", 1.5, "$.tenants[0].quotas.max_vcpus", "1.5 is not allowed: whole numbers, 0 to"),
        ("tenants.0.secrets_hash", "a b", "$.tenants[0].secrets_hash", "is not a hash"),
        (f"{POOL}.desired_counts", {"running": -1}, "$.tenants[0].pools[0].desired_counts.running",
         "-1 is not allowed: 0 to 10000"),
        (f"{POOL}.desired_counts", {"running": 10**30}, "$.tenants[0].pools[0].desired_counts.running",
         "1000000000000000000000000000000 is not allowed: 0 to 10000"),
        (f"{POOL}.desired_counts", {"running": 2.5}, "$.tenants[0].pools[0].desired_counts.running",
         "2.5 is not allowed: whole numbers, 0 to 10000"),
        (f"{POOL}.desired_counts", {"warm": 1}, "$.tenants[0].pools[0].desired_counts.running", "is missing"),
        (f"{POOL}.pinend", True, "$.tenants[0].pools[0].pinend", "is not a field here: did you mean pinned?"),
        (f"{POOL}.a b", 1, '$.tenants[0].pools[0]["a b"]', "is not a field here"),
        (f"{POOL}.pinned", "yes", "$.tenants[0].pools[0].pinned", '"yes" is not allowed: true or false'),
        (f"{POOL}.seccomp_policy", "none", "$.tenants[0].pools[0].seccomp_policy", "allowed: baseline, strict"),
        (f"{POOL}.sleep_policy", {"sleep_after_s": 100}, "$.tenants[0].pools[0].sleep_policy.sleep_after_s",
         "at least warm-after, 300"),
        (f"{POOL}.egress", {"policy": "nat", "allow": ["1.2.3.4"]}, "$.tenants[0].pools[0].egress.allow",
         "says nothing with egress nat"),
        (f"{POOL}.egress", {"policy": "allow", "allow": ["x"]}, "$.tenants[0].pools[0].egress.allow[0]",
         "is not an IPv4 network"),
        (f"{POOL}.flake_ref", "github:x/y", "$.tenants[0].pools[0].flake_ref", "cannot be built here"),
        (f"{POOL}.profile", "huge", "$.tenants[0].pools[0].profile", "allowed: minimal, baseline, python"),
        (f"{POOL}.rollout", {"max_unavailable": 0}, "$.tenants[0].pools[0].rollout.max_unavailable", "1 to 10000"),
        (f"{POOL}.instance_resources", {"data_disk_mib": 2}, "$.tenants[0].pools[0].instance_resources.data_disk_mib",
         "allowed: 4 to"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path: str, value: Any, where: str, message: str) -> None:
    found = problems(changed(path, value))
    assert list(found) == [where]
    assert message in found[where]


def test_everything_is_told_at_once() -> None:
    made = deepcopy(MINIMAL)
    (tenant,) = made["tenants"]
    del tenant["network"]
    tenant["pools"][0]["desired_counts"] = {"running": -1}
    made["tenants"] += [
        {"tenant_id": "b", "network": {"tenant_net_id": 1, "ipv4_subnet": "10.241.0.0/16"},
         "pools": [*tenant["pools"][:1], {**tenant["pools"][0], "desired_counts": {"running": 1}}]},
        {"tenant_id": "b", "network": {"tenant_net_id": 1, "ipv4_subnet": "10.241.9.0/24"}, "nam": 1},
    ]  # fmt: skip
    made["schema_version"] = 9
    assert list(problems(made)) == [
        "$.schema_version",
        "$.tenants[0].network",
        "$.tenants[0].pools[0].desired_counts.running",
        "$.tenants[1].pools[0].desired_counts.running",
        "$.tenants[2].nam",
        "$.tenants[2].tenant_id",
        "$.tenants[2].network.tenant_net_id",
        "$.tenants[2].network.ipv4_subnet",
        "$.tenants[1].pools[1].pool_id",
    ]


def test_a_network_within_another_is_found_wherever_it_is() -> None:
    made = deepcopy(MINIMAL)
    for at, subnet in enumerate(["10.241.0.0/16", "10.242.0.0/24", "10.241.1.0/24", "10.241.200.0/24"]):
        name = {"tenant_id": f"t{at}", "network": {"tenant_net_id": at, "ipv4_subnet": subnet}}
        made["tenants"].append(name)
    assert problems(made) == {
        f"$.tenants[{at}].network.ipv4_subnet": f"{subnet} overlaps 10.241.0.0/16 at $.tenants[1].network.ipv4_subnet"
        for at, subnet in ((3, "10.241.1.0/24"), (4, "10.241.200.0/24"))
    }


@pytest.mark.parametrize(
    ("quotas", "wanted", "where", "message"),
    [
        ({"max_running": 1}, {"running": 2}, "pools", "2 running instances in all, and quotas.max_running is 1"),
        ({"max_warm": 0}, {"running": 0, "warm": 1}, "pools", "1 warm instances in all, and quotas.max_warm is 0"),
        ({"max_vcpus": 1}, {"running": 1, "warm": 1}, "pools", "2 vCPUs in all, and quotas.max_vcpus is 1"),
        ({"max_mem_mib": 256}, {"running": 2}, "pools", "512 MiB of memory in all, and quotas.max_mem_mib is 256"),
        ({"max_pools": 0}, {"running": 0}, "pools", "1 pools, and quotas.max_pools is 0"),
        ({"max_instances_per_pool": 2}, {"running": 1, "sleeping": 2}, "pools[0].desired_counts",
         "3 instances, and quotas.max_instances_per_pool is 2"),
    ],
)  # fmt: skip
def test_counts_above_the_quota_are_refused(quotas: Any, wanted: Any, where: str, message: str) -> None:
    made = changed(f"{POOL}.desired_counts", wanted)
    made["tenants"][0]["quotas"] = quotas
    assert problems(made) == {f"$.tenants[0].{where}": message}
    with pytest.raises(QuotaExceeded) as caught:
        parse(made)
    assert caught.value.code == "desired.over_quota"
    with pytest.raises(InvalidInput) as invalid:
        parse({**made, "node_id": ""})
    assert invalid.value.code == "desired.invalid"


def test_more_guests_than_addresses_are_refused() -> None:
    made = changed(f"{POOL}.desired_counts", {"running": 5})
    parse(made)
    made["tenants"][0]["network"]["ipv4_subnet"] = "10.240.7.0/29"
    told = "5 instances in all, and 10.240.7.0/29 has 4 addresses for guests, from .3 on"
    assert problems(made) == {"$.tenants[0].pools": told}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"", "line 1, column 1"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 10_000, "too long"),
        (b"schema_version: 1", "not JSON"),
    ],
)
def test_what_is_no_document(content: bytes, what: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_json(content)
    assert caught.value.code == "desired.malformed"
    assert what in caught.value.message


def test_a_field_given_twice_is_refused() -> None:
    text = json.dumps(MINIMAL).replace('"node_id": "n1"', '"node_id": "n2", "node_id": "n1"')
    assert problems(decode_json(text.encode())) == {"$.node_id": "is given more than once"}


def test_100_mb_are_refused_by_their_size() -> None:
    check_size(MAX_BYTES)
    with pytest.raises(InvalidInput) as caught:
        decode_json(bytes(100_000_000))
    assert caught.value.code == "desired.too_large"


def test_many_errors_are_told_in_part() -> None:
    made = deepcopy(MINIMAL)
    made["tenants"] = [None] * 3000
    with pytest.raises(InvalidInput) as caught:
        parse(made)
    assert "has 1000 errors and perhaps more" in caught.value.message
    assert "and 900 more" in caught.value.message


def test_another_nodes_document_and_an_older_one_are_refused() -> None:
    state = replace(parse(MINIMAL), generation=4)
    check_for_node(state, NodeId("n1"), None)
    check_for_node(state, NodeId("n1"), state)
    check_for_node(replace(state, generation=None), NodeId("n1"), state)
    with pytest.raises(InvalidInput) as foreign:
        check_for_node(state, NodeId("n2"), None)
    assert foreign.value.code == "desired.other_node"
    with pytest.raises(NotAllowed) as older:
        check_for_node(state, NodeId("n1"), replace(state, generation=5))
    assert older.value.code == "desired.older_generation"


@given(desired_states(), desired_states())
def test_a_digest_names_the_content(one: DesiredState, other: DesiredState) -> None:
    assert (digest(one) == digest(other)) == (one == other)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["schema_version", "node_id", "tenants", "tenant_id", "network", "pools", "quotas"]),
                inner,
            )
        ),
    )
)
def test_no_value_is_too_strange(value: Any) -> None:
    with pytest.raises(MvmError):
        parse(value)


def test_the_published_schema_is_this_one() -> None:
    """To write it anew: python -c 'from mvm.domain.desired_schema import *; print(schema_text(), end="")'."""
    assert (DOCS / "desired-state.schema.json").read_text() == schema_text()


def names(schema: dict[str, Any]) -> set[str]:
    inner = [schema.get("items", {}), *schema.get("properties", {}).values()]
    return set(schema.get("properties", {})).union(*(names(each) for each in inner if each))


def test_the_documentation_names_every_field() -> None:
    lines = [line for line in (DOCS / "desired-state.md").read_text().splitlines() if line.startswith("| `")]
    told = {line.split("`")[1].rpartition(".")[2] for line in lines}
    assert told == names(json_schema())


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.json")), ids=lambda path: path.name)
def test_the_examples_are_documents(path: Path) -> None:
    assert parse(decode_json(path.read_bytes())).tenants
