"""Slow is not dead."""

import pytest

from mvm.domain.liveness import Answer, judge, patience_s


@pytest.mark.parametrize(
    ("load", "cpus", "seconds"), [(0.0, 2, 2), (2.0, 2, 2), (14.0, 2, 14), (1000.0, 2, 30), (3.0, 0, 6)]
)
def test_patience_grows_with_the_load_and_has_an_end(load: float, cpus: int, seconds: float) -> None:
    assert patience_s(2, load, cpus) == seconds


def test_what_took_long_is_well_and_says_so() -> None:
    assert judge(None, 0.1, 3) == Answer(True)
    assert judge(None, 7.25, 3) == Answer(True, "slow: answered after 7.2 s")
    assert judge("no answer", 0.1, 3) == Answer(False, "no answer")
    assert judge("no answer", 14, 3) == Answer(False, "no answer (waited 14 s)")
