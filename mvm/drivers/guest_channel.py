"""The guest agent's channel: Unix sockets in the instance's directory, which its VMM listens on.

The protocol is described in `mvm.guest`.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.errors import Failed, InvalidInput, TimedOut, Unreachable
from mvm.ports.guest import ExecResult, GuestHello, GuestIdentity

_TURN_S = 0.01  # how often a taken port is tried again; the kernel tells nobody when a lock ends
_REPLY_GRACE_S = 5.0  # for a guest to end a late command and to send what it wrote
_LONGEST_COMMAND = 96 * 1024  # bytes; the guest's kernel takes 128 KiB as one argument
_BACKLOG = 16


def listen(directory: Path, port: str) -> socket.socket:
    """A listening socket for a guest port, for a VMM to inherit, and its lock file; replaces a former run's."""
    with _open_directory(directory) as fd:
        listener = socket.socket(socket.AF_UNIX)
        try:
            os.close(os.open(f"{port}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=fd))
            path = _path(fd, port)
            Path(path).unlink(missing_ok=True)
            listener.bind(path)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise Failed("vmm.start_failed", f"no socket in {directory}: {error.strerror}") from None
        return listener


class UnixGuestChannel:
    """`GuestChannel` over the sockets that `listen` made. Threads and processes take turns by a lock file per port."""

    def hello(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestHello:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            version, uptime, kernel = call.ask("hello", words=3)
            return GuestHello(int(version), float(uptime), kernel)

    def configure(self, ref: InstanceRef, directory: Path, identity: GuestIdentity, *, deadline_s: float) -> None:
        """See the port."""
        fields = {
            "hostname": identity.hostname,
            "address": identity.address,
            "gateway": identity.gateway,
            "epoch": str(round(identity.now.timestamp())),
            "host_key": _encode(identity.ssh_host_key),
            "authorized_key": _encode(identity.authorized_key.strip().encode()),
            "entropy": _encode(identity.entropy),
        }
        for name, value in fields.items():
            if not value.isascii() or not value.isprintable() or " " in value:
                raise InvalidInput("guest.invalid_identity", f"the guest's {name} cannot be sent", field=name)
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            done = call.ask("configure", *(f"{name}={value}" for name, value in fields.items()))
            if tuple(done) != guest.CONFIGURE_STEPS:
                raise call.refused(f"it did only: {' '.join(done)}")

    def ping(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> float:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            return float(call.ask("ping", words=1)[0])

    def execute(self, ref: InstanceRef, directory: Path, command: str, *, deadline_s: float) -> ExecResult:
        """See the port. Raises `InvalidInput` for a command that no shell can be given."""
        encoded = command.encode()
        if not encoded or b"\0" in encoded or len(encoded) > _LONGEST_COMMAND:
            raise InvalidInput(
                "guest.invalid_command", "the command is empty, too long, or holds a zero byte",
                hint=f"allowed: 1 to {_LONGEST_COMMAND} bytes", field="command",
            )  # fmt: skip
        with _Call(ref, directory, deadline_s, guest.EXEC) as call:
            seconds = max(call.left(), 0.1)
            call.extend(_REPLY_GRACE_S)
            code, truncated, out, err = call.send("exec", f"{seconds:.3f}", _encode(encoded), words=4)
            return ExecResult(int(code), _decode(out), _decode(err), truncated == "1")

    def shutdown(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            call.ask("shutdown")


class _Call:
    """One request to one of `ports`, whichever is free first, within a deadline."""

    def __init__(self, ref: InstanceRef, directory: Path, deadline_s: float, ports: Sequence[str]) -> None:
        self._ref = ref
        self._directory = directory
        self._ports = ports
        self._end = time.monotonic() + deadline_s
        self._socket = socket.socket(socket.AF_UNIX)
        self._lock = -1

    def __enter__(self) -> _Call:
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self._lock >= 0:
            os.close(self._lock)  # after the socket, so that the next one finds the port free

    def left(self) -> float:
        """Seconds until the deadline; raises `TimedOut` past it."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._silent()
        return left

    def extend(self, seconds: float) -> None:
        """Move the deadline."""
        self._end += seconds

    def ask(self, *request: str, words: int = 0) -> Sequence[str]:
        """Send a request whose reply begins with 0; returns the words after it, of which there must be `words`."""
        code, *reply = self.send(*request, words=1 + words)
        if code != "0":
            raise self.refused(" ".join(reply))
        return reply

    def send(self, *request: str, words: int) -> Sequence[str]:
        """Send a request and return the words of its reply after the id, at least `words` of them."""
        token = secrets.token_hex(8)
        try:
            self._socket.settimeout(self.left())
            self._socket.sendall(f"\n{token} {' '.join(request)} .\n".encode())
            for line in self._lines():
                first, *reply = line.split(" ")
                if first == token:
                    if len(reply) < words:
                        raise self.refused(f"unreadable reply to {request[0]}")
                    return reply
        except TimeoutError:
            raise self._silent() from None
        except ConnectionError:
            pass
        raise self._gone()

    def refused(self, words: str) -> Failed:
        """The error for a guest that answered, but not as it should."""
        return Failed(
            "guest.refused", f"the guest of {self._ref} refused: {words[:500]}",
            hint="its console may tell more: mvm instance logs", subject=str(self._ref),
        )  # fmt: skip

    def _lines(self) -> Iterator[str]:
        """Complete lines as they arrive, until the VMM closes the socket."""
        pieces: list[bytes] = []
        while data := self._receive():
            *complete, rest = data.split(b"\n")
            for line in complete:
                yield b"".join((*pieces, line)).decode("ascii", "replace")
                pieces.clear()
            pieces.append(rest)

    def _receive(self) -> bytes:
        self._socket.settimeout(self.left())
        return self._socket.recv(1 << 18)

    def _connect(self) -> None:
        try:
            with _open_directory(self._directory) as fd:
                port = self._take_turn(fd)
                # A blocking connect waits while the VMM has not yet dismissed clients that were killed.
                seconds, fraction = divmod(self.left(), 1)
                limit = struct.pack("@ll", int(seconds), int(fraction * 1e6))
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                self._socket.connect(_path(fd, port))
        except (FileNotFoundError, NotADirectoryError, ConnectionError):
            raise self._gone() from None
        except (TimeoutError, BlockingIOError):
            raise self._silent() from None

    def _take_turn(self, directory: int) -> str:
        """Lock the first free port; the lock ends with us, however we end."""
        while True:
            for port in self._ports:
                self._lock = os.open(f"{port}.lock", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return port
                except BlockingIOError:
                    os.close(self._lock)
                    self._lock = -1
            threading.Event().wait(min(_TURN_S, self.left()))

    def _gone(self) -> Unreachable:
        return Unreachable(
            "guest.gone", f"the VMM of {self._ref} does not run", hint="mvm instance info tells its status",
            subject=str(self._ref),
        )  # fmt: skip

    def _silent(self) -> TimedOut:
        return TimedOut(
            "guest.silent", f"the guest of {self._ref} did not answer in time",
            hint="its console may tell why: mvm instance logs", subject=str(self._ref),
        )  # fmt: skip


@contextmanager
def _open_directory(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _path(directory: int, port: str) -> str:
    """A socket's path by its directory's descriptor: the real one may exceed the 107 bytes that fit an address."""
    return f"/proc/self/fd/{directory}/{port}.sock"


def _encode(data: bytes) -> str:
    return b64encode(data).decode() or "-"


def _decode(word: str) -> bytes:
    return b"" if word == "-" else b64decode(word)
