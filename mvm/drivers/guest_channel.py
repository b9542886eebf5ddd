"""The guest agent's channel: Unix sockets in the instance's directory, which its VMM listens on.

The protocol is described in `mvm.guest`.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime
from ipaddress import IPv4Address
from pathlib import Path

from mvm import guest
from mvm.domain.commands import ExecPart, ExecResult, collected
from mvm.domain.ids import InstanceRef
from mvm.domain.refusals import guest_gone, guest_refused, guest_silent
from mvm.drivers import guest_commands
from mvm.drivers.guest_hearing import Bounds, Hearing
from mvm.drivers.instance_sockets import Connection, remaining
from mvm.errors import InvalidInput
from mvm.ports.guest import GuestHello, GuestIdentity, GuestStatus, Worker

_PLAIN = (string.ascii_letters + "+-./:;=@^_,~").encode()  # they mean themselves, also after an octal
_CLOCK_S, _CLOCK_TRIES = 0.01, 4
_HUGE = 1e18
_BOUNDS = Bounds(64 << 10, 2048, 256)  # of one call, with what was left over from replies that nobody waited for


class UnixGuestChannel:
    """`GuestChannel` over the sockets that `listen` made. Threads and processes take turns by a lock file per port."""

    def hello(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestHello:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            version, uptime, kernel = call.ask("hello", words=3)
            return GuestHello(_count(version), _number(uptime), kernel)

    def configure(self, ref: InstanceRef, directory: Path, identity: GuestIdentity, *, deadline_s: float) -> None:
        """See the port."""
        began = time.monotonic()
        address, _, prefix = identity.address.partition("/")
        fields = {
            "hostname": identity.hostname,
            "machine_id": identity.machine_id,
            "mac": identity.mac,
            "address": address,
            "netmask": str(IPv4Address(0xFFFFFFFF << 32 - int(prefix) & 0xFFFFFFFF)),
            "gateway": identity.gateway,
            "data": "1" if identity.data_disk else "0",
            "secrets": "1" if identity.secrets else "0",
            "host_key": _escaped(identity.ssh_host_key),
            "authorized_key": _escaped(identity.authorized_key.strip().encode()),
        }
        for name, value in fields.items():
            if not value.isascii() or not value.isprintable() or " " in value:
                raise InvalidInput("guest.invalid_identity", f"the guest's {name} cannot be sent", field=name)
        end = began + deadline_s
        with _Call(ref, directory, deadline_s, (guest.CLOCK,)) as call:
            call.set_moment(identity.now, began, identity.entropy, guest.CONFIGURE_STEPS)
        with _Call(ref, directory, end - time.monotonic(), (guest.CONTROL,)) as call:
            call.ask_for(guest.CONFIGURE_STEPS, "configure", *(f"{name}={value}" for name, value in fields.items()))

    def status(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestStatus:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            uptime, worker, ticks, load, received, sent = call.ask("status", words=6)
            return GuestStatus(
                _number(uptime), Worker(worker), _count(ticks) / 100, _number(load), _count(received), _count(sent)
            )  # fmt: skip

    def settle(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            call.ask("settle")

    def prepare_sleep(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            call.ask("sleep")

    def wake(
        self, ref: InstanceRef, directory: Path, *, now: datetime, entropy: bytes, secrets: bool, deadline_s: float
    ) -> None:
        """See the port."""
        began = time.monotonic()
        with _Call(ref, directory, deadline_s, (guest.CLOCK,)) as call:
            call.set_moment(now, began, entropy, ["secrets"] if secrets else [])
        if secrets:
            self.mount_secrets(ref, directory, deadline_s=began + deadline_s - time.monotonic())

    def drop_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            call.ask("secrets", "0")

    def mount_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            call.ask("secrets", "1")

    def ping(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> float:
        """See the port."""
        with _Call(ref, directory, deadline_s, (guest.CONTROL,)) as call:
            return _number(call.ask("ping", words=1)[0])

    def execute(self, ref: InstanceRef, directory: Path, command: str, *, deadline_s: float) -> ExecResult:
        """See the port."""
        return collected(self.run(ref, directory, command.encode(), deadline_s=deadline_s))

    def run(
        self, ref: InstanceRef, directory: Path, command: bytes, *, deadline_s: float
    ) -> Generator[ExecPart, None, None]:
        """See the port. Raises `InvalidInput` for a command that no shell can be given."""
        return guest_commands.run(ref, directory, command, deadline_s=deadline_s)

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
        self._hearing = Hearing(ref, _BOUNDS)

    def __enter__(self) -> _Call:
        try:
            self._connection = Connection(self._directory, self._ports, self._end)
        except TimeoutError:
            raise guest_silent(self._ref) from None
        except ConnectionError:
            raise guest_gone(self._ref) from None
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, ValueError | OverflowError):  # its guest says what it likes
            raise guest_refused(self._ref, "unreadable reply") from None

    def left(self) -> float:
        """Seconds until the deadline; raises `TimedOut` past it."""
        try:
            return remaining(self._end)
        except TimeoutError:
            raise guest_silent(self._ref) from None

    def ask(self, *request: str, words: int = 0) -> Sequence[str]:
        """Send a request whose reply begins with 0; returns the words after it, of which there must be `words`."""
        code, *reply = self.send(*request, words=1 + words)
        if code != "0":
            raise guest_refused(self._ref, " ".join(reply))
        return reply

    def set_moment(self, now: datetime, asked: float, entropy: bytes, later: Sequence[str]) -> None:
        """Set the guest's clock, which it was `now` at the monotonic time `asked`, and give it entropy.

        Exact to the time that the answer takes, which is long for the first one of a guest just restored: then again.
        What is not acknowledged is missing, and so are the parts that were to come `later`.
        """
        start = round(now.timestamp() * 1e9)
        for _ in range(_CLOCK_TRIES):
            before, token = time.monotonic(), secrets.token_bytes(guest.MOMENT_ID_BYTES)
            told = divmod(start + round((before - asked) * 1e9), 10**9)
            code = self._exchange(guest.MOMENT.pack(entropy[: guest.ENTROPY_BYTES], *told, token), token)
            if code != b"0":
                words = f"moment: call {code.decode('ascii', 'replace')} failed"
                raise guest_refused(self._ref, words, ["moment", *later])
            if time.monotonic() - before < _CLOCK_S:
                return

    def ask_for(self, steps: Sequence[str], *request: str) -> None:
        """Send a request that must be answered with all of `steps`."""
        code, *reply = self.send(*request, words=1)
        missing = [step for step in steps if code != "0" or step not in reply]
        if code != "0":
            at = steps.index(reply[0].rstrip(":")) if reply and reply[0].rstrip(":") in steps else 0
            missing = list(steps[at:])
        if missing:
            raise guest_refused(self._ref, " ".join(reply), missing)

    def send(self, *request: str, words: int) -> Sequence[str]:
        """Send a request and return the words of its reply after the id, at least `words` of them."""
        token = secrets.token_hex(4)
        try:
            self._connection.socket.settimeout(self.left())
            self._connection.socket.sendall(f"\n{token} {' '.join(request)} .\n".encode())
            for line in self._lines():
                first, *reply = line.split(" ")
                if first == token:
                    if len(reply) < words:
                        raise guest_refused(self._ref, f"unreadable reply to {request[0]}")
                    return reply
        except TimeoutError:
            raise guest_silent(self._ref) from None
        except ConnectionError:
            pass
        raise guest_gone(self._ref)

    def _exchange(self, request: bytes, token: bytes) -> bytes:
        """The digit after `token` in what comes after `request`."""
        said = b""
        try:
            self._connection.socket.settimeout(self.left())
            self._connection.socket.sendall(request)
            while data := self._receive():
                said += data
                _, found, rest = said.partition(token)
                if found and rest:
                    return rest[:1]
                said = said[-len(token) :]
        except TimeoutError:
            raise guest_silent(self._ref) from None
        except ConnectionError:
            pass
        raise guest_gone(self._ref)

    def _lines(self) -> Iterator[str]:
        """Complete lines as they arrive, until the VMM closes the socket."""
        while data := self._receive():
            for line in self._hearing.lines(data):
                yield line.decode("ascii", "replace")

    def _receive(self) -> bytes:
        """What comes next."""
        self._connection.socket.settimeout(self.left())
        return self._hearing.read(self._connection.socket.recv(1 << 16))


def _escaped(data: bytes) -> str:
    """For the shell's printf; see `mvm.guest`."""
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:o}" for byte in data) or "-"


def _number(word: str) -> float:
    number = float(word)
    if not -_HUGE < number < _HUGE:
        raise ValueError(word)
    return number


def _count(word: str) -> int:
    return int(_number(word))
