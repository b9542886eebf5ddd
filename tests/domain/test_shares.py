from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.agent.places import ALL, COMMANDS, NODE, STREAMS
from mvm.agent.room import VERIFIED
from mvm.domain.shares import Places, Refusal, refusal

PLACES = Places("streams", 8, 4)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({}, None),
        ({"a": 3}, None),
        ({"a": 4}, Refusal.SHARE),
        ({"b": 4}, None),
        ({"a": 2, "b": 4}, Refusal.SHARE),  # two are left for others
        ({"b": 4, "c": 3}, None),
        ({"b": 4, "c": 4}, Refusal.FULL),
    ],
)
def test_a_tenant_has_its_share_and_never_more_than_is_left(held: dict[str, int], expected: Refusal | None) -> None:
    assert refusal(PLACES, held, "a") == expected


@given(st.lists(st.sampled_from("abcdefgh")), st.integers(2, 64), st.integers(1, 64))
def test_greedy_tenants_leave_a_place_for_the_next(asking: list[str], count: int, share: int) -> None:
    places = Places("any", count, min(share, count))
    held: Counter[str] = Counter()
    for tenant in asking:
        if refusal(places, held, tenant) is None:
            held[tenant] += 1
    assert held.total() <= count
    assert all(own <= share for own in held.values())


@pytest.mark.parametrize("places", [COMMANDS, STREAMS])
def test_six_tenants_that_take_all_they_can_leave_a_place_for_a_seventh(places: Places) -> None:
    held: Counter[str] = Counter()
    for tenant in "abcdef":
        while refusal(places, held, tenant) is None:
            held[tenant] += 1
    assert refusal(places, held, "new") is None


@pytest.mark.parametrize("places", [places for places in ALL if places is not NODE], ids=lambda places: places.kind)
def test_who_takes_all_it_can_leaves_a_place_for_the_next(places: Places) -> None:
    held: Counter[str] = Counter()
    while refusal(places, held, "greedy") is None:
        held["greedy"] += 1
    assert refusal(places, held, "next") is None


def test_without_shares_whoever_comes_takes_what_is_free() -> None:
    places = Places("any", 3)
    assert [refusal(places, {"a": held}, "a") for held in range(4)] == [None, None, None, Refusal.FULL]


def test_what_may_last_leaves_connections_for_what_is_urgent() -> None:
    assert COMMANDS.count + STREAMS.count < VERIFIED
