"""Pieces of work that stand still between two steps, and can be killed there.

Each runs in a thread of its own, but only one thread of a simulation ever runs: a baton goes between the scheduler and
the actor that it lets go on. So the order of everything is the scheduler's, and a run repeats exactly.
"""

from __future__ import annotations

import contextvars
import threading
from _thread import allocate_lock
from collections.abc import Callable
from datetime import UTC, datetime

from mvm.domain.instance import Instance
from mvm.errors import MvmError


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs after it."""


class _Thread:
    """A thread that runs one thing after another; threads are dear, so they are kept for the next actor."""

    idle: list[_Thread] = []  # noqa: RUF012 - one list for all

    def __init__(self) -> None:
        self.go, self.back = allocate_lock(), allocate_lock()
        self.go.acquire()
        self.back.acquire()
        self.work: Callable[[], None] = lambda: None
        threading.Thread(target=self._serve, name="actor", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.go.acquire()
            contextvars.copy_context().run(self.work)
            self.back.release()


class Actor:
    """One piece of work of a process. `verb` and `subject` are its job's; `error` what it ended with."""

    def __init__(self, process: Process, name: str, work: Callable[[], object]) -> None:
        self.process = process
        self.name = name
        self.verb = ""
        self.subject = ""
        self.forced = False
        """Its job does not wait for a guest, or is given up and undone."""
        self.has_resumed = False
        self.late = False
        """It began when the record of its job was final already."""
        self.began = datetime.max.replace(tzinfo=UTC)
        self.spare: list[Instance] = []
        """What could have been started when it made more."""
        self.misled = False
        """What it saw in the registry, or put there, was lost while it was at work."""
        self.at = "its begin"
        self.calls = 0
        self.left: int | None = None
        self.waits_for: Callable[[], bool] | None = None
        self.alone = self.doomed = self.done = False
        self.result: object = None
        self.error: BaseException | None = None
        self.then: Callable[[], None] = lambda: None
        self._work = work
        self._thread: _Thread | None = None
        process.actors.append(self)

    @property
    def runnable(self) -> bool:
        """Whether it would go on, if it were let."""
        return not self.done and (self.waits_for is None or self.doomed or self.waits_for())

    def step(self, calls: int | None, *, alone: bool = False) -> None:
        """Let it make `calls` more calls of its ports (None: as many as it will), until it waits or ends.

        One that is `alone` at work has nobody to wait for, so it needs no thread of its own.
        """
        thread = self._thread
        if thread is None and calls is None and alone:
            self.alone = True
            self._run()
            self._end()
            return
        if thread is None:
            thread = self._thread = _Thread.idle.pop() if _Thread.idle else _Thread()
            thread.work = self._run
        self.left = calls
        thread.go.release()
        thread.back.acquire()
        if self.done:
            self._thread = None
            _Thread.idle.append(thread)
            self._end()

    def _end(self) -> None:
        self.process.actors.remove(self)
        if self.error is None or isinstance(self.error, MvmError):
            self.then()

    def call(self, point: str) -> None:
        """It is about to call `point`: here it may stand still, or die."""
        if self.doomed:
            raise Killed
        if self.left is not None:
            if self.left <= 0:
                self.at = point
                self.pause()
            if self.left is not None:
                self.left -= 1
        self.calls += 1

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Stand still until that is so."""
        self.waits_for, self.at = until, what
        while not until():
            self.pause()
        self.waits_for = None

    def pause(self) -> None:
        """The scheduler has the baton."""
        thread = self._thread
        assert thread is not None
        thread.back.release()
        thread.go.acquire()
        if self.doomed:
            raise Killed

    def kill(self) -> None:
        """It ends where it stands."""
        self.doomed = True
        if self._thread is None:  # not begun
            self.done = True
            self.process.actors.remove(self)
            return
        self.step(None)

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the scheduler has to know
            self.error = error
        self.done = True


class Process:
    """What dies as one: a worker, the agent, Beat, somebody's command."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.up = True
        self.actors: list[Actor] = []

    def kill(self) -> list[Actor]:
        """All of it ends; returns what was at work."""
        self.up = False
        killed = list(self.actors)
        for actor in killed:
            actor.kill()
        return killed
