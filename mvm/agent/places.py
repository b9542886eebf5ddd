"""Threads for the agent's requests: places for each kind, so that no kind waits for another.

What is asked for in a hurry shares nothing with what may last: a node can always be asked how it is and to wake an
instance, however many follow logs or run commands there.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from mvm.domain.shares import Places, Refusal, refusal
from mvm.errors import QuotaExceeded

NODE = Places("node", 4, waiting=64)  # how the node is: an answer of one part, from memory and the store
WAKES = Places("wakes", 32, 16, waiting=128)
READS = Places("reads", 8, 4, waiting=128)  # answers from the store, of whatever length
REPORTS = Places("reports", 8, 4, waiting=8)  # what takes a while and has an end
COMMANDS = Places("commands", 64, 32)  # these and the next: fewer than connections may be
STREAMS = Places("streams", 64, 32)  # what goes on until its client goes
ALL = (NODE, WAKES, READS, REPORTS, COMMANDS, STREAMS)


@dataclass(frozen=True, slots=True)
class _Piece:
    tenant: str
    work: Callable[[], None]


class Threads:
    """Daemon threads for one kind of work.

    There are only as many as were ever busy at once: a thread's first request also opens its way to the store.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._held: Counter[str] = Counter()
        self._queue: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._started = 0
        self._free = 0
        self._closed = False

    def submit(self, tenant: str, work: Callable[[], None]) -> None:
        """Have `work` done for `tenant`, "" for nobody's. Raises `QuotaExceeded`."""
        with self._changed:
            self._check(tenant)
            self._queue.append(_Piece(tenant, work))
            if self._free >= len(self._queue) or self._started == self._places.count:
                self._changed.notify()
                return
            name = f"agent-{self._places.kind}-{self._started}"
            self._started += 1
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def close(self) -> None:
        """Let the threads end; those at work are not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check(self, tenant: str) -> None:
        queued = Counter(piece.tenant for piece in self._queue)
        why = refusal(self._places, self._held + queued, tenant)
        if why is None or queued[tenant] < self._places.waiting:
            return
        taken = self._held[tenant] + queued[tenant]
        if why is Refusal.SHARE and tenant:
            raise QuotaExceeded(
                "agent.share_used", f"tenant {tenant} has {taken} {self._places.kind} here, which is its share",
                hint="end one of them, or try again in a moment", tenant=tenant, kind=self._places.kind, taken=taken,
            )  # fmt: skip
        raise QuotaExceeded(
            "agent.busy", f"this agent has {self._held.total() + len(self._queue)} {self._places.kind}",
            hint="try again in a moment", kind=self._places.kind,
        )  # fmt: skip

    def _serve(self) -> None:
        while (piece := self._next()) is not None:
            try:
                piece.work()
            finally:
                with self._changed:
                    self._held[piece.tenant] -= 1

    def _next(self) -> _Piece | None:
        """Wait for a piece of work that may begin; None when there will be none."""
        with self._changed:
            while (piece := self._first()) is None:
                if self._closed:
                    return None
                self._free += 1
                self._changed.wait()
                self._free -= 1
            self._queue.remove(piece)
            self._held[piece.tenant] += 1
            self._changed.notify()  # the place that was given back may be for more than one
            return piece

    def _first(self) -> _Piece | None:
        return next((each for each in self._queue if refusal(self._places, self._held, each.tenant) is None), None)
