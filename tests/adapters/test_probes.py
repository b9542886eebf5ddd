"""Parts that are asked on a busy machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvm.drivers.probes import Probes
from mvm.drivers.supervisor import PartState
from mvm.settings import load_settings
from tests.support.local import running
from tests.support.waiting import until

PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def answering_late(server: socket.socket, after_s: float, said: bytes) -> Iterator[None]:
    """A server that has each client wait."""
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                client, _ = server.accept()
            except OSError:
                return
            over.wait(after_s)
            client.sendall(said)
            client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of 14 on two processors."""
    monkeypatch.setattr(os, "getloadavg", lambda: (14.0, 14.0, 14.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_a_slow_part_of_a_busy_machine_is_slow_and_not_dead(load: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = load_settings(state_dir=str(tmp_path), netns="host", metrics_port=server.getsockname()[1])
        with answering_late(server, 3.2, PAGE):
            answer = Probes(settings).ask("metrics", {})
    assert answer.well
    assert (answer.note or "").startswith("slow: answered after 3.")


def test_a_dead_one_is_told_at_once(load: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answer = Probes(load_settings(state_dir=str(tmp_path), netns="host", metrics_port=port)).ask("metrics", {})
    assert (answer.well, answer.note) == (False, "Connection refused")


def test_one_that_was_stopped_is_told_at_once_by_what_the_kernel_says(load: None, tmp_path: Path) -> None:
    with running(["sleep", "600"], stdin=subprocess.DEVNULL) as process:
        os.kill(process.pid, signal.SIGSTOP)
        state = PartState("agent", "RUNNING", process.pid, None)
        stat = Path(f"/proc/{process.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 10, "it is stopped")
        answer = Probes(load_settings(state_dir=str(tmp_path), netns="host")).ask("agent", {"agent": state})
    assert (answer.well, answer.note) == (False, f"process {process.pid} was stopped by a signal")
