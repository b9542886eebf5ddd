from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain import metadata
from mvm.domain.metadata import Self, proves, read, token
from mvm.metadata.answers import Answers

KEY = b"k" * 32
ONE = Self(
    "acme/web/i-00000001 2026", {"/latest/meta-data/mac": "02", "/latest/meta-data/a/b": "x", "/latest/user-data": "u"}
)
TWO = Self("acme/web/i-00000002 2026", {})
NOW = 1_700_000_000.0
TTL = "x-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "x-aws-ec2-metadata-token"


def answers(now: float = NOW) -> Answers:
    return Answers(KEY, lambda: now)


def given_token(ttl: str = "60") -> str:
    return answers().to(ONE, "PUT", metadata.TOKEN_PATH, {TTL: ttl}).body


def test_a_token_is_its_guests_alone_and_ends() -> None:
    shown = token(KEY, ONE, int(NOW) + 60)
    assert proves(KEY, ONE, shown, NOW)
    assert not proves(KEY, ONE, shown, NOW + 60)
    assert not proves(KEY, TWO, shown, NOW)
    assert not proves(b"l" * 32, ONE, shown, NOW)
    longer = f"{int(NOW) + 6000}{shown[10:]}"
    assert not proves(KEY, ONE, longer, NOW)


@given(st.text() | st.text("0123456789=-_ab", max_size=60))
def test_no_text_is_a_token(shown: str) -> None:
    assert not proves(KEY, ONE, shown, NOW)


def test_directories_list_what_is_in_them() -> None:
    assert read(ONE.tree, "/latest/meta-data/mac") == "02"
    assert read(ONE.tree, "/latest/meta-data/") == "a/\nmac"
    assert read(ONE.tree, "/latest") == "meta-data/\nuser-data"
    assert read(ONE.tree, "/") == "latest/"
    assert read(ONE.tree, "/latest/meta") is None
    assert read(ONE.tree, "") == "latest/"


def test_nobody_is_told_nothing() -> None:
    for method in ("GET", "PUT"):
        assert answers().to(None, method, metadata.TOKEN_PATH, {TTL: "60"}).status == 403


@pytest.mark.parametrize("ttl", ["", "0", "-1", "21601", "1e3", "٣", "9" * 5000, "60 "])
def test_a_token_lives_as_long_as_is_allowed(ttl: str) -> None:
    assert answers().to(ONE, "PUT", metadata.TOKEN_PATH, {TTL: ttl}).status == 400


def test_with_a_token_everything_is_told_and_without_it_nothing() -> None:
    path = "/latest/user-data"
    assert answers().to(ONE, "GET", path, {}).status == 401
    assert answers().to(ONE, "GET", path, {TOKEN: given_token()}).body == "u"
    assert answers().to(ONE, "GET", path, {"x-metadata-token": given_token()}).body == "u"
    assert answers(NOW + 61).to(ONE, "GET", path, {TOKEN: given_token()}).status == 401
    assert answers().to(ONE, "GET", f"{path}?a=b", {TOKEN: given_token()}).status == 200
    assert answers().to(ONE, "GET", "/latest/none", {TOKEN: given_token()}).status == 404
    assert answers().to(ONE, "GET", "//[", {TOKEN: given_token()}).status == 404
    for method in ("POST", "DELETE", "PUT"):
        assert answers().to(ONE, method, path, {TOKEN: given_token()}).status == 405
    assert answers().to(ONE, "PUT", metadata.TOKEN_PATH, {TTL: "60", "x-forwarded-for": "1.2.3.4"}).status == 403


def test_the_tree_tells_of_the_instance_and_leaves_out_what_is_empty() -> None:
    from dataclasses import replace

    from mvm.domain.addressing import TenantNetwork, parse_subnet
    from mvm.domain.ids import NodeId
    from mvm.domain.instance import Instance
    from mvm.domain.lifecycle import Status
    from mvm.domain.pool import ImageSource, InstanceResources, WorkerPool
    from tests.support.make import instance_ref

    ref, when = instance_ref(1), datetime(2026, 1, 1, tzinfo=UTC)
    pool = WorkerPool(ref.pool_ref, ImageSource("builtin:", "minimal"), InstanceResources(), NodeId("n1"), when)
    instance = Instance(ref, NodeId("n1"), 3, Status.RUNNING, when)
    network = TenantNetwork(1, parse_subnet("10.240.1.0/24"))
    found = metadata.of(network, pool, instance, "")
    assert found.tree["/latest/meta-data/local-ipv4"] == "10.240.1.3"
    assert "/latest/user-data" not in found.tree
    assert not any("public-keys" in path for path in found.tree)
    later = metadata.of(network, pool, replace(instance, created_at=datetime(2027, 1, 1, tzinfo=UTC)), "")
    assert later.name != found.name, "an id that is given again is another guest"
