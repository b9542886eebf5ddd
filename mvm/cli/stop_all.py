"""Stopping all running instances, for ``mvm down --instances``."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Callable

from mvm.domain.ids import NodeId
from mvm.domain.job import JobState, JobVerb, Reason
from mvm.drivers.stack import Stack
from mvm.errors import Failed, Unreachable
from mvm.settings import Settings
from mvm.wiring import open_client


def stop_instances(settings: Settings, stack: Stack, say: Callable[[str], None]) -> None:
    """Stop every running instance by one bulk job and wait for it.

    Raises `Unreachable` (``stack.down``) when instances run on without a stack, and `Failed`
    (``instance.stop_failed``) when one could not be stopped: the stack then stays up.
    """
    try:
        facts = json.loads(settings.layout.connection.read_text())
    except FileNotFoundError:
        if not stack.instances_remain():
            return
        raise Unreachable(
            "stack.down", "the stack is not running, so nothing can stop instances", hint="mvm up --detach, then again"
        ) from None
    client = open_client(facts, settings.layout)
    answer = client.agents.call(facts["agent_address"], "instance.list", {"status": "running"}, deadline_s=10)
    refs = [str(row["ref"]) for row in answer["items"]]
    if not refs:
        return
    say(f"stopping {len(refs)} instances")
    node = NodeId(facts["node_id"])
    actor = os.environ.get("SUDO_USER") or getpass.getuser()
    parent = client.jobs.submit_bulk(JobVerb.INSTANCE_STOP, refs, lambda _: node, actor=actor, reason=Reason.SHUTDOWN)
    last = parent
    for job in client.jobs.follow([parent.job_id]):
        if job.job_id == parent.job_id:
            last = job
    if last.state is not JobState.SUCCEEDED:
        raise Failed(
            "instance.stop_failed", f"{last.progress.failed} of {len(refs)} instances could not be stopped",
            hint=f"see: mvm job show {parent.job_id}", job_id=str(parent.job_id),
        )  # fmt: skip
