"""Guests that fall silent: noticed, told, and replaced where that is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.drivers.fake import Lie
from mvm.errors import GuestRefused
from tests.services.conftest import Node

V = JobVerb
CHECKS = 6  # as the settings have it


def running(node: Node, count: int = 2, **ways: Any) -> list[str]:
    node.pool()
    if ways:
        node.ok(V.POOL_UPDATE, "acme/web", **ways)
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def check(node: Node, times: int = 1) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _ in range(times):
        node.clock.advance(10)
        found = list(node.sweep(V.SWEEP_HEALTH)["failing"])
    return found


def explain(node: Node, ref: str) -> dict[str, Any]:
    return node.services.view.explain(InstanceRef.parse(ref))


def hang(node: Node, ref: str, *, hung: bool = True) -> None:
    node.host.machines[InstanceRef.parse(ref)].hung = hung


def test_a_silent_guest_is_ill_after_some_checks_and_is_replaced(node: Node) -> None:
    silent, well = running(node)
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    node.clock.advance(601)  # what a person did holds no longer
    hang(node, silent)
    assert check(node, CHECKS - 1) == [
        {"ref": silent, "failed_checks": 5, "ill": False, "reason": "its agent does not answer (guest.silent)"}
    ]
    assert explain(node, silent)["health"]["well"] is True
    assert not node.sweep(V.SWEEP_RECONCILE)["changed"]
    assert check(node)[0]["ill"] is True
    told = explain(node, silent)
    assert told["health"] == {
        "well": False, "failed_checks": 6, "of": 6, "reason": "its agent does not answer (guest.silent)",
        "since": told["health"]["since"],
    }  # fmt: skip
    assert (told["next"]["verb"], "reconcile replaces it" in told["next"]["reason"]) == ("stop", True)
    assert explain(node, well)["health"] is None
    before = node.instance(silent).process
    node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(silent).status is Status.STOPPED
    stops = [job for job in node.registry.jobs(subject=silent) if job.verb is V.INSTANCE_STOP]
    assert [(job.state, job.params) for job in stops] == [(JobState.SUCCEEDED, {"why": "its guest is not well"})]
    node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(silent).status is Status.RUNNING
    assert node.instance(silent).process != before
    assert check(node) == []
    assert explain(node, silent)["health"] is None


def test_one_answer_makes_it_well(node: Node) -> None:
    ref, _ = running(node)
    hang(node, ref)
    check(node, CHECKS)
    hang(node, ref, hung=False)
    assert check(node) == []
    assert explain(node, ref)["health"] is None
    hang(node, ref)
    assert check(node)[0]["failed_checks"] == 1


@pytest.mark.parametrize(
    ("way", "words"), [({"critical": True}, "critical"), ({"pinned": True}, "pinned"), ({}, "never scaled")]
)
def test_who_may_not_be_stopped_is_only_told(node: Node, way: dict[str, Any], words: str) -> None:
    ref, _ = running(node, **way)
    if way:
        node.ok(V.POOL_SCALE, "acme/web", running=2)
    node.clock.advance(601)
    hang(node, ref)
    check(node, CHECKS + 1)
    told = explain(node, ref)
    assert told["health"]["well"] is False
    assert told["next"]["verb"] is None
    assert words in told["next"]["reason"]
    assert not node.sweep(V.SWEEP_RECONCILE)["changed"]
    assert node.instance(ref).status is Status.RUNNING


def test_an_ill_one_that_a_person_holds_is_not_said_to_be_replaced_before_that_ends(node: Node) -> None:
    ref, _ = running(node)
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    node.ok(V.INSTANCE_STOP, ref)
    node.ok(V.INSTANCE_START, ref)
    hang(node, ref)
    check(node, CHECKS)
    told = explain(node, ref)
    assert (told["health"]["well"], told["next"]["verb"]) == (False, None)
    assert "as a person left it" in told["next"]["reason"]
    assert not node.sweep(V.SWEEP_RECONCILE)["changed"]
    node.clock.advance(601)
    assert explain(node, ref)["next"]["verb"] == "stop"


def test_a_guest_without_its_interface_is_not_well(node: Node) -> None:
    running(node)
    del node.host.taps["tn0i3"]
    assert check(node)[0]["reason"] == "its network interface tn0i3 is gone"
    check(node, CHECKS - 1)
    lost, well = sorted(node.services.view.instances(None, None, None), key=lambda row: str(row["tap"]))
    assert lost["status"] == "running"
    assert lost["unwell"].startswith("its network interface tn0i3 is gone"), "whoever lists them sees it"
    assert well["unwell"] is None
    assert node.services.view.instance(InstanceRef.parse(lost["ref"]))["unwell"] == lost["unwell"]


def test_those_that_are_not_running_and_those_that_are_gone_are_not_asked(node: Node) -> None:
    one, two = running(node)
    node.ok(V.INSTANCE_WARM, one)
    node.clock.advance(10)
    node.host.kill_process(InstanceRef.parse(two))
    assert node.sweep(V.SWEEP_HEALTH) == {"changed": False, "checked": 1, "failing": [], "stalled": []}
    node.ok(V.INSTANCE_STOP, two)
    node.ok(V.INSTANCE_START, two)
    node.host.fail("guest.ping", GuestRefused("guest.refused", "what?"))
    assert [each["ref"] for each in check(node)] == [two]


def test_a_warm_guest_that_is_silent_when_it_is_to_sleep_is_replaced(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    node.clock.advance(601)
    hang(node, ref)
    for missed in range(1, CHECKS + 1):
        node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
        node.clock.advance(601)
        health = explain(node, ref)["health"]
        assert (health["failed_checks"], health["well"]) == (missed, missed < CHECKS)
        assert "did not answer" in health["reason"]
    assert node.instance(ref).status is Status.WARM
    assert explain(node, ref)["next"]["verb"] == "stop"
    node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(ref).status is Status.STOPPED
    assert explain(node, ref)["health"] is None


def test_exact_counts_that_want_a_silent_warm_guest_asleep_are_met_in_the_end(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    hang(node, ref)
    node.ok(V.POOL_SCALE, "acme/web", running=0, warm=0, sleeping=1)
    node.clock.advance(601)
    for _ in range(CHECKS + 3):
        node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(ref).status is Status.SLEEPING
    jobs = [job for job in node.registry.jobs(subject=ref) if job.verb is V.INSTANCE_STOP]
    assert [job.params for job in jobs] == [{"why": "its guest is not well"}]


def test_a_warm_guest_that_says_no_is_well(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    hang(node, ref)
    node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
    assert explain(node, ref)["health"]["failed_checks"] == 1
    hang(node, ref, hung=False)
    node.host.fail("guest.prepare_sleep", GuestRefused("guest.refused", "busy"))
    node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
    assert explain(node, ref)["health"] is None


def test_a_warm_guest_that_says_no_to_everything_is_not_well(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.lie(InstanceRef.parse(ref), Lie.REFUSES)
    for missed in range(1, CHECKS + 1):
        node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
        assert explain(node, ref)["health"]["failed_checks"] == missed
    node.ok(V.POOL_SCALE, "acme/web", running=0, warm=0, sleeping=1)
    node.clock.advance(601)
    for _ in range(3):
        node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(ref).status is Status.SLEEPING


def test_a_warm_guest_that_is_at_work_is_not_asked_to_sleep_in_every_pass(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.fail("guest.prepare_sleep", GuestRefused("guest.refused", "busy"), times=3)
    node.ok(V.POOL_SCALE, "acme/web", running=0, warm=0, sleeping=1)
    told = node.sweep(V.SWEEP_RECONCILE)
    assert (told["jobs"], [each["cause"] for each in told["obstacles"]]) == (0, ["failed"])
    assert node.instance(ref).status is Status.WARM


def test_a_warm_guest_without_its_interface_is_not_well(node: Node) -> None:
    (ref,) = running(node, 1)
    node.ok(V.INSTANCE_WARM, ref)
    hang(node, ref)
    node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
    assert check(node) == []
    assert explain(node, ref)["health"]["failed_checks"] == 1, "a sweep cannot ask it, and knows nothing better"
    node.host.taps.clear()
    assert check(node)[0]["failed_checks"] == 2
