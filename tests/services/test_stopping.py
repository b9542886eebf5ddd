"""Ending what has a VMM, whether it runs or stands still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast
from unittest.mock import Mock, create_autospec

import pytest

from mvm.cli import stop_all
from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status
from mvm.drivers.fake import Lie
from mvm.drivers.stack import Stack
from mvm.errors import Failed, MvmError, NotAllowed
from mvm.settings import Settings
from tests.services.conftest import NODE, Node
from tests.support.command_line import ADDRESS, CommandLine

S, V = Status, JobVerb


def running(node: Node, count: int = 1) -> list[str]:
    node.pool()
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def test_a_warm_one_is_shut_down_cleanly(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    assert node.ok(V.INSTANCE_STOP, ref)["clean"] is True
    assert node.instance(ref).status is Status.STOPPED


def test_one_that_a_killed_worker_left_standing_still_is_shut_down_cleanly(node: Node) -> None:
    """It was to become warm, or to sleep, and is recorded as running."""
    (ref,) = running(node)
    instance = node.instance(ref)
    assert instance.process is not None
    node.host.vmm.pause(instance.ref, instance.process)
    assert node.ok(V.INSTANCE_STOP, ref)["clean"] is True


def test_a_warm_one_is_ended_at_once_by_force(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    assert node.ok(V.INSTANCE_STOP, ref, force=True)["clean"] is False
    assert not node.host.vmm.processes()


@pytest.mark.parametrize("trouble", ["does not resume", "is silent"])
def test_a_warm_one_that_does_not_come_back_is_ended_all_the_same(node: Node, trouble: str) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    if trouble == "is silent":
        node.host.hang_guest(InstanceRef.parse(ref))
    else:
        node.host.fail("vmm.resume", Failed("vmm.failed", "no"))
    assert node.ok(V.INSTANCE_STOP, ref)["clean"] is False
    assert node.instance(ref).status is Status.STOPPED
    assert not node.host.vmm.processes()


@pytest.fixture
def up(mvm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a stack that is up."""
    settings = Settings(state_dir=tmp_path / "state", node_id=str(NODE), driver="fake", netns="host")
    settings.layout.run.mkdir(parents=True)
    settings.layout.connection.write_text(json.dumps({"node_id": str(NODE), "agent_address": ADDRESS}))
    monkeypatch.setattr(stop_all, "open_client", lambda *_: mvm.client)
    return settings


@pytest.fixture
def stack() -> Mock:
    return cast("Mock", create_autospec(Stack, instance=True))


def calls(stack: Mock) -> list[tuple[str, ...]]:
    return [(name, *args) for name, args, _ in stack.method_calls if name != "down"]


def test_down_with_instances_stops_warm_ones_too(node: Node, up: Settings, stack: Mock) -> None:
    awake, warm, asleep = running(node, 3)
    node.ok(V.INSTANCE_WARM, warm)
    node.ok(V.INSTANCE_SLEEP, asleep)
    stop_all.down_with_instances(up, stack, lambda _: None)
    assert [node.instance(ref).status for ref in (awake, warm, asleep)] == [S.STOPPED, S.STOPPED, S.SLEEPING]
    stack.down.assert_called_once()
    assert calls(stack) == [("stop_part", "beat")]


@pytest.mark.parametrize("lie", list(Lie))
def test_down_with_instances_ends_those_whose_agents_lie(node: Node, up: Settings, stack: Mock, lie: Lie) -> None:
    refs = running(node, 2)
    for ref in refs:
        node.host.lie(InstanceRef.parse(ref), lie)
    stop_all.down_with_instances(up, stack, lambda _: None)
    assert [node.instance(ref).status for ref in refs] == [S.STOPPED] * 2
    assert not node.host.machines
    stack.down.assert_called_once()


@pytest.mark.parametrize("trouble", ["an instance stays up", "another down is at work"])
def test_where_down_with_instances_fails_beat_goes_on_as_the_stack_does(
    node: Node, up: Settings, stack: Mock, trouble: str
) -> None:
    running(node)
    if trouble == "an instance stays up":
        node.host.fail("vmm.kill", Failed("vmm.failed", "it does not die"), times=9)
        node.host.fail("guest.shutdown", Failed("guest.failed", "no"), times=9)
    else:
        stack.down.side_effect = NotAllowed("stack.busy", "another one is at it")
    with pytest.raises(MvmError) as caught:
        stop_all.down_with_instances(up, stack, lambda _: None)
    assert caught.value.code in ("instance.stop_failed", "stack.busy")
    assert calls(stack) == [("stop_part", "beat"), ("start_part", "beat")]
