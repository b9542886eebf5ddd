"""``mvm agent``: this node's agent and its certificates."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.params import JobWait, job_options, pass_fleet
from mvm.cli.render import Columns, emit, show_list
from mvm.domain.ids import JobId
from mvm.errors import Failed

_COLUMNS: Columns = {
    "name": "name",
    "ok": "ok",
    "days left": "days_left",
    "subject": "subject",
    "names": "sans",
    "problem": "problem",
}


@click.group(cls=Group)
def agent() -> None:
    """This node's agent and its certificates."""


@agent.command()
@pass_fleet
def serve(fleet: Fleet, _output: str) -> None:
    """Serve requests until ended; `mvm up` does this by itself."""
    os.environ["MVM_STATE_DIR"] = str(fleet.layout.root)
    os.execv(sys.executable, [sys.executable, "-m", "mvm.agent"])


@agent.command()
@click.option("--desired", "path", metavar="F", required=True, type=click.Path(path_type=Path),
              help="The desired state: a JSON file, or YAML by its ending.")  # fmt: skip
@click.option("--prune", is_flag=True, help="Destroy what it does not list.")
@click.option("--plan", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--expect", metavar="FINGERPRINT", help="Only if this is still the plan.")
@job_options
@pass_fleet
def reconcile(
    fleet: Fleet, output: str, path: Path, prune: bool, plan: bool, expect: str | None, wait: JobWait
) -> None:
    """Make F this node's desired state, and bring the node there."""
    from mvm.cli.desired import give, settle, show_plan

    answer = give(fleet.agents, fleet.addresses[0], path, prune=prune, expect=expect, plan=plan)
    if plan:
        show_plan(answer, output)
    elif wait.wait:
        settle(fleet, output, JobId(answer["job"]["job_id"]), wait, prune=prune)
    else:
        emit(answer["job"], output) if output != "table" else click.echo(answer["job"]["job_id"])


@agent.group()
def certs() -> None:
    """The certificates that agents and their clients show each other."""


@certs.command()
@click.option(
    "--ca", metavar="F", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM file or pipe with the CA's certificate and key, and those above it; default: a CA of our own.",
)  # fmt: skip
@pass_fleet
def init(fleet: Fleet, output: str, ca: Path | None) -> None:
    """Make the certificates that are missing or about to expire."""
    from mvm.drivers.identity import check_node
    from mvm.drivers.quic.certs import init as make
    from mvm.settings import load_settings

    settings = load_settings(state_dir=fleet.layout.root)
    check_node(settings)
    for note in make(fleet.layout, settings.node, ca=ca):
        click.echo(f"note: {note}", err=True)
    _show(fleet, output)


@certs.command()
@pass_fleet
def status(fleet: Fleet, output: str) -> None:
    """Show the certificates; exits 1 when one of them is unusable."""
    _show(fleet, output)


def _show(fleet: Fleet, output: str) -> None:
    from mvm.drivers.quic.certs import status as look

    rows = look(fleet.layout)
    show_list(rows, _COLUMNS, output, empty="no certificates")
    bad = [str(row["name"]) for row in rows if not row["ok"]]
    if bad:
        show_and_exit([Failed("certs.unusable", f"not usable: {', '.join(bad)}", hint="make them: mvm agent certs init",
                              names=bad)])  # fmt: skip
