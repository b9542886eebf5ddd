"""Who gives way when there is not enough for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.crowds import Allowance, Holder, gives_way


def test_whoever_holds_most_gives_way_by_its_oldest() -> None:
    holders = [Holder("good", 1), Holder("bad", 2), Holder("bad", 3)]
    assert gives_way(holders) == 1


def test_among_equals_it_is_the_oldest() -> None:
    assert gives_way([Holder("a", 3), Holder("b", 1), Holder("c", 2)]) == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 9)), min_size=1))
def test_a_source_gives_way_only_if_no_other_holds_more(held: list[tuple[str, float]]) -> None:
    holders = [Holder(*each) for each in held]
    chosen = holders[gives_way(holders)]
    count = [h.source for h in holders].count
    assert all(count(chosen.source) >= count(other.source) for other in holders)


def test_an_allowance_is_each_sources_own_and_grows_again() -> None:
    allowance = Allowance(2.0, 3)
    assert [allowance.take("bad", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert allowance.take("good", 0.0)
    assert [allowance.take("bad", 1.0) for _ in range(3)] == [True, True, False]


def test_an_allowance_remembers_no_more_than_it_must() -> None:
    allowance = Allowance(1.0, 1)
    for source in range(10_000):
        assert allowance.take(source, 0.0)
    assert len(allowance._left) <= 4096
