"""QEMU's machine protocol: one short connection per operation."""

from __future__ import annotations

import array
import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvm.domain.ids import InstanceRef
from mvm.drivers.instance_sockets import Connection, remaining
from mvm.errors import Failed, TimedOut, Unreachable

MONITOR = "monitor"
_MOST_BYTES = 4 << 20  # on one connection
_NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'


class CommandFailed(Exception):
    """QEMU's own words for why it did not do something. It stays in this package."""


class Qmp:
    """A connection to the monitor of the VMM of `ref`, to be used in ``with``; everything within `deadline_s`.

    Raises `Unreachable` (``vmm.gone``) when the VMM has ended, and `TimedOut` (``vmm.silent``).
    """

    def __init__(self, ref: InstanceRef, directory: Path, deadline_s: float) -> None:
        self._ref = ref
        self._directory = directory
        self._end = time.monotonic() + deadline_s
        self._received, self._heard = b"", 0
        self._events: list[dict[str, Any]] = []
        self._version: str | None = None

    def __enter__(self) -> Qmp:
        try:
            self._connection = Connection(self._directory, (MONITOR,), self._end)
        except TimeoutError:
            raise self._silent() from None
        except ConnectionError:
            raise self._gone() from None
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def extend(self, seconds: float) -> None:
        """Everything else within `seconds` from now, if there is less time."""
        self._end = max(self._end, time.monotonic() + seconds)

    def hello(self) -> str:
        """QEMU's version; it answers, so it has come up."""
        if self._version is None:
            self._send(_NEGOTIATE, ())
            self._version = self._greeted()
        return self._version

    def run(self, command: str, fds: Sequence[int] = (), **arguments: object) -> Any:
        """Run `command`, with descriptors `fds` for it; underscores in `arguments` are hyphens there."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): it for name, it in arguments.items()}
        data = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        if self._version is not None:
            self._send(data, fds)
        else:  # in one go: nobody waits for the greeting, and QEMU reads byte by byte
            self._send(_NEGOTIATE + data, fds)
            self._version = self._greeted()
        return self._returned()

    def _greeted(self) -> str:
        try:
            version = self._next("QMP")["QMP"]["version"]
            qemu = version["qemu"]
            named = f"{qemu['major']}.{qemu['minor']}.{qemu['micro']} {version['package']}".strip()
        except (KeyError, TypeError):
            raise self._babbles() from None
        self._returned()
        return named

    def _returned(self) -> Any:
        reply = self._next("return", "error")
        if "error" in reply:
            raise CommandFailed(reply["error"]["desc"])
        return reply["return"]

    def wait(self, event: str, **data: Sequence[object]) -> dict[str, Any]:
        """Wait for an `event` each of whose `data` has one of the given values; returns its data."""
        while True:
            while self._events:
                found = self._events.pop(0)
                told: dict[str, Any] = found.get("data", {})
                if found["event"] == event and all(told.get(name) in values for name, values in data.items()):
                    return told
            self._events.append(self._next("event"))

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        sock = self._connection.socket
        try:
            sock.settimeout(remaining(self._end))
            if fds:
                sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            else:
                sock.sendall(data)
        except TimeoutError:
            raise self._silent() from None
        except ConnectionError:
            raise self._gone() from None

    def _next(self, *keys: str) -> dict[str, Any]:
        """The next message with one of `keys`; events meanwhile are kept."""
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if not newline:
                self._receive()
                continue
            self._received = rest
            try:
                message: Any = json.loads(line)
            except (ValueError, RecursionError):
                raise self._babbles() from None
            if not isinstance(message, dict):
                raise self._babbles()
            if any(key in message for key in keys):
                return message
            if "event" in message:
                self._events.append(message)

    def _receive(self) -> None:
        try:
            self._connection.socket.settimeout(remaining(self._end))
            data = self._connection.socket.recv(1 << 16)
        except TimeoutError:
            raise self._silent() from None
        except ConnectionError:
            data = b""
        if not data:
            raise self._gone()
        self._received += data
        self._heard += len(data)
        if self._heard > _MOST_BYTES:
            raise self._babbles()

    def _babbles(self) -> Failed:
        return Failed(
            "vmm.failed", f"the VMM of {self._ref} does not speak QMP",
            hint=f"to end it: mvm instance stop --force {self._ref}", subject=str(self._ref),
        )  # fmt: skip

    def _gone(self) -> Unreachable:
        return Unreachable(
            "vmm.gone", f"the VMM of {self._ref} does not run", hint=f"see: mvm instance info {self._ref}",
            subject=str(self._ref),
        )  # fmt: skip

    def _silent(self) -> TimedOut:
        return TimedOut(
            "vmm.silent", f"the VMM of {self._ref} does not answer",
            hint=f"is the host overloaded? try again; if it hangs: mvm instance stop --force {self._ref}",
            subject=str(self._ref),
        )  # fmt: skip
