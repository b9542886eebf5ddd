"""``mvm down --instances``: all instances that have a VMM are stopped, and then the stack."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.drivers.stack import Stack
from mvm.errors import Failed, NotAllowed, NotFound, TimedOut, Unreachable
from mvm.settings import Settings
from mvm.wiring import Client, open_client

_PATIENCE_S = 20.0


def down_with_instances(settings: Settings, stack: Stack, say: Callable[[str], None]) -> None:
    """Cancel what is queued or running, stop every instance that has a VMM by one bulk job, then stop the stack.

    Those that sleep sleep on. What somebody wakes meanwhile is stopped, too.

    Raises `Unreachable` (``stack.down``) when instances run on without a stack, `Failed` (``instance.stop_failed``)
    when one could not be stopped, and what `Stack.down` does: the stack then stays up as it was.
    """
    facts = _connection(settings, stack)
    if facts is None:
        stack.down(say)
        return
    stack.stop_part("beat")  # its reconcile would start again what stops here
    try:
        _stop_all(open_client(facts, settings.layout), facts, say)
        stack.down(say)
    except BaseException:
        with suppress(Unreachable):  # all of it is down
            stack.start_part("beat")
        raise


def _connection(settings: Settings, stack: Stack) -> Mapping[str, Any] | None:
    """How to reach the stack; None when neither it nor an instance runs."""
    try:
        return cast("Mapping[str, Any]", json.loads(settings.layout.connection.read_text()))
    except FileNotFoundError:
        if not (left := stack.remaining()):
            return None
    raise Unreachable(
        "stack.down", f"the stack is not running, so nothing can stop what runs on: {left[0]}",
        hint="mvm up --detach, then again",
    )  # fmt: skip


def _stop_all(client: Client, facts: Mapping[str, Any], say: Callable[[str], None]) -> None:
    node = NodeId(facts["node_id"])
    actor = os.environ.get("SUDO_USER") or getpass.getuser()
    _cancel_open_jobs(client, node, actor, say)
    while refs := _with_vmm(client, facts["agent_address"]):
        say(f"stopping {len(refs)} instances")
        _stop(client, node, actor, refs, say)


def _with_vmm(client: Client, address: str) -> list[str]:
    answer = client.agents.call(address, "instance.list", {}, deadline_s=10)
    return [str(row["ref"]) for row in answer["items"] if Status(row["status"]).has_vmm]


def _stop(client: Client, node: NodeId, actor: str, refs: Sequence[str], say: Callable[[str], None]) -> None:
    parent = client.jobs.submit_bulk(JobVerb.INSTANCE_STOP, refs, lambda _: node, actor=actor, reason=Reason.SHUTDOWN)
    [last] = [job for job in _finals(client, node, actor, [parent.job_id], say) if job.job_id == parent.job_id]
    if last.state is not JobState.SUCCEEDED:
        raise Failed(
            "instance.stop_failed", f"{last.progress.failed} of {len(refs)} instances could not be stopped",
            hint=f"see: mvm job show {parent.job_id}", job_id=str(parent.job_id),
        )  # fmt: skip


def _cancel_open_jobs(client: Client, node: NodeId, actor: str, say: Callable[[str], None]) -> None:
    """No job of the node is queued or running any more; one that ends may have asked for others."""
    while jobs := client.registry.open_jobs(node):
        say(f"cancelling {len(jobs)} jobs")
        for job in jobs:
            try:
                client.jobs.cancel(job.job_id)
            except (NotAllowed, NotFound):  # it has ended meanwhile
                continue
        _finals(client, node, actor, [job.job_id for job in jobs], say)


def _finals(client: Client, node: NodeId, actor: str, ids: Sequence[JobId], say: Callable[[str], None]) -> list[Job]:
    """The jobs once they have ended. Sweeps help on what a killed worker left, and Beat asks for none now."""
    while True:
        try:
            return [job for job in client.jobs.follow(ids, deadline_s=_PATIENCE_S) if job.state.final]
        except TimedOut:
            say("still waiting for jobs to end; see: mvm job list")
            client.jobs.expire()
            for sweep in (JobVerb.SWEEP_STALE_PIDS, JobVerb.SWEEP_ORPHANS):  # tell of ends; send again what was lost
                client.jobs.submit(sweep, str(node), node, actor=actor, reason=Reason.SHUTDOWN)
