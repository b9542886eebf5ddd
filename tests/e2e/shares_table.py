"""One tenant at full throttle, a shared resource at a time, and how another fares: a table, ``build/shares.txt``.

Run by name, for it is a measurement: ``pytest tests/e2e/shares_table.py -s``, and with ``MVM_TEST_SHARES=whole`` often
enough to compare medians.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.test_isolation import stack
from tests.support.crowded import Fare, crowd, table
from tests.support.stack import Stack
from tests.support.throttle import ALL

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(1800)]

__all__ = ["stack"]  # the fixture

WHOLE = os.environ.get("MVM_TEST_SHARES") == "whole"
SAMPLES, THROTTLE_S = (60, 120.0) if WHOLE else (3, 40.0)
TABLE = Path(__file__).parents[2] / "build" / "shares.txt"


def test_a_tenant_at_full_throttle_leaves_the_other_its_share(stack: Stack) -> None:
    """`docs/shares.md` lists what is shared. The table is ``build/shares.txt``."""
    base, fares = Fare(), {}
    with crowd(stack, good="t1", bad="t0") as crowded:
        for what in ALL:
            fare = base if what == "processors" else fares.setdefault(what, Fare())
            with crowded.throttled(what, THROTTLE_S, fare):
                for _ in range(SAMPLES):
                    crowded.sample(fare)
            print(table(base, fares))
    text = table(base, fares)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    assert {what: fare.failures for what, fare in {"processors": base, **fares}.items() if fare.failures} == {}
    assert all(fare.pieces for fare in fares.values()), text
    if WHOLE:
        own = base.medians()
        slow = {
            (what, name): value / own[name]
            for what, fare in fares.items()
            for name, value in fare.medians().items()
            if value > own[name] * 1.5
        }
        assert slow == {}, text
