"""The sleep policy, without a clock and without guests."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.idleness import BUSY, Candidate, Choice, Sample, Watch, decide, judge, must_stay, observe, outlook
from mvm.domain.lifecycle import Status
from mvm.domain.pool import SleepPolicy
from mvm.errors import InvalidInput
from tests.support import make

S = Status
POLICY = SleepPolicy(warm_after_s=300, sleep_after_s=900, min_running_s=60)


def sample(at: float, **changes: object) -> Sample:
    return replace(Sample(at, at, 0.0, 0, 0, 0.0, "idle"), **changes)  # type: ignore[arg-type]


def watched(*samples: Sample, run: str = "r") -> Watch:
    watch: Watch | None = None
    for each in samples:
        watch = observe(watch, run, each.at, each)
    assert watch is not None
    return watch


def candidate(number: int = 1, status: Status = S.RUNNING, *, idle_since: float = 0.0, **changes: object) -> Candidate:
    watch = Watch("r", 0.0, idle_since, sample(idle_since))
    made = Candidate(make.instance_ref(number), status, watch, POLICY, frees_mib=100)
    return replace(made, **changes)  # type: ignore[arg-type]


seconds = st.floats(0, 1e6, allow_nan=False)
policies = st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 200)).map(
    lambda t: SleepPolicy(t[0], t[1] if t[1] == 0 else max(t[0], t[1]), t[2])
)
workers = st.sampled_from(["ready", "idle", "busy", "unknown"])


@st.composite
def candidates(draw: st.DrawFn, number: int = 1) -> Candidate:
    since = draw(seconds)
    idle_since = since + draw(st.floats(0, 3000))
    last = draw(st.none() | workers.map(lambda worker: sample(idle_since, worker=worker)))
    return Candidate(
        make.instance_ref(number), draw(st.sampled_from([S.RUNNING, S.WARM])), Watch("r", since, idle_since, last),
        draw(policies), draw(st.none() | st.sampled_from(["pinned", "critical"])), draw(st.booleans()),
        draw(st.integers(0, 300)),
    )  # fmt: skip


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Candidate], float]:
    found = [draw(candidates(number)) for number in range(draw(st.integers(0, 8)))]
    return found, max((c.watch.idle_since for c in found), default=0.0) + draw(st.floats(0, 3000))


# --- what always holds


@given(fleets(), st.integers(0, 2000))
def test_who_must_stay_is_kept_whatever_the_pressure(fleet: tuple[list[Candidate], float], short: int) -> None:
    found, now = fleet
    decisions = decide(found, now, short_mib=short)
    assert set(decisions) == {c.ref for c in found}
    for each in found:
        decision = decisions[each.ref]
        assert decision.reason
        if must_stay(each, now) or not (each.policy.warm_after_s or each.policy.sleep_after_s):
            assert decision.choice is Choice.KEEP
        if decision.choice is Choice.SLEEP:
            assert each.policy.sleep_after_s
        if decision.choice is Choice.WARM:
            assert each.status is S.RUNNING
            assert now - each.watch.idle_since >= each.policy.warm_after_s > 0
        if decision.choice is not Choice.KEEP and each.status is S.RUNNING:
            assert now - each.watch.since >= each.policy.min_running_s


@given(fleets(), st.integers(1, 2000))
def test_pressure_takes_the_coldest_and_no_more_than_needed(fleet: tuple[list[Candidate], float], short: int) -> None:
    found, now = fleet
    calm, pressed = decide(found, now), decide(found, now, short_mib=short)
    assert all(pressed[ref] == decision for ref, decision in calm.items() if decision.choice is Choice.SLEEP)
    forced = [c for c in found if pressed[c.ref] != calm[c.ref]]
    kept = [
        c for c in found
        if pressed[c.ref].choice is not Choice.SLEEP and c.policy.sleep_after_s and not must_stay(c, now)
    ]  # fmt: skip
    assert all(f.watch.idle_since <= k.watch.idle_since for f in forced for k in kept)
    if forced:
        last = max(forced, key=lambda c: (c.watch.idle_since, c.ref))
        freed = sum(c.frees_mib for c in found if pressed[c.ref].choice is Choice.SLEEP and c is not last)
        assert freed < short


@given(fleets())
def test_what_is_foreseen_happens_then_and_not_before(fleet: tuple[list[Candidate], float]) -> None:
    found, now = fleet
    for each in found:
        coming = outlook(each, now)
        if coming is None:
            assert judge(each, now + 1e7).choice is Choice.KEEP
            continue
        choice, wait = coming
        if judge(each, now).choice is Choice.KEEP and wait > 1:
            assert judge(each, now + wait - 0.5).choice is Choice.KEEP
        if not must_stay(each, now + wait + 0.001):
            assert judge(each, now + wait + 0.001).choice is choice


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5), st.integers(0, 10**6), workers), max_size=10))
def test_idleness_never_begins_before_the_run_or_after_now(steps: list[tuple[float, float, int, str]]) -> None:
    at, cpu, rx = 10.0, 0.0, 0
    watch = observe(None, "r", at, sample(at))
    for wait, cpu_more, rx_more, worker in steps:
        before, earlier = watch, at
        at, cpu, rx = at + wait, cpu + cpu_more, rx + rx_more
        watch = observe(watch, "r", at, sample(at, cpu_s=cpu, rx_bytes=rx, worker=worker))
        assert watch.since == 10.0
        assert before.idle_since <= watch.idle_since <= at
        if worker == BUSY and at > earlier:
            assert watch.idle_since == at
        assert Watch.from_dict(json.loads(json.dumps(watch.to_dict()))) == watch


# --- what is idle


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, True), ({"worker": "ready"}, True), ({"worker": "unknown"}, True), ({"worker": BUSY}, False),
        ({"cpu_s": 0.5}, True), ({"cpu_s": 0.7}, False), ({"tx_bytes": 900}, True), ({"tx_bytes": 1200}, False),
        ({"rx_bytes": 3000}, True), ({"rx_bytes": 4000}, False), ({"load": 3.0}, True),
    ],
)  # fmt: skip
def test_half_a_minute(changes: dict[str, object], idle: bool) -> None:
    watch = watched(sample(100), sample(130, **changes))
    assert watch.idle_since == (100 if idle else 130)


@pytest.mark.parametrize(
    "later",
    [sample(130, uptime_s=3), sample(130, cpu_s=1.0), sample(130, rx_bytes=1), sample(50)],
    ids=["booted again", "cpu counter back", "card's counter back", "host booted again"],
)
def test_counters_that_go_back_are_a_new_beginning(later: Sample) -> None:
    watch = watched(sample(100, cpu_s=2.0, rx_bytes=10), later)
    assert (watch.since, watch.idle_since, watch.last) == (later.at, later.at, later)


def test_a_wake_begins_a_new_run() -> None:
    cold = watched(sample(0), sample(1000))
    assert judge(candidate(watch=cold), 1000).choice is Choice.SLEEP
    woken = observe(cold, "another run", 1030, sample(1030))
    for now, choice in ((1030, Choice.KEEP), (1329, Choice.KEEP), (1330, Choice.WARM), (1930, Choice.SLEEP)):
        assert judge(candidate(watch=woken), now).choice is choice


def test_silence_and_pauses_change_nothing() -> None:
    watch = watched(sample(0), sample(30, worker=BUSY))
    assert observe(watch, "r", 60, None) == watch
    assert observe(watch, "r", 30, sample(30)) == watch
    assert observe(None, "r", 60, None) == Watch("r", 60, 60)
    assert observe(Watch("r", 60, 60), "r", 90, sample(90)) == Watch("r", 60, 90, sample(90))


# --- what is done about it


@pytest.mark.parametrize(
    ("given_", "now", "choice", "words"),
    [
        (candidate(), 299, Choice.KEEP, "idle for 299 s"),
        (candidate(), 300, Choice.WARM, "idle for 300 s, warm after 300 s"),
        (candidate(), 900, Choice.SLEEP, "idle for 900 s, sleep after 900 s"),
        (candidate(status=S.WARM), 899, Choice.KEEP, "idle for 899 s"),
        (candidate(status=S.WARM), 900, Choice.SLEEP, "idle for 900 s, sleep after 900 s"),
        (candidate(protected="pinned"), 9000, Choice.KEEP, "its pool is pinned"),
        (candidate(silent=True), 9000, Choice.KEEP, "its guest did not say what it does"),
        (candidate(watch=watched(sample(0, worker=BUSY))), 9000, Choice.KEEP, "its worker is busy"),
        (candidate(policy=SleepPolicy(0, 0)), 9000, Choice.KEEP, "idle for 9000 s"),
        (candidate(policy=SleepPolicy(0, 900)), 899, Choice.KEEP, "idle for 899 s"),
        (candidate(policy=SleepPolicy(5, 10, 60)), 59, Choice.KEEP, "it has run for 59 s of at least 60 s"),
        (candidate(policy=SleepPolicy(5, 10, 60)), 60, Choice.SLEEP, "idle for 60 s, sleep after 10 s"),
        (candidate(), 0, Choice.KEEP, "it has run for 0 s of at least 60 s"),
        (candidate(watch=watched(sample(0), sample(100, cpu_s=50.0))), 100, Choice.KEEP,
         "it works: 50% CPU, 0 B/s in, 0 B/s out"),
        (candidate(policy=SleepPolicy(5, 10, 0)), 0, Choice.KEEP, "it is watched from now on"),
    ],
)  # fmt: skip
def test_a_decision_and_its_reason(given_: Candidate, now: float, choice: Choice, words: str) -> None:
    decision = judge(given_, now)
    assert (decision.choice, decision.reason) == (choice, words)


def test_the_coldest_sleep_first_when_memory_is_short() -> None:
    found = [candidate(n, idle_since=100 + n) for n in range(4)] + [candidate(9, S.WARM, idle_since=50)]
    decisions = decide(found, 200, short_mib=250)
    assert [c.ref for c in found if decisions[c.ref].choice is Choice.SLEEP] == [
        found[0].ref,
        found[1].ref,
        found[4].ref,
    ]
    assert decisions[found[0].ref].reason == "memory is short by 250 MiB, and it is among the coldest: idle for 100 s"


def test_who_never_sleeps_does_not_under_pressure_either() -> None:
    assert decide([candidate(policy=SleepPolicy(300, 0))], 200, short_mib=1)[make.instance_ref(1)].choice is Choice.KEEP


@pytest.mark.parametrize(
    ("given_", "field"),
    [
        ({"warm_after_s": -1}, "warm_after_s"), ({"sleep_after_s": 10**9}, "sleep_after_s"),
        ({"min_running_s": -5}, "min_running_s"), ({"warm_after_s": 901}, "sleep_after_s"),
    ],
)  # fmt: skip
def test_policies_that_mean_nothing_are_refused(given_: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        SleepPolicy(**given_)
    assert refused.value.code == "pool.invalid_policy"
    assert refused.value.fields["field"] == field
