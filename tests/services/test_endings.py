"""What a VMM says of its guest, and how a run ended, is recorded as it is; and a pool chooses what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.domain.vmm import Ending, VmmState
from mvm.drivers.fake import Lie
from mvm.errors import TimedOut
from mvm.services.lifecycle import Lifecycle
from mvm.telemetry.metrics import observe_job
from tests.services.conftest import NODE, Node
from tests.support import make

V, S = JobVerb, Status
ROOM, NO_ROOM = 1 << 39, 1 << 20
NEITHER = {"ended": None, "why": ""}


def running(node: Node, count: int = 1, **pool: Any) -> list[str]:
    node.pool()
    if pool:
        node.ok(V.POOL_UPDATE, "acme/web", **pool)
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    node.clock.advance(601)  # what a person has said is of the past
    return refs


def end(node: Node, ref: str, how: Ending) -> Instance:
    """Its run ends without us, and a sweep finds that out."""
    parsed = InstanceRef.parse(ref)
    if how.by_guest:
        node.host.halt_guest(parsed, how)
    else:
        node.host.end_process(parsed, how)
    found = node.sweep(V.SWEEP_STALE_PIDS)
    assert [(each["ref"], each["ended"]) for each in found["stopped"]] == [(ref, how.value)]
    return node.instance(ref)


def audited(node: Node, code: str) -> list[str]:
    (entries,) = [list(each) for each in node.services.view.audit_tail(TenantId("acme"), 50, follow=False)]
    return [entry["subject"] for entry in entries if entry["code"] == code]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (Ending.HALTED, "guest.halted"), (Ending.REBOOTED, "guest.rebooted"), (Ending.PANICKED, "guest.panicked"),
        (Ending.TERMINATED, "vmm.terminated"), (Ending.CRASHED, "vmm.gone"),
    ],
)  # fmt: skip
def test_how_a_run_ended_is_told_as_it_was(node: Node, how: Ending, code: str) -> None:
    (ref,) = running(node)
    ended = end(node, ref, how)
    assert (ended.status, ended.ended, ended.process) == (S.STOPPED, how, None)
    assert f"[{code}]" in str(ended.last_error)
    assert audited(node, code) == [ref]
    (shown,) = [row for row in node.services.view.instances(None, None, None) if row["ref"] == ref]
    assert shown["ended"] == how.value
    assert node.services.view.explain(InstanceRef.parse(ref))["ended"] == how.value
    node.ok(V.INSTANCE_START, ref)
    assert node.instance(ref).ended is None


def reconciled(node: Node) -> dict[str, Any]:
    node.clock.advance(20)
    return dict(node.sweep(V.SWEEP_RECONCILE))


def test_one_that_rebooted_starts_again_itself_though_its_pool_was_never_scaled(node: Node) -> None:
    spare, ref = running(node, 2)
    node.ok(V.INSTANCE_STOP, spare)
    node.clock.advance(601)
    end(node, ref, Ending.REBOOTED)
    assert node.services.view.explain(InstanceRef.parse(ref))["next"]["verb"] == "start"
    reconciled(node)
    assert node.instance(ref).status is S.RUNNING
    assert node.instance(spare).status is S.STOPPED


def test_one_that_halted_rests_in_a_pool_that_was_never_scaled(node: Node) -> None:
    (ref,) = running(node)
    end(node, ref, Ending.HALTED)
    assert not reconciled(node)["changed"]
    assert node.services.view.explain(InstanceRef.parse(ref))["next"]["verb"] is None


@pytest.mark.parametrize("how", list(Ending))
def test_a_count_is_kept_whatever_ended(node: Node, how: Ending) -> None:
    spare, ref = running(node, 2)
    node.ok(V.INSTANCE_STOP, spare)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    node.clock.advance(601)
    end(node, ref, how)
    reconciled(node)
    assert sorted(node.instance(r).status for r in (spare, ref)) == [S.RUNNING, S.STOPPED]
    if how is Ending.REBOOTED:
        assert node.instance(ref).status is S.RUNNING  # and no other in its place


@pytest.mark.parametrize("how", list(Ending))
def test_where_a_pool_says_stop_what_ended_by_itself_rests_and_keeps_its_place(node: Node, how: Ending) -> None:
    (ref,) = running(node, 1, on_exit="stop")
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    end(node, ref, how)
    done = reconciled(node)
    if how.by_guest:
        assert (done["changed"], node.instance(ref).status) == (False, S.STOPPED)
        assert "1 ended by themselves and rest" in str(done["remarks"])
        assert "rests" in node.services.view.explain(InstanceRef.parse(ref))["next"]["reason"]
        node.ok(V.POOL_SCALE, "acme/web", running=2)
        assert len(node.services.store.instances()) == 2
        node.ok(V.INSTANCE_START, ref)
    assert node.instance(ref).status is S.RUNNING


# --- guests that stand still
def stalled(node: Node, ref: str, state: VmmState = VmmState.IO_ERROR) -> dict[str, Any]:
    node.host.stall_guest(InstanceRef.parse(ref), state)
    return check(node)


def check(node: Node) -> dict[str, Any]:
    node.clock.advance(10)
    return dict(node.sweep(V.SWEEP_HEALTH))


def test_a_guest_without_room_is_told_is_no_ill_one_and_goes_on_when_there_is_room(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    process = node.instance(ref).process
    node.host.disk_free = NO_ROOM
    for _ in range(8):
        found = stalled(node, ref)
        assert found["failing"] == []
        assert found["stalled"] == [{"ref": ref, "state": "io-error", "then": "waits for room on the disk", **NEITHER}]
    assert not reconciled(node)["changed"]
    row = node.instance(ref)
    assert (row.status, row.stalled) == (S.RUNNING, VmmState.IO_ERROR)
    assert "[vmm.io_error]" in str(row.last_error)
    told = node.services.view.explain(InstanceRef.parse(ref))
    assert told["stalled"] == "io-error"
    assert "disk is full" in told["next"]["reason"]
    assert audited(node, "vmm.io_error") == [ref]  # once

    node.host.disk_free = ROOM
    assert check(node)["stalled"] == [{"ref": ref, "state": "io-error", "then": "goes on", **NEITHER}]
    row = node.instance(ref)
    assert (row.status, row.stalled, row.last_error, row.process) == (S.RUNNING, None, None, process)
    assert audited(node, "vmm.resumed") == [ref]
    assert check(node)["stalled"] == check(node)["failing"] == []


def test_a_guest_that_somebody_else_paused_goes_on(node: Node) -> None:
    (ref,) = running(node)
    assert stalled(node, ref, VmmState.PAUSED)["stalled"] == [
        {"ref": ref, "state": "paused", "then": "goes on", **NEITHER}
    ]
    assert node.host.machines[InstanceRef.parse(ref)].state is VmmState.RUNNING


@pytest.mark.parametrize(
    ("state", "how"),
    [
        (VmmState.BROKEN, Ending.CRASHED), (VmmState.WATCHDOG, Ending.CRASHED),
        (VmmState.PANICKED, Ending.PANICKED), (VmmState.ENDED, Ending.HALTED),
    ],
)  # fmt: skip
def test_a_vmm_whose_guest_is_over_is_ended(node: Node, state: VmmState, how: Ending) -> None:
    (ref,) = running(node)
    assert stalled(node, ref, state)["stalled"] == [
        {"ref": ref, "state": state.value, "then": "stopped", "ended": how.value, "why": ""}
    ]
    row = node.instance(ref)
    assert (row.status, row.ended) == (S.STOPPED, how)
    assert not node.host.machines
    assert not node.host.leaks()


def samples() -> tuple[float, dict[str, float]]:
    """Of runs that have ended so far, how many; and how many guests stand still, by state, where any do."""
    metrics = {metric.name: metric.samples for metric in REGISTRY.collect()}
    ended = sum(each.value for each in metrics["mvm_runs_ended"] if each.name == "mvm_runs_ended_total")
    return ended, {each.labels["state"]: each.value for each in metrics["mvm_stalled_guests"] if each.value}


def observed(result: dict[str, Any]) -> tuple[float, dict[str, float]]:
    observe_job(make.job(verb=V.SWEEP_HEALTH, state=JobState.SUCCEEDED, result=result))
    return samples()


@pytest.mark.parametrize("state", [VmmState.BROKEN, VmmState.WATCHDOG, VmmState.PANICKED, VmmState.ENDED])
def test_a_run_that_the_health_sweep_ends_is_counted_as_ended_and_stands_still_no_more(
    node: Node, state: VmmState
) -> None:
    (ref,) = running(node)
    before, _ = samples()
    assert observed(stalled(node, ref, state)) == (before + 1, {})


def test_guests_that_stand_still_are_counted_until_they_go_on(node: Node) -> None:
    (ref,) = running(node)
    before, _ = samples()
    node.host.disk_free = NO_ROOM
    assert observed(stalled(node, ref)) == (before, {"io-error": 1})
    node.host.disk_free = ROOM
    assert observed(check(node)) == (before, {})


@pytest.mark.parametrize("state", [VmmState.BROKEN, VmmState.IO_ERROR])
def test_one_that_changes_while_its_vmm_is_asked_is_not_said_to_be_stopped(
    node: Node, state: VmmState, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    before, _ = samples()
    node.host.disk_free = NO_ROOM
    real = node.services.store.instance

    def changed(asked: InstanceRef) -> Instance:
        found = real(asked)
        return replace(found, generation=found.generation + 1)

    node.host.stall_guest(InstanceRef.parse(ref), state)
    node.clock.advance(10)
    with monkeypatch.context() as patch:
        patch.setattr(node.services.store, "instance", changed)
        found = dict(node.sweep(V.SWEEP_HEALTH))
    (told,) = found["stalled"]
    assert (told["then"], told["ended"]) == ("changed meanwhile", None)
    assert observed(found) == (before, {})
    assert node.instance(ref).status is S.RUNNING


def test_one_that_a_job_holds_is_told_as_standing_still_with_the_reason(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    before, _ = samples()

    def held(*_: object) -> bool:
        raise TimedOut("lock.busy", "the lock is taken")

    monkeypatch.setattr(Lifecycle, "mark_gone", held)
    found = stalled(node, ref, VmmState.BROKEN)
    assert found["stalled"] == [
        {"ref": ref, "state": "internal-error", "then": "left for the next sweep", "ended": None,
         "why": "the lock is taken"}
    ]  # fmt: skip
    assert observed(found) == (before, {"internal-error": 1})


def test_a_wake_of_one_without_room_says_so_and_it_stays_warm(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.disk_free = NO_ROOM
    node.host.stall_guest(InstanceRef.parse(ref))
    node.fails("vmm.io_error", V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is S.WARM
    node.host.disk_free = ROOM
    node.ok(V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is S.RUNNING


@pytest.mark.parametrize("room", [ROOM, NO_ROOM])
def test_one_that_stands_still_can_be_stopped_cleanly_if_there_is_room(node: Node, room: int) -> None:
    (ref,) = running(node)
    node.host.disk_free = NO_ROOM
    stalled(node, ref)
    node.host.disk_free = room
    assert node.ok(V.INSTANCE_STOP, ref)["clean"] is (room == ROOM)
    row = node.instance(ref)
    assert (row.status, row.stalled) == (S.STOPPED, None)


@pytest.mark.parametrize("lie", list(Lie))
def test_however_its_agent_lies_an_instance_is_stopped_and_destroyed(node: Node, lie: Lie) -> None:
    first, second = running(node, 2)
    for ref in (first, second):
        node.host.lie(InstanceRef.parse(ref), lie)
    assert node.ok(V.INSTANCE_STOP, first)["clean"] is False
    node.ok(V.INSTANCE_DESTROY, second)
    assert not node.host.machines
    assert str(NODE) == "n1"


@pytest.mark.parametrize("lie", list(Lie))
def test_however_their_agents_lie_a_pool_is_scaled_down(node: Node, lie: Lie) -> None:
    refs = running(node, 2)
    for ref in refs:
        node.host.lie(InstanceRef.parse(ref), lie)
    node.ok(V.POOL_SCALE, "acme/web", running=0)
    reconciled(node)
    assert [node.instance(ref).status for ref in refs] == [S.STOPPED] * 2
    assert not node.host.machines
