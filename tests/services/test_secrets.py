"""Tenants' secrets on the fake host."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.job import JobVerb
from mvm.errors import Failed, GuestRefused, GuestSilent, InvalidInput, NotFound
from tests.services.conftest import Node
from tests.support.command_line import CommandLine

V = JobVerb
ACME = TenantId("acme")


class Killed(BaseException):
    """Stands for SIGKILL."""


def put(node: Node, **values: str) -> int:
    return int(node.services.view.set_secrets(ACME, json.dumps(values).encode(), "me")["secrets_epoch"])


def running(node: Node, count: int = 1) -> list[str]:
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def seen(node: Node, ref: str) -> dict[str, str]:
    """What the guest has mounted: names and digests."""
    return dict(node.host.machines[InstanceRef.parse(ref)].mounted)


def digest(**values: str) -> dict[str, str]:
    return {name: sha256(value.encode()).hexdigest() for name, value in values.items()}


def test_guests_have_what_was_set_before_they_started(node: Node) -> None:
    node.pool()
    (before,) = running(node)
    assert seen(node, before) == {}
    assert put(node, A="1") == 1
    (after,) = running(node)
    assert seen(node, after) == digest(A="1")
    assert node.ok(V.TENANT_SECRETS, "acme")["reached"] == sorted([before, after])
    assert seen(node, before) == digest(A="1")


def test_whoever_sets_them_is_in_the_audit_trail(node: Node) -> None:
    node.pool()
    put(node, TOKEN="one")
    (last,) = next(node.services.view.audit_tail(ACME, 1, follow=False))
    assert [last[name] for name in ("kind", "verb", "actor", "from", "to", "job_id")] == [
        "call", "tenant.set_secrets", "me", "epoch=0 names=-", "epoch=1 names=TOKEN", None,
    ]  # fmt: skip
    assert "one" not in str(last).split("'")
    assert node.services.view.audit_verify(ACME)["whole"]


def test_rotation_makes_an_epoch_and_reaches_running_guests(node: Node) -> None:
    node.pool()
    put(node, A="1")
    (ref,) = running(node)
    job = node.do(V.TENANT_SECRETS, "acme", rotate=True)
    assert job.result is not None
    assert (job.result["secrets_epoch"], job.result["reached"]) == (2, [ref])
    assert node.services.store.tenant(ACME).secrets_epoch == 2
    again = node.services.runner.run(replace(job, state=job.state.QUEUED))
    assert again.result == job.result, "delivered twice it is one rotation"


def test_a_rotation_that_lost_its_worker_makes_one_epoch(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    put(node, A="1")
    running(node)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    job = node.submit(V.TENANT_SECRETS, "acme", rotate=True)
    with monkeypatch.context() as patch:
        patch.setattr(node.host.vmm, "put_secrets", killed)
        with pytest.raises(Killed):
            node.drain()
    final = node.services.runner.run(job)
    assert final.result is not None
    assert final.result["secrets_epoch"] == 2


def test_sleeping_and_warm_guests_have_the_new_ones_when_they_run_again(node: Node) -> None:
    node.pool()
    put(node, A="1")
    asleep, warm = running(node, 2)
    node.ok(V.INSTANCE_SLEEP, asleep)
    node.ok(V.INSTANCE_WARM, warm)
    put(node, A="2")
    assert node.ok(V.TENANT_SECRETS, "acme")["reached"] == []
    node.ok(V.INSTANCE_WAKE, asleep)
    node.ok(V.INSTANCE_WAKE, warm)
    assert seen(node, asleep) == seen(node, warm) == digest(A="2")


@pytest.mark.parametrize("force", [False, True])
def test_a_guest_that_slept_with_old_secrets_wakes_with_new_ones(node: Node, force: bool) -> None:
    node.pool()
    put(node, A="1")
    (ref,) = running(node)
    if force:
        node.host.fail("guest.prepare_sleep", GuestRefused("guest.refused", "a file is open below /run/secrets"))
    node.ok(V.INSTANCE_SLEEP, ref, force=force)
    put(node, A="2")
    node.ok(V.INSTANCE_WAKE, ref)
    assert seen(node, ref) == digest(A="2")
    put(node, A="3")
    node.host.fail("guest.drop_secrets", GuestRefused("guest.refused", "still open"), times=2)
    node.fails("secrets.not_delivered", V.TENANT_SECRETS, "acme")
    node.sweep(V.SWEEP_STALE_PIDS)
    assert seen(node, ref) == digest(A="2")
    node.sweep(V.SWEEP_STALE_PIDS)
    assert seen(node, ref) == digest(A="3")


def test_a_wake_that_is_not_answered_sleeps_anew_without_secrets(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    put(node, A="1")
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    wake = node.host.guest.wake

    def late(*args: Any, **named: Any) -> None:
        wake(*args, **named)
        raise GuestSilent("guest.silent", "its answer came too late")

    for dropped in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(node.host.guest, "wake", late)
            if not dropped:
                node.host.fail("guest.drop_secrets", GuestSilent("guest.silent", "nor does it now"))
            node.fails("guest.silent", V.INSTANCE_WAKE, ref)
        kept = [each.machine for each in node.host.saved.values()]
        (saved,) = [machine for machine in kept if machine.spec.ref == InstanceRef.parse(ref)]
        assert saved.disk == {}
        assert (saved.mounted == {}) is dropped
        put(node, A=f"2{dropped}")
        node.ok(V.INSTANCE_WAKE, ref)
        assert seen(node, ref) == digest(A=f"2{dropped}")
        node.ok(V.INSTANCE_SLEEP, ref)


def test_a_guest_that_could_not_be_put_to_sleep_has_its_secrets_again(node: Node) -> None:
    node.pool()
    put(node, A="1")
    (ref,) = running(node)
    node.host.fail("vmm.save", Failed("disk.full", "no space"))
    node.fails("disk.full", V.INSTANCE_SLEEP, ref)
    assert seen(node, ref) == digest(A="1")


def test_a_guest_that_keeps_its_secrets_is_named_and_asked_again(node: Node) -> None:
    node.pool()
    put(node, A="1")
    busy, other = sorted(running(node, 2))
    put(node, A="2")
    node.host.fail("guest.drop_secrets", GuestRefused("guest.refused", "secrets: Device or resource busy"))
    job = node.fails("secrets.not_delivered", V.TENANT_SECRETS, "acme")
    assert job.error is not None
    assert list(job.error["fields"]["failed"]) == [busy]
    assert job.error["fields"]["reached"] == [other]
    assert (seen(node, busy), seen(node, other)) == (digest(A="1"), digest(A="2"))
    node.sweep(V.SWEEP_STALE_PIDS)
    assert seen(node, busy) == digest(A="2")


def test_a_wake_taken_up_by_another_worker_ends_with_the_secrets_of_now(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pool()
    put(node, A="1")
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    job = node.submit(V.INSTANCE_WAKE, ref)
    with monkeypatch.context() as patch:
        patch.setattr(node.host.guest, "wake", killed)
        with pytest.raises(Killed):
            node.services.runner.run(job)
    put(node, A="2")
    assert node.services.runner.run(job).error is None
    assert seen(node, ref) == digest(A="2")


def test_older_secrets_and_vanished_ones_start_nothing(node: Node) -> None:
    node.pool()
    put(node, A="1")
    old = node.host.kept_secrets[ACME]
    put(node, A="2")
    (ref,) = node.create()
    for replacement in (old, None):
        node.host.kept_secrets.pop(ACME)
        if replacement:
            node.host.kept_secrets[ACME] = replacement
        node.fails("secrets.damaged", V.INSTANCE_START, ref)
        node.fails("secrets.damaged", V.TENANT_SECRETS, "acme", rotate=True)
        assert not node.host.vmm.processes()
        node.host.kept_secrets[ACME] = old
    node.host.fail("secrets.load", Failed("secrets.damaged", "they were changed"))
    assert put(node, A="3") == 3, "setting them anew mends it"
    node.ok(V.INSTANCE_START, ref)
    assert seen(node, ref) == digest(A="3")


def test_a_tenant_takes_its_secrets_along(node: Node) -> None:
    with pytest.raises(NotFound):
        put(node, A="1")
    node.ok(V.TENANT_CREATE, "acme")
    node.fails("secrets.none", V.TENANT_SECRETS, "acme", rotate=True)
    put(node, A="1")
    with pytest.raises(InvalidInput):
        node.services.view.set_secrets(ACME, b"hush", "me")
    assert node.services.store.tenant(ACME).secrets_epoch == 1
    node.ok(V.TENANT_DESTROY, "acme")
    assert node.host.kept_secrets == {}


def test_a_new_tenant_has_nothing_of_a_former_one_of_its_name(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    put(node, A="1")
    left = node.host.kept_secrets[ACME]
    node.ok(V.TENANT_DESTROY, "acme")
    node.host.kept_secrets[ACME] = left  # put there by who was about to set them while the tenant was destroyed
    node.pool()
    (ref,) = running(node)
    assert (node.host.kept_secrets, seen(node, ref)) == ({}, {})
    assert put(node, A="2") == 1


def test_a_tenant_that_stays_keeps_its_secrets(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    put(node, A="1")

    def close(*_: object) -> None:
        node.pool()  # by somebody else, meanwhile

    monkeypatch.setattr(node.services.networks, "close", close)
    node.fails("tenant.not_empty", V.TENANT_DESTROY, "acme")
    (ref,) = running(node)
    assert seen(node, ref) == digest(A="1")


def test_the_commands(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    mvm.json("tenant", "create", "acme")
    file = tmp_path / "secrets"
    file.write_text("A=hush\n")
    assert mvm.json("tenant", "secrets", "set", "acme", "--from-file", str(file))["secrets_epoch"] == 1
    assert mvm.json("tenant", "secrets", "rotate", "acme")["secrets_epoch"] == 2
    assert mvm.json("tenant", "info", "acme")["secrets_epoch"] == 2
    jobs = json.dumps(mvm.json("job", "list"))
    assert "tenant.secrets" in jobs
    assert "hush" not in jobs


def test_guests_that_never_answer_hold_up_neither_the_sweep_nor_others(node: Node) -> None:
    node.pool()
    refs = node.create(4)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    node.services.view.set_secrets(TenantId("acme"), b"KEY=value\n", "test")
    for ref in refs[:3]:
        node.host.machines[InstanceRef.parse(ref)].hung = True
    for _ in range(4):
        began = node.clock.monotonic()
        node.sweep(V.SWEEP_STALE_PIDS)
        assert node.clock.monotonic() - began < 25
    assert node.host.machines[InstanceRef.parse(refs[3])].mounted
