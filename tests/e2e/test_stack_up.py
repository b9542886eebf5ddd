"""``mvm up`` in the foreground with all its parts: every one answers, comes back when it dies, and goes in order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.layout import StateLayout
from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Supervisor
from tests.support.local import alive, free_port, running
from tests.support.waiting import until

pytestmark = pytest.mark.redis
MVM = [sys.executable, "-c", "from mvm.cli.main import main; main()"]


@pytest.fixture
def env() -> Iterator[dict[str, str]]:
    root = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    ports = {f"MVM_{name}_PORT": str(free_port()) for name in ("FLOWER", "METRICS", "AGENT")}
    yield {**os.environ, **ports, "MVM_STATE_DIR": str(root / "s"), "MVM_NETNS": "host", "MVM_DRIVER": "fake"}
    Supervisor(StateLayout(root / "s"), LocalShell()).stop()
    shutil.rmtree(root)


def status(env: dict[str, str]) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([*MVM, "status", "-o", "json"], env=env, capture_output=True, check=False)
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)}


def test_the_whole_stack(env: dict[str, str]) -> None:
    layout = StateLayout(Path(env["MVM_STATE_DIR"]))
    supervisor = Supervisor(layout, LocalShell())
    with running([*MVM, "up"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as up:
        until(lambda: layout.connection.exists() or up.poll() is not None, 100, "mvm up is ready")
        code, parts = status(env)
        assert code == 0, parts
        assert list(parts) == ["redis", "worker", "urgent", "beat", "agent", "flower", "metrics"]
        assert all(part["answers"] and part["pid"] and part["since"] for part in parts.values())

        again = subprocess.run([*MVM, "up"], env=env, capture_output=True, check=False)
        assert again.returncode == 4
        assert b"error[stack.already_up]" in again.stderr

        os.kill(parts["worker"]["pid"], signal.SIGKILL)
        until(lambda: status(env)[0] == 0, 60, "the worker is back")
        assert status(env)[1]["worker"]["pid"] != parts["worker"]["pid"]

        members = supervisor.pids()
        up.terminate()
        up.communicate(timeout=60)
    assert up.returncode == 0
    assert not any(map(alive, members))
    assert status(env)[0] == 6
