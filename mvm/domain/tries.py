"""How often a job is tried, how long one try may take, and when it is given up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType

from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.errors import GuestSilent, MvmError, TimedOut

DEADLINE_S = 300.0
DEADLINES: Mapping[JobVerb, float] = MappingProxyType(
    {
        JobVerb.POOL_BUILD: 3600.0,
        JobVerb.INSTANCE_CREATE: 900.0,
        JobVerb.INSTANCE_START: 900.0,  # its pool's template may have to be made first
        JobVerb.INSTANCE_SLEEP: 900.0,
    }
)
"""Seconds that one try of a verb may take, where it is not `DEADLINE_S`."""

_LONGEST_S = 604_800

_LASTING = frozenset({"vmm.gone", "guest.gone"})
"""Nobody answered, and nobody will: a process has ended."""

FAILURES = "failures"
"""The name of a job's parameter: how many jobs like it have failed before it, in a row."""

_LONGEST_PAUSE_S = 300.0

_MOST_DOUBLINGS = 30
"""After these, one second is 34 years; after 1024, no float holds it."""

_SUSPECT = 2
"""Deaths after which a job runs beside no other suspect, so that the next death tells which of them it was."""


@dataclass(frozen=True, slots=True)
class TryPolicy:
    """Tries and their pauses; `deaths` is how many workers may die in a job before it is given up."""

    attempts: int = 3
    base_s: float = 1.0
    cap_s: float = 60.0
    deaths: int = 5
    deadlines: Mapping[JobVerb, float] = field(default_factory=lambda: DEADLINES)

    def deadline_s(self, verb: JobVerb) -> float:
        """How long one try of `verb` may take."""
        return self.deadlines.get(verb, DEADLINE_S)

    def tries(self, job: Job) -> int:
        """How many tries `job` has. Who waits for an urgent wake tries again himself, and Beat asks for sweeps anew."""
        return 1 if job.reason is Reason.URGENT or job.verb.is_sweep else self.attempts

    def pause_s(self, job: Job, error: MvmError, luck: float) -> float | None:
        """Seconds until `job`, whose try ended with `error`, is tried again; None when that is no use.

        Each pause is twice the last one at most, and by `luck` (0 to 1) half of that at least.
        """
        if not error.retryable or _stays_so(job, error) or job.attempt >= job.attempts:
            return None
        return _doubled(self.base_s, job.attempt - 1, self.cap_s) * (1 + luck) / 2

    def begun(self, job: Job, now: datetime, *, died: bool, worker: str | None = None) -> Job:
        """`job` as `worker` begins its next try, or the same try again because the worker before `died`.

        One that lives and has left it, as its store did not answer, counts as a try.
        """
        if died:
            where = f"its worker ended in step {job.step!r}" if job.step else "its worker ended"
            job = _set_back(job, now, "job.worker_died", where).with_(deaths=job.deaths + 1)
        else:
            job = job.with_(attempt=job.attempt + 1, attempts=self.tries(job))
        return job.with_(
            state=JobState.RUNNING, started_at=job.started_at or now, retry_at=None, expires_at=None, worker=worker,
            deadline_at=now + timedelta(seconds=self.deadline_s(job.verb)),
        )  # fmt: skip

    def failed(self, job: Job, now: datetime, error: MvmError, pause_s: float) -> Job:
        """`job`, whose try ended with `error`, until its next one."""
        job = _set_back(job, now, error.code, error.message)
        return job.with_(state=JobState.QUEUED, retry_at=now + timedelta(seconds=pause_s), deadline_at=None)

    def early(self, job: Job, now: datetime) -> bool:
        """Whether the next try of `job` is still to come. Not for ever: clocks are set back."""
        if job.state is not JobState.QUEUED or job.retry_at is None:
            return False
        return timedelta(0) < job.retry_at - now <= timedelta(seconds=self.cap_s)

    def suspect(self, job: Job) -> bool:
        """Whether `job` may be what its workers die of."""
        return job.deaths >= _SUSPECT


def _stays_so(job: Job, error: MvmError) -> bool:
    """Whether the next try would end with the same error.

    A guest that is silent as it boots may only have had too little of a busy host's time. One that runs stays silent.
    """
    if isinstance(error, GuestSilent):
        return job.verb is not JobVerb.INSTANCE_START
    return error.code in _LASTING


def asked_again_at(last: Job, now: datetime, period_s: float) -> datetime | None:
    """When reconcile asks again for what `last`, the last job of its subject, was to do; None: at once.

    What a pass asked for and failed is asked for after a pause that doubles with each failure in a row, from the
    sweep's period on. A time too far ahead is of a clock that has been set back since.
    """
    if last.state is not JobState.FAILED or last.finished_at is None or last.reason is not Reason.RECONCILE:
        return None
    pause_s = _doubled(period_s, failures_before(last), _LONGEST_PAUSE_S)
    until = last.finished_at + timedelta(seconds=pause_s)
    return until if now < until <= now + 2 * timedelta(seconds=_LONGEST_PAUSE_S) else None


def _doubled(base_s: float, times: int, cap_s: float) -> float:
    """`base_s`, doubled so many `times`, and `cap_s` at most: however often something fails, this is a number."""
    return float(min(cap_s, base_s * 2 ** min(times, _MOST_DOUBLINGS)))


def failures_before(job: Job) -> int:
    """How many jobs in a row had failed, of the same subject, before reconcile asked for `job`."""
    return int(job.params.get(FAILURES, 0))


def expired(job: Job, now: datetime) -> Job:
    """`job` at its end, as no worker took it in time."""
    hint = "sweeps come by themselves" if job.verb.is_sweep else f"is the node up? then: mvm job retry {job.job_id}"
    error = TimedOut("job.expired", f"no worker of node {job.node_id} took it in time", hint=hint)
    return job.with_(state=JobState.CANCELLED, error=error.to_dict(), finished_at=now)


def _set_back(job: Job, now: datetime, code: str, message: str) -> Job:
    return job.with_(setbacks=(*job.setbacks, {"at": now.isoformat(), "code": code, "message": message}))


def parse_deadlines(text: str) -> Mapping[JobVerb, float]:
    """`DEADLINES` with changes such as ``pool.build=7200 instance.start=60``. Raises `ValueError`."""
    changed: dict[JobVerb, float] = {}
    for word in text.replace(",", " ").split():
        name, _, seconds = word.partition("=")
        try:
            verb, limit = JobVerb(name), float(seconds)
        except ValueError:
            raise ValueError(f"{word!r} is not VERB=SECONDS, such as instance.start=60") from None
        if verb is JobVerb.BULK:
            raise ValueError(f"{word!r} has no deadline: a bulk job ends with its last child")
        if not 0 < limit <= _LONGEST_S:
            raise ValueError(f"{word!r} is not within 0 and {_LONGEST_S} seconds")
        changed[verb] = limit
    return {**DEADLINES, **changed}
