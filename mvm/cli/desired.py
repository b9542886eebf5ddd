"""Desired-state documents from the command line: shown as a plan, given to nodes, followed until all is done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import click

from mvm.cli.errors import show_and_exit
from mvm.cli.fleet import Fleet
from mvm.cli.following import error_of, follow
from mvm.cli.params import JobWait, actor
from mvm.cli.render import emit
from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.remarks import Cause
from mvm.errors import Failed, NotAllowed, TimedOut
from mvm.ports.agents import NodeAgents

APPLY_S = 60.0  # reading and planning a large document
_MOST_ROUNDS = 200
_LOOK_AGAIN_S = 2.0  # health checks come by themselves
_HALTED_S = 180.0  # a rollout that has not gone on for so long does not go on


def give(
    agents: NodeAgents,
    address: str,
    path: Path,
    *,
    prune: bool,
    expect: str | None,
    plan: bool,
    to_its_node: bool = False,
) -> dict[str, Any]:
    """The agent's answer to the document in a file, which is checked here first: a plan, and unless `plan` a job.

    With `to_its_node` no other node than the document's own is shown it, unless `address` names one.
    """
    from mvm.domain.desired import parse
    from mvm.drivers.document_files import read_document
    from mvm.drivers.packed import packed

    value = read_document(path)
    state = parse(value)
    if to_its_node and "@" not in address:
        address = f"{state.node_id}@{address}"
    params: dict[str, Any] = {"document": packed(json.dumps(value).encode()), "prune": prune}
    if not plan:
        params |= {"actor": actor(), **({} if expect is None else {"expect": expect})}
    return agents.call(address, "desired.plan" if plan else "desired.apply", params, deadline_s=APPLY_S)


def show_plan(answer: Mapping[str, Any], output: str) -> None:
    """The plan as a diff, or as an object."""
    if output != "table":
        emit({name: answer.get(name, []) for name in ("fingerprint", "actions", "remarks")}, output)
        return
    click.echo(answer.get("text") or "nothing to do")
    click.echo(f"fingerprint {answer['fingerprint']}")


def settle(fleet: Fleet, output: str, first: JobId, wait: JobWait, *, prune: bool) -> None:
    """Follow pass after pass until one has nothing to do and nothing under way.

    The first failure ends it, and so does a rollout that the health checks of its new instances have halted. Beat's
    sweeps go on anyway: what they or somebody else's pass asked for is waited for likewise. What is blocked is told
    once everything else is done (``desired.blocked``).
    """
    end = None if wait.timeout_s is None else time.monotonic() + wait.timeout_s
    done, rounds, job_id = 0, 0, first
    fewest, since = sys.maxsize, time.monotonic()
    while rounds < _MOST_ROUNDS:
        final = _ended(fleet, job_id, end)
        result = final.result or {}
        asked = [*result.get("under_way", ()), *([result["bulk"]] if result.get("jobs") else [])]
        rolling = result.get("rolling", 0)
        if 0 < rolling < fewest:
            fewest, since = rolling, time.monotonic()
            click.echo(f"note: {_rollout(result)}", err=True)
        if not asked and not rolling:
            return _show(output, rounds, done, result)
        if not asked:
            _await_health(_rollout(result), since, end)
        rounds += bool(asked)
        for bulk in asked:
            _ended(fleet, JobId(bulk), end, within=True)
        children = [child for bulk in asked for child in fleet.jobs.children(JobId(bulk))]
        failures = [error_of(child) for child in children if child.state is not JobState.SUCCEEDED]
        if failures:
            show_and_exit(failures)
        done += result["jobs"]
        params = {"prune": prune}
        job_id = fleet.jobs.submit(
            JobVerb.NODE_RECONCILE, fleet.node_id, fleet.node_id, params=params, actor=actor()
        ).job_id
    raise Failed(
        "desired.unsettled",
        f"there is still something to do after {_MOST_ROUNDS} rounds",
        hint="see: mvm job list --all",
    )


def _rollout(result: Mapping[str, Any]) -> str:
    """What a rollout waits for, in words."""
    waits = (each for each in result["obstacles"] if each["cause"] == Cause.HEALTH_CHECK)
    return next((f"{each['subject']}: {each['text']}" for each in waits), "")


def _await_health(remark: str, since: float, end: float | None) -> None:
    now = time.monotonic()
    Event().wait(_LOOK_AGAIN_S if end is None else max(0.0, min(_LOOK_AGAIN_S, end - now)))
    if now - since > _HALTED_S:
        raise Failed("desired.rollout_halted", f"the rollout has halted: {remark}",
                     hint="sweeps go on with it once that is well; see: mvm instance list", remark=remark)  # fmt: skip
    if end is not None and time.monotonic() >= end:
        raise TimedOut("job.wait_timeout", f"the rollout is still under way: {remark}", hint="sweeps go on with it")


def _ended(fleet: Fleet, job_id: JobId, end: float | None, *, within: bool = False) -> Job:
    left = None if end is None else max(0.001, end - time.monotonic())
    final = follow(fleet, [job_id], left)[job_id]
    if final.state is not JobState.SUCCEEDED and not within:
        raise error_of(final)
    return final


def _show(output: str, rounds: int, done: int, result: Mapping[str, Any]) -> None:
    if result.get("blocked"):
        raise NotAllowed(
            "desired.blocked",
            "\n  ".join(["this cannot be done now:", *result["blocked"]]),
            hint="everything else is done; the node's sweep goes on by itself once that has changed",
            blocked=result["blocked"],
            jobs=done,
            rounds=rounds,
        )
    remarks = list(result.get("remarks", ()))
    if output != "table":
        emit({"rounds": rounds, "jobs": done, "waiting": result.get("waiting", 0), "remarks": remarks}, output)
        return
    click.echo(f"{done} jobs in {rounds} rounds; nothing more to do" if done else "nothing to do")
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)
