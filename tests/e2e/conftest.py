"""One stack on the fake host for each module: everything real but the guests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_stack import LiveStack, live_stack


@pytest.fixture(scope="module")
def mvm() -> Iterator[LiveStack]:
    """The command, over a stack that is up; redis, workers, Beat, agent and Flower are processes of their own."""
    with live_stack("--driver", "fake", "--netns", "host", MVM_NODE_ID="n1") as stack:
        yield stack
