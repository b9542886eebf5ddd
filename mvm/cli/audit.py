"""``mvm audit``: the tenants' trails, read by the nodes' agents."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.params import TENANT, counted, pass_fleet
from mvm.cli.render import Columns, emit, show_list, table
from mvm.domain.ids import TenantId
from mvm.drivers.quic.frames import join
from mvm.errors import Failed, NotFound

_READ_S = 120.0  # for an answer that is read out of files
_COLUMNS: Columns = {
    "entry": "seq",
    "at": lambda row: str(row.get("at", ""))[:19],
    "actor": "actor",
    "reason": "reason",
    "verb": lambda row: row.get("verb", row["kind"]),
    "subject": "subject",
    "change": lambda row: _change(row.get("from"), row.get("to")),
    "result": lambda row: row.get("code") or row.get("result"),
    "job": "job_id",
    "why": lambda row: row.get("why") or (row["cut"]["bytes"] if "cut" in row else row.get("text")),
}


def _change(before: str | None, after: str | None) -> str:
    if before == after:
        return f"stays {after}" if after else "-"
    return f"{before or '-'} > {after or '-'}"


_FINDINGS: Columns = {
    "file": "file", "line": lambda row: row["line"] or "end", "entry": "seq", "is": "problem",
    "detail": "detail",
}  # fmt: skip


@click.group(cls=Group)
def audit() -> None:
    """Who changed what of a tenant, and why: entries that are only ever added."""


@audit.command()
@click.argument("tenant", metavar="T", type=TENANT)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("-n", "--lines", "count", type=int, default=20, metavar="N", help="The last N entries; default: 20.")
@pass_fleet
def tail(fleet: Fleet, output: str, tenant: TenantId, follow: bool, count: int) -> None:
    """Show the last entries of tenant T's trail; also of one that was destroyed.

    With -f JSON and YAML have an object per entry, else an array.
    """
    params = {"tenant": tenant, "count": counted(count, "lines", "audit.invalid_count"), "follow": follow}
    parts = _ask(fleet, "audit.tail", params, deadline_s=None if follow else _READ_S)
    if not follow:
        show_list([entry for part in parts for entry in part["items"]], _COLUMNS, output, empty="no entries")
        return
    with closing(parts):
        headed = True
        for entries in (part["items"] for part in parts if part["items"]):  # an empty one only says that it goes on
            if output == "table":
                click.echo("\n".join(table(entries, _COLUMNS, headed=headed)))
                headed = False
                continue
            for entry in entries:
                if output == "yaml":
                    click.echo("---")
                emit(entry, output)


@audit.command()
@click.argument("tenant", metavar="T", type=TENANT)
@pass_fleet
def verify(fleet: Fleet, output: str, tenant: TenantId) -> None:
    """Look for edited, removed and reordered entries in tenant T's trail; exits 0 only if there are none."""
    verdict = join(list(_ask(fleet, "audit.verify", {"tenant": tenant}, deadline_s=_READ_S)))
    findings = verdict["findings"]
    if output != "table":
        emit(verdict, output)
    elif findings:
        click.echo("\n".join(table(findings, _FINDINGS)))
    else:
        click.echo(f"{tenant}  whole  {verdict['entries']} entries")
    if findings:
        broken = Failed(
            "audit.broken", f"the audit trail of {tenant} is not as it was written: {len(findings)} findings",
            hint="keep its files and the node's log; a copy made before shows what was there",
            tenant=tenant, findings=len(findings),
        )  # fmt: skip
        show_and_exit([broken])


def _ask(
    fleet: Fleet, method: str, params: Mapping[str, Any], *, deadline_s: float | None
) -> Generator[dict[str, Any], None, None]:
    """The parts of the answer of the agent that has the trail; raises `NotFound` when none has."""
    unknown: NotFound | None = None
    for address in fleet.addresses:
        try:
            yield from fleet.agents.stream(address, method, params, deadline_s=deadline_s)
        except NotFound as error:
            unknown = unknown or error
        else:
            return
    assert unknown is not None, "a fleet has an agent"
    raise unknown
