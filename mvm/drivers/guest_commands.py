"""Commands in a guest, over one of its exec ports. The protocol is described in `mvm.guest`.

Whoever takes the parts of a command may stop doing so at any time: closing the generator hangs up, and a guest whose
host has hung up ends the command. A part comes at least every `_IDLE_S`, whatever the guest says.
"""

from __future__ import annotations

import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from mvm import guest
from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart
from mvm.domain.ids import InstanceRef
from mvm.domain.refusals import guest_gone, guest_refused, guest_silent
from mvm.drivers.guest_hearing import Bounds, Effort, Hearing
from mvm.drivers.instance_sockets import Connection, NoTurn
from mvm.errors import InvalidInput, MvmError, TimedOut

_IDLE_S = 0.2  # so long a part may take; how soon somebody who has gone is noticed
_OLD_GRACE_S = 5.0  # for an older guest to end a late command and to send what it wrote
_LONGEST_COMMAND = 96 * 1024  # bytes; the guest's kernel takes 128 KiB as one argument
_BEFORE = Bounds(4 << 20, 1 << 16, 0)  # of what others were told, before the reply begins; it may be any bytes
_OLDER = Bounds(4 << 20, 1 << 16, 256)  # of an older guest's reply, with such a rest
_OLDER_WORDS = 4
_ASKED_ELSE = b" "  # what follows the request's id in a reply of words
_LETTERS = [chr(97 + (byte >> 4)) + chr(97 + (byte & 15)) for byte in range(256)]


def run(ref: InstanceRef, directory: Path, command: bytes, *, deadline_s: float) -> Generator[ExecPart, None, None]:
    """`command` by the guest's shell, as `mvm.ports.guest.GuestChannel.run` promises."""
    if not command or b"\0" in command or len(command) > _LONGEST_COMMAND:
        raise InvalidInput(
            "guest.invalid_command", "the command is empty, too long, or holds a zero byte",
            hint=f"allowed: 1 to {_LONGEST_COMMAND} bytes", field="command",
        )  # fmt: skip
    return _Run(ref, directory, command, time.monotonic() + deadline_s).parts()


@dataclass(frozen=True, slots=True)
class _Frame:
    kind: bytes
    payload: bytes


class _Run:
    """One command, until the monotonic time `end`."""

    def __init__(self, ref: InstanceRef, directory: Path, command: bytes, end: float) -> None:
        self._ref = ref
        self._directory = directory
        self._command = command
        self._end = end
        self._begun = False

    def parts(self) -> Generator[ExecPart, None, None]:
        connection = yield from self._connected()
        with closing(connection):
            try:
                token = secrets.token_hex(guest.TOKEN_BYTES // 2).encode()
                letters = "".join(_LETTERS[byte] for byte in self._command).encode()
                self._send(connection, b"\n" + token + b" run " + letters + b" .\n")
                ended = yield from self._follow(connection, token)
            except ConnectionError:
                raise guest_gone(self._ref) from None
        yield ended  # once we have hung up, and the guest ends what is left to end

    def _connected(self) -> Generator[ExecPart, None, Connection]:
        while True:
            try:
                return Connection(self._directory, guest.EXEC, min(time.monotonic() + _IDLE_S, self._end))
            except NoTurn:
                if time.monotonic() >= self._end:
                    raise self._busy() from None
            except TimeoutError:
                if time.monotonic() >= self._end:
                    raise guest_silent(self._ref) from None
            except ConnectionError:
                raise guest_gone(self._ref) from None
            yield ExecOutput()

    def _send(self, connection: Connection, request: bytes) -> None:
        connection.socket.settimeout(max(self._end - time.monotonic(), 0.001))
        try:
            connection.socket.sendall(request)
        except TimeoutError:
            raise guest_silent(self._ref) from None

    def _follow(self, connection: Connection, token: bytes) -> Generator[ExecPart, None, ExecEnd]:
        reader = _Frames(token, Hearing(self._ref, _BEFORE))
        for data in self._pieces(connection, self._end):
            if not data:
                yield ExecOutput()
                continue
            try:
                frames = reader.feed(data)
            except ValueError as error:
                raise guest_refused(self._ref, str(error)) from None
            for kind, group in groupby(frames, attrgetter("kind")):
                if kind == _ASKED_ELSE:
                    return (yield from self._ask_older(connection))
                part = self._part(kind, [frame.payload for frame in group])
                if isinstance(part, ExecEnd):
                    return part
                if part is not None:
                    yield part
        if not self._begun:
            raise guest_silent(self._ref)
        return ExecEnd(guest.DEADLINE_EXIT, timed_out=True)

    def _pieces(self, connection: Connection, end: float) -> Iterator[bytes]:
        """What comes until `end`; every `_IDLE_S` an empty one, whatever comes: somebody may have gone."""
        effort = Effort()
        told = time.monotonic()
        while (now := time.monotonic()) < end:
            if now - told >= _IDLE_S:
                told = now
                yield b""
            effort.rest()
            data = self._receive(connection, min(end, told + _IDLE_S))
            if data:
                yield data

    def _receive(self, connection: Connection, end: float) -> bytes:
        """What came by `end`, if anything did."""
        connection.socket.settimeout(max(end - time.monotonic(), 0.001))
        try:
            data = connection.socket.recv(1 << 16)
        except TimeoutError:
            return b""
        if not data:
            raise ConnectionError
        return data

    def _part(self, kind: bytes, payloads: Sequence[bytes]) -> ExecPart | None:
        """What frames of one kind, one after the other, are together."""
        first = payloads[0]
        match kind:
            case guest.BEGUN if not self._begun and len(payloads) == 1:
                self._begun = True
                return None
            case guest.STDOUT:
                return ExecOutput(stdout=b"".join(payloads))
            case guest.STDERR:
                return ExecOutput(stderr=b"".join(payloads))
            case guest.ENDED if len(first) == guest.STATUS.size:
                return ExecEnd(_exit_code(*guest.STATUS.unpack(first)))
            case guest.FAILED if len(first) == guest.STATUS.size:
                raise guest_refused(self._ref, f"no process for a command, error {guest.STATUS.unpack(first)[0]}")
        raise guest_refused(self._ref, "a reply of no known kind")

    def _ask_older(self, connection: Connection) -> Generator[ExecPart, None, ExecEnd]:
        token = secrets.token_hex(4).encode()
        seconds = max(self._end - time.monotonic(), 0.1)
        encoded = b64encode(self._command)
        self._send(connection, b"\n" + token + f" exec {seconds:.3f} ".encode() + encoded + b" .\n")
        hearing = Hearing(self._ref, _OLDER)
        for data in self._pieces(connection, self._end + _OLD_GRACE_S):
            if not data:
                yield ExecOutput()
                continue
            for line in hearing.lines(hearing.read(data)):
                first, *words = line.split(b" ", 1 + _OLDER_WORDS)
                if first == token:
                    return (yield from self._older_parts(words))
        raise guest_silent(self._ref)

    def _older_parts(self, words: list[bytes]) -> Generator[ExecPart, None, ExecEnd]:
        try:
            code, truncated, out, err = words
            exit_code = int(code)
            output = ExecOutput(_decoded(out), _decoded(err))
        except ValueError:
            raise guest_refused(self._ref, "unreadable reply to exec") from None
        yield output
        timed_out = exit_code == guest.DEADLINE_EXIT and time.monotonic() >= self._end
        return ExecEnd(exit_code, truncated == b"1", timed_out)

    def _busy(self) -> MvmError:
        return TimedOut(
            "guest.busy", f"{len(guest.EXEC)} commands run in {self._ref}, which is all it takes at once",
            hint="wait for one of them to end, or end one: Ctrl-C", subject=str(self._ref),
        )  # fmt: skip


class _Frames:
    """Cuts what comes after the request's id first appears; what comes before is another request's."""

    def __init__(self, token: bytes, before: Hearing) -> None:
        self._token = token
        self._before = before
        self._buffer = bytearray()
        self._found = False

    def feed(self, data: bytes) -> list[_Frame]:
        """The frames that `data` completes, or one of `_ASKED_ELSE`. Raises `ValueError` for what cannot be one."""
        if not self._found:
            self._before.read(data)
        self._buffer += data
        if not self._found and not self._find():
            return []
        frames: list[_Frame] = []
        while len(self._buffer) > guest.TOKEN_BYTES:
            kind = bytes(self._buffer[guest.TOKEN_BYTES : guest.TOKEN_BYTES + 1])
            if kind == _ASKED_ELSE:
                return [*frames, _Frame(kind, b"")]
            if len(self._buffer) < guest.FRAME.size:
                break
            token, kind, size = guest.FRAME.unpack_from(self._buffer)
            end = guest.FRAME.size + size
            if token != self._token or end > guest.FRAME_LIMIT or (not size and kind in (guest.STDOUT, guest.STDERR)):
                raise ValueError("an unreadable reply to run")
            if len(self._buffer) < end:
                break
            frames.append(_Frame(kind, bytes(self._buffer[guest.FRAME.size : end])))
            del self._buffer[:end]
        return frames

    def _find(self) -> bool:
        at = self._buffer.find(self._token)
        self._found = at >= 0
        skipped = at if self._found else max(len(self._buffer) - guest.TOKEN_BYTES + 1, 0)
        del self._buffer[:skipped]
        return self._found


def _exit_code(status: int) -> int:
    """As a shell tells it: 128 and the signal's number for what a signal ended."""
    signal = status & 0x7F
    return 128 + signal if signal else status >> 8 & 0xFF


def _decoded(word: bytes) -> bytes:
    return b"" if word == b"-" else b64decode(word)
