"""Secrets in real guests, by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(600)]

MOUNTED = {"ro", "nosuid", "nodev", "noexec"}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.mvm("tenant", "create", "acme")
        running.mvm(
            "pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128",
            "--compression", "none",
        )  # fmt: skip
        running.mvm("pool", "build", "acme/web")
        yield running


@pytest.fixture
def emptied(stack: Stack) -> Iterator[Stack]:
    yield stack
    stack.mvm("instance", "destroy", "acme", "--all", "-y")


def create(stack: Stack, count: int = 1) -> list[str]:
    refs = [i["ref"] for i in stack.json("instance", "create", "acme/web", "--count", str(count))]
    stack.mvm("instance", "start", *refs)
    return refs


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


def put(stack: Stack, path: Path, **values: str) -> int:
    """Set the tenant's secrets; their epoch."""
    path.write_text(json.dumps(values))
    return int(stack.json("tenant", "secrets", "set", "acme", "--from-file", str(path))["secrets_epoch"])


def test_a_tenant_without_secrets_has_an_empty_directory(emptied: Stack) -> None:
    (ref,) = create(emptied)
    assert execute(emptied, ref, "ls -A /run/secrets") == ""


def test_guests_have_their_secrets_from_start_to_stop(emptied: Stack, tmp_path: Path) -> None:
    stack = emptied
    key = "-----BEGIN KEY-----\n" + "x" * 9000 + "\n-----END KEY-----\n"
    put(stack, tmp_path / "f", PASSWORD="first", KEY=key)
    (ref,) = create(stack)
    assert execute(stack, ref, "cat /run/secrets/PASSWORD; ls /run/secrets") == "firstKEY\nPASSWORD"
    assert execute(stack, ref, "cat /run/secrets/KEY") == key.strip()
    (mount,) = [line.split() for line in execute(stack, ref, "cat /proc/mounts").splitlines() if "/run/secrets" in line]
    assert set(mount[3].split(",")) >= MOUNTED
    assert mount[0].startswith("/dev/vd")
    stack.mvm("instance", "sleep", ref)
    stack.mvm("instance", "wake", ref)
    assert execute(stack, ref, "cat /run/secrets/PASSWORD") == "first"
    put(stack, tmp_path / "f", PASSWORD="second")
    assert execute(stack, ref, "cat /run/secrets/*") == "second"
    before = stack.json("tenant", "info", "acme")["secrets_epoch"]
    stack.mvm("tenant", "secrets", "rotate", "acme")
    assert stack.json("tenant", "info", "acme")["secrets_epoch"] == before + 1
    assert execute(stack, ref, "cat /run/secrets/*") == "second"
    assert [path.name for path in stack.layout.secrets.iterdir()] == ["acme"]


def test_a_guest_that_holds_a_secret_open_keeps_it_and_is_asked_again(emptied: Stack, tmp_path: Path) -> None:
    stack, file = emptied, tmp_path / "f"
    put(stack, file, TOKEN="old")
    (ref,) = create(stack)
    execute(stack, ref, "setsid sleep 1000 </run/secrets/TOKEN >/dev/null 2>&1 & echo $! >/run/holder")
    file.write_text("TOKEN=new\n")
    error = stack.fails(1, "secrets.not_delivered", "tenant", "secrets", "set", "acme", "--from-file", str(file))
    assert list(error["fields"]["failed"]) == [ref]
    assert execute(stack, ref, "cat /run/secrets/TOKEN") == "old"
    stack.fails(1, "guest.not_ready", "instance", "sleep", ref)
    assert execute(stack, ref, "cat /run/secrets/TOKEN") == "old"
    execute(stack, ref, "kill $(cat /run/holder)")
    now = "cat /run/secrets/TOKEN || true"  # it is away while it is replaced
    until(lambda: execute(stack, ref, now) == "new", 60, "a sweep has brought it")

    execute(stack, ref, "setsid sleep 1000 </run/secrets/TOKEN >/dev/null 2>&1 &")
    stack.mvm("instance", "sleep", ref, "--force")
    stack.mvm("instance", "wake", ref)
    assert execute(stack, ref, "echo 3 >/proc/sys/vm/drop_caches; cat /run/secrets/TOKEN") == "new"


def test_a_guest_forced_to_sleep_with_old_secrets_wakes_with_new_ones(emptied: Stack, tmp_path: Path) -> None:
    stack, file = emptied, tmp_path / "f"
    put(stack, file, TOKEN="old")
    (ref,) = create(stack)
    execute(stack, ref, "mkdir -p /etc/mvm; printf '#!/bin/sh\\nexit 1\\n' >/etc/mvm/sleep; chmod +x /etc/mvm/sleep")
    stack.fails(1, "guest.not_ready", "instance", "sleep", ref)
    stack.mvm("instance", "sleep", ref, "--force")
    put(stack, file, TOKEN="new", MORE="than before")
    stack.mvm("instance", "wake", ref)
    assert execute(stack, ref, "cat /run/secrets/*") == "than beforenew"


def test_words_that_are_off_and_a_tampered_store_change_nothing(emptied: Stack, tmp_path: Path) -> None:
    stack, file = emptied, tmp_path / "f"
    put(stack, file, TOKEN="good")
    (ref,) = create(stack)
    epoch = stack.json("tenant", "info", "acme")["secrets_epoch"]

    def refused(code: str, path: Path = file, tenant: str = "acme", exit_code: int = 2) -> None:
        stack.fails(exit_code, code, "tenant", "secrets", "set", tenant, "--from-file", str(path))

    for content, code in (
        (b"x" * (256 * 1024 + 1), "secrets.too_large"), (b"", "secrets.empty"), (b"A=\xff", "secrets.invalid"),
        (b"../up=x", "secrets.invalid"), (b"{", "secrets.invalid"),
    ):  # fmt: skip
        file.write_bytes(content)
        refused(code)
    refused("secrets.unreadable", tmp_path)
    refused("secrets.unreadable", tmp_path / "none")
    file.write_text("A=x")
    refused("tenant.not_found", tenant="nobody", exit_code=3)
    assert stack.json("tenant", "info", "acme")["secrets_epoch"] == epoch

    sealed = stack.layout.secrets / "acme"
    kept = sealed.read_bytes()
    sealed.write_bytes(kept[:-9] + b"A" + kept[-8:])
    stack.fails(1, "secrets.damaged", "tenant", "secrets", "rotate", "acme")
    stack.mvm("instance", "stop", ref)
    stack.fails(1, "secrets.damaged", "instance", "start", ref)
    sealed.write_bytes(kept)
    stack.mvm("instance", "start", ref)
    assert execute(stack, ref, "cat /run/secrets/TOKEN") == "good"
