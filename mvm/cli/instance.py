"""``mvm instance``: what changes and lists instances. What reaches into guests is in ``guest.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from mvm.cli import guest
from mvm.cli.base import Group
from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.following import finish, show_job
from mvm.cli.params import (
    INSTANCE,
    POOL,
    TARGET,
    TENANT,
    JobWait,
    Target,
    actor,
    confirm,
    counted,
    job_options,
    pass_fleet,
    wait_options,
    yes_option,
)
from mvm.cli.render import Columns, age, emit, show_list, show_one
from mvm.domain.ids import InstanceRef, NodeId, PoolRef, TenantId
from mvm.domain.job import Job, JobVerb
from mvm.domain.lifecycle import Status, Verb, allowed_verbs
from mvm.errors import InvalidInput, MvmError
from mvm.ports.agents import ConnectedAgent

_WAKES_AT_ONCE = 8
_WAKE_S = 60.0

COLUMNS: Columns = {
    "instance": "ref",
    "status": "status",
    "job": lambda row: row["job"] and row["job"]["verb"],
    "ip": "guest_ip",
    "pid": "pid",
    "node": "node_id",
    "age": lambda row: age(row["created_at"]),
    "error": lambda row: (row["last_error"] or row.get("unwell") or "").partition("\n")[0][:60],
}


@click.group(cls=Group)
def instance() -> None:
    """Instances of a pool: one microVM each."""


for _command in (guest.logs, guest.ssh, guest.exec_):
    instance.add_command(_command)


@instance.command()
@click.argument("ref", metavar="T/P", type=POOL)
@click.option("--count", type=int, default=1, metavar="N", help="How many; default: 1.")
@job_options
@pass_fleet
def create(fleet: Fleet, output: str, ref: PoolRef, count: int, wait: JobWait) -> None:
    """Create instances in pool T/P; `start` boots them."""
    params = {"count": counted(count, "count", "instance.invalid_count")}
    job = fleet.jobs.submit(JobVerb.INSTANCE_CREATE, str(ref), fleet.pool_route(ref), params=params, actor=actor())

    def show(done: Job) -> None:
        made = (done.result or {})["instances"]
        emit(made, output) if output != "table" else click.echo("\n".join(each["ref"] for each in made))

    finish(fleet, output, job, wait, show)


@instance.command(name="list")
@click.option("--tenant", type=TENANT, metavar="T", help="Only this tenant's.")
@click.option("--pool", type=POOL, metavar="T/P", help="Only this pool's.")
@click.option("--status", type=click.Choice([s.value for s in Status]), help="Only those that are so.")
@pass_fleet
def list_(fleet: Fleet, output: str, tenant: TenantId | None, pool: PoolRef | None, status: str | None) -> None:
    """List instances."""
    if tenant and pool and pool.tenant != tenant:
        raise InvalidInput("usage", f"pool {pool} is not one of tenant {tenant}", hint="leave --tenant out",
                           field="pool")  # fmt: skip
    rows, errors = fleet.rows("instance.list", tenant=tenant, pool=pool and str(pool), status=status)
    show_list(rows, COLUMNS, output, empty="no instances")
    show_and_exit(errors)


@instance.command()
@click.argument("ref", type=INSTANCE)
@pass_fleet
def info(fleet: Fleet, output: str, ref: InstanceRef) -> None:
    """Show instance REF."""
    show_one(guest.find(fleet, ref)[1], output)


@instance.command()
@click.argument("ref", type=INSTANCE)
@pass_fleet
def explain(fleet: Fleet, output: str, ref: InstanceRef) -> None:
    """Show why instance REF is as it is, and what comes next."""
    show_one(guest.find(fleet, ref, "instance.explain")[1], output)


@instance.command()
@click.argument("ref", type=INSTANCE)
@pass_fleet
def stats(fleet: Fleet, output: str, ref: InstanceRef) -> None:
    """Show what instance REF takes, awake and asleep, and how long it takes to get there."""
    show_one(guest.find(fleet, ref, "instance.stats")[1], output)


def _many(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of verbs that take several instances."""
    for option in (
        click.argument("refs", metavar="REF... | POOL --all", type=TARGET, nargs=-1, required=True),
        click.option("--all", "all_", is_flag=True, help="All that can, of the given pools or tenants."),
        click.option("--parallel", type=int, metavar="N", help="How many at once; default: all."),
    ):
        command = option(command)
    return command


_force = click.option("--force", is_flag=True, help="Do not wait for the guest to shut down.")


@instance.command()
@_many
@click.option("--force", is_flag=True, help="A sleeping one forgets its memory and starts from its disks.")
@job_options
@pass_fleet
def start(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, force: bool, wait: JobWait
) -> None:
    """Start REFs; each is done when its guest has answered. Warm and sleeping ones go on where they were."""
    found = _expand(fleet, refs, all_, Verb.START)
    _run(fleet, output, Verb.START, found, parallel, wait, {"force": True} if force else {}, bulk=all_)


@instance.command()
@_many
@_force
@job_options
@pass_fleet
def stop(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, force: bool, wait: JobWait
) -> None:
    """Shut REFs down; they keep their data disk and address."""
    found = _expand(fleet, refs, all_, Verb.STOP)
    _run(fleet, output, Verb.STOP, found, parallel, wait, {"force": force}, bulk=all_)


@instance.command()
@_many
@click.option("--force", is_flag=True, help="Changes nothing: no guest is asked.", expose_value=False)
@job_options
@pass_fleet
def warm(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, wait: JobWait
) -> None:  # fmt: skip
    """Pause REFs; they keep their memory and go on within milliseconds."""
    _run(fleet, output, Verb.WARM, _expand(fleet, refs, all_, Verb.WARM), parallel, wait, {}, bulk=all_)


@instance.command()
@_many
@click.option("--force", is_flag=True, help="Also when the guest does not get ready for it.")
@job_options
@pass_fleet
def sleep(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, force: bool, wait: JobWait
) -> None:
    """Snapshot REFs to disk and free their memory."""
    found = _expand(fleet, refs, all_, Verb.SLEEP)
    _run(fleet, output, Verb.SLEEP, found, parallel, wait, {"force": force}, bulk=all_)


@instance.command()
@_many
@click.option("--force", is_flag=True, help="Start anew, from the disks, what cannot or need not go on where it was.")
@wait_options(f"{_WAKE_S:.0f}")
@pass_fleet
def wake(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, force: bool, wait: JobWait
) -> None:  # fmt: skip
    """Wake REFs at once, past every queue: their node's agent is asked directly.

    With --force or --no-wait they are jobs in its queue like any other.
    """
    found = _expand(fleet, refs, all_, Verb.WAKE)
    if force or not wait.wait or not found:
        verb, params = (Verb.START, {"force": True}) if force else (Verb.WAKE, {})
        _run(fleet, output, verb, found, parallel, wait, params, bulk=all_)
        return
    if parallel is not None:
        counted(parallel, "parallel", "job.invalid_parallel")
    lanes = min(parallel or len(found), len(found), _WAKES_AT_ONCE)

    def woken(lane: Sequence[InstanceRef]) -> list[dict[str, Any] | MvmError]:
        with fleet.agents.connected(fleet.addresses[0]) as agent:
            return [_outcome(agent, ref, wait.timeout_s) for ref in lane]

    with ThreadPoolExecutor(lanes) as threads:
        outcomes = [each for lane in threads.map(woken, [found[n::lanes] for n in range(lanes)]) for each in lane]
    errors = [each for each in outcomes if isinstance(each, MvmError)]
    if len(outcomes) == 1 and errors:
        raise errors[0]
    show_woken([each for each in outcomes if not isinstance(each, MvmError)], output)
    show_and_exit(errors)


def _outcome(agent: ConnectedAgent, ref: InstanceRef, timeout_s: float | None) -> dict[str, Any] | MvmError:
    try:
        return wake_at(agent, ref, timeout_s)
    except MvmError as error:
        return error


@instance.command()
@_many
@_force
@yes_option
@job_options
@pass_fleet
def destroy(
    fleet: Fleet, output: str, refs: Sequence[Target], all_: bool, parallel: int | None, force: bool, yes: bool,
    wait: JobWait,
) -> None:  # fmt: skip
    """Destroy REFs with everything they hold."""
    found = _expand(fleet, refs, all_, Verb.DESTROY)
    if found:
        confirm(f"destroy {found[0]}" if len(found) == 1 else f"destroy {len(found)} instances", yes)
    _run(fleet, output, Verb.DESTROY, found, parallel, wait, {"force": force}, bulk=all_)


def wake_at(agent: ConnectedAgent, ref: InstanceRef, timeout_s: float | None = None) -> dict[str, Any]:
    """What `agent` answers once `ref` runs."""
    return agent.call("instance.wake", {"ref": str(ref), "actor": actor()}, deadline_s=timeout_s or _WAKE_S)


def show_woken(answers: Sequence[Mapping[str, Any]], output: str) -> None:
    """The answers of agents that were asked to wake."""
    for answer in answers:
        if answer["waited_for"]:
            click.echo(f"{answer['ref']}: waited for job {answer['waited_for']}", err=True)
    if output != "table":
        emit(list(answers), output)
    elif answers:
        click.echo("\n".join(str(answer["ref"]) for answer in answers))


def _expand(fleet: Fleet, targets: Sequence[Target], all_: bool, verb: Verb) -> list[InstanceRef]:
    """The instances meant, each once. With `all_`, those of the pools and tenants that may be asked `verb`."""
    for target in targets:
        if isinstance(target, InstanceRef) is all_:
            hint = (
                "leave --all out" if all_ else f"for all of its instances add --all: mvm instance {verb} {target} --all"
            )
            what = "one instance" if all_ else "not an instance"
            raise InvalidInput("instance.invalid_ref", f"{target} is {what}", hint=hint, field="refs",
                               value=str(target))  # fmt: skip
    found: dict[InstanceRef, None] = {}
    for target in targets:
        if isinstance(target, InstanceRef):
            found[target] = None
            continue
        if isinstance(target, PoolRef):
            fleet.pool_route(target)
            rows, errors = fleet.rows("instance.list", pool=str(target))
        else:
            fleet.tenant_route(target)
            rows, errors = fleet.rows("instance.list", tenant=target)
        if errors:  # of what is not known entirely, "all" is not known
            raise errors[0]
        found |= {InstanceRef.parse(row["ref"]): None for row in rows if verb in allowed_verbs(Status(row["status"]))}
    return list(found)


def _run(
    fleet: Fleet, output: str, verb: Verb, refs: Sequence[InstanceRef], parallel: int | None, wait: JobWait,
    params: dict[str, Any], *, bulk: bool,
) -> None:  # fmt: skip
    """One job, or for several (and `bulk`) one with a child each."""
    if parallel is not None:
        counted(parallel, "parallel", "job.invalid_parallel")
    if not refs:
        click.echo(f"nothing to {verb}", err=True)
        if output != "table":
            emit([], output)
        return
    job_verb = JobVerb(f"instance.{verb}")
    nodes: dict[str, NodeId] = {}
    for pool in {ref.pool_ref for ref in refs}:
        node = fleet.pool_route(pool)
        nodes |= {str(ref): node for ref in refs if ref.pool_ref == pool}
    names = [str(ref) for ref in refs]
    if len(names) == 1 and not bulk:
        job = fleet.jobs.submit(job_verb, names[0], nodes[names[0]], params=params, actor=actor())
    else:
        job = fleet.jobs.submit_bulk(
            job_verb, names, nodes.__getitem__, params=params, parallel=parallel, actor=actor()
        )
    finish(fleet, output, job, wait, show_job(output, names[0]))
