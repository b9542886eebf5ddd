"""A secret passes through a whole life of a fleet and is found nowhere but where it belongs."""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.drivers.redis_link import RedisLink
from tests.e2e.test_secrets import execute
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(600)]

CANARY = f"canary{secrets.token_hex(12)}"
MARKER = f"marker{secrets.token_hex(12)}"


def spellings(text: str) -> tuple[bytes, ...]:
    """`text`, and what is left of it in base64 wherever it begins, in hex, and in UTF-16."""
    raw = text.encode()
    shifted = [base64.b64encode(b"x" * n + raw)[4 * (n > 0) : -4] for n in range(3)]
    return raw, raw.hex().encode(), text.encode("utf-16-le"), *shifted


def hits(places: Iterator[tuple[str, bytes]], text: str) -> list[str]:
    needles = spellings(text)
    return [name for name, data in places if any(needle in data for needle in needles)]


def files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Everything below a directory; of a stack's own: logs, store, Redis, Flower, snapshots, disks, templates."""
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def processes() -> Iterator[tuple[str, bytes]]:
    """The arguments and the environment of every process on this host."""
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            if entry.name.isdecimal():
                with suppress(OSError):
                    yield f"{entry}/{name}", (entry / name).read_bytes()


def redis(stack: Stack) -> Iterator[tuple[str, bytes]]:
    """Every key and value, as Redis itself would write it down: unpacked."""
    link = RedisLink(json.loads(stack.layout.connection.read_text())["redis_url"], code="x")
    read: dict[bytes, tuple[Any, ...]] = {
        b"string": ("GET",), b"hash": ("HGETALL",), b"list": ("LRANGE", 0, -1), b"set": ("SMEMBERS",),
        b"zset": ("ZRANGE", 0, -1), b"stream": ("XRANGE", "-", "+"),
    }  # fmt: skip
    try:
        for key in link.command("KEYS", "*"):
            kind = link.command("TYPE", key)
            kind = kind if isinstance(kind, bytes) else kind.encode()
            command, *rest = read[kind]
            yield f"redis {key!r}", repr((key, link.command(command, key, *rest))).encode()
    finally:
        link.close()


def flower(stack: Stack) -> Iterator[tuple[str, bytes]]:
    port = int(stack.env["MVM_FLOWER_PORT"])
    token = base64.b64encode(f"mvm:{stack.layout.flower_password.read_text().strip()}".encode()).decode()
    for path in ("/api/tasks?limit=10000", "/api/workers?refresh=1", "/tasks", "/metrics"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={"Authorization": f"Basic {token}"})
        answer = connection.getresponse()
        yield f"flower {path}", answer.read()
        connection.close()


def test_a_canary_is_found_nowhere(tmp_path: Path) -> None:
    said: list[subprocess.CompletedProcess[str]] = []
    with running_stack(MVM_LOG="debug") as stack:

        def run(*words: str, ends: int = 0) -> str:
            done = stack.run(*words)
            said.append(done)
            assert done.returncode == ends, (words, done.stdout, done.stderr)
            return done.stdout

        def put(content: str, ends: int = 0) -> None:
            path = tmp_path / "secrets"
            path.write_text(content)
            run("tenant", "secrets", "set", "acme", "--from-file", str(path), "-o", "json", ends=ends)

        run("tenant", "create", "acme")
        pool = ("--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--compression", "none")
        run("pool", "create", "acme/web", *pool)
        run("pool", "build", "acme/web")

        # words that are off, with the secret in them
        put(f'{{"TOKEN": "{CANARY}", }}', ends=2)
        put(f'{{"TOKEN": ["{CANARY}"]}}', ends=2)
        put(f"{CANARY}\n", ends=2)
        put(f"-{CANARY}={CANARY}\n", ends=2)

        put(json.dumps({"TOKEN": CANARY, "LONG": CANARY * 500}))
        made = json.loads(run("instance", "create", "acme/web", "--count", "2", "-o", "json"))
        one, two = (instance["ref"] for instance in made)
        run("instance", "start", one, two)
        # sendfile: what the workload copies into its own memory is its own
        read = "cat /run/secrets/TOKEN /run/secrets/LONG >/dev/null; ls /run/secrets"
        for ref in (one, two):
            assert execute(stack, ref, f"echo {MARKER} >/dev/shm/marker; {read}").split() == ["LONG", "TOKEN"]
        run("instance", "warm", two)
        run("instance", "wake", two)
        run("tenant", "secrets", "rotate", "acme")
        for ref in (one, two):
            execute(stack, ref, read)
        run("instance", "sleep", one)
        sleeping = stack.layout.snapshot(InstanceRef.parse(one))
        assert hits(files(sleeping), MARKER), "what is in a guest's memory would be found"
        assert not hits(files(sleeping), CANARY)

        # a job that fails, and one whose worker is killed
        sealed = stack.layout.secrets / "acme"
        kept = sealed.read_bytes()
        sealed.write_bytes(kept.replace(b'"sealed": "', b'"sealed": "AAAA'))
        run("instance", "wake", one, ends=1)
        run("tenant", "secrets", "rotate", "acme", ends=1)
        sealed.write_bytes(kept)
        job = run("instance", "start", one, "--no-wait").strip()
        until(lambda: stack.json("job", "show", job)["state"] != "queued", 60, "it has begun")
        os.kill(stack.pid("worker"), signal.SIGKILL)
        run("job", "wait", job)
        run("instance", "stop", two)
        run("instance", "start", two)
        os.kill(stack.pid("agent"), signal.SIGABRT)
        until(lambda: stack.run("status").returncode == 0, 60, "every part answers")
        put(json.dumps({"TOKEN": CANARY + "2"}))
        for ref in (one, two):
            assert execute(stack, ref, f"grep -c {CANARY}2 /run/secrets/TOKEN; ls /run/secrets").split() == [
                "1",
                "TOKEN",
            ]

        for what in (("tenant", "info", "acme"), ("job", "list"), ("instance", "list"), ("instance", "explain", one),
                     ("instance", "stats", one), ("instance", "logs", one), ("status",), ("doctor",)):  # fmt: skip
            said.append(stack.run(*what, "-o", "json"))
        RedisLink(json.loads(stack.layout.connection.read_text())["redis_url"], code="x").command("BGREWRITEAOF")

        for name, places in {
            "files": files(stack.layout.root), "processes": processes(), "redis": redis(stack), "flower": flower(stack),
        }.items():  # fmt: skip
            assert not hits(places, CANARY), name
        printed = ((" ".join(done.args), f"{done.stdout}{done.stderr}".encode()) for done in said)
        assert not hits(printed, CANARY)
        root = stack.layout.root
    assert not hits(files(root), CANARY)
