"""Calling a task as Celery's users do: what is called becomes a job first, then a message.

``apply_async``, ``delay``, ``send_task``, chains, groups, chords and ``celery call`` all come to `JobsApp.send_task`.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import structlog
from celery import Celery
from celery.result import AsyncResult
from kombu import Queue
from kombu.exceptions import KombuError
from kombu.utils.json import dumps, loads

from mvm.domain.calls import Call, read_call
from mvm.domain.canvas import canvas_of
from mvm.domain.ids import InstanceRef, JobId, NodeId, PoolRef
from mvm.domain.job import Job, JobVerb, Lane
from mvm.domain.messages import ForeignMessage
from mvm.domain.refusals import not_found
from mvm.drivers.celery_queue import priority_of, readable, task_kwargs
from mvm.errors import InvalidInput, MvmError, Unreachable
from mvm.ports.queue import node_queue, queue_owner
from mvm.services.jobs import Jobs
from mvm.settings import Settings
from mvm.wiring import open_jobs

log = structlog.get_logger("mvm.calls")

_REFUSED: Mapping[str, str] = {
    "link_error": "a job tells of its failure in its record; ask for its state instead",
    "time_limit": "jobs have deadlines of their own: MVM_JOB_DEADLINES",
    "soft_time_limit": "jobs have deadlines of their own: MVM_JOB_DEADLINES",
    "compression": "workers read JSON as it is",
    "priority": "a job's lane says how urgent it is: lane='urgent', 'normal' or 'bulk'",
    "exchange": "each queue is reached by its own name, which is its routing key",
}
"""Options of Celery's that a job cannot have, and why."""

_IN_ONE_TASK = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
"""Tasks of Celery's own that call others within themselves."""

_CANVAS = {
    "group_id": "group",
    "group_index": "group_index",
    "chain": "chain",
    "chord": "chord",
    "link": "callbacks",
    "root_id": "root_id",
    "parent_id": "parent_id",
}


class JobsApp(Celery):  # type: ignore[misc]
    """Celery, whose tasks are jobs: recorded before they are sent, like those of the command line."""

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mvm_settings = settings

    @cached_property
    def jobs(self) -> Jobs:
        """Recording, cancelling and following jobs."""
        return open_jobs(self._mvm_settings)

    def refuse(self, error: ForeignMessage) -> None:
        """Who waits for the result of a task that was set aside is told so."""
        if error.task_id is None:
            return
        try:
            self.jobs.refuse(error.task_id, error)
        except MvmError as failure:
            log.warning("refusal not noted", code=failure.code, error=failure.message)

    def send_task(
        self, name: str, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult:
        """Celery's own, for other tasks. A job is recorded first.

        Raises `InvalidInput` (``job.invalid_arguments``, ``job.option_refused``, ``job.invalid_id``), `NotAllowed`
        (``job.id_used``), `NotFound` for a pool that does not exist, and `Unreachable`.
        """
        verb = _verb(name)
        if name in _IN_ONE_TASK:
            raise _option(name, f"a worker takes no {name}: each job has a message of its own; ask for a group")
        if verb is None:
            return super().send_task(name, args, kwargs, **options)
        _check_options(name, options)
        job = self._job(read_call(verb, args or (), kwargs or {}), options)
        known = self.jobs.accept(job)
        if known.state.final:  # a link of a chain, sent by a task that was delivered twice
            return self.AsyncResult(job.job_id)
        for spent in ("task_id", "queue", "routing_key", "priority", "countdown", "eta", "expires", "serializer"):
            options.pop(spent, None)
        words = task_kwargs(job)
        queue = node_queue(job.node_id, job.lane)
        try:
            return super().send_task(
                name,
                (),
                words,
                task_id=str(job.job_id),
                queue=Queue(queue, routing_key=queue),
                priority=priority_of(job.lane),
                eta=job.retry_at,
                kwargsrepr=readable(words),
                **options,
            )
        except (KombuError, OSError) as error:
            failure = Unreachable("broker.unreachable", f"the broker does not take it: {error}", hint="see: mvm status")
            self.jobs.not_sent(job, failure)
            raise failure from error

    def _job(self, call: Call, options: Mapping[str, Any]) -> Job:
        asker = self.current_worker_task
        inherited = asker.request.kwargs.get("actor") if asker and asker.request.kwargs else None
        node, lane = self._place(call, options)
        job = self.jobs.new(
            call.verb,
            call.subject,
            node,
            params=call.params,
            actor=call.actor or inherited or getpass.getuser(),
            lane=lane,
        )
        if options.get("task_id"):
            job = job.with_(job_id=JobId(str(options["task_id"])))
        return job.with_(
            retry_at=self._eta(options),
            expires_at=_time(options.get("expires")) or job.expires_at,
            canvas=_canvas(options, asker, job.job_id),
        )

    def _place(self, call: Call, options: Mapping[str, Any]) -> tuple[NodeId, Lane | None]:
        """The job's node and lane: of its queue when one is named, else of its subject."""
        named = options.get("queue") or options.get("routing_key")
        if named:
            owner = queue_owner(named.name if isinstance(named, Queue) else str(named))
            if owner is None or call.node not in (None, owner[0]):
                raise _option("queue", f"{named} is no queue for this job: node.ID or node.ID.urgent")
            return owner[0], call.lane or owner[1]
        return call.node or self._home(call), call.lane

    def _home(self, call: Call) -> NodeId:
        """The node that has the subject; new things are made on this one."""
        kind = call.verb.value.partition(".")[0]
        if kind == "node":
            return NodeId(call.subject)
        if kind == "tenant" or call.verb is JobVerb.POOL_CREATE:
            return self._mvm_settings.node
        whole = call.subject.count("/") > 1
        pool = InstanceRef.parse(call.subject).pool_ref if whole else PoolRef.parse(call.subject)
        home = self.jobs.home(pool)
        if home is None:
            raise not_found("pool", pool)
        return home

    def _eta(self, options: Mapping[str, Any]) -> datetime | None:
        when = _time(options.get("eta") if options.get("eta") is not None else options.get("countdown") or None)
        if when is not None and when - datetime.now(UTC) > timedelta(seconds=self.jobs.ahead_s):
            raise _option(
                "eta",
                f"a job waits for {self.jobs.ahead_s:g} s at most: its worker would hold it all the while; "
                "let Beat, cron or a timer call it at its time",
            )
        return when


def _verb(name: str) -> JobVerb | None:
    try:
        return JobVerb(name.removeprefix("mvm.")) if name.startswith("mvm.") else None
    except ValueError:
        return None


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option, why in _REFUSED.items():
        if options.get(option):
            raise _option(option, f"{name} takes no {option}: {why}")
    if options.get("serializer") not in (None, "json"):
        raise _option("serializer", f"{name} is sent as JSON alone")


def _option(name: str, why: str) -> InvalidInput:
    return InvalidInput("job.option_refused", why, hint="see docs/celery.md: What is refused", field=name)


def _time(value: Any) -> datetime | None:
    """Celery's ways to tell a time: a time, its text, or seconds from now."""
    if value is None:
        return None
    try:
        if isinstance(value, int | float):
            return datetime.now(UTC) + timedelta(seconds=value)
        when = datetime.fromisoformat(value) if isinstance(value, str) else value
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, AttributeError, OverflowError):
        raise _option("eta", f"{value!r} is no time") from None


def _canvas(options: Mapping[str, Any], asker: Any, job_id: JobId) -> Mapping[str, Any] | None:
    given = {name: options.get(option) for option, name in _CANVAS.items()}
    if given["callbacks"] is not None and not isinstance(given["callbacks"], list | tuple):
        given["callbacks"] = [given["callbacks"]]
    if asker:
        given["root_id"] = given["root_id"] or asker.request.root_id or asker.request.id
        given["parent_id"] = given["parent_id"] or asker.request.id
    return canvas_of(loads(dumps(given)), job_id, None)
