from __future__ import annotations

import pytest

from mvm.domain.egress import MAX_DESTINATIONS, NO_EGRESS, Destination, Egress, EgressPolicy
from mvm.domain.pool import WorkerPool
from mvm.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("192.0.2.7:443", "192.0.2.7/32:443/tcp"),
        ("192.0.2.7:53/udp", "192.0.2.7/32:53/udp"),
        ("0.0.0.0/0:443/tcp", "0.0.0.0/0:443/tcp"),
    ],
)
def test_destinations(text: str, said: str) -> None:
    assert str(Destination.parse(text)) == said
    assert Destination.parse(said) == Destination.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "example.org", "192.0.2.1/24", "192.0.2.0/33", "::1", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:",
        "192.0.2.1:x", "192.0.2.1:1/", "192.0.2.1:1/icmp", "192.0.2.1:-1", "192.0.2.1:1/tcp/udp",
        "10.240.7.0/24", "169.254.169.254", "x" * 1000, "192.0.2.1; drop", "192.0.2.1:٣",
    ],
)  # fmt: skip
def test_a_bad_destination_is_named(text: str) -> None:
    with pytest.raises(InvalidInput) as bad:
        Destination.parse(text)
    assert bad.value.code == "pool.invalid_egress"
    assert bad.value.fields["field"] == "allow"
    assert "--allow" in bad.value.message
    assert "CIDR" in bad.value.hint
    assert len(bad.value.message) < 250


@pytest.mark.parametrize(
    "data",
    [
        {"policy": "allow"}, {"policy": "allow", "allow": []}, {"policy": "nat", "allow": ["192.0.2.1"]},
        {"policy": "none", "allow": ["192.0.2.1"]}, {"policy": "all"}, {"policy": 7},
        {"policy": "allow", "allow": [f"192.0.2.{n}" for n in range(MAX_DESTINATIONS + 1)]},
    ],
)  # fmt: skip
def test_a_bad_policy_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="egress"):
        EgressPolicy.from_dict(data)


def test_a_policy_goes_through_json_and_older_pools_have_none() -> None:
    policy = EgressPolicy.from_dict({"policy": "allow", "allow": ["192.0.2.1:80", "192.0.2.1:80/tcp"]})
    assert policy.allow == (Destination.parse("192.0.2.1:80"),)
    assert EgressPolicy.from_dict(policy.to_dict()) == policy
    assert EgressPolicy.from_dict({}) == NO_EGRESS
    assert NO_EGRESS.kind is Egress.NONE
    old = {
        "ref": "acme/web", "flake_ref": "builtin:", "profile": "minimal", "resources": {}, "node_id": "n1",
        "created_at": "2026-01-01T00:00:00+00:00", "desired": None, "revision": None,
    }  # fmt: skip
    assert WorkerPool.from_dict(old).egress == NO_EGRESS
