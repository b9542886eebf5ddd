"""``mvm disk``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.fleet import Fleet
from mvm.cli.following import finish, show_result
from mvm.cli.params import JobWait, actor, job_options, pass_fleet
from mvm.cli.render import Columns, emit, paint, table
from mvm.domain.disk import checked_keep, size
from mvm.domain.job import JobVerb

_MEASURE_S = 120.0
_COLUMNS: Columns = {
    "tenant": "tenant",
    "pool": lambda row: row["pool"].partition("/")[2] if row["pool"] else None,
    "kind": "kind",
    "count": "count",
    "size": lambda row: size(row["bytes"]),
}
_LEVELS = {"ok": "good", "low": "busy", "full": "bad"}


@click.group(cls=Group)
def disk() -> None:
    """What lies on the disk, and cleaning it up."""


@disk.command()
@pass_fleet
def report(fleet: Fleet, output: str) -> None:
    """Show what takes space, by tenant, pool and kind; what several pools use is counted once, without a pool."""
    found = [fleet.agents.call(address, "disk.report", {}, deadline_s=_MEASURE_S) for address in fleet.addresses]
    if output != "table":
        emit(found[0] if len(found) == 1 else found, output)
        return
    for node in found:
        for line in [*table(node["items"], _COLUMNS), _space(node)]:
            click.echo(line)


def _space(node: Mapping[str, Any]) -> str:
    marks = f"low below {size(node['low_bytes'])}, {size(node['reserve_bytes'])} kept free"
    shared = f" ({size(node['shared_bytes'])} more are shared)" if node["shared_bytes"] else ""
    return (
        f"{node['node_id']}: {paint(node['level'], _LEVELS[node['level']])}; {size(node['used_bytes'])} used{shared}; "
        f"{node['path']} has {size(node['free_bytes'])} free of {size(node['total_bytes'])}; {marks}"
    )


@disk.command()
@click.option("--keep", type=int, metavar="N", help="Revisions to keep of each pool; default: MVM_KEEP_REVISIONS.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@job_options
@pass_fleet
def clean(fleet: Fleet, output: str, keep: int | None, dry_run: bool, wait: JobWait) -> None:
    """Remove old revisions, their templates and their packages. What is in use stays, and so do all data disks."""
    params: dict[str, Any] = {"dry_run": True} if dry_run else {}
    if keep is not None:
        params["keep"] = checked_keep(keep)
    job = fleet.jobs.submit(JobVerb.NODE_CLEAN, fleet.node_id, fleet.node_id, params=params, actor=actor())
    finish(fleet, output, job, wait, show_result(output, _cleaned))


def _cleaned(result: Mapping[str, Any]) -> str:
    rows = [{**each, "size": size(each["bytes"])} for each in result["removed"]]
    would = "would be " if result["dry_run"] else ""
    last = f"{size(result['freed_bytes'])} {would}freed; {size(result['free_bytes'])} are free"
    return "\n".join([*(table(rows, {name: name for name in ("kind", "name", "size")}) if rows else ()), last])
