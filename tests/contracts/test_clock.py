"""ports/clock.py."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import ManualClock
from mvm.ports.clock import Clock


@pytest.fixture(params=[ManualClock, SystemClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    return request.param()


def test_the_wall_time_is_utc(clock: Clock) -> None:
    assert clock.now().utcoffset() == timedelta(0)


def test_monotonic_time_never_shrinks(clock: Clock) -> None:
    times = [clock.monotonic() for _ in range(50)]
    assert times == sorted(times)


def test_random_bytes_differ_from_call_to_call(clock: Clock) -> None:
    assert [len(clock.random(n)) for n in (0, 4, 5, 32, 64, 100)] == [0, 4, 5, 32, 64, 100]
    assert len({clock.random(5) for _ in range(100)}) == 100


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock()
    before = clock.now(), clock.monotonic()
    assert (clock.now(), clock.monotonic()) == before
    clock.advance(2.5)
    assert clock.now() - before[0] == timedelta(seconds=2.5)
    assert clock.monotonic() - before[1] == 2.5
