"""Sleep, wake and clones on real microVMs, by the command line and over QUIC.

``MVM_TEST_ROUNDS`` and ``MVM_TEST_CLONES`` are how many rounds of sleep and how many clones together,
5 and 6 for the whole proof.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.drivers import netns
from mvm.wiring import open_client
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(600)]

ROUNDS = int(os.environ.get("MVM_TEST_ROUNDS", "2"))
CLONES = int(os.environ.get("MVM_TEST_CLONES", "3"))
CLOCK_S = 0.05
DAY_S = 86400
ASK_AGAIN_S = 2.0
TIMESTAMP = struct.Struct("!BBHHHIII")  # of ICMP: type, code, checksum, identifier, number, and three times
COUNTER = """
exec 3<>/root/held; echo kept >&3; rm /root/held; i=0
while :; do i=$((i + 1)); echo $i $$ >/run/count.new; mv /run/count.new /run/count; usleep 20000; done
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.mvm("tenant", "create", "acme")
        running.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
        running.mvm("pool", "build", "acme/web")
        yield running


@pytest.fixture
def emptied(stack: Stack) -> Iterator[Stack]:
    yield stack
    stack.mvm("instance", "destroy", "acme", "--all", "-y")
    assert not stack.vmms()
    assert not stack.taps()


def create(stack: Stack, count: int = 1, pool: str = "acme/web") -> list[str]:
    refs = [i["ref"] for i in stack.json("instance", "create", pool, "--count", str(count))]
    stack.mvm("instance", "start", *refs)
    return refs


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


def snapshot(stack: Stack, ref: str) -> Path:
    return stack.layout.snapshot(InstanceRef.parse(ref))


def wake(stack: Stack, ref: str) -> dict[str, Any]:
    """Over QUIC, from this process."""
    connection = json.loads(stack.layout.connection.read_text())
    agents = open_client(connection, stack.layout).agents
    return agents.call(connection["agent_address"], "instance.wake", {"ref": ref, "actor": "test"}, deadline_s=60)


def clock_error(stack: Stack, ref: str) -> float:
    """By how many seconds the guest's clock is off at most, as its kernel's quickest answer tells."""
    address, found = stack.json("instance", "info", ref)["guest_ip"], []
    with netns.entered(netns.path_of(json.loads(stack.layout.connection.read_text())["netns"])):
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with sock:
        sock.settimeout(ASK_AGAIN_S)

        def told_quickly() -> bool:
            before = time.time()
            sock.sendto(TIMESTAMP.pack(13, 0, 0xFFFF - 0x0D00 - len(found), 0, len(found), 0, 0, 0), (address, 0))
            with suppress(TimeoutError):
                reply = sock.recv(4096)[20:]
                after = time.time()
                if reply[0] == 14:
                    told = TIMESTAMP.unpack(reply)[6] / 1000  # since midnight
                    early, late = ((told - each % DAY_S + DAY_S / 2) % DAY_S - DAY_S / 2 for each in (after, before))
                    found.append((after - before, max(-early, late)))
            return len(found) > 7 and min(found)[0] < CLOCK_S / 2

        until(told_quickly, 60, "an answer came quickly")
    return min(found)[1]


def test_a_guest_goes_on_where_it_was_round_after_round(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    execute(stack, ref, f"setsid sh -c '{COUNTER}' </dev/null >/dev/null 2>&1 & ")
    until(lambda: execute(stack, ref, "cat /run/count || :"), 60, "it counts")
    count, pid = map(int, execute(stack, ref, "cat /run/count").split())
    for _ in range(ROUNDS):
        stack.mvm("instance", "sleep", ref)
        asleep = stack.json("instance", "info", ref)
        assert (asleep["status"], asleep["pid"]) == ("sleeping", None)
        assert not stack.vmms()
        assert not stack.taps()
        assert stack.mvm("instance", "wake", ref).strip() == ref
        assert clock_error(stack, ref) < CLOCK_S
        later, same, held = execute(stack, ref, f"cat /run/count; cat /proc/{pid}/fd/3").split()
        assert (int(same), held) == (pid, "kept")
        assert later.isdecimal()
        assert int(later) >= count
        again = execute(stack, ref, "usleep 100000; cat /run/count").split()
        assert int(again[0]) > int(later)
        count = int(again[0])
        assert stack.mvm("instance", "ssh", ref, "--", "hostname").strip() == ref.split("/")[2]
    assert not snapshot(stack, ref).exists()


def test_warm_and_awake_again_the_clock_is_right(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    pid = stack.json("instance", "info", ref)["pid"]
    stack.mvm("instance", "warm", ref)
    assert stack.json("instance", "info", ref)["status"] == "warm"
    stack.mvm("instance", "wake", ref)
    assert clock_error(stack, ref) < CLOCK_S
    stack.mvm("instance", "warm", ref)
    stack.mvm("instance", "sleep", ref)
    stack.mvm("instance", "start", ref)
    assert clock_error(stack, ref) < CLOCK_S
    assert stack.json("instance", "info", ref)["pid"] != pid
    stack.fails(4, "instance.invalid_transition", "instance", "wake", ref)


def test_clones_started_together_are_different_machines(emptied: Stack) -> None:
    stack = emptied
    refs = [i["ref"] for i in stack.json("instance", "create", "acme/web", "--count", str(CLONES))]
    stack.mvm("instance", "start", *refs, timeout_s=300)
    ask = (
        "cat /etc/machine-id; sha256sum </run/mvm/ssh/host_key; head -c 32 /dev/urandom | sha256sum; "
        "cat /sys/class/net/eth0/address; ip -4 addr show dev eth0 | awk '/inet/ {print $2}'; "
        "ping -c 1 -W 3 10.240.0.1 >/dev/null && echo reached"
    )
    answers = [[line.split()[0] for line in execute(stack, ref, ask).splitlines()] for ref in refs]
    for what, values in zip(
        ("machine id", "host key", "random", "MAC", "IP"), zip(*answers, strict=True), strict=False
    ):
        assert len(set(values)) == CLONES, what
    assert {answer[5] for answer in answers} == {"reached"}
    for ref in refs:  # with the host key pinned
        assert stack.mvm("instance", "ssh", ref, "--", "hostname").strip() == ref.split("/")[2]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_snapshot_is_refused_and_stays(emptied: Stack, damage: Callable[[Path], None]) -> None:
    stack, (ref,) = emptied, create(emptied)
    stack.mvm("instance", "sleep", ref)
    directory = snapshot(stack, ref)
    kept = shutil.copytree(directory, directory.with_name("kept"))
    for name in sorted(path.name for path in kept.iterdir()):
        damage(directory / name)
        error = stack.fails(1, "snapshot.damaged", "instance", "wake", ref)
        assert name in error["message"]
        assert "--force" in error["hint"]
        assert stack.statuses()[ref] == "sleeping"
        assert not stack.vmms()
        assert not stack.taps()
        shutil.copy2(kept / name, directory / name)
    shutil.rmtree(kept)
    stack.mvm("instance", "wake", ref)


def test_another_instances_snapshot_is_refused(emptied: Stack) -> None:
    stack, (one, other) = emptied, create(emptied, 2)
    stack.mvm("instance", "sleep", one, other)
    ours, theirs = snapshot(stack, one), snapshot(stack, other)
    ours.rename(ours.with_name("aside"))
    theirs.rename(ours)
    stack.fails(1, "snapshot.other_instance", "instance", "wake", one)
    stack.fails(3, "snapshot.not_found", "instance", "wake", other)
    ours.rename(theirs)
    ours.with_name("aside").rename(ours)
    stack.mvm("instance", "wake", one)
    stack.mvm("instance", "start", "--force", other)
    assert set(stack.statuses().values()) == {"running"}


def test_a_template_that_is_damaged_gone_or_another(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    stack.mvm("instance", "sleep", ref)
    (template,) = (stack.layout.templates / "acme" / "web").iterdir()
    kept = shutil.copytree(template, template.parents[2] / "kept")
    for name in sorted(path.name for path in kept.iterdir() if path.name != "devices"):  # which a delta has of its own
        flip(template / name)
        stack.fails(1, "snapshot.damaged", "instance", "wake", ref)
        shutil.copy2(kept / name, template / name)
    shutil.rmtree(kept)
    stack.mvm("instance", "wake", ref)
    stack.mvm("instance", "sleep", ref)

    shutil.rmtree(template)
    stack.fails(3, "snapshot.not_found", "instance", "wake", ref)
    create(stack)  # which makes the template anew
    stack.fails(1, "snapshot.other_base", "instance", "wake", ref)
    assert stack.statuses()[ref] == "sleeping"
    stack.mvm("instance", "start", "--force", ref)
    assert execute(stack, ref, "hostname") == ref.split("/")[2]


def test_a_damaged_template_is_no_reason_not_to_start(emptied: Stack) -> None:
    stack = emptied
    create(stack)
    stack.mvm("instance", "destroy", "acme", "--all", "-y")
    (template,) = (stack.layout.templates / "acme" / "web").iterdir()
    flip(template / "memory")
    ref, other = (i["ref"] for i in stack.json("instance", "create", "acme/web", "--count", "2"))
    done = stack.run("instance", "start", ref)
    assert f"note: {ref}: booted, as it could not be cloned: " in done.stderr
    assert execute(stack, ref, "hostname") == ref.split("/")[2]
    assert "note:" not in stack.run("instance", "start", other).stderr, "it is a clone of a new template"


def test_two_wakes_at_once_are_one_flight(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    stack.mvm("instance", "sleep", ref)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: wake(stack, ref), range(3)))
    assert len({answer["job_id"] for answer in answers}) == 1
    assert len(stack.vmms()) == 1
    assert stack.statuses()[ref] == "running"


def test_a_wake_overtakes_a_queued_start(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    stack.mvm("instance", "sleep", ref)
    with stack.frozen("worker"):
        job_id = stack.mvm("instance", "start", ref, "--no-wait").strip()
        assert wake(stack, ref)["status"] == "running"
    done = stack.run("job", "wait", job_id)
    assert done.returncode in (0, 4), done.stderr  # there was nothing left for it to do
    assert len(stack.vmms()) == 1
    assert stack.statuses()[ref] == "running"


def test_a_wake_needs_no_redis(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied)
    stack.mvm("instance", "sleep", ref)
    with stack.without("redis"):
        assert wake(stack, ref)["status"] == "running"
    assert stack.statuses()[ref] == "running"
