from __future__ import annotations

from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.ids import (
    InstanceId,
    InstanceRef,
    JobId,
    NodeId,
    PoolId,
    PoolRef,
    Revision,
    TenantId,
    node_id_from_hostname,
)
from mvm.errors import InvalidInput
from tests.support.strategies import instance_refs, pool_refs, slugs

NAMES = [TenantId, PoolId, NodeId, InstanceId, JobId, Revision]


@given(slugs())
def test_slugs_are_tenants_pools_and_nodes(text: str) -> None:
    for kind in (TenantId, PoolId, NodeId):
        assert kind(text) == text
        assert str(kind(text)) == text


@pytest.mark.parametrize("kind", NAMES)
@given(text=st.text(max_size=80))
def test_a_name_is_accepted_whole_or_refused_with_its_rule(kind: type[TenantId], text: str) -> None:
    if not kind.rule.fullmatch(text):
        with pytest.raises(InvalidInput) as refused:
            kind(text)
        error = refused.value
        assert (error.code, error.hint) == (f"{kind.what}.invalid_id", f"allowed: {kind.allowed}")
        assert error.fields["field"] == kind.what
    else:
        assert kind(text) == text
        assert not set(text) & set("/ \n\0%\\"), "it must be safe as a file's name"
        assert not text.startswith((".", "-"))


@pytest.mark.parametrize("bad", ["", "-a", "a-", "a--b", "1a", "A", "a_b", "a/b", "a.b", "ä", "a\n", " a", "a" * 33])
def test_what_is_no_slug_is_refused(bad: str) -> None:
    for kind in (TenantId, PoolId):
        with pytest.raises(InvalidInput):
            kind(bad)


@pytest.mark.parametrize("bad", ["", "7f2c91ab", "i-7f2c91a", "i-7f2c91abc", "i-7F2C91AB", "i-7f2c91ag", "j-7f2c91ab"])
def test_what_is_no_instance_id_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput):
        InstanceId(bad)


@given(pool_refs)
def test_a_pools_ref_is_read_as_it_is_printed(ref: PoolRef) -> None:
    assert PoolRef.parse(str(ref)) == ref


@given(instance_refs)
def test_an_instances_ref_is_read_as_it_is_printed(ref: InstanceRef) -> None:
    assert InstanceRef.parse(str(ref)) == ref
    assert ref.pool_ref.instance(ref.instance) == ref
    assert str(ref).startswith(str(ref.pool_ref) + "/")


@given(st.text("a/i-0", max_size=30))
def test_what_is_read_as_a_ref_prints_the_same(text: str) -> None:
    for kind in (PoolRef, InstanceRef):
        with suppress(InvalidInput):
            assert str(kind.parse(text)) == text


@pytest.mark.parametrize("bad", ["", "acme", "acme/web/i-7f2c91ab", "acme/", "/web", "acme//web", "acme/web/"])
def test_what_is_no_pool_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput):
        PoolRef.parse(bad)


@pytest.mark.parametrize("bad", ["", "acme", "acme/web", "acme/web/", "acme/web/i-1", "acme/web/i-7f2c91ab/x"])
def test_what_is_no_instance_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput):
        InstanceRef.parse(bad)


def test_a_huge_input_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidInput) as refused:
        InstanceRef.parse("x" * 100_000)
    assert len(str(refused.value.fields["value"])) <= 80


MILLISECONDS = st.integers(0, int(datetime(9999, 1, 1).timestamp() * 1000))


@given(MILLISECONDS, MILLISECONDS, st.binary(min_size=5, max_size=16), st.binary(min_size=5, max_size=16))
def test_jobs_sort_by_the_time_they_were_made(first: int, second: int, one: bytes, other: bytes) -> None:
    a, b = JobId.make(first, one), JobId.make(second, other)
    if first != second:
        assert (a < b) == (first < second)
    assert (a == b) == ((first, one[:5]) == (second, other[:5]))


@given(st.binary(min_size=4, max_size=8))
def test_an_instance_id_is_made_of_4_random_bytes(raw: bytes) -> None:
    assert InstanceId.from_bytes(raw) == "i-" + raw[:4].hex()


@given(st.text(max_size=100))
def test_any_hostname_gives_a_node_id(hostname: str) -> None:
    assert NodeId(node_id_from_hostname(hostname))


def test_a_hostname_gives_its_short_name() -> None:
    assert node_id_from_hostname("Node_7.example.org") == "node-7"
    assert node_id_from_hostname("...") == "node"
