"""The real stack that benchmarks measure: one for all of a run, brought up by the first that needs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property

from tests.support.live_stack import LiveStack, live_stack
from tests.support.microvm import image_cache


class Bench:
    """What benchmarks share. `stack` has tenant ``bench`` with the pool ``bench/web``, built, and no instances."""

    def __init__(self, cleanup: ExitStack, say: Callable[[str], None]) -> None:
        self._cleanup = cleanup
        self.say = say

    @cached_property
    def stack(self) -> LiveStack:
        """Up, with the steps of jobs in its worker's log. Packages and images come from the tests' cache."""
        self.say("bringing a stack up")
        stack = self._cleanup.enter_context(live_stack(before=_use_cache, MVM_LOG="mvm.jobs=debug"))
        stack.ok("tenant", "create", "bench")
        stack.ok("pool", "create", "bench/web", "--flake", "builtin:", "--profile", "minimal")
        self.say("building its image")
        stack.ok("pool", "build", "bench/web", within_s=600)
        return stack


def _use_cache(stack: LiveStack) -> None:
    cache, layout = image_cache(), stack.layout
    for ours, theirs in ((cache.package_cache, layout.package_cache), (cache.images, layout.images)):
        ours.mkdir(parents=True, exist_ok=True, mode=0o700)
        theirs.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        theirs.symlink_to(ours)
