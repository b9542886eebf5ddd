"""What 6e69ba5 left comes up under this mvm, its guests untouched."""

from __future__ import annotations

import pytest

from tests.support import old_state
from tests.support.stack import Stack, running_stack

pytestmark = [pytest.mark.redis]


def test_a_state_directory_of_6e69ba5_comes_up_and_its_guests_are_untouched() -> None:
    """On the fake host, whose guests are in the state directory."""

    def before(stack: Stack) -> None:
        old_state.unpack(stack.layout.root)

    with running_stack("fake", before=before, MVM_NETNS="host") as stack:
        found = {row["ref"]: (row["status"], row["pid"]) for row in stack.json("instance", "list")}
        assert found == old_state.PROCESSES
        woken = next(ref for ref, (status, _) in old_state.PROCESSES.items() if status == "sleeping")
        stack.mvm("instance", "wake", woken)
        assert stack.statuses()[woken] == "running"
        assert stack.mvm("audit", "verify", "acme").split()[1] == "whole"
        assert stack.fails(4, "tenant.exists", "tenant", "create", "acme")
        assert stack.json("tenant", "create", "new")["net_id"] == 2, "a net id is never given twice"
