"""Asking for jobs and following them: what the command line, reconcile and Beat use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import takewhile
from typing import Any, NamedTuple

from mvm.domain.canvas import names
from mvm.domain.ids import JobId, NodeId, PoolRef
from mvm.domain.job import Job, JobState, JobVerb, Lane, Progress, Reason, lane_of
from mvm.domain.refusals import id_used, job_not_found
from mvm.domain.tries import expired
from mvm.errors import InvalidInput, MvmError, NotAllowed
from mvm.ports.clock import Clock
from mvm.ports.queue import JobQueue
from mvm.ports.registry import Registry

NODE_LIVE_S = 15.0
AHEAD_S = 120.0
"""A time further ahead than this, of a job that waits, is of a clock that has been set back since.

Or twice as far ahead as the longest pause between tries, if that is more.
"""
_VAIN = (JobState.FAILED, JobState.CANCELLED)


class Asked(NamedTuple):
    """A job to be: what, of whom, with which words."""

    verb: JobVerb
    subject: str
    params: Mapping[str, Any] = {}


class Jobs:
    """Records a job, then sends it: never the other way round."""

    def __init__(
        self, registry: Registry, queue: JobQueue, clock: Clock, *, expires_s: float = 86400.0, cap_s: float = 0.0
    ) -> None:
        self._registry = registry
        self._queue = queue
        self._clock = clock
        self._expires_s = expires_s
        self.ahead_s = max(AHEAD_S, 2 * cap_s)

    def new(
        self, verb: JobVerb, subject: str, node: NodeId, *, params: Mapping[str, Any] | None = None,
        reason: Reason = Reason.MANUAL, actor: str, parent: JobId | None = None, lane: Lane | None = None,
        expires_s: float | None = None, retry_of: JobId | None = None,
    ) -> Job:  # fmt: skip
        """A job that is not known anywhere yet; dropped if nobody takes it within `expires_s` seconds."""
        now = self._clock.now()
        job_id = JobId.make(int(now.timestamp() * 1000), self._clock.random(5))
        lane = lane or lane_of(verb, bulk=parent is not None)
        expires = now + timedelta(seconds=expires_s or self._expires_s)
        return Job(job_id, verb, subject, node, actor, reason, now, params or {}, lane, parent=parent,
                   expires_at=expires, retry_of=retry_of)  # fmt: skip

    def submit(
        self, verb: JobVerb, subject: str, node: NodeId, *, params: Mapping[str, Any] | None = None,
        reason: Reason = Reason.MANUAL, actor: str, expires_s: float | None = None,
    ) -> Job:  # fmt: skip
        """Record and send one job. Raises `Unreachable` when it could not be accepted."""
        job = self.new(verb, subject, node, params=params, reason=reason, actor=actor, expires_s=expires_s)
        self._registry.record([job])
        self._send([job])
        return job

    def accept(self, job: Job) -> Job:
        """Record `job`, which others send, unless it is known; returns what is known of it.

        Raises `NotAllowed` (``job.id_used``) when its id is that of a job which asks for something else.
        """
        known = self._registry.job(job.job_id)
        if known is None:
            self._registry.record([job])
        elif not known.asks_as(job):
            raise id_used(known)
        return known or job

    def not_sent(self, job: Job, error: MvmError) -> None:
        """`job` was recorded and cannot be sent: say so where people look."""
        self._registry.update(job.with_(state=JobState.FAILED, error=error.to_dict(), finished_at=self._clock.now()))

    def home(self, pool: PoolRef) -> NodeId | None:
        """The node that has the pool."""
        return self._registry.pool_node(pool)

    def refuse(self, task_id: str, error: MvmError) -> None:
        """See `Registry.refuse`."""
        self._registry.refuse(task_id, error)

    def refusal(self, task_id: str) -> MvmError | None:
        """See `Registry.refusal`."""
        return self._registry.refusal(task_id)

    def is_expected(self, task_id: str) -> bool:
        """Whether something that is under way names this Celery task, which may become a job yet."""
        return any(
            any(names(job, task_id) for job in self._registry.open_jobs(node)) or self._queue.speaks_of(node, task_id)
            for node in (record.node_id for record in self._registry.nodes())
        )

    def find(self, job_id: JobId) -> Job | None:
        """One job, if it is known."""
        return self._registry.job(job_id)

    def submit_bulk(
        self, verb: JobVerb, subjects: Sequence[str], node_of: Callable[[str], NodeId], *,
        params: Mapping[str, Any] | None = None, parallel: int | None = None, actor: str,
        reason: Reason = Reason.MANUAL,
    ) -> Job:  # fmt: skip
        """One parent with a child per subject, at most `parallel` of them at once. Returns the parent."""
        if parallel is not None and parallel < 1:
            raise InvalidInput("job.invalid_parallel", f"--parallel is {parallel}", hint="allowed: 1 and up",
                               field="parallel", value=parallel)  # fmt: skip
        params_ = {"verb": verb.value, "count": len(subjects), "parallel": parallel or len(subjects)}
        parent = self._parent(params_, subjects, node_of(subjects[0]), reason, actor)
        children = [
            self.new(verb, s, node_of(s), params=params, reason=reason, actor=actor, parent=parent.job_id)
            for s in subjects
        ]
        return self._spread(parent, children, parallel)

    def submit_group(self, asked: Sequence[Asked], node: NodeId, *, reason: Reason, actor: str) -> Job:
        """One parent with a child for each of `asked`, whatever their verbs, all at once. Returns the parent."""
        subjects = [each.subject for each in asked]
        parent = self._parent({"verb": reason.value, "count": len(asked)}, subjects, node, reason, actor)
        children = [
            self.new(a.verb, a.subject, node, params=a.params, reason=reason, actor=actor, parent=parent.job_id)
            for a in asked
        ]
        return self._spread(parent, children, None)

    def retry(self, job_id: JobId, *, actor: str) -> Job:
        """Ask for what `job_id` did not achieve once more, as a new job: all of it, or a bulk job's children of these.

        Raises `NotFound`, and `NotAllowed` (``job.not_failed``) when there is nothing that failed or was cancelled.
        """
        job = self.job(job_id)
        if job.state not in _VAIN or job.verb.is_sweep:
            raise NotAllowed(
                "job.not_failed", f"job {job_id} ({job.verb}) is {job.state}",
                hint="what failed or was cancelled can be asked for again; sweeps come by themselves",
                subject=job_id, state=job.state.value,
            )  # fmt: skip
        if job.verb is not JobVerb.BULK:
            again = self._again(job, actor, None)
            self._registry.record([again])
            self._send([again])
            return again
        left = [child for child in self.children(job_id) if child.state in _VAIN]
        params = {**job.params, "count": len(left)}
        parent = self._parent(params, [child.subject for child in left], job.node_id, Reason.MANUAL, actor)
        children = [self._again(child, actor, parent.job_id) for child in left]
        return self._spread(parent.with_(retry_of=job_id), children, job.params.get("parallel"))

    def _again(self, job: Job, actor: str, parent: JobId | None) -> Job:
        return self.new(
            job.verb, job.subject, job.node_id, params=job.params, actor=actor, parent=parent, retry_of=job.job_id
        )

    def _spread(self, parent: Job, children: Sequence[Job], parallel: int | None) -> Job:
        hold = frozenset(child.job_id for child in children[parallel or len(children) :])
        self._registry.record([parent, *children], hold=hold)
        self._send([child for child in children if child.job_id not in hold])
        return parent

    def _parent(
        self, params: Mapping[str, Any], subjects: Sequence[str], node: NodeId, reason: Reason, actor: str
    ) -> Job:
        parent = self.new(JobVerb.BULK, _common(subjects), node, reason=reason, actor=actor, params=params)
        running = parent.with_(state=JobState.RUNNING, progress=Progress(total=len(subjects)))
        return running.with_(started_at=parent.submitted_at)

    def sweep(self, verb: JobVerb, *, every_s: float) -> Sequence[Job]:
        """Ask every live node for this period's sweep, unless it was asked or has one of this kind queued or running.

        Whoever else asks at the same time, and whenever the caller is held up: each period has one at most.
        """
        if verb is JobVerb.SWEEP_ORPHANS:
            self.expire()  # a dead node sweeps nothing
        sent, tick = [], self._registry.tick(every_s)
        for node in self._registry.live_nodes(self._clock.now() - timedelta(seconds=NODE_LIVE_S)):
            job = self.new(
                verb, str(node), node, params={"tick": tick}, reason=Reason.SWEEP, actor="beat", expires_s=4 * every_s
            )
            lasts_s = max(30.0, 5 * every_s)
            if self._registry.claim_sweep(verb.value, node, job.job_id, tick=tick, every_s=every_s, ttl_s=lasts_s):
                self._registry.record([job])
                self._send([job])
                sent.append(job)
        return sent

    def _send(self, jobs: Sequence[Job]) -> None:
        try:
            self._queue.send(jobs)
        except MvmError as error:
            for job in jobs:
                self.not_sent(job, error)
            raise

    def send_lost(self, node: NodeId, *, older_than_s: float) -> Sequence[Job]:
        """Send again what waits for `node` and is in none of its queues; returns those jobs.

        A message is lost when a worker is killed between taking and noting it, or a caller between recording its job
        and sending it. A message too many is harmless: a job is done once. Sweeps are not worth it.
        """
        now = self._clock.now()
        before, ahead = now - timedelta(seconds=older_than_s), now + timedelta(seconds=self.ahead_s)
        waiting = [
            job
            for job in self._registry.open_jobs(node)
            if job.state is JobState.QUEUED
            and not before < (job.retry_at or job.submitted_at) <= ahead
            and job.verb is not JobVerb.BULK
            and not job.verb.is_sweep
        ]
        if not waiting:
            return []
        parents = {job.parent for job in waiting if job.parent}
        for parent in parents:
            self.release_children(parent)  # whoever ended the one before may not have come to it
        known = set(self._queue.queued(node))
        for parent in parents:
            known |= self._registry.held_children(parent)
        lost = [job for job in waiting if job.job_id not in known]
        if lost:
            self._queue.send(lost)
        return lost

    def expire(self) -> Sequence[Job]:
        """End the queued jobs that no worker took in time, of live nodes and dead ones; returns them."""
        late = self._registry.expired_jobs(self._clock.now())
        for job in late:
            self.expired(job)
        for node in {job.node_id for job in late}:
            self._queue.discard(node, frozenset(job.job_id for job in late if job.node_id == node))
        return late

    def expired(self, job: Job) -> None:
        """No worker took `job` in time: it ends, whatever message of it still comes."""
        self._registry.expire(expired(job, self._clock.now()))
        if job.verb.is_sweep:
            self._registry.release_sweep(job.verb.value, job.node_id, job.job_id)
        if job.parent:
            self.release_children(job.parent)

    def send_again(self, jobs: Sequence[Job]) -> None:
        """Send jobs that are known: each is delivered at its ``retry_at``, or at once."""
        self._queue.send(jobs)

    def queued(self, node: NodeId) -> frozenset[JobId]:
        """The jobs whose messages wait for the node's workers."""
        return self._queue.queued(node)

    def release_children(self, parent: JobId) -> None:
        """Send the children of a bulk job that may run now that others ended."""
        ready = self._registry.next_children(parent)
        if ready:
            self._queue.send(ready)

    def job(self, job_id: JobId) -> Job:
        """One job; raises `NotFound`."""
        job = self._registry.job(job_id)
        if job is None:
            raise job_not_found(job_id)
        return job

    def list(self, *, state: JobState | None = None, subject: str | None = None, limit: int = 200) -> Sequence[Job]:
        """The newest jobs first."""
        return self._registry.jobs(state=state, subject=subject, limit=limit)

    def children(self, job_id: JobId) -> Sequence[Job]:
        """A bulk job's children."""
        return self._registry.children(job_id)

    def cancel(self, job_id: JobId) -> Job:
        """Ask it to end; see `Registry.request_cancel`."""
        job = self._registry.request_cancel(job_id)
        if job.parent and job.state.final:
            self.release_children(job.parent)
        return job

    def follow(self, job_ids: Sequence[JobId], *, deadline_s: float | None = None) -> Iterator[Job]:
        """See `Registry.follow`."""
        return self._registry.follow(job_ids, deadline_s=deadline_s)

    def is_node_live(self, node: NodeId) -> bool:
        """Whether the node's worker was seen lately."""
        return node in self._registry.live_nodes(self._clock.now() - timedelta(seconds=NODE_LIVE_S))

    def diagnosis(self, job: Job) -> str | None:
        """Why a queued job is not being done, if that can be told."""
        if job.state is not JobState.QUEUED:
            return None
        if self.is_node_live(job.node_id):
            return _next_try(job)
        seen = next((r.last_seen_at for r in self._registry.nodes() if r.node_id == job.node_id), None)
        if seen is None:
            return f"no worker has taken it: node {job.node_id} has never been seen"
        ago = int((self._clock.now() - seen).total_seconds())
        return f"no worker has taken it: node {job.node_id}'s worker was last seen {ago} s ago"


def _next_try(job: Job) -> str | None:
    if not job.retry_at or not job.setbacks:
        return None
    last = job.setbacks[-1]
    when = job.retry_at.isoformat(timespec="seconds")
    return f"try {job.attempt + 1} of {job.attempts} comes at {when}: {last['message']} [{last['code']}]"


def _common(subjects: Sequence[str]) -> str:
    """What all subjects lie below: a pool, a tenant, or ``*``."""
    paths = [subject.split("/")[:-1] for subject in subjects]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return "/".join(names[0] for names in shared) or "*"
