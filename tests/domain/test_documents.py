"""Values survive their JSON form."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Lane, Reason, lane_of
from mvm.domain.lifecycle import Status, landing
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, StartMode, WorkerPool
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import (
    Cancelled,
    Failed,
    Forbidden,
    InvalidInput,
    MvmError,
    NotAllowed,
    NotFound,
    QuotaExceeded,
    TimedOut,
    Unreachable,
    error_from_dict,
)
from tests.support import make
from tests.support import strategies as some

ERRORS = [
    MvmError, InvalidInput, NotFound, NotAllowed, QuotaExceeded, Unreachable, TimedOut, Forbidden, Failed, Cancelled,
]  # fmt: skip


def through_json(value: object) -> Any:
    return json.loads(json.dumps(value))


@given(some.jobs)
def test_a_job(job: Job) -> None:
    assert Job.from_dict(through_json(job.to_dict())) == job


def test_a_jobs_fields_are_the_command_lines_contract() -> None:
    contract = (
        "job_id, verb, subject, node_id, actor, reason, state, step, progress, error, result, parent, submitted_at, "
        "started_at, finished_at"
    )
    assert set(contract.split(", ")) <= make.job().to_dict().keys()


def test_a_job_of_which_little_is_known_is_queued() -> None:
    job = make.job()
    little = {key: job.to_dict()[key] for key in
              ("job_id", "verb", "subject", "node_id", "actor", "reason", "submitted_at")}  # fmt: skip
    assert Job.from_dict(little) == job


@given(some.instances)
def test_an_instance(instance: Instance) -> None:
    assert Instance.from_dict(through_json(instance.to_dict()), instance.generation) == instance


@given(some.instances)
def test_an_instance_lands_where_its_job_takes_it(instance: Instance) -> None:
    if instance.in_flight is None:
        assert instance.lands_on is instance.status
    else:
        try:
            expected = landing(instance.status, instance.in_flight.verb)
        except NotAllowed:
            expected = instance.status
        assert instance.lands_on is expected
    moved = instance.moved(Status.STOPPED, last_error="x")
    assert (moved.status, moved.in_flight, moved.last_error) == (Status.STOPPED, None, "x")
    assert moved.generation == instance.generation


limits = st.builds(Quota, *[st.integers(0, 1_000_000)] * len(fields(Quota)))


@given(st.builds(Tenant, st.builds(lambda ref: ref.tenant, some.pool_refs), some.networks(), limits, some.times))
def test_a_tenant(tenant: Tenant) -> None:
    assert Tenant.from_dict(through_json(tenant.to_dict())) == tenant


shapes = st.builds(
    InstanceResources, st.integers(1, 64), st.integers(96, 262_144), st.just(0) | st.integers(4, 1_048_576)
)
desired = st.none() | st.builds(DesiredCounts, *[st.integers(0, 10_000)] * 3)
sources = st.builds(ImageSource, st.just("builtin:"), st.sampled_from(["minimal", "baseline", "python"]))


@given(
    st.builds(
        WorkerPool, ref=some.pool_refs, source=sources, resources=shapes, node_id=some.node_ids, created_at=some.times,
        desired=desired, start=st.sampled_from(StartMode), compression=st.sampled_from(Compression),
        pinned=st.booleans(), critical=st.booleans(), revision=st.none() | some.revisions,
    )
)  # fmt: skip
def test_a_pool(pool: WorkerPool) -> None:
    assert WorkerPool.from_dict(through_json(pool.to_dict())) == pool


@pytest.mark.parametrize("kind", ERRORS)
@given(code=st.text(max_size=10), message=st.text(max_size=20), hint=st.text(max_size=20), extra=some.json_objects)
def test_an_error(kind: type[MvmError], code: str, message: str, hint: str, extra: dict[str, object]) -> None:
    error = kind(code, message, hint=hint)
    error.fields = extra
    again = error_from_dict(through_json(error.to_dict()))
    assert type(again) is kind
    assert again.to_dict() == error.to_dict()


def test_an_error_of_a_kind_that_is_not_known_yet_is_one_still() -> None:
    again = error_from_dict({"kind": "novel", "code": "a.b", "message": "m"})
    assert type(again) is MvmError
    assert (again.code, again.message, again.exit_code) == ("a.b", "m", 1)


# --- shapes and sources nobody can have


@pytest.mark.parametrize(
    ("given_", "field"),
    [
        ({"vcpus": 0}, "vcpus"), ({"vcpus": -1}, "vcpus"), ({"vcpus": 65}, "vcpus"), ({"mem_mib": 0}, "mem_mib"),
        ({"mem_mib": 95}, "mem_mib"), ({"mem_mib": 10**9}, "mem_mib"), ({"data_disk_mib": -1}, "data_disk_mib"),
        ({"data_disk_mib": 3}, "data_disk_mib"), ({"data_disk_mib": 10**9}, "data_disk_mib"),
    ],
)  # fmt: skip
def test_absurd_resources_are_refused(given_: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        InstanceResources(**given_)
    assert refused.value.code == "pool.invalid_resources"
    assert refused.value.fields["field"] == field


@pytest.mark.parametrize("given_", [{"running": -1}, {"warm": 10_001}, {"sleeping": -5}])
def test_absurd_counts_are_refused(given_: dict[str, int]) -> None:
    with pytest.raises(InvalidInput) as refused:
        DesiredCounts(**given_)
    assert refused.value.code == "pool.invalid_count"


def test_sources_nobody_can_build_are_refused() -> None:
    with pytest.raises(InvalidInput) as flake:
        ImageSource("github:x/y", "minimal")
    assert flake.value.code == "pool.unsupported_flake"
    with pytest.raises(InvalidInput) as profile:
        ImageSource("builtin:", "maximal")
    assert profile.value.code == "pool.unknown_profile"
    assert "minimal" in profile.value.hint


# --- what a job's verb and state say


def test_names_on_the_wire_are_stable() -> None:
    assert JobVerb.INSTANCE_START.task_name == "mvm.instance.start"
    assert {state for state in JobState if state.final} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@given(st.sampled_from(JobVerb))
def test_bulk_gives_way_and_sweeps_and_single_stops_overtake(verb: JobVerb) -> None:
    assert lane_of(verb, bulk=True) is Lane.BULK
    overtakes = verb.is_sweep or verb in (JobVerb.INSTANCE_STOP, JobVerb.INSTANCE_DESTROY)
    assert lane_of(verb, bulk=False) is (Lane.URGENT if overtakes else Lane.NORMAL)


def test_times_keep_their_zone() -> None:
    job = make.job(submitted_at=datetime(2026, 1, 1, tzinfo=UTC), reason=Reason.SWEEP)
    assert Job.from_dict(job.to_dict()).submitted_at.utcoffset() is not None
