"""Who goes first on a node's processors."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import pytest

from mvm.drivers.locks import FileLocks
from mvm.services import precedence
from mvm.services.precedence import Precedence


@pytest.fixture
def locks(tmp_path: Path) -> FileLocks:
    return FileLocks(tmp_path)


def test_jobs_begin_after_the_last_urgent_wake(locks: FileLocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precedence, "_LET_PASS_S", 60)
    begun = Event()

    def job() -> None:
        Precedence(locks).given()  # a worker's
        begun.set()

    agent = Precedence(locks)
    worker = Thread(target=job)
    with agent.taken():
        with agent.taken():
            worker.start()
        assert not begun.wait(0.05)
    worker.join(30)
    assert begun.is_set()
    with agent.taken():
        pass


def test_a_stream_of_wakes_holds_nobody_up_for_ever(locks: FileLocks) -> None:
    with Precedence(locks).taken():
        Precedence(locks).given()


def test_another_agents_wakes_are_no_reason_to_wait(locks: FileLocks) -> None:
    with Precedence(locks).taken(), Precedence(locks).taken():
        pass
