"""Running a job once: the record, the locks, the tries, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import structlog

from mvm.domain import lock_names
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Lane, Progress, Reason
from mvm.domain.tries import TryPolicy, expired
from mvm.errors import Cancelled, Failed, Fenced, MvmError, Overdue, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.audit import Audit
from mvm.services.jobs import Jobs
from mvm.services.precedence import Precedence

log = structlog.get_logger("mvm.jobs")

_DUPLICATE_WAIT_S = 900.0
"""How long a second delivery waits for the first one to end, and a suspect for the one before it."""

Handler = Callable[["JobContext"], Mapping[str, Any]]
Undo = Callable[["JobContext"], None]
Observer = Callable[[Job], None]


class Workers(NamedTuple):
    """Which process this one is, and whether another one goes on: it has not ended, nor is it stopped."""

    own: str | None
    goes_on: Callable[[str], bool]


_UNKNOWN = Workers(None, lambda _: False)


class JobContext:
    """What a handler has of its job: its words, its steps, and the way to end it."""

    def __init__(self, job: Job, runner: Runner, end: float) -> None:
        self.job = job
        self.touched: dict[str, Instance | None] = {}
        self.change: tuple[str | None, str | None] = (None, None)
        self._runner = runner
        self._end = end
        self._remarks: list[str] = []
        self._lease: Instance | None = None
        self.left_at: str | None = None
        """The step at which another job left what this one works on, when its worker was killed."""
        self.unrecorded = False
        """What it does is done, and could not be written down."""

    def remark(self, text: str) -> None:
        """What whoever asked should know though the job succeeds; kept as ``remarks`` of its result."""
        self._remarks.append(text)
        log.warning("remark", text=text)

    def found(self, ref: InstanceRef, instance: Instance | None) -> None:
        """The job is about `instance` (None: to be made), as it is now; for the audit trail."""
        self.touched[str(ref)] = instance

    def changed(self, before: str | None, after: str | None) -> None:
        """What the job changed, when it is of no instance; for the audit trail."""
        self.change = (before, after)

    def leased(self, instance: Instance) -> None:
        """The job acts on `instance` for as long as nobody takes another lease of it."""
        self._lease = instance

    def check_lease(self) -> None:
        """Raises `Fenced` when another worker has taken over what this job works on: before whatever changes it."""
        if self._lease is not None:
            self._runner.check_lease(self._lease)

    def step(self, name: str, done: int = 0, total: int = 0) -> None:
        """Begin step `name`, the `done`-th of `total`: it is written down, then done.

        Here a job ends that has lost its lease (`Fenced`), that somebody wants cancelled (`Cancelled`), or whose
        deadline has passed (`Overdue`).
        """
        self.check_lease()
        self._runner.check_cancelled(self.job)
        self._runner.check_deadline(self.job, self._end)
        self.job = self.job.with_(step=name, progress=Progress(done, total))
        self._runner.save(self.job)
        log.debug("step", step=name)

    @contextmanager
    def undoing(self, undo: Callable[[], object]) -> Iterator[None]:
        """What fails within is undone, unless somebody else has taken over: then it is theirs."""
        try:
            yield
        except Fenced:
            raise
        except Exception:
            self.check_lease()
            undo()
            raise

    def record(self) -> None:
        """The job is at work: for the transaction in which it claims what it works on."""
        self._runner.store.put_job(self.job)

    @contextmanager
    def ending(self, **result: Any) -> Iterator[None]:
        """The job succeeds with `result` in one transaction with the writes made within."""
        if self._remarks:
            result["remarks"] = self._remarks
        self.unrecorded = True
        with self._runner.store.transaction():
            yield
            self._runner.record_end(self, self._runner.ended(self.job, JobState.SUCCEEDED, result=result))
        self.unrecorded = False


class Runner:
    """The one door for work on a node: Celery, the agent, sweeps and tests all call `run`."""

    def __init__(
        self, store: NodeStore, registry: Registry, locks: Locks, clock: Clock, jobs: Jobs,
        precedence: Precedence, audit: Audit, tries: TryPolicy, observers: tuple[Observer, ...] = (),
        workers: Workers | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self._registry = registry
        self._locks = locks
        self._clock = clock
        self._jobs = jobs
        self._precedence = precedence
        self._audit = audit
        self._tries = tries
        self._observers = observers
        self._workers = workers or _UNKNOWN
        self._handlers: dict[JobVerb, tuple[Handler, Undo | None]] = {}

    def register(self, verb: JobVerb, handler: Handler, undo: Undo | None = None) -> None:
        """`handler` does what `verb` says; `undo` takes back what a job left that will not be done again."""
        self._handlers[verb] = handler, undo

    def run(self, job: Job) -> Job:
        """Do `job`, once, and return its record; its errors are in the record, not raised.

        The record is final, or queued until ``retry_at``. A second delivery waits for the first, then returns what
        was recorded. A job whose worker was killed is taken up from its beginning: every step observes before it acts.
        """
        self._give_way(job)
        with structlog.contextvars.bound_contextvars(
            job_id=job.job_id, subject=job.subject, node=job.node_id, reason=job.reason.value, verb=job.verb.value
        ), self._locks.hold(lock_names.job(job.job_id), deadline_s=_DUPLICATE_WAIT_S):  # fmt: skip
            known = self.store.job(job.job_id)
            if known is not None and known.state.final:
                log.info("delivered again", state=known.state.value)
                self._publish(known)
                return known
            if known is not None and self._tries.early(known, self._clock.now()):
                log.info("delivered before its time", retry_at=known.retry_at)
                self._try_later(known)  # one message for this one, which may be the only one: clocks are set back
                return known
            if known is None and job.expires_at and job.expires_at <= self._clock.now():
                after = self._drop(job)
            else:
                after = self._run_once(known or job)
            if not after.state.final:
                self._try_later(after)
                return after
            if not job.verb.is_sweep:
                self._audit.soon()
            self._give_way(job)  # it holds no instance any more that a wake could wait for
            self._publish(after)
            if job.verb.is_sweep:
                self._release_sweep(job)
            for observe in self._observers:
                observe(after)
            return after

    def _give_way(self, job: Job) -> None:
        if job.lane is not Lane.URGENT:
            self._precedence.given()

    def _run_once(self, job: Job) -> Job:
        left = job.state is JobState.RUNNING  # whoever ran it holds its lock no more and has not ended it
        died = left and not (job.worker and self._workers.goes_on(job.worker))
        job = self._tries.begun(job, self._clock.now(), died=died, worker=self._workers.own)
        context = JobContext(job, self, self._clock.monotonic() + self._tries.deadline_s(job.verb))
        try:
            with self._alone(job):
                self._begin(job, again=left)
                log.debug("began", attempt=job.attempt, deaths=job.deaths)
                self._refuse_poison(context)
                result = self._handlers[job.verb][0](context)
            if not context.job.state.final:
                with context.ending(**result):
                    pass
            log.info("succeeded")
        except MvmError as error:
            self._fail(context, error)
        except Exception:  # the last line of defence: a bug must not leave a job without an end
            bug = MvmError("internal", "an unexpected error; its details are in the node's log",
                           hint=f"look for {job.job_id} in the worker's log")  # fmt: skip
            log.exception("crashed")
            self._fail(context, bug)
        return context.job

    def _begin(self, job: Job, *, again: bool) -> None:
        """Record that it runs, then tell and ask: until it is told, whoever cancels it ends it in the registry."""
        if job.reason is not Reason.URGENT or again:  # else it is recorded with its claim
            self.store.put_job(job)
        self._heed(job, lambda: self._registry.update_and_ask(job))

    def _drop(self, job: Job) -> Job:
        """Nobody took `job` in time."""
        context = JobContext(job, self, 0)
        with self.store.transaction():
            self.record_end(context, expired(job, self._clock.now()))
        log.warning("ended", state=context.job.state.value, code="job.expired")
        return context.job

    def _refuse_poison(self, context: JobContext) -> None:
        """Give a job up in which too many workers died, and undo what it left; if they die of that, without."""
        job, limit = context.job, self._tries.deaths
        if job.deaths < limit:
            return
        undo = self._handlers[job.verb][1]
        if undo is not None and job.deaths == limit:
            undo(context)
        raise Failed(
            "job.poison", f"{job.deaths} workers ended while they ran it, the last one in step {job.step or 'one'}",
            hint=f"look for the reason in the worker's log; then: mvm job retry {job.job_id}", deaths=job.deaths,
        )  # fmt: skip

    def _alone(self, job: Job) -> AbstractContextManager[None]:
        """Suspects run one at a time, so that those who merely stood by are not taken for what their worker died of."""
        return (
            self._locks.hold(lock_names.SUSPECTS, deadline_s=_DUPLICATE_WAIT_S)
            if self._tries.suspect(job)
            else nullcontext()
        )

    def _fail(self, context: JobContext, error: MvmError) -> None:
        """Record that the try ended with `error`: the job's end, or a pause before the next try."""
        pause = self._tries.pause_s(context.job, error, self._clock.random(1)[0] / 255)
        try:
            if pause is not None:
                job = self._tries.failed(context.job, self._clock.now(), error, pause)
                self.store.put_job(job)
                context.job = job
                log.warning("tried in vain", code=error.code, error=error.message, again_in_s=round(pause, 2))
                return
            state = JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED
            with self.store.transaction():
                self.record_end(context, self.ended(context.job, state, error=error.to_dict()))
            log.warning("ended", state=state.value, code=error.code, error=error.message)
        except Fenced as fenced:  # its record is another worker's, too
            log.warning("another worker has taken over", code=fenced.code)
            context.job = self.store.job(context.job.job_id) or context.job

    def _try_later(self, job: Job) -> None:
        """Tell of it and send the message of the next try. Should that fail, a sweep does it."""
        if job.state is not JobState.QUEUED or not self._tell(job):
            return
        try:
            self._jobs.send_again([job])
        except MvmError as error:
            log.warning("next try not sent", code=error.code, error=error.message)

    def record_end(self, context: JobContext, job: Job) -> None:
        """Within a transaction: the final record of the context's job, and what the audit trail says of it."""
        self._audit.job_ended(job, context.touched, context.change)
        self.store.put_job(job)
        context.job = job

    def ended(self, job: Job, state: JobState, **changes: Any) -> Job:
        """`job` at its end; a finished step count says that all of it is done."""
        progress = Progress(job.progress.total, job.progress.total) if state is JobState.SUCCEEDED else job.progress
        return job.with_(state=state, finished_at=self._clock.now(), progress=progress, deadline_at=None, **changes)

    def check_cancelled(self, job: Job) -> None:
        """Raises `Cancelled` if somebody asked for it; nobody is taken to have while the registry cannot be reached."""
        self._heed(job, lambda: self._registry.cancel_requested(job.job_id))

    def _heed(self, job: Job, ask: Callable[[], bool]) -> None:
        if job.reason is Reason.URGENT:  # every millisecond of it is waited for
            return
        try:
            asked = ask()
        except Unreachable as error:
            log.warning("registry not asked", error=error.message)
            return
        if asked:
            raise Cancelled("job.cancelled", "cancelled on request; what it had begun is undone")

    def check_deadline(self, job: Job, end: float) -> None:
        """Raises `Overdue` once the try has taken too long."""
        if self._clock.monotonic() >= end:
            limit = self._tries.deadline_s(job.verb)
            raise Overdue(
                "job.deadline", f"{job.verb} was not done within {limit:g} s; what it had begun is undone",
                hint="set by MVM_JOB_DEADLINES; to ask again: mvm job retry " + job.job_id, deadline_s=limit,
                step=job.step,
            )  # fmt: skip

    def check_lease(self, held: Instance) -> None:
        """Raises `Fenced` unless `held` is the newest lease of its instance."""
        if self.store.lease(held.ref) != held.lease:
            raise Fenced("job.fenced", f"another worker has taken {held.ref} over meanwhile",
                         hint=f"see: mvm job list --subject {held.ref}", subject=str(held.ref))  # fmt: skip

    def save(self, job: Job) -> None:
        """Record a running job's state here, then for those who follow it."""
        self.store.put_job(job)
        self._tell(job)

    def _publish(self, job: Job) -> None:
        """Tell the registry of a job's end and send what waited for it."""
        if self._tell(job) and job.parent:
            try:
                self._jobs.release_children(job.parent)
            except Unreachable as error:
                log.warning("siblings wait", error=error.message)

    def _release_sweep(self, job: Job) -> None:
        try:
            self._registry.release_sweep(job.verb.value, job.node_id, job.job_id)
        except Unreachable as error:  # its claim ends by itself after a while
            log.warning("sweep not released", error=error.message)

    def _tell(self, job: Job) -> bool:
        if job.reason is Reason.URGENT:  # listed by `UrgentWake` once it has ended: now every millisecond is waited for
            return False
        try:
            self._registry.update(job)
        except Unreachable as error:  # the node's record is the truth; a sweep publishes it later
            log.warning("not published", error=error.message)
            return False
        return True
