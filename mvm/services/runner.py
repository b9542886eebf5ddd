"""Running a job once: the record, the locks, the steps, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog

from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Lane, Progress, Reason
from mvm.errors import Cancelled, MvmError, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.audit import Audit
from mvm.services.jobs import Jobs
from mvm.services.precedence import Precedence

log = structlog.get_logger("mvm.jobs")

_DUPLICATE_WAIT_S = 900.0
"""How long a second delivery waits for the first one to end."""

Handler = Callable[["JobContext"], Mapping[str, Any]]
Observer = Callable[[Job], None]


class JobContext:
    """What a handler has of its job: its words, its steps, and the way to end it."""

    def __init__(self, job: Job, runner: Runner) -> None:
        self.job = job
        self.touched: dict[str, Instance | None] = {}
        self.change: tuple[str | None, str | None] = (None, None)
        self._runner = runner
        self._remarks: list[str] = []
        self.left_at: str | None = None
        """The step at which another job left what this one works on, when its worker was killed."""

    def remark(self, text: str) -> None:
        """What whoever asked should know though the job succeeds; kept as ``remarks`` of its result."""
        self._remarks.append(text)
        log.warning("remark", text=text)

    def found(self, ref: InstanceRef, instance: Instance | None) -> None:
        """The job is about `instance` (None: to be made), as it is now; for the audit trail."""
        self.touched[str(ref)] = instance

    def changed(self, before: str, after: str) -> None:
        """What the job changed, when it is of no instance; for the audit trail."""
        self.change = (before, after)

    def step(self, name: str, done: int = 0, total: int = 0) -> None:
        """Begin step `name`, the `done`-th of `total`; raises `Cancelled` here if somebody asked for it."""
        self._runner.check_cancelled(self.job)
        self.job = self.job.with_(step=name, progress=Progress(done, total))
        self._runner.save(self.job)
        log.debug("step", step=name)

    def record(self) -> None:
        """The job is at work: for the transaction in which it claims what it works on."""
        self._runner.store.put_job(self.job)

    @contextmanager
    def ending(self, **result: Any) -> Iterator[None]:
        """The job succeeds with `result` in one transaction with the writes made within."""
        if self._remarks:
            result["remarks"] = self._remarks
        with self._runner.store.transaction():
            yield
            self._runner.record_end(self, self._runner.ended(self.job, JobState.SUCCEEDED, result=result))


class Runner:
    """The one door for work on a node: Celery, the agent, sweeps and tests all call `run`."""

    def __init__(
        self, store: NodeStore, registry: Registry, locks: Locks, clock: Clock, jobs: Jobs,
        precedence: Precedence, audit: Audit, observers: tuple[Observer, ...] = (),
    ) -> None:  # fmt: skip
        self.store = store
        self._registry = registry
        self._locks = locks
        self._clock = clock
        self._jobs = jobs
        self._precedence = precedence
        self._audit = audit
        self._observers = observers
        self._handlers: dict[JobVerb, Handler] = {}

    def register(self, verb: JobVerb, handler: Handler) -> None:
        """`handler` does what `verb` says."""
        self._handlers[verb] = handler

    def run(self, job: Job) -> Job:
        """Do `job`, once, and return its final record; its errors are in the record, not raised.

        A second delivery waits for the first, then returns what was recorded. A job whose worker was killed is
        taken up from its beginning: every step observes before it acts.
        """
        self._give_way(job)
        with structlog.contextvars.bound_contextvars(
            job_id=job.job_id, subject=job.subject, node=job.node_id, reason=job.reason.value, verb=job.verb.value
        ), self._locks.hold(f"job {job.job_id}", deadline_s=_DUPLICATE_WAIT_S):  # fmt: skip
            known = self.store.job(job.job_id)
            if known is not None and known.state.final:
                log.info("delivered again", state=known.state.value)
                self._publish(known)
                return known
            final = self._run_once(known or job)
            if not job.verb.is_sweep:
                self._audit.soon()
            self._give_way(job)  # it holds no instance any more that a wake could wait for
            self._publish(final)
            if job.verb.is_sweep:
                self._release_sweep(job)
            for observe in self._observers:
                observe(final)
            return final

    def _give_way(self, job: Job) -> None:
        if job.lane is not Lane.URGENT:
            self._precedence.given()

    def _run_once(self, job: Job) -> Job:
        job = job.with_(state=JobState.RUNNING, started_at=job.started_at or self._clock.now())
        context = JobContext(job, self)
        try:
            self.check_cancelled(job)
            if job.reason is not Reason.URGENT:  # it is recorded with its claim: each commit reaches the disk
                self.save(job)
            log.info("began")
            result = self._handlers[job.verb](context)
            if not context.job.state.final:
                with context.ending(**result):
                    pass
            log.info("succeeded")
        except MvmError as error:
            state = JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED
            self._end(context, state, error)
            log.warning("ended", state=state.value, code=error.code, error=error.message)
        except Exception:  # the last line of defence: a bug must not leave a job without an end
            bug = MvmError("internal", "an unexpected error; its details are in the node's log",
                           hint=f"look for {job.job_id} in the worker's log")  # fmt: skip
            self._end(context, JobState.FAILED, bug)
            log.exception("crashed")
        return context.job

    def _end(self, context: JobContext, state: JobState, error: MvmError) -> None:
        with self.store.transaction():
            self.record_end(context, self.ended(context.job, state, error=error.to_dict()))

    def record_end(self, context: JobContext, job: Job) -> None:
        """Within a transaction: the final record of the context's job, and what the audit trail says of it."""
        self._audit.job_ended(job, context.touched, context.change)
        self.store.put_job(job)
        context.job = job

    def ended(self, job: Job, state: JobState, **changes: Any) -> Job:
        """`job` at its end; a finished step count says that all of it is done."""
        progress = Progress(job.progress.total, job.progress.total) if state is JobState.SUCCEEDED else job.progress
        return job.with_(state=state, finished_at=self._clock.now(), progress=progress, **changes)

    def check_cancelled(self, job: Job) -> None:
        """Raises `Cancelled` if somebody asked for it. An unreachable registry has nobody's wishes."""
        if job.reason is Reason.URGENT:
            return
        try:
            asked = self._registry.cancel_requested(job.job_id)
        except Unreachable:
            return
        if asked:
            raise Cancelled("job.cancelled", "cancelled on request; what it had begun is undone")

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
