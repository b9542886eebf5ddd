"""``mvm pool``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.following import finish, show_job, show_result
from mvm.cli.params import (
    NODE,
    POOL,
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
from mvm.domain.egress import Egress, EgressPolicy
from mvm.domain.ids import NodeId, PoolRef, TenantId
from mvm.domain.job import JobVerb
from mvm.domain.pool import (
    MAX_USER_DATA,
    DesiredCounts,
    ImageSource,
    InstanceResources,
    SeccompPolicy,
    SleepPolicy,
    StartMode,
    checked_user_data,
)  # fmt: skip
from mvm.domain.snapshot import Compression
from mvm.domain.vmm import OnExit
from mvm.errors import InvalidInput, NotFound

_SHAPE = InstanceResources()


@click.group(cls=Group)
def pool() -> None:
    """Pools of a tenant: one image, one shape, desired counts."""


def _ways(*, new: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How the pool's instances start and sleep and what they reach, passed as ``ways: dict``.

    Only what of it is given, ready for a job; of a `new` pool the rest has defaults.
    """
    policy = SleepPolicy()

    def said(text: str, default: object) -> str:
        return with_default(text, default if new else None)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(
            "--cold/--no-cold", default=None, help=said("Boot each instance instead of cloning a template", "--no-cold")
        )
        @click.option(
            "--compression",
            type=click.Choice([c.value for c in Compression]),
            help=said("How sleeping memory is packed", Compression.ZSTD),
        )
        @click.option(
            "--seccomp",
            type=click.Choice([p.value for p in SeccompPolicy]),
            help=said("Which system calls its VMMs may make", SeccompPolicy.BASELINE),
        )
        @click.option(
            "--pinned/--no-pinned", default=None, help=said("Its instances are never put away when idle", "--no-pinned")
        )
        @click.option(
            "--critical/--no-critical", default=None, help=said("Nor are these: others depend on them", "--no-critical")
        )
        @click.option(
            "--on-exit",
            type=click.Choice([e.value for e in OnExit]),
            help=said("When a guest halts or reboots by itself", OnExit.RESTART),
        )
        @click.option(
            "--warm-after",
            type=int,
            metavar="S",
            help=said("Seconds of idleness until it is paused; 0: never", policy.warm_after_s),
        )
        @click.option(
            "--sleep-after",
            type=int,
            metavar="S",
            help=said("Seconds of idleness until it sleeps; 0: never", policy.sleep_after_s),
        )
        @click.option(
            "--min-running",
            type=int,
            metavar="S",
            help=said("Seconds that it runs at least before", policy.min_running_s),
        )
        @click.option(
            "--egress", type=click.Choice([e.value for e in Egress]), help=said("What they reach outside", Egress.NONE)
        )
        @click.option("--allow", multiple=True, metavar="CIDR[:PORT[/PROTO]]", help="For --egress allow; repeatable.")
        @click.option(
            "--metadata/--no-metadata",
            default=None,
            help=said("Whether its guests can ask about themselves", "--metadata"),
        )
        @click.option("--user-data", metavar="F", help="A text that they can read there; jobs show it: no secrets.")
        @functools.wraps(command)
        def wrapper(
            *args: Any, cold: bool | None, compression: str | None, seccomp: str | None, pinned: bool | None,
            critical: bool | None, on_exit: str | None,
            warm_after: int | None, sleep_after: int | None, min_running: int | None,
            egress: str | None, allow: tuple[str, ...], metadata: bool | None, user_data: str | None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            sleep = {"warm_after_s": warm_after, "sleep_after_s": sleep_after, "min_running_s": min_running}
            ways = _given(
                start=None if cold is None else StartMode.COLD if cold else StartMode.CLONE,
                compression=compression,
                seccomp_policy=seccomp,
                pinned=pinned,
                critical=critical,
                on_exit=on_exit,
                metadata_enabled=metadata,
                user_data=None if user_data is None else checked_user_data(_read(user_data)),
                sleep_policy=_given(**sleep) or None,
                egress=_egress(egress, allow),
            )
            return command(*args, ways=ways, **kwargs)

        return wrapper

    return decorate


def _egress(kind: str | None, allow: tuple[str, ...]) -> dict[str, Any] | None:
    """A policy whole, checked here before a job is made of it; ``--allow`` alone means ``--egress allow``."""
    if kind is None and not allow:
        return None
    return EgressPolicy.from_dict({"policy": kind or Egress.ALLOW, "allow": allow}).to_dict()


def _read(path: str) -> bytes:
    return read_file(path, MAX_USER_DATA, "user-data", "pool.invalid_user_data")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@click.option("--flake", required=True, metavar="REF", help="What the image is built from, such as builtin:")
@click.option("--profile", required=True, metavar="NAME", help="Of builtin: minimal, baseline or python.")
@click.option("--cpus", type=int, metavar="N", help=with_default("vCPUs of an instance", _SHAPE.vcpus))
@click.option("--mem", type=int, metavar="MIB", help=with_default("Memory of an instance", _SHAPE.mem_mib))
@click.option("--data-disk", type=int, metavar="MIB", help="Size of a disk that survives stops; default: none.")
@click.option("--node", type=NODE, metavar="NODE", help="Where it lives; default: this node.")
@_ways(new=True)
@job_options
@pass_fleet
def create(
    fleet: Fleet, output: str, ref: PoolRef, flake: str, profile: str, cpus: int | None, mem: int | None,
    data_disk: int | None, node: NodeId | None, ways: dict[str, Any], wait: JobWait,
) -> None:  # fmt: skip
    """Create pool T/P. What its instances have of vCPUs, memory and disk cannot be changed later."""
    source = ImageSource(flake, profile)
    resources = InstanceResources(**_given(vcpus=cpus, mem_mib=mem, data_disk_mib=data_disk))
    SleepPolicy(**ways.get("sleep_policy", {}))
    params = {"flake_ref": source.flake_ref, "profile": source.profile, "resources": asdict(resources), **ways}
    own = fleet.tenant_route(ref.tenant)
    if node is not None and node not in [record.node_id for record in fleet.registry.nodes()]:
        raise NotFound("node.not_found", f"there is no node {node}", hint="see: mvm node list", field="node",
                       value=node)  # fmt: skip
    job = fleet.jobs.submit(JobVerb.POOL_CREATE, str(ref), node or own, params=params, actor=actor())
    finish(fleet, output, job, wait, show_result(output, lambda _: str(ref)))


@pool.command(name="list")
@click.argument("tenant", required=False, metavar="[T]", type=TENANT)
@pass_fleet
def list_(fleet: Fleet, output: str, tenant: TenantId | None) -> None:
    """List pools, of tenant T or all."""
    rows, errors = fleet.rows("pool.list", tenant=tenant)
    columns: Columns = {
        "pool": "ref",
        "image": lambda row: f"{row['flake_ref']}{row['profile']}",
        "revision": lambda row: (row["revision"] or "")[:12],
        "cpus": lambda row: row["resources"]["vcpus"],
        "mem": lambda row: f"{row['resources']['mem_mib']}M",
        "wanted": lambda row: row["desired"]["running"],
        "instances": "counts",
        "node": "node_id",
        "age": lambda row: age(row.get("created_at")),
    }
    show_list(rows, columns, output, empty="no pools")
    show_and_exit(errors)


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@pass_fleet
def info(fleet: Fleet, output: str, ref: PoolRef) -> None:
    """Show pool T/P."""
    row = fleet.one("pool", ref, "ref", "pool.list", tenant=ref.tenant)
    if output == "table":
        row["obstacles"] = "; ".join(obstacle["text"] for obstacle in row["obstacles"])
    show_one(row, output)


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@_ways(new=False)
@job_options
@pass_fleet
def update(fleet: Fleet, output: str, ref: PoolRef, ways: dict[str, Any], wait: JobWait) -> None:
    """Change how the instances of pool T/P start and sleep from now on, and what they reach at once; the rest stays."""
    if not ways:
        raise InvalidInput("pool.nothing_to_update", "nothing to change is given", hint="see: mvm pool update --help")
    job = fleet.jobs.submit(JobVerb.POOL_UPDATE, str(ref), fleet.pool_route(ref), params=ways, actor=actor())
    finish(fleet, output, job, wait, show_result(output, lambda _: str(ref)))


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@job_options
@pass_fleet
def build(fleet: Fleet, output: str, ref: PoolRef, wait: JobWait) -> None:
    """Build the image of pool T/P; instances started from now on use it."""
    job = fleet.jobs.submit(JobVerb.POOL_BUILD, str(ref), fleet.pool_route(ref), params={}, actor=actor())
    finish(fleet, output, job, wait, show_result(output, lambda built: f"{ref}  {built['revision']}"))


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@click.option("--running", type=int, metavar="N", help="How many run.")
@click.option("--warm", type=int, metavar="N", help="How many are paused in memory.")
@click.option("--sleeping", type=int, metavar="N", help="How many are saved to disk.")
@job_options
@pass_fleet
def scale(
    fleet: Fleet, output: str, ref: PoolRef, running: int | None, warm: int | None, sleeping: int | None, wait: JobWait
) -> None:
    """Set how many instances pool T/P has; reconcile keeps it so.

    Without --running that count stays; without --warm and --sleeping the sleep policy puts idle ones away.
    """
    given = {"running": running, "warm": warm, "sleeping": sleeping}
    params = {name: count for name, count in given.items() if count is not None}
    if not params:
        raise InvalidInput("pool.nothing_to_scale", "no count is given", hint="one of: --running, --warm, --sleeping")
    DesiredCounts(**params)
    job = fleet.jobs.submit(JobVerb.POOL_SCALE, str(ref), fleet.pool_route(ref), params=params, actor=actor())

    def text(scaled: Any) -> str:
        return f"{ref}  " + " ".join(
            f"{name}={count}" for name, count in scaled["desired"].items() if count is not None
        )

    finish(fleet, output, job, wait, show_result(output, text))


@pool.command()
@click.argument("ref", metavar="T/P", type=POOL)
@yes_option
@job_options
@pass_fleet
def destroy(fleet: Fleet, output: str, ref: PoolRef, yes: bool, wait: JobWait) -> None:
    """Destroy pool T/P, which has no instances any more."""
    node = fleet.pool_route(ref)
    confirm(f"destroy pool {ref}", yes)
    job = fleet.jobs.submit(JobVerb.POOL_DESTROY, str(ref), node, params={}, actor=actor())
    finish(fleet, output, job, wait, show_job(output, str(ref)))
