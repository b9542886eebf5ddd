"""From a submitted job to what the command prints: wait with progress, then the result or the job's own error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

import click

from mvm.cli.errors import show_and_exit, show_error
from mvm.cli.fleet import Fleet
from mvm.cli.params import JobWait
from mvm.cli.progress import Progress
from mvm.cli.render import emit
from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.errors import Cancelled, Failed, MvmError, TimedOut, Unreachable, error_from_dict

_DIAGNOSE_S = 3.0  # queued for so long, a job's node is looked at
_PATIENCE_S = 15.0  # with a registry that has answered before: its supervisor starts it again
_ASK_AGAIN_S = 0.25


def finish(fleet: Fleet, output: str, job: Job, wait: JobWait, show: Callable[[Job], None]) -> None:
    """Wait for `job` as `wait` says; `show` prints it once it has succeeded.

    Raises the job's own error, and `TimedOut` (``job.wait_timeout``) when the wait is over first.
    """
    if not wait.wait:
        emit(job.to_dict(), output) if output != "table" else click.echo(job.job_id)
        return
    final = follow(fleet, [job.job_id], wait.timeout_s)[job.job_id]
    if final.verb is JobVerb.BULK:
        _show_bulk(fleet, output, final)
    elif final.state is JobState.SUCCEEDED:
        show(final)
        _show_remarks(final)
    else:
        raise error_of(final)


def show_result(output: str, text: Callable[[Mapping[str, Any]], str]) -> Callable[[Job], None]:
    """Prints a job's result: the object itself, or `text` of it."""

    def show(job: Job) -> None:
        result = dict(job.result or {})
        emit(result, output) if output != "table" else click.echo(text(result))

    return show


def show_job(output: str, text: str) -> Callable[[Job], None]:
    """Prints the job as an object, or `text`."""
    return lambda job: emit(job.to_dict(), output) if output != "table" else click.echo(text)


def follow(fleet: Fleet, ids: Sequence[JobId], timeout_s: float | None) -> dict[JobId, Job]:
    """Show progress until all of them are final. Ctrl-C stops the waiting only, and exits 130."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    latest: dict[JobId, Job] = {}
    lost: float | None = None  # since when the registry is silent
    try:
        with Progress(ids) as progress:
            look = True  # now and then, why nothing happens
            while True:
                left = None if end is None else max(0.0, end - time.monotonic())
                last = not look or (left is not None and left <= _DIAGNOSE_S)
                try:
                    for job in fleet.jobs.follow(ids, deadline_s=left if last else _DIAGNOSE_S):
                        latest[job.job_id], lost = job, None
                        progress.show(job)
                    return latest
                except Unreachable as error:
                    now = time.monotonic()
                    if lost is None and latest:
                        progress.note(f"{error.message}; waiting for it")
                    lost = lost or now
                    if not latest or now - lost > _PATIENCE_S or (end is not None and now > end):
                        raise _unheard(ids, latest, error) from None
                    Event().wait(_ASK_AGAIN_S)  # nothing tells when it is back
                except TimedOut:
                    if last:
                        raise _waited(ids, latest, timeout_s) from None
                    look = _look(fleet, latest, progress)
    except KeyboardInterrupt:
        names = _open(ids, latest)
        if names:
            click.echo(f"stopped waiting; the job goes on: {' '.join(names)}", err=True)
            click.echo(f"hint: mvm job wait {' '.join(names)}; to end it: mvm job cancel {names[0]}", err=True)
        raise click.exceptions.Exit(130) from None


def _look(fleet: Fleet, latest: Mapping[JobId, Job], progress: Progress) -> bool:
    """Say why a job is not being done, if that can be told; returns whether to look again later."""
    note = next(filter(None, (note_of(fleet, job) for job in latest.values())), None)
    if note:
        progress.note(note)
    return note is None and any(_idle(job) for job in latest.values())


def _idle(job: Job) -> bool:
    return job.state is JobState.QUEUED or (job.verb is JobVerb.BULK and not job.progress.done)


def note_of(fleet: Fleet, job: Job) -> str | None:
    """Why `job`, or a child of it, has not begun."""
    if job.state.final:
        return None
    waiting = [job] if job.verb is not JobVerb.BULK else fleet.jobs.children(job.job_id)
    queued = {each.node_id: each for each in waiting if each.state is JobState.QUEUED}
    return next(filter(None, map(fleet.jobs.diagnosis, queued.values())), None)


def _open(ids: Sequence[JobId], latest: Mapping[JobId, Job]) -> list[JobId]:
    return [job_id for job_id in ids if job_id not in latest or not latest[job_id].state.final]


def _waited(ids: Sequence[JobId], latest: Mapping[JobId, Job], timeout_s: float | None) -> TimedOut:
    names = _open(ids, latest)
    return TimedOut(
        "job.wait_timeout", f"not finished after {timeout_s:g} s; the job goes on: {' '.join(names)}",
        hint=f"mvm job wait {' '.join(names)}", jobs=[str(name) for name in names],
    )  # fmt: skip


def _unheard(ids: Sequence[JobId], latest: Mapping[JobId, Job], error: Unreachable) -> Unreachable:
    """`error`, with the jobs that it keeps from being followed: they were accepted."""
    names = _open(ids, latest)
    return Unreachable(
        error.code, error.message, hint=f"see: mvm status; then: mvm job wait {' '.join(names)}",
        **{**error.fields, "jobs": [str(name) for name in names]},
    )  # fmt: skip


def error_of(job: Job) -> MvmError:
    """Why a job that ended did not succeed."""
    if job.error:
        error = error_from_dict(job.error)
    elif job.state is JobState.CANCELLED:
        error = Cancelled("job.cancelled", "cancelled before it began")
    else:
        error = Failed("job.failed", "failed without saying why", hint=f"see: mvm job show {job.job_id}")
    if job.subject not in error.message:
        error.message = f"{job.subject}: {error.message}"
    error.fields.setdefault("job_id", str(job.job_id))
    return error


def _show_remarks(job: Job) -> None:
    for text in (job.result or {}).get("remarks", ()):
        click.echo(f"note: {job.subject}: {text}", err=True)


def _show_bulk(fleet: Fleet, output: str, parent: Job) -> None:
    """The parent and its children; exits with the code that the failed ones have in common, else 1."""
    children = fleet.jobs.children(parent.job_id)
    if output != "table":
        emit({**parent.to_dict(), "children": [child.to_dict() for child in children]}, output)
    else:
        for child in children:
            if child.state is JobState.SUCCEEDED:
                click.echo(child.subject)
    for child in children:
        _show_remarks(child)
    failures = [error_of(child) for child in children if child.state is not JobState.SUCCEEDED]
    if parent.state is not JobState.SUCCEEDED:
        show_error(error_of(parent))
        show_and_exit(failures or [error_of(parent)])
