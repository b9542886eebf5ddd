"""``mvm node``: through the agents, and nothing else."""

from __future__ import annotations

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet, gather
from mvm.cli.params import NODE, pass_fleet
from mvm.cli.render import Columns, show_list, show_one
from mvm.domain.ids import NodeId
from mvm.errors import NotFound

COLUMNS: Columns = {
    "node": "node_id",
    "address": "address",
    "status": "status",
    "driver": "driver",
    "cpus": "vcpus",
    "mem": lambda row: f"{row['mem_mib']}M",
    "instances": "instances",
}


@click.group(cls=Group)
def node() -> None:
    """Nodes, asked through their agents."""


@node.command(name="list")
@pass_fleet
def list_(fleet: Fleet, output: str) -> None:
    """List nodes."""
    rows, errors = gather(fleet.agents, fleet.addresses, "node.info")
    show_list(rows, COLUMNS, output, empty="no nodes")
    show_and_exit(errors)


@node.command()
@click.argument("node_id", metavar="[NODE]", required=False, type=NODE)
@pass_fleet
def info(fleet: Fleet, output: str, node_id: NodeId | None) -> None:
    """Show NODE, or this node."""
    _show(fleet, output, node_id, "node.info")


@node.command()
@click.argument("node_id", metavar="[NODE]", required=False, type=NODE)
@pass_fleet
def stats(fleet: Fleet, output: str, node_id: NodeId | None) -> None:
    """Show what NODE, or this node, has in use."""
    _show(fleet, output, node_id, "node.stats")


def _show(fleet: Fleet, output: str, node_id: NodeId | None, method: str) -> None:
    wanted = node_id or fleet.node_id
    answers, errors = gather(fleet.agents, fleet.addresses, method)
    for answer in answers:
        if answer["node_id"] == wanted:
            show_one(answer, output)
            return
    raise (
        errors[0]
        if errors
        else NotFound(
            "node.not_found", f"there is no node {wanted}", hint="see: mvm node list", field="node", value=wanted
        )
    )
