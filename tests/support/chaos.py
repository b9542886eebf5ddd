"""Killing the parts of a real stack, again and again, by their pids."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic

from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Supervisor
from mvm.errors import MvmError, Unreachable
from tests.support.stack import Stack


def seed(name: str) -> random.Random:
    """Another one each time, and told; ``MVM_TEST_SEED`` names one."""
    number = int(os.environ.get("MVM_TEST_SEED", random.randrange(1 << 32)))
    print(f"{name}: MVM_TEST_SEED={number}")
    return random.Random(number)


class Killer:
    """Kills parts with SIGKILL; the supervisor brings them back. `kills` counts them."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._supervisor = Supervisor(stack.layout, LocalShell())
        self._ready: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()

    def kill(self, part: str) -> bool:
        """Whether it was there to be killed."""
        try:
            found = self._supervisor.parts().get(part)
        except Unreachable:
            return False
        if found is None or found.pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)
            self.kills[part] += 1
            return True
        return False

    def kill_ready(self, worker: str) -> bool:
        """Kill a worker that has come up since it was killed last, and has ended a job since.

        A machine on which it takes longer to come up than to be killed again would never get anything done.
        """
        log = (self._stack.layout.logs / f"{worker}.log").read_text(errors="replace")
        lives = log.split(" ready.")
        if len(lives) <= self._ready[worker] + 1 or '"event": "succeeded"' not in lives[-1] or not self.kill(worker):
            return False
        self._ready[worker] = len(lives) - 1
        return True

    @contextmanager
    def every(self, seconds: float, strike: Callable[[], object]) -> Iterator[None]:
        """Within the block `strike` is called at this pace."""
        ended, failed = threading.Event(), []

        def run() -> None:
            try:
                while not ended.wait(seconds):
                    strike()
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=run, name="killer")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        assert not failed, failed

    def told(self) -> str:
        """What was killed how often."""
        return ", ".join(f"{part} {count} times" for part, count in sorted(self.kills.items())) or "nothing"


def asked(ask: Callable[[], int], otherwise: int) -> int:
    """What `ask` says; `otherwise` while nobody answers it."""
    try:
        return ask()
    except MvmError:
        return otherwise


def percentile(values: Sequence[float], part: float) -> float:
    """The value that this part of `values` does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def pause(seconds: float) -> Callable[[], bool]:
    """A condition that comes true after `seconds`."""
    end = monotonic() + seconds
    return lambda: monotonic() >= end
