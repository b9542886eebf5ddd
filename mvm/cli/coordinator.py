"""``mvm coordinator``: agents anywhere, by address. Needs this state directory's certificates and no stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit, show_error
from mvm.cli.fleet import Fleet, ask, gather, named
from mvm.cli.instance import COLUMNS as INSTANCE_COLUMNS
from mvm.cli.instance import show_woken, wake_at
from mvm.cli.node import COLUMNS as NODE_COLUMNS
from mvm.cli.params import TENANT, pass_fleet
from mvm.cli.render import show_list
from mvm.domain.ids import InstanceId, InstanceRef, PoolId, TenantId
from mvm.errors import MvmError

_NODES = "HOST:PORT of agents; NODE@HOST:PORT to say which node must answer there."
_NODE = "HOST:PORT of the agent; NODE@HOST:PORT to say which node must answer there."


@click.group(cls=Group)
def coordinator() -> None:
    """Ask agents anywhere, by address."""


@coordinator.command()
@click.option("--desired", "path", metavar="F", required=True, type=click.Path(path_type=Path),
              help="The desired state: a JSON file, or YAML by its ending.")  # fmt: skip
@click.option("--node", "nodes", metavar="ADDR...", multiple=True, required=True, help=_NODES)
@click.argument("more", metavar="", nargs=-1)
@pass_fleet
def push(fleet: Fleet, output: str, path: Path, nodes: Sequence[str], more: Sequence[str]) -> None:
    """Give F to the nodes at these addresses; the one that it is for takes it, any other refuses."""
    from mvm.cli.desired import give

    rows, errors = [], []
    for address in dict.fromkeys([*nodes, *more]):
        try:
            answer = give(fleet.distant_agents, address, path, prune=False, expect=None, plan=False, to_its_node=True)
        except MvmError as error:
            errors.append(named(error, address))
        else:
            rows.append({"node": address, "actions": len(answer.get("actions", ())), "job_id": answer["job"]["job_id"]})
    if not rows:
        *others, last = errors
        for other in others:
            show_error(other)
        raise last
    show_list(rows, {"node": "node", "actions": "actions", "job": "job_id"}, output, empty="no nodes")
    show_and_exit(errors)


@coordinator.command()
@click.option("--node", "nodes", metavar="ADDR...", multiple=True, required=True, help=_NODES)
@click.argument("more", metavar="", nargs=-1)
@pass_fleet
def status(fleet: Fleet, output: str, nodes: Sequence[str], more: Sequence[str]) -> None:
    """Show how the nodes at these addresses are."""
    addresses = list(dict.fromkeys([*nodes, *more]))
    rows, errors = gather(fleet.distant_agents, addresses, "node.info")
    show_list(rows, NODE_COLUMNS, output, empty="no nodes")
    show_and_exit(errors)


@coordinator.command(name="list-instances")
@click.option("--node", metavar="ADDR", required=True, help=_NODE)
@click.option("--tenant", type=TENANT, required=True, metavar="T", help="Whose instances.")
@pass_fleet
def list_instances(fleet: Fleet, output: str, node: str, tenant: TenantId) -> None:
    """List the instances of a tenant on one node."""
    rows = ask(fleet.distant_agents, node, "instance.list", tenant=tenant)["items"]
    show_list(rows, INSTANCE_COLUMNS, output, empty="no instances")


@coordinator.command()
@click.option("--node", metavar="ADDR", required=True, help=_NODE)
@click.option("--tenant", type=TENANT, required=True, metavar="T", help="The tenant's id.")
@click.option("--pool", required=True, metavar="P", help="The pool's id.")
@click.option("--instance", required=True, metavar="I", help="The instance's id.")
@pass_fleet
def wake(fleet: Fleet, output: str, node: str, tenant: TenantId, pool: str, instance: str) -> None:
    """Wake an instance at once, past every queue."""
    ref = InstanceRef(tenant, PoolId(pool), InstanceId(instance))
    with fleet.distant_agents.connected(node) as agent:
        show_woken([wake_at(agent, ref)], output)
