"""Runs with faults hold what is promised; bugs put in are found; what fails replays and shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.simulation.bases import simulated
from tests.simulation.events import Event, events_of
from tests.simulation.planted import PLANTED
from tests.simulation.runs import Result, run, shortest, shrink

RUNS = 300
NEAR = 150
"""Seeds that are looked through for a planted bug; the first of them has it, as long as runs mean what they do now."""
FOUND_AT = {
    "drop-the-lock": 200, "ack-early": 30, "forget-an-undo": 1300, "count-ready-as-gone": 5, "compare-pid-only": 200,
    "stop-what-stands-still": 0, "go-by-another-name": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    with simulated():
        yield


@pytest.mark.parametrize("first", range(0, RUNS, 100))
def test_nothing_that_is_promised_is_broken(first: int) -> None:
    """Read on with: scripts/simulate --seed N."""
    assert [(r.seed, r.breaches) for seed in range(first, first + 100) if (r := run(seed)).breaches] == []


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_bug_is_found(name: str) -> None:
    with PLANTED[name]():
        found = next(_failing(range(FOUND_AT[name], FOUND_AT[name] + NEAR)), None)
        assert found is not None
        short = shortest(found)
        assert short.breaches
        assert len(short.events) <= len(found.events)
    assert not run(found.seed, short.events).breaches, "without the bug, the same events do no harm"


def _failing(seeds: Sequence[int]) -> Iterator[Result]:
    return (result for seed in seeds if (result := run(seed)).breaches)


def test_a_run_replays_exactly() -> None:
    for seed in (3, 4, 5):
        assert run(seed, trace=True) == run(seed, trace=True)


def test_of_events_those_stay_without_which_it_would_not_fail() -> None:
    events = [Event("time", n, 5, 7) for n in range(40)]

    def fails(left: Sequence[Event]) -> bool:
        picks = [event.pick for event in left]
        return 3 in picks and 29 in picks

    assert shrink(0, events, fails) == [Event("time", 3), Event("time", 29)]


def test_seeds_differ() -> None:
    assert len({tuple(events_of(seed)) for seed in range(100)}) == 100
