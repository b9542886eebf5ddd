"""Plans as values."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given

from mvm.domain.desired import DesiredCounts
from mvm.domain.instance import InFlight
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.passes import Rest
from mvm.domain.plans import Plan, fingerprint
from mvm.errors import NotAllowed
from tests.domain.test_planner import STATE, TENANT, with_pool, world
from tests.support.fleet_model import JOB, NOW, World
from tests.support.fleets import SOURCES, worlds
from tests.support.make import instance_ref


@given(worlds())
def test_a_plan_can_be_told_whatever_is_in_it(any_world: World) -> None:
    plan = Plan.make(any_world.desired, any_world.observed())
    told = plan.to_dict()
    assert len(told["actions"]) == len(plan.actions)
    assert (plan.to_text() == "nothing to do") == (not plan.actions and not plan.news)
    assert plan == Plan.make(any_world.desired, any_world.observed())


def test_the_fingerprint_changes_with_anything_that_a_plan_goes_by() -> None:
    there = world()
    known, first = there.observed(), instance_ref(0)
    seen = {fingerprint(STATE, known), fingerprint(with_pool(desired=DesiredCounts(3)), known)}
    one, *others = known.instances
    for other in (
        replace(known, instances=(replace(one, status=Status.STOPPED), *others)),
        replace(known, instances=(replace(one, in_flight=InFlight(JOB, Verb.STOP)), *others)),
        replace(known, instances=(replace(one, last_error="it crashed"), *others)),
        replace(known, instances=(replace(one, manual_override_until=NOW + timedelta(seconds=1)), *others)),
        replace(known, instances=tuple(others)),
        replace(known, pools=tuple(replace(pool, pinned=True) for pool in known.pools)),
        replace(known, tenants=()),
        replace(known, unhealthy=frozenset({first})),
        replace(known, resting={(JobVerb.INSTANCE_STOP, str(first)): Rest("vmm.failed", NOW)}),
    ):
        seen.add(fingerprint(STATE, other))
    assert len(seen) == 11
    assert fingerprint(STATE, replace(known, instances=known.instances[::-1])) in seen


def test_a_plan_of_another_world_is_refused() -> None:
    plan = Plan.make(STATE, world().observed())
    plan.check_current(plan.fingerprint)
    with pytest.raises(NotAllowed) as caught:
        plan.check_current(Plan.make(STATE, world(running=1).observed()).fingerprint)
    assert caught.value.code == "desired.plan_outdated"


def test_a_plan_reads_as_a_diff() -> None:
    assert Plan.make(STATE, World(STATE).observed()).to_text().splitlines() == [
        "+ tenant acme  net id 1, 10.240.1.0/24",
        "+ pool acme/web  builtin: minimal, 1 vCPU, 256 MiB",
        "+ image of acme/web  builtin: minimal",
        "+ 2 instances of acme/web  -> running",
    ]
    state = with_pool(source=SOURCES[1], pinned=True, desired=DesiredCounts(1))
    assert Plan.make(state, world(state).observed()).to_text().splitlines() == [
        "~ pool acme/web",
        "    source: {flake_ref builtin:, profile minimal} -> {flake_ref builtin:, profile python}",
        "    desired: {running 2, warm not set, sleeping not set} -> {running 1, warm not set, sleeping not set}",
        "    pinned: False -> True",
        "+ image of acme/web  builtin: python",
        "! acme/web: 1 too many are up, and stay: the pool is pinned",
    ]


def test_many_alike_are_told_in_short() -> None:
    state = replace(STATE, tenants=(replace(TENANT, pools=()),), prune_unknown_pools=True)
    told = Plan.make(state, world(running=25).observed()).to_text().splitlines()
    assert told[0] == f"- {instance_ref(0)}  running -> destroyed  (its pool is not asked for)"
    assert told[20:] == ["- acme/web destroy, its pool is not asked for: and 5 more alike", "- pool acme/web"]
