"""Runs requests in threads and carries their answers back to the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from typing import Any, Protocol

import structlog

from mvm.agent import places
from mvm.agent.methods import Call, Method, accept
from mvm.agent.places import Threads
from mvm.drivers.quic.frames import encode
from mvm.drivers.quic.identity import Peer
from mvm.errors import Failed, InvalidInput, MvmError, Unreachable
from mvm.telemetry import metrics

log = structlog.get_logger(__name__)

UNSENT = 256 * 1024  # bytes that one answer may have waiting for the network


class Outlet(Protocol):
    """The sending side of one stream. Only the event loop's thread calls it."""

    def write(self, data: bytes, *, end: bool) -> None:
        """Queue bytes; `end` closes this side of the stream."""
        ...

    def unsent(self) -> int:
        """Bytes queued that have not left yet."""
        ...


class Abandoned(Exception):
    """Nobody waits for an answer any more, and what is at work for it ends with this. Nobody is told it."""


class Reply:
    """The answer to one request: its thread sends, the event loop writes, and either may end it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, outlet: Outlet, ended: Callable[[Reply], None]) -> None:
        self._loop = loop
        self._outlet = outlet
        self._ended = ended
        self._gone = False
        self._begun = False
        self._stopping = False
        self._room: Future[bool] | None = None
        self.ends_with_client = False  # whether what is at work for it must end as soon as its client has gone

    @property
    def gone(self) -> bool:
        """Whether nobody listens any more. From any thread."""
        return self._gone

    def check(self) -> None:
        """Raises `Abandoned` when nobody listens any more. From any thread."""
        if self._gone:
            raise Abandoned

    def send(self, frame: bytes) -> bool:
        """One part, from the request's thread; waits for room and is False when nobody listens any more."""
        room: Future[bool] = Future()
        return self._soon(self._write, frame, room) and room.result()

    def finish(self, frame: bytes) -> None:
        """The last part, from any thread; it may be empty."""
        self._soon(self._finish, frame)

    def cancel(self) -> None:
        """Nobody listens any more. From the event loop."""
        self._gone = True
        self.check_room()

    def stop(self) -> None:
        """End an answer that comes in parts with an error; one that has not begun may still come whole."""
        self._stopping = True
        if self._begun and not self._gone:
            self._outlet.write(error_frame(_stopping()), end=True)
            self.cancel()

    def check_room(self) -> None:
        """Let the thread go on when there is room. From the event loop, after it has sent something."""
        if self._room is not None and (self._gone or self._outlet.unsent() < UNSENT):
            room, self._room = self._room, None
            room.set_result(not self._gone)

    def _soon(self, function: Callable[..., None], *args: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the agent has stopped
            return False
        return True

    def _write(self, frame: bytes, room: Future[bool]) -> None:
        self._room = room
        if not self._gone:
            self._outlet.write(frame, end=False)
            self._begun = True
        if self._stopping:
            self.stop()
        self.check_room()

    def _finish(self, frame: bytes) -> None:
        if not self._gone:
            self._outlet.write(frame, end=True)
        self._ended(self)


class Dispatcher:
    """Accepts requests by the method table and runs them, each kind in places of its own."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = methods
        self._threads = {kind: Threads(kind) for kind in places.ALL}
        self.stopping = False

    def begin(self, peer: Peer, message: Mapping[str, Any], reply: Reply) -> None:
        """Start answering; what cannot start is answered with its error."""
        try:
            if self.stopping:
                raise _stopping()
            call = accept(self._methods, peer, message)
            reply.ends_with_client = call.method.takes in (places.COMMANDS, places.REPORTS)
            self._threads[call.method.takes].submit(call.tenant, lambda: _run(peer, call, reply))
        except MvmError as error:
            log.info("agent.request_refused", peer=str(peer), code=error.code)
            metrics.AGENT_REQUESTS.labels("-", "refused").inc()
            reply.finish(error_frame(error))

    def close(self) -> None:
        """Let the threads end; those at work are not waited for."""
        for threads in self._threads.values():
            threads.close()


def error_frame(error: MvmError) -> bytes:
    """The frame that tells `error`, whatever its fields hold."""
    try:
        return encode({"error": json.loads(json.dumps(error.to_dict(), default=str))})
    except InvalidInput:  # too long for a frame
        return encode({"error": MvmError(error.code, error.message[:4096]).to_dict()})


def _stopping() -> Unreachable:
    return Unreachable("agent.stopping", "this agent is stopping", hint="try again in a moment")


def _run(peer: Peer, call: Call, reply: Reply) -> None:
    outcome = "ok"
    held = b""  # the last part of a short answer leaves together with the stream's end
    try:
        with closing(call.run(reply.check)) as parts:
            for part in parts:
                if part is None:
                    heard = not reply.gone
                elif call.method.prompt:
                    heard = reply.send(_part_frame(part))
                else:
                    heard = not held or reply.send(held)
                    held = _part_frame(part)
                if not heard:
                    raise Abandoned
    except Abandoned:
        log.debug("agent.request_abandoned", peer=str(peer), method=call.name, request=call.id)
        outcome = "abandoned"
    except MvmError as error:
        held, outcome = error_frame(error), "failed"
        log.info("agent.request_failed", peer=str(peer), method=call.name, request=call.id, code=error.code)
    except Exception:  # a defect: the caller learns that there is one, the log learns which
        log.exception("agent.request_crashed", peer=str(peer), method=call.name, request=call.id)
        outcome = "crashed"
        held = error_frame(
            MvmError("internal", "the agent failed to answer", hint="its log has the details", request=call.id)
        )
    metrics.AGENT_REQUESTS.labels(call.name, outcome).inc()
    reply.finish(held)


def _part_frame(part: Mapping[str, Any]) -> bytes:
    try:
        return encode({"ok": dict(part)})
    except InvalidInput as error:
        raise Failed("agent.answer_too_large", f"the answer has {error.message}") from None
