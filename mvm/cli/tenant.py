"""``mvm tenant``."""

from __future__ import annotations

import functools
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.following import finish, show_job, show_result
from mvm.cli.params import (
    TENANT,
    JobWait,
    actor,
    confirm,
    job_options,
    pass_fleet,
    read_file,
    with_default,
    yes_option,
)  # fmt: skip
from mvm.cli.render import Columns, age, show_list, show_one
from mvm.domain.addressing import parse_net_id, parse_subnet
from mvm.domain.ids import NodeId, TenantId
from mvm.domain.job import JobVerb
from mvm.domain.secrets import MAX_BYTES, parse
from mvm.domain.tenant import Quota
from mvm.errors import InvalidInput

_QUOTA = {  # flag, field, unit, what it limits
    "--max-vcpus": ("max_vcpus", "N", "vCPUs of running and warm instances"),
    "--max-mem": ("max_mem_mib", "MIB", "Memory of running and warm instances"),
    "--max-running": ("max_running", "N", "Running instances"),
    "--max-warm": ("max_warm", "N", "Warm instances"),
    "--max-pools": ("max_pools", "N", "Pools"),
    "--max-instances-per-pool": ("max_instances_per_pool", "N", "Instances of one pool, whatever their status"),
    "--max-disk": ("max_disk_gib", "GIB", "All data disks"),
}


def quota_options(*, new: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The quota's flags; those given are passed as ``quota``, validated. Of a `new` tenant the rest has defaults."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            values = {name: kwargs.pop(name) for name, _, _ in _QUOTA.values()}
            quota = {name: value for name, value in values.items() if value is not None}
            Quota(**quota)
            return command(*args, quota=quota, **kwargs)

        decorated: Callable[..., Any] = wrapper
        for flag, (name, unit, limits) in reversed(_QUOTA.items()):
            text = with_default(limits, getattr(Quota(), name) if new else None)
            decorated = click.option(flag, name, type=int, metavar=unit, help=text)(decorated)
        return decorated

    return decorate


@click.group(cls=Group)
def tenant() -> None:
    """Tenants: the boundary of security, quota and network."""


@tenant.command()
@click.argument("tenant_id", metavar="ID", type=TENANT)
@click.option("--net-id", type=int, metavar="N", help="0 to 4095, never given twice; default: a free one.")
@click.option("--subnet", metavar="CIDR", help="Within 10.240.0.0/12; default: a free /24.")
@quota_options(new=True)
@job_options
@pass_fleet
def create(
    fleet: Fleet, output: str, tenant_id: TenantId, net_id: int | None, subnet: str | None, quota: dict[str, int],
    wait: JobWait,
) -> None:  # fmt: skip
    """Create tenant ID with its network and quota."""
    params: dict[str, Any] = {"quota": asdict(Quota(**quota))}
    if net_id is not None:
        params["net_id"] = parse_net_id(net_id)
    if subnet is not None:
        params["subnet"] = str(parse_subnet(subnet))
    job = fleet.jobs.submit(JobVerb.TENANT_CREATE, tenant_id, fleet.node_id, params=params, actor=actor())
    finish(fleet, output, job, wait, show_result(output, lambda made: f"{made['tenant_id']}  {made['subnet']}"))


@tenant.command(name="list")
@pass_fleet
def list_(fleet: Fleet, output: str) -> None:
    """List tenants."""
    rows, errors = fleet.rows("tenant.list")
    columns: Columns = {
        "tenant": "tenant_id",
        "net": "net_id",
        "subnet": "subnet",
        "running": lambda row: f"{row['usage']['running']}/{row['quota']['max_running']}",
        "pools": lambda row: row["usage"]["pools"],
        "instances": lambda row: row["usage"]["instances"],
        "age": lambda row: age(row["created_at"]),
    }
    show_list(rows, columns, output, empty="no tenants")
    show_and_exit(errors)


@tenant.command()
@click.argument("tenant_id", metavar="ID", type=TENANT)
@pass_fleet
def info(fleet: Fleet, output: str, tenant_id: TenantId) -> None:
    """Show tenant ID, its quota and what it uses of it."""
    show_one(fleet.one("tenant", tenant_id, "tenant_id", "tenant.list"), output)


@tenant.command()
@click.argument("tenant_id", metavar="ID", type=TENANT)
@quota_options(new=False)
@job_options
@pass_fleet
def update(fleet: Fleet, output: str, tenant_id: TenantId, quota: dict[str, int], wait: JobWait) -> None:
    """Change the quota of tenant ID; what is not given stays."""
    if not quota:
        raise InvalidInput("tenant.nothing_to_update", "no quota is given", hint=f"one of: {', '.join(_QUOTA)}")
    node = fleet.tenant_route(tenant_id)
    job = fleet.jobs.submit(JobVerb.TENANT_UPDATE, tenant_id, node, params={"quota": quota}, actor=actor())
    finish(fleet, output, job, wait, show_result(output, lambda _: tenant_id))


@tenant.group(cls=Group)
def secrets() -> None:
    """Secrets of a tenant: files below /run/secrets in all of its guests."""


@secrets.command(name="set")
@click.argument("tenant_id", metavar="ID", type=TENANT)
@click.option("--from-file", required=True, metavar="F", help='A JSON object {"NAME": "text"}, or NAME=VALUE lines.')
@job_options
@pass_fleet
def set_(fleet: Fleet, output: str, tenant_id: TenantId, from_file: str, wait: JobWait) -> None:
    """Replace all secrets of tenant ID by those in file F (- for standard input), in its running guests too."""
    content = read_file(from_file, MAX_BYTES, "from-file", "secrets.unreadable")
    parse(content)
    node = fleet.tenant_route(tenant_id)
    # Straight to the agent: no message, job or log ever holds them.
    kept = fleet.call(
        fleet.addresses[0], "tenant.set_secrets",
        tenant=str(tenant_id), content=b64encode(content).decode(), actor=actor(),
    )  # fmt: skip
    _deliver(fleet, output, tenant_id, node, {"secrets_epoch": kept["secrets_epoch"]}, wait)


@secrets.command()
@click.argument("tenant_id", metavar="ID", type=TENANT)
@job_options
@pass_fleet
def rotate(fleet: Fleet, output: str, tenant_id: TenantId, wait: JobWait) -> None:
    """Encrypt the secrets of tenant ID under a new key and epoch, and hand them to its running guests anew."""
    _deliver(fleet, output, tenant_id, fleet.tenant_route(tenant_id), {"rotate": True}, wait)


def _deliver(
    fleet: Fleet, output: str, tenant_id: TenantId, node: NodeId, params: dict[str, Any], wait: JobWait
) -> None:
    job = fleet.jobs.submit(JobVerb.TENANT_SECRETS, tenant_id, node, params=params, actor=actor())
    words = "{tenant_id}  epoch {secrets_epoch}, {count} running guests have it"
    show = show_result(output, lambda done: words.format(count=len(done["reached"]), **done))
    finish(fleet, output, job, wait, show)


@tenant.command()
@click.argument("tenant_id", metavar="ID", type=TENANT)
@yes_option
@job_options
@pass_fleet
def destroy(fleet: Fleet, output: str, tenant_id: TenantId, yes: bool, wait: JobWait) -> None:
    """Destroy tenant ID, which has no pools any more."""
    node = fleet.tenant_route(tenant_id)
    confirm(f"destroy tenant {tenant_id}", yes)
    job = fleet.jobs.submit(JobVerb.TENANT_DESTROY, tenant_id, node, params={}, actor=actor())
    finish(fleet, output, job, wait, show_job(output, tenant_id))
