"""Disk, health and orphans on a real stack with real guests."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from mvm.drivers.shell import LocalShell
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Sweeps come often, and a guest is ill after two checks."""
    settings = {
        "MVM_HEALTH_SWEEP_S": "1", "MVM_HEALTH_ANSWER_S": "1", "MVM_HEALTH_CHECKS": "2", "MVM_MANUAL_HOLD_S": "0",
        "MVM_DISK_SWEEP_S": "1",
    }  # fmt: skip
    with running_stack(**settings) as running:
        running.mvm("tenant", "create", "acme")
        running.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
        running.mvm("pool", "build", "acme/web")
        yield running


@pytest.fixture
def running(stack: Stack) -> Iterator[str]:
    """An instance that reconcile keeps up."""
    stack.mvm("pool", "scale", "acme/web", "--running", "1")
    until(lambda: [*stack.statuses().values()] == ["running"], 120, "it runs")
    yield next(iter(stack.statuses()))
    stack.mvm("pool", "scale", "acme/web", "--running", "0")
    until(lambda: "running" not in stack.statuses().values(), 60, "it is stopped")
    stack.mvm("instance", "destroy", "acme", "--all", "-y")


def metrics(stack: Stack) -> str:
    url = f"http://127.0.0.1:{stack.env['MVM_METRICS_PORT']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def replaced(stack: Stack, ref: str, before: dict[str, Any]) -> bool:
    info = stack.json("instance", "info", ref)
    return info["status"] == "running" and info["pid"] != before["pid"] and info["job"] is None


def test_a_guest_that_stands_still_is_replaced(stack: Stack, running: str) -> None:
    before = stack.json("instance", "info", running)
    assert stack.json("instance", "explain", running)["health"] is None
    os.kill(before["pid"], signal.SIGSTOP)
    until(lambda: replaced(stack, running, before), 120, "it was replaced")
    assert stack.mvm("instance", "exec", running, "--", "echo", "well").strip() == "well"
    stops = [job for job in stack.json("job", "list", "--subject", running) if job["verb"] == "instance.stop"]
    assert (stops[0]["reason"], stops[0]["params"]) == ("reconcile", {"why": "its guest is not well"})


def test_a_guest_whose_interface_is_gone_is_replaced(stack: Stack, running: str) -> None:
    before = stack.json("instance", "info", running)
    stack.in_namespace("ip", "link", "del", before["tap"])
    until(lambda: replaced(stack, running, before), 120, "it was replaced")
    assert before["tap"] in stack.taps()


def test_a_guest_that_reboots_is_started_again_unless_its_pool_says_otherwise(stack: Stack, running: str) -> None:
    before = stack.json("instance", "info", running)
    stack.run("instance", "exec", running, "--", "reboot")
    until(lambda: replaced(stack, running, before), 120, "it was started again")
    told = [each for each in stack.json("audit", "tail", "acme") if each["subject"] == running]
    assert "guest.rebooted" in {each["code"] for each in told}
    stack.mvm("pool", "update", "acme/web", "--on-exit", "stop")
    stack.run("instance", "exec", running, "--", "halt")
    until(lambda: stack.statuses()[running] == "stopped", 120, "it is over")
    assert "rests" in stack.json("instance", "explain", running)["next"]["reason"]
    assert "rested" in {each["cause"] for each in stack.json("pool", "info", "acme/web")["obstacles"]}
    assert stack.statuses() == {running: "stopped"}
    stack.mvm("pool", "update", "acme/web", "--on-exit", "restart")
    until(lambda: stack.statuses()[running] == "running", 120, "its count wants it again")


def test_a_bridge_that_is_gone_is_made_again_with_its_ports(stack: Stack, running: str) -> None:
    bridge = stack.json("tenant", "info", "acme")["bridge"]
    stack.in_namespace("ip", "link", "del", bridge)
    until(lambda: stack.run("net", "verify").returncode == 0, 60, "all is clean again")
    assert "0% packet loss" in stack.mvm("instance", "exec", running, "--", "ping", "-c", "1", "-W", "3", "10.240.0.1")


def test_a_report_is_true_and_cleaning_keeps_what_is_used(stack: Stack, running: str) -> None:
    report = stack.json("disk", "report")
    kinds = {row["kind"] for row in report["items"] if row["pool"] == "acme/web"}
    assert kinds >= {"revisions", "templates", "overlays", "logs"}
    said = int(LocalShell().run(["du", "--block-size=1", "-s", str(stack.layout.root)]).stdout.split()[0])
    assert abs(report["used_bytes"] - said) < 8 << 20  # logs and Redis go on
    stack.mvm("instance", "sleep", running)
    stack.mvm("disk", "clean", "--keep", "1")
    stack.mvm("instance", "wake", running)  # from what was kept
    stray = stack.layout.images / ("0" * 64)
    stray.mkdir()
    (stray / "rootfs.ext4").write_bytes(b"x" * (1 << 20))
    cleaned = stack.json("disk", "clean")
    assert [(each["kind"], each["name"]) for each in cleaned["removed"]] == [("revisions", "0" * 64)]
    assert 1 << 20 <= cleaned["freed_bytes"] < 2 << 20
    assert not stray.exists()
    until(lambda: 'mvm_disk_used_bytes{kind="templates"}' in metrics(stack), 30, "the disk sweep has told")
    assert "mvm_disk_free_bytes" in metrics(stack)
