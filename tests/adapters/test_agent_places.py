"""Threads of rooms: who has to wait, who is told to go, and that work in one room never waits for another's."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from mvm.agent import places
from mvm.agent.places import Threads
from mvm.domain.shares import Places
from mvm.errors import QuotaExceeded
from tests.support.waiting import until


class Work:
    """Work that lasts until it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.begun += 1
        self.go.wait(60)


def test_a_share_and_a_full_room_are_told_apart() -> None:
    threads, work = Threads(Places("streams", 3, 2)), Work()
    threads.submit("acme", work)
    with pytest.raises(QuotaExceeded) as caught:  # one more would leave too little
        [threads.submit("acme", work) for _ in range(2)]
    assert caught.value.code == "agent.share_used"
    threads.submit("other", work)
    with suppress(QuotaExceeded):
        threads.submit("third", work)
    with pytest.raises(QuotaExceeded) as caught:
        threads.submit("fourth", work)
    assert caught.value.code == "agent.busy"
    work.go.set()
    until(lambda: _free(threads), 60, "there is room again")
    threads.close()


def _free(threads: Threads) -> bool:
    try:
        threads.submit("acme", lambda: None)
    except QuotaExceeded:
        return False
    return True


def test_what_waits_is_done_in_turn_and_another_tenant_does_not_wait_for_it() -> None:
    threads, work, quick = Threads(Places("wakes", 4, 2, waiting=8)), Work(), threading.Event()
    for _ in range(8):
        threads.submit("acme", work)
    threads.submit("other", quick.set)
    assert quick.wait(60)
    assert work.begun <= 2
    work.go.set()
    until(lambda: work.begun == 8, 60, "all were done")
    threads.close()


@pytest.mark.parametrize("kind", [kind for kind in places.ALL if kind is not places.NODE], ids=lambda kind: kind.kind)
def test_all_that_one_tenant_asks_for_keeps_no_other_waiting(kind: Places) -> None:
    threads, work, quick = Threads(kind), Work(), threading.Event()
    with suppress(QuotaExceeded):
        for _ in range(2 * kind.count):
            threads.submit("acme", work)
    threads.submit("other", quick.set)
    assert quick.wait(20)
    work.go.set()
    threads.close()
