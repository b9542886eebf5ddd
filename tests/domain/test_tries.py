"""How jobs are tried again, and what becomes of an instance that is left in the middle."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import TRANSITIONS, Status, Verb
from mvm.domain.recovery import Act, Rest, settled
from mvm.domain.tries import DEADLINES, FAILURES, TryPolicy, asked_again_at, parse_deadlines
from mvm.errors import Cancelled, Failed, GuestSilent, InvalidInput, MvmError, Overdue, QuotaExceeded, Unreachable
from mvm.settings import load_settings
from tests.support.make import START, job

POLICY = TryPolicy(attempts=4, base_s=1, cap_s=3)
AWAY = Unreachable("registry.unreachable", "away")


def tried(times: int, **changes: object) -> Job:
    return job(attempt=times, attempts=4, **changes)


def test_each_pause_is_twice_the_last_at_most_and_by_luck_half_of_that() -> None:
    assert [POLICY.pause_s(tried(n), AWAY, 1.0) for n in (1, 2, 3)] == [1, 2, 3]
    assert [POLICY.pause_s(tried(n), AWAY, 0.0) for n in (1, 2, 3)] == [0.5, 1, 1.5]
    assert POLICY.pause_s(tried(4), AWAY, 1.0) is None, "it had its tries"


@pytest.mark.parametrize(
    "error",
    [
        Failed("disk.full", ""), QuotaExceeded("quota.exceeded", ""), InvalidInput("x.y", ""), MvmError("internal", ""),
        Cancelled("job.cancelled", ""), Overdue("job.deadline", ""), Unreachable("vmm.gone", ""),
        GuestSilent("guest.silent", ""),
    ],
)  # fmt: skip
def test_what_would_end_the_same_way_is_not_tried_again(error: MvmError) -> None:
    assert POLICY.pause_s(tried(1, verb=JobVerb.INSTANCE_WAKE), error, 0.5) is None


def test_a_guest_that_is_silent_as_it_boots_is_tried_again() -> None:
    silent = GuestSilent("guest.silent", "")
    assert POLICY.pause_s(tried(1, verb=JobVerb.INSTANCE_START), silent, 1.0) == 1
    assert POLICY.pause_s(tried(4, verb=JobVerb.INSTANCE_START), silent, 1.0) is None


def test_urgent_wakes_and_sweeps_have_one_try() -> None:
    assert POLICY.tries(job(reason=Reason.URGENT)) == POLICY.tries(job(verb=JobVerb.SWEEP_ORPHANS)) == 1
    assert POLICY.tries(job()) == 4


def test_a_try_and_a_death_are_told_apart() -> None:
    first = POLICY.begun(job(), START, died=False)
    assert (first.attempt, first.deaths, first.run, first.state) == (1, 0, 1, JobState.RUNNING)
    assert first.deadline_at == START + timedelta(seconds=DEADLINES[JobVerb.INSTANCE_START])
    again = POLICY.begun(first.with_(step="boot"), START, died=True)
    assert (again.attempt, again.deaths, again.run) == (1, 1, 2)
    assert [s["code"] for s in again.setbacks] == ["job.worker_died"]
    later = POLICY.failed(again, START, AWAY, 2.0)
    assert (later.state, later.retry_at, later.deadline_at) == (JobState.QUEUED, START + timedelta(seconds=2), None)
    assert Job.from_dict(later.to_dict()) == later
    assert POLICY.early(later, START)
    assert not POLICY.early(later, START + timedelta(seconds=2))
    assert not POLICY.early(later, START - timedelta(hours=1)), "the clock was set back"


def test_deadlines_are_set_by_verb() -> None:
    assert parse_deadlines("pool.build=7, sweep.orphans=2.5")[JobVerb.SWEEP_ORPHANS] == 2.5
    assert load_settings(job_deadlines="pool.build=7").tries.deadline_s(JobVerb.POOL_BUILD) == 7


@pytest.mark.parametrize(
    "wrong", ["pool.build", "pool.bild=1", "pool.build=soon", "pool.build=0", "pool.build=1e9", "bulk=5"]
)
def test_a_bad_deadline_is_named(wrong: str) -> None:
    with pytest.raises(InvalidInput) as bad:
        load_settings(job_deadlines=wrong)
    assert bad.value.code == "settings.invalid"
    assert "job_deadlines" in bad.value.message
    assert wrong in bad.value.message


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(("status", "verb"), [key for key in TRANSITIONS if key[1] is not Verb.PREPARE])
def test_whatever_was_left_rests_at_a_status_that_fits_the_host(
    status: Status, verb: Verb, process: bool, snapshot: bool
) -> None:
    rest = settled(status, verb, process=process, snapshot=snapshot)
    assert rest.status in (status, TRANSITIONS[status, verb], Status.STOPPED)
    if rest.status is Status.SLEEPING:
        assert snapshot, "there is something to wake from"
        assert rest.act is Act.PUT_BACK
    if rest.act is Act.TAKE_DOWN:
        assert rest.status not in (Status.RUNNING, Status.WARM, Status.SLEEPING)


def test_what_was_saved_is_completed_and_the_rest_undone() -> None:
    assert settled(Status.RUNNING, Verb.SLEEP, process=False, snapshot=True) == Rest(Act.PUT_BACK, Status.SLEEPING)
    assert settled(Status.RUNNING, Verb.SLEEP, process=True, snapshot=True) == Rest(Act.RESUME, Status.RUNNING)
    assert settled(Status.WARM, Verb.WAKE, process=True, snapshot=False) == Rest(Act.PAUSE, Status.WARM)
    assert settled(Status.SLEEPING, Verb.WAKE, process=True, snapshot=True) == Rest(Act.PUT_BACK, Status.SLEEPING)
    assert settled(Status.READY, Verb.START, process=True, snapshot=False) == Rest(Act.TAKE_DOWN, Status.READY)
    assert settled(Status.RUNNING, Verb.STOP, process=True, snapshot=False) == Rest(Act.TAKE_DOWN, Status.STOPPED)


@pytest.mark.parametrize("failures", [0, 3, 5, 1024, 5000, 10**9])
def test_the_pause_after_failures_in_a_row_has_an_end_however_many_they_were(failures: int) -> None:
    last = job(
        verb=JobVerb.INSTANCE_START, reason=Reason.RECONCILE, state=JobState.FAILED, finished_at=START,
        params={FAILURES: failures},
    )  # fmt: skip
    until = asked_again_at(last, START, 15.0)
    assert until == START + timedelta(seconds=min(300, 15 * 2 ** min(failures, 9)))
    assert asked_again_at(last, START + timedelta(seconds=300), 15.0) is None
    assert asked_again_at(last, START - timedelta(days=1), 15.0) is None, "the clock was set back"


def test_the_pause_between_tries_has_an_end_however_many_they_were() -> None:
    policy = TryPolicy(attempts=9999, base_s=0.5, cap_s=3)
    assert policy.pause_s(job(attempt=5000, attempts=9999), AWAY, 1.0) == policy.cap_s
