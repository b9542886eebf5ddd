"""``mvm job``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.following import error_of, finish, follow, note_of
from mvm.cli.params import JOB, SECONDS, SUBJECT, JobWait, actor, counted, job_options, pass_fleet
from mvm.cli.render import Columns, age, emit, show_list, show_one, table
from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobState, JobVerb

_SCAN = 2000  # newest jobs that are looked at when succeeded sweeps are left out
_COLUMNS: Columns = {
    "id": "job_id",
    "verb": lambda row: f"{row['params'].get('verb', '')} (bulk)" if row["verb"] == JobVerb.BULK else row["verb"],
    "subject": "subject",
    "state": "state",
    "step": lambda row: _step(row),
    "age": lambda row: age(row["submitted_at"]),
    "reason": "reason",
}


def _step(row: Mapping[str, Any]) -> str:
    if row["state"] == JobState.FAILED and row["error"]:
        return str(row["error"]["code"])
    done, total = row["progress"]["done"], row["progress"]["total"]
    return f"{done}/{total}" if row["verb"] == JobVerb.BULK else row["step"] or ""


@click.group(cls=Group)
def job() -> None:
    """Jobs: what was asked, by whom, why, and how it went."""


@job.command(name="list")
@click.option("--state", type=click.Choice([s.value for s in JobState]), help="Only those that are so.")
@click.option("--subject", type=SUBJECT, metavar="REF", help="Only of this tenant, pool, instance or node.")
@click.option("--all", "all_", is_flag=True, help="Also sweeps that succeeded.")
@click.option("--limit", type=int, default=100, metavar="N", help="At most the N newest; default: 100.")
@pass_fleet
def list_(fleet: Fleet, output: str, state: str | None, subject: str | None, all_: bool, limit: int) -> None:
    """List jobs, newest first."""
    counted(limit, "limit", "job.invalid_limit")
    everything = all_ or bool(state or subject)
    jobs = fleet.jobs.list(
        state=JobState(state) if state else None, subject=subject, limit=limit if everything else max(limit, _SCAN)
    )
    shown = [each for each in jobs if everything or not (each.verb.is_sweep and each.state is JobState.SUCCEEDED)]
    show_list([each.to_dict() for each in shown[:limit]], _COLUMNS, output, empty="no jobs")


@job.command()
@click.argument("job_id", metavar="ID", type=JOB)
@pass_fleet
def show(fleet: Fleet, output: str, job_id: JobId) -> None:
    """Show job ID; a bulk job with its children, a waiting one with the reason if it can be told."""
    found = fleet.jobs.job(job_id)
    fields = found.to_dict()
    note = note_of(fleet, found)
    if note:
        fields["note"] = note
    children = [child.to_dict() for child in fleet.jobs.children(job_id)] if found.verb is JobVerb.BULK else []
    if output != "table":
        emit({**fields, "children": children} if found.verb is JobVerb.BULK else fields, output)
        return
    fields["setbacks"] = "; ".join(f"{s['at'][:19]} {s['message']} [{s['code']}]" for s in found.setbacks)
    error = fields.pop("error")
    if error:
        fields["error"] = f"[{error['code']}] {error['message']}"
        fields["hint"] = error["hint"]
    tables = _tables(fields)
    show_one({name: value for name, value in fields.items() if value not in (None, {}, "")}, output)
    for name, rows in tables.items():
        click.echo("\n".join([f"\n{name}:", *table(rows, {column: column for column in rows[0]})]))
    if children:
        click.echo("\n" + "\n".join(table(children, _COLUMNS)))


def _tables(fields: dict[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """What of a job's result is lists of objects, such as a sweep's findings; the result has their lengths instead."""
    result = dict(fields["result"] or {})
    lists: dict[str, Sequence[Mapping[str, Any]]] = {
        name: value for name, value in result.items() if isinstance(value, list) and _objects(value)
    }
    if lists:
        fields["result"] = {**result, **{name: len(rows) for name, rows in lists.items()}}
    return lists


def _objects(rows: Sequence[Any]) -> bool:
    return bool(rows) and all(isinstance(row, Mapping) for row in rows)


@job.command()
@click.argument("ids", metavar="ID...", type=JOB, nargs=-1, required=True)
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="Wait at most so long; default: no limit.")
@pass_fleet
def wait(fleet: Fleet, output: str, ids: Sequence[JobId], timeout: float | None) -> None:
    """Wait for jobs; exits 0 only if all succeeded."""
    ids = list(dict.fromkeys(ids))
    ended = follow(fleet, ids, timeout)
    jobs: list[Job] = [ended[job_id] for job_id in ids]
    failures = [error_of(each) for each in jobs if each.state is not JobState.SUCCEEDED]
    if len(jobs) == 1 and failures:
        raise failures[0]
    if output != "table":
        emit(jobs[0].to_dict() if len(jobs) == 1 else [each.to_dict() for each in jobs], output)
    else:
        click.echo("\n".join(f"{each.job_id}  {each.state}" for each in jobs))
    show_and_exit(failures)


@job.command()
@click.argument("job_id", metavar="ID", type=JOB)
@pass_fleet
def cancel(fleet: Fleet, output: str, job_id: JobId) -> None:
    """Ask job ID to end; what it has begun is undone first."""
    asked = fleet.jobs.cancel(job_id)
    if output != "table":
        emit(asked.to_dict(), output)
    else:
        click.echo(f"{job_id}  {'cancelled' if asked.state.final else 'asked to end'}")


@job.command()
@click.argument("job_id", metavar="ID", type=JOB)
@job_options
@pass_fleet
def retry(fleet: Fleet, output: str, job_id: JobId, wait: JobWait) -> None:
    """Ask once more for what job ID did not do, as a new job; of a bulk job for the children that failed."""
    again = fleet.jobs.retry(job_id, actor=actor())
    finish(fleet, output, again, wait, lambda done: _show_state(done, output))


def _show_state(job: Job, output: str) -> None:
    emit(job.to_dict(), output) if output != "table" else click.echo(f"{job.job_id}  {job.state}")
