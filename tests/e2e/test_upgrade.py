"""What 6e69ba5 left comes up under this mvm, its guests untouched."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import old_state
from tests.support.reach import Reached, reaching
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
OLD = "6e69ba5"
PATIENCE_S = 120.0

pytestmark = [pytest.mark.redis, pytest.mark.timeout(900)]


def test_a_state_directory_of_6e69ba5_comes_up_and_its_guests_are_untouched() -> None:
    """On the fake host, whose guests are in the state directory."""

    def before(stack: Stack) -> None:
        old_state.unpack(stack.layout.root)

    with running_stack("fake", before=before, MVM_NETNS="host") as stack:
        found = {row["ref"]: (row["status"], row["pid"]) for row in stack.json("instance", "list")}
        assert found == old_state.PROCESSES
        woken = next(ref for ref, (status, _) in old_state.PROCESSES.items() if status == "sleeping")
        stack.mvm("instance", "wake", woken)
        assert stack.statuses()[woken] == "running"
        assert stack.mvm("audit", "verify", "acme").split()[1] == "whole"
        assert stack.fails(4, "tenant.exists", "tenant", "create", "acme")
        assert stack.json("tenant", "create", "new")["net_id"] == 2, "a net id is never given twice"


def old_code(into: Path) -> Path:
    """The mvm of that commit."""
    archive = subprocess.run(
        ["git", "-c", "safe.directory=*", "archive", OLD, "mvm", "workers", "beat"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    assert archive.returncode == 0, f"a clone with its history is needed: {archive.stderr.decode()}"
    into.mkdir()
    subprocess.run(["tar", "-x", "-C", str(into)], input=archive.stdout, check=True)
    return into


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


class OldNode:
    """Real guests that 6e69ba5 started: two running, one warm, one asleep; the new mvm has ended its stack.

    From before that until `held` is closed, those that run are reached by ping and ssh all the time.
    """

    def __init__(self, code: Path, held: ExitStack) -> None:
        self._code = code
        self._held = held
        self.refs: list[str] = []
        self.vmms: set[int] = set()
        self.reached: Reached

    def __call__(self, stack: Stack) -> None:
        old = Stack(stack.layout, stack.env | {"PYTHONPATH": str(self._code)}, old_code(self._code))
        old.mvm("up", "--detach")
        old.mvm("tenant", "create", "acme")
        pool = ("acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--data-disk", "16")
        old.mvm("pool", "create", *pool)
        old.mvm("pool", "build", "acme/web")
        self.refs = [i["ref"] for i in old.json("instance", "create", "acme/web", "--count", "4")]
        for ref in self.refs:  # one after the other, on however slow a machine
            old.mvm("instance", "start", ref)
        for ref in self.refs:
            execute(old, ref, "echo old >/data/f; echo $$ >/run/kept")
        old.mvm("instance", "warm", self.refs[2])
        old.mvm("instance", "sleep", self.refs[3])
        self.vmms = set(stack.vmms())
        rows = old.json("instance", "list")  # by their names, not as they were made
        running = [(row["ref"], row["guest_ip"]) for row in rows if row["status"] == "running"]
        assert {ref for ref, _ in running} == set(self.refs[:2])
        for ref, _ in running:
            old.mvm("instance", "ssh", ref, "true")  # which writes down its host key
        namespace = json.loads(stack.layout.connection.read_text())["netns"]
        self.reached = self._held.enter_context(reaching(namespace, stack.layout, running))
        until(lambda: self.reached.logins > 1 and self.reached.pings > 1, PATIENCE_S, "they can be reached at all")
        stack.mvm("down")  # its own would take the guests' network along


@pytest.mark.root
@pytest.mark.guest
def test_guests_of_6e69ba5_go_on_under_the_new_stack(tmp_path: Path) -> None:
    held = ExitStack()
    node = OldNode(tmp_path / "old", held)
    with held, running_stack(before=node) as stack:
        one, two, warm, asleep = node.refs
        assert stack.statuses() == {one: "running", two: "running", warm: "warm", asleep: "sleeping"}
        assert set(stack.vmms()) == node.vmms
        for ref in (one, two):
            assert execute(stack, ref, "cat /data/f") == "old"
            assert stack.mvm("instance", "ssh", ref, "--", "cat", "/data/f").strip() == "old"
        count = node.reached.logins
        until(lambda: node.reached.failures or node.reached.logins > count + 2, PATIENCE_S, "logins under the new one")
        held.close()
        assert not node.reached.failures, node.reached.failures
        assert stack.json("net", "verify", "--active")["clean"]
        for ref in (warm, asleep):
            stack.mvm("instance", "wake", ref)
            assert execute(stack, ref, "test -s /run/kept; cat /data/f") == "old"
        assert set(stack.vmms()) >= node.vmms
        assert stack.mvm("audit", "verify", "acme").split()[1] == "whole"
