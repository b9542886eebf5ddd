"""What runs begin with. It is made once, by the real services; each run has a copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from unittest.mock import patch

import structlog

from mvm.domain.job import JobState, JobVerb
from mvm.drivers.fake.state import Files, Machine
from mvm.services.audit import Audit
from tests.simulation.host import patched_future
from tests.simulation.world import NODE, World, document

V = JobVerb
_T = TypeVar("_T")
KINDS = 3
_current: list[World] = []


class _Inline:
    """Stands for a pool of threads: everything is done at once, by the caller."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


def simulated() -> AbstractContextManager[object]:
    """Within, the services start no threads and say nothing; what runs begin with is there, made by sound code."""
    stack = ExitStack()
    for module in ("idle", "health"):
        stack.enter_context(patch(f"mvm.services.{module}.ThreadPoolExecutor", _Inline))
    stack.enter_context(patch("mvm.services.urgent.Future", patched_future(lambda: _current[-1])))
    stack.enter_context(patch.object(Audit, "soon", lambda self: None))
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False)
    stack.callback(lambda: structlog.configure(**before))
    for kind in range(KINDS):
        _base(kind)
    return stack


def begin(seed: int) -> World:
    """A world for the run of `seed`."""
    base, world = _base(seed % KINDS), World()
    world.clock.elapsed, world.clock._draws = base.clock.elapsed, base.clock._draws
    world.store = base.store.copy(world.store_call)
    world.store.inserted = world.inserted
    world.registry.set_state(base.registry.state())
    source, host = base.host, world.host
    for name in ("taps", "bridges", "files", "saved", "machines", "consoles"):
        setattr(host, name, {key: _own(value) for key, value in getattr(source, name).items()})
    host.rules, host.revisions, host.groups = source.rules, set(source.revisions), set(source.groups)
    host.trails = {tenant: bytearray(trail) for tenant, trail in source.trails.items()}
    host.kept_secrets, host._serial = dict(source.kept_secrets), source._serial
    world.quotas = {tenant.id: [tenant.quota] for tenant in base.store._tenants.values()}
    _current[:] = [world]
    return world


def _own(value: _T) -> _T:
    if isinstance(value, Files):
        return replace(value, runtime=set(value.runtime))  # type: ignore[return-value]
    return copy(value) if isinstance(value, Machine | deque) else value


@cache
def _base(kind: int) -> World:
    """0: scaled by hand, with an image newer than some run and sleep on. 1: by a document. 2: hardly begun."""
    world = World()
    _current[:] = [world]
    for tenant, most in (("acme", 3), ("bolt", 2)):
        _do(world, V.TENANT_CREATE, tenant, {"quota": {"max_running": most, "max_warm": 1, "max_pools": 3}})
    for pool, start in (("acme/web", "clone"), ("acme/jobs", "cold"), ("bolt/web", "clone")):
        policy = {"warm_after_s": 20, "sleep_after_s": 40, "min_running_s": 5}
        shape = {"flake_ref": "builtin:", "profile": "minimal", "start": start, "sleep_policy": policy}
        _do(world, V.POOL_CREATE, pool, shape)
        if kind != 2 or pool == "acme/web":
            _do(world, V.POOL_BUILD, pool, {})
    _do(world, V.INSTANCE_CREATE, "acme/web", {"count": 1})
    if kind != 2:
        _do(world, V.POOL_SCALE, "acme/web", {"running": 2})
        _do(world, V.POOL_SCALE, "bolt/web", {"running": 1, "warm": 1, "sleeping": 1})
        _do(world, V.INSTANCE_CREATE, "acme/jobs", {"count": 1})
        world.services("agent").view.set_secrets(next(iter(world.store._tenants)), b"KEY=first\n", "sim")
    if kind == 1:
        world.services("agent").view.desired_apply(document(0, world.store), prune=False, expect=None, actor="sim")
    for _ in range(6):
        _drain(world)
        world.pass_time(65.0)
        for verb in (V.SWEEP_STALE_PIDS, V.SWEEP_RECONCILE):
            world.jobs().sweep(verb, every_s=15.0)
    if kind == 0:
        _do(world, V.POOL_UPDATE, "bolt/web", {"source": {"flake_ref": "builtin:", "profile": "python"}})
        _do(world, V.POOL_BUILD, "bolt/web", {})
    _drain(world)
    world.registry._jobs.clear()
    world.registry._bulks.clear()
    world.store._jobs.clear()
    return world


def _do(world: World, verb: JobVerb, subject: str, params: Mapping[str, Any]) -> None:
    world.clock.elapsed += 0.01
    job = world.jobs().submit(verb, subject, NODE, params=params, actor="sim")
    _drain(world)
    ended = world.registry.all_jobs()[job.job_id]
    assert ended.state is JobState.SUCCEEDED, ended.error


def _drain(world: World) -> None:
    while world.queue.ready:
        message = world.queue.ready[0]
        world.queue.take(message, "worker")
        world.services("worker").runner.run(message.job)
        world.queue.ack(message)
