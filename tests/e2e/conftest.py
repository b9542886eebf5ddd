"""One stack on the fake host for each module: everything real but the guests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stack import Stack, running_stack


@pytest.fixture(scope="module")
def fake_stack() -> Iterator[Stack]:
    """Redis, workers, Beat, agent and Flower are processes of their own, outside any namespace."""
    seldom = {f"MVM_{sweep}_SWEEP_S": "60" for sweep in ("STALE_PID", "RECONCILE", "ORPHAN")}
    with running_stack("fake", MVM_NETNS="host", **seldom) as stack:
        yield stack
