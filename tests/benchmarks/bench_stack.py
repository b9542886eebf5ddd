"""The real stack that benchmarks measure: one for all of a run, brought up by the first that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from tests.support.stack import Stack, running_stack

COMMAND = str(Path(sys.executable).with_name("mvm"))  # as people run it
_SETTINGS = {  # the defaults, which tests make shorter; and the steps of jobs in the worker's log
    "MVM_STALE_PID_SWEEP_S": "10", "MVM_RECONCILE_SWEEP_S": "15", "MVM_ORPHAN_SWEEP_S": "60",
    "MVM_ORPHAN_GRACE_S": "60", "MVM_LOG": "mvm.jobs=debug",
}  # fmt: skip


class Bench:
    """What benchmarks share. `stack` has tenant ``bench`` with the pool ``bench/web``, built, and no instances."""

    def __init__(self, cleanup: ExitStack, say: Callable[[str], None]) -> None:
        self._cleanup = cleanup
        self.say = say

    @cached_property
    def stack(self) -> Stack:
        """Up. Packages come from the tests' cache."""
        self.say("bringing a stack up")
        stack = self._cleanup.enter_context(running_stack(**_SETTINGS))
        stack.mvm("tenant", "create", "bench")
        stack.mvm("pool", "create", "bench/web", "--flake", "builtin:", "--profile", "minimal")
        self.say("building its image")
        stack.mvm("pool", "build", "bench/web", timeout_s=600)
        return stack
