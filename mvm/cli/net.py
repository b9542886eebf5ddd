"""``mvm net``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.params import pass_fleet
from mvm.cli.paths import NewFile
from mvm.cli.render import Columns, clean, emit, paint, table
from mvm.errors import Failed, InvalidInput

_LOOK_S, _PROVE_S = 60.0, 600.0


@click.group(cls=Group)
def net() -> None:
    """The tenants' networks."""


@net.command()
@click.option("--active", is_flag=True, help="Prove it with traffic, from probes on each tenant's bridge.")
@click.option("--report", type=NewFile(), metavar="FILE", help="Keep it as JSON, too.")
@pass_fleet
def verify(fleet: Fleet, output: str, active: bool, report: Path | None) -> None:
    """Compare the networks with what they should be. Exits 0 only when everything is clean."""
    deadline_s = _PROVE_S if active else _LOOK_S
    found = [
        fleet.agents.call(address, "net.verify", {"active": active}, deadline_s=deadline_s)
        for address in fleet.addresses
    ]
    if report is not None:
        _keep(report, found)
    if output == "table":
        click.echo("\n".join(line for node in found for line in _lines(node)))
    else:
        emit(found[0] if len(found) == 1 else found, output)
    if not all(node["clean"] for node in found):
        nodes = ", ".join(node["node_id"] for node in found if not node["clean"])
        show_and_exit([
            Failed("net.not_clean", f"the network of {nodes} is not clean", hint="each finding says what to do")
        ])  # fmt: skip


def _keep(path: Path, found: list[dict[str, Any]]) -> None:
    try:
        path.write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise InvalidInput(
            "net.report_unwritable", f"--report {path}: {error.strerror}", hint="name a file that may be written",
            field="report", value=str(path),
        ) from None  # fmt: skip


def _lines(node: Mapping[str, Any]) -> Iterator[str]:
    columns: Columns = {
        "tenant": "tenant_id", "bridge": "bridge", "subnet": "subnet", "gateway": "gateway",
        "ports": lambda row: len(row["ports"]), "clean": "clean",
    }  # fmt: skip
    if node["bridges"]:
        yield from table(node["bridges"], columns)
    named = [*node["findings"], *(f for bridge in node["bridges"] for f in bridge["findings"])]
    for finding in named:
        yield f"{paint('not clean', 'bad')}: {clean(finding['what'])}"
        yield f"  {paint('hint', 'hint')}: {clean(finding['hint'])}"
    if node["active"]:
        yield ""
        yield from _probes(node["probes"])
    yield f"{node['node_id']}: {paint('clean', 'good') if node['clean'] else paint('not clean', 'bad')}"


def _probes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each kind: how many were to pass and did, how many were not to and did; then those that fail."""
    tried = Counter((row["kind"], row["expected"], row["seen"]) for row in rows)
    kinds = [
        {"probe": kind, "expected": expected, "passed": tried[kind, expected, "passes"],
         "blocked": tried[kind, expected, "blocked"],
         "ok": tried[kind, expected, expected] == sum(n for (*both, _), n in tried.items() if both == [kind, expected])}
        for kind, expected in dict.fromkeys((row["kind"], row["expected"]) for row in rows)
    ]  # fmt: skip
    yield from _matrix(rows)
    yield ""
    yield from table(kinds, {name: name for name in ("probe", "expected", "passed", "blocked", "ok")})
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        yield ""
        told = ["why"] if any("why" in row for row in wrong) else []
        yield from table(wrong, {name: name for name in ("kind", "source", "target", "expected", "seen", *told)})
    yield f"{len(rows)} probes, {len(wrong)} not as expected"


def _matrix(rows: list[dict[str, Any]]) -> Iterator[str]:
    """From which tenant to which how many of the ways that were tried are open."""
    tried = Counter((row["from"], row["to"]) for row in rows if row["from"])
    passed = Counter((row["from"], row["to"]) for row in rows if row["from"] and row["seen"] == "passes")
    names = list(dict.fromkeys(name for name, _ in tried))
    lines = [
        {"from": one, **{f"to {other}": f"{passed[one, other]}/{tried[one, other]}" for other in names}}
        for one in names
    ]  # fmt: skip
    yield from table(lines, {column: column for column in ("from", *(f"to {name}" for name in names))})
