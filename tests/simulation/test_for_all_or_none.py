"""A worker is killed at each step of making and destroying: afterwards it is there for all, or for none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mvm.domain.job import JobVerb
from tests.simulation.bases import begin, simulated
from tests.simulation.runs import settle
from tests.simulation.world import NODE, World

V = JobVerb
POOL: dict[str, Any] = {"flake_ref": "builtin:", "profile": "minimal"}
STEPS = 60


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    with simulated():
        yield


def ask(world: World, verb: JobVerb, subject: str, params: dict[str, Any], calls: int | None) -> bool:
    """Whether it came to its end within so many calls of its ports; else its worker is killed there."""
    world.clock.elapsed += 0.01
    world.jobs().submit(verb, subject, NODE, params=params, actor="sim")
    actor = world.deliver(world.queue.due(urgent=False)[0], calls)
    if actor.done:
        return True
    world.kill(world.processes["worker"])
    return False


@pytest.mark.parametrize("then", ["delivered again", "its message lost", "cancelled"])
@pytest.mark.parametrize("verb", [V.TENANT_CREATE, V.TENANT_DESTROY, V.POOL_CREATE, V.POOL_DESTROY])
def test_it_is_there_for_all_or_for_none(verb: JobVerb, then: str) -> None:
    subject = "temp" if verb.value.startswith("tenant.") else "acme/temp"
    for calls in range(STEPS):
        world = begin(2)
        if verb in (V.TENANT_DESTROY, V.POOL_DESTROY):
            made = V.TENANT_CREATE if verb is V.TENANT_DESTROY else V.POOL_CREATE
            assert ask(world, made, subject, POOL if made is V.POOL_CREATE else {}, None)
        ended = ask(world, verb, subject, POOL if verb is V.POOL_CREATE else {}, calls)
        if then == "cancelled" and not ended:
            world.jobs().cancel(next(iter(world.registry.open_jobs(NODE))).job_id)
        if then == "its message lost":
            world.queue.taken.clear()
            world.lost.update(world.registry.all_jobs())
        assert settle(world)[1] == [], f"{verb}, killed after {calls} calls"
        if ended:
            return
    raise AssertionError(f"{verb} has more than {STEPS} steps")
