"""The audit trail of a whole stack, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.stack import COMMAND, Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.redis]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack("fake") as stack:
        yield stack


def test_what_is_done_to_a_tenant_is_told_and_what_is_done_to_the_trail_is_found(stack: Stack) -> None:
    stack.mvm("tenant", "create", "acme")
    stack.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal")
    stack.mvm("pool", "build", "acme/web")
    refs = [each["ref"] for each in stack.json("instance", "create", "acme/web", "--count", "4")]
    following = subprocess.Popen(
        [*COMMAND, "audit", "tail", "acme", "-f", "-n", "1", "-o", "json"], env=stack.env,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        stack.mvm("instance", "start", *refs)
        stack.mvm("instance", "sleep", refs[0])
        stack.mvm("instance", "wake", refs[0])
        _wait_for(following, "instance.wake")
    finally:
        following.kill()
        following.communicate()
    entries = stack.json("audit", "tail", "acme", "-n", "100")
    assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
    assert sorted(e["subject"] for e in entries if e["verb"] == "instance.start") == sorted(refs)
    (woken,) = [entry for entry in entries if entry["verb"] == "instance.wake"]
    assert (woken["from"], woken["to"], woken["reason"]) == ("sleeping", "running", "urgent")
    jobs = {job["job_id"] for job in stack.json("job", "list", "--all", "--limit", "1000")}
    assert {entry["job_id"] for entry in entries} <= jobs
    assert stack.json("audit", "verify", "acme")["whole"]
    _spoil(stack)


def test_nothing_is_lost_or_told_twice_when_workers_are_killed(stack: Stack) -> None:
    stack.mvm("tenant", "create", "bolt")
    stack.mvm("pool", "create", "bolt/web", "--flake", "builtin:", "--profile", "minimal")
    stack.mvm("pool", "build", "bolt/web")
    refs = [each["ref"] for each in stack.json("instance", "create", "bolt/web", "--count", "20")]
    jobs = []
    for verb in ("start", "warm", "start", "stop"):
        (job,) = stack.mvm("instance", verb, *refs, "--no-wait").split()
        until(lambda job=job: _begun(stack, job), 60, "some of it has begun")  # type: ignore[misc]
        for part in ("worker", "urgent"):
            os.kill(stack.pid(part), signal.SIGKILL)
        stack.run("job", "wait", job)
        jobs.append(job)
    children = [child for job in jobs for child in stack.json("job", "show", job)["children"]]
    assert len(children) == 80
    ended = {child["job_id"]: child["state"] for child in children}
    told = [e for e in stack.json("audit", "tail", "bolt", "-n", "1000") if e["job_id"] in ended]
    assert Counter(entry["job_id"] for entry in told) == Counter(ended.keys())
    assert {entry["job_id"]: entry["result"] for entry in told} == ended
    assert stack.json("audit", "verify", "bolt")["whole"]


def _begun(stack: Stack, job: str) -> bool:
    return any(child["state"] != "queued" for child in stack.json("job", "show", job)["children"])


def _wait_for(following: subprocess.Popen[str], verb: str) -> None:
    assert following.stdout is not None
    seen = ""
    for line in following.stdout:
        seen += line
        if f'"verb": "{verb}"' in line:
            return
    pytest.fail(f"ended without {verb}: {seen}")


def _spoil(stack: Stack) -> None:
    (path,) = (stack.layout.audit / "acme").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for problem, spoilt, number in (
        ("edited", [*lines[:2], lines[2].replace(b"succeeded", b"failed"), *lines[3:]], 3),
        ("removed", lines[:-1], 0),
        ("moved", [lines[0], lines[2], lines[1], *lines[3:]], 3),
    ):
        path.write_bytes(b"".join(spoilt))
        done = stack.run("audit", "verify", "acme", "-o", "json")
        assert done.returncode == 1
        assert "error[audit.broken]" in done.stderr
        (finding,) = json.loads(done.stdout)["findings"]
        assert (finding["problem"], finding["line"]) == (problem, number)
    path.write_bytes(whole)
    assert stack.run("audit", "verify", "acme").returncode == 0
