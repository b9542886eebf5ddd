"""A thin Redis connection for the path of a command: 10 ms to import where redis-py takes 250.

hiredis does the protocol; here is the socket, one per thread, connected on first use and again after a
failure. All failures are `Unreachable`; waiting for a reply is bounded.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import hiredis

from mvm.errors import Failed, InvalidInput, Unreachable

_LOADS = "it still loads its data"
_CONNECT_S = 0.9  # "down" must be known within a second


class Greeting(NamedTuple):
    """What each new connection asks first, and who looks at the answer: he raises when nothing else is to be asked."""

    words: Sequence[str]
    check: Callable[[Any], None]


# The kernel connects us to a Redis that hangs, too. One that takes no writes refuses PING, and is read.
_ECHO = Greeting(("ECHO", "mvm"), lambda _: None)


class _Connection:
    """A socket and its parser; closed with the thread (or link) that owns it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = hiredis.Reader()
        self.owner = os.getpid()  # a forked child shares no connection

    def __del__(self) -> None:
        self.sock.close()

    def exchange(self, packed: bytes, count: int, timeout_s: float) -> list[Any]:
        """Send packed commands and read `count` replies."""
        if self.sock.gettimeout() != timeout_s:
            self.sock.settimeout(timeout_s)
        self.sock.sendall(packed)
        return [self._reply() for _ in range(count)]

    def _reply(self) -> Any:
        while (reply := self.reader.gets()) is False:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("Redis closed the connection")
            self.reader.feed(data)
        return reply


class RedisLink:
    """Commands to one Redis. URLs: ``unix:///PATH``, ``redis://[user:password@]host:port/db``, ``rediss://``.

    A command that met a dead connection is sent once more: callers send only what may be repeated.
    """

    def __init__(self, url: str, *, code: str, timeout_s: float = 5.0, greeting: Greeting = _ECHO) -> None:
        self._url = urlsplit(url.replace("redis+socket://", "unix://", 1))
        if self._url.scheme not in ("unix", "redis", "rediss"):
            raise InvalidInput(
                "settings.invalid", f"{self._url.scheme}:// is no Redis URL", hint="allowed: unix, redis, rediss",
                field="redis_url",
            )  # fmt: skip
        self._code = code
        self._timeout_s = timeout_s
        self._greeting = greeting
        self._local = threading.local()

    def listens(self) -> bool:
        """Whether somebody listens there, though he may not answer, or not yet: only what is refused is not there."""
        try:
            self._connect().close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
        return True

    def command(self, *words: str | bytes | int | float, timeout_s: float | None = None) -> Any:
        """One command and its reply: bytes, int, None or lists of them. `Failed` when Redis refuses it."""
        return self.pipeline([words], timeout_s=timeout_s)[0]

    def pipeline(
        self, commands: Sequence[Sequence[str | bytes | int | float]], *, timeout_s: float | None = None
    ) -> list[Any]:
        """Commands sent together, and their replies."""
        packed = b"".join(hiredis.pack_command(cast("Any", tuple(words))) for words in commands)
        fresh = self._connection is None
        try:
            replies = self._exchange(packed, len(commands), timeout_s)
        except OSError as error:
            if fresh:
                raise self._unreachable(error) from None
            try:
                replies = self._exchange(packed, len(commands), timeout_s)
            except OSError as again:
                raise self._unreachable(again) from None
        for reply in replies:
            if isinstance(reply, hiredis.HiredisError):
                if _loads(reply):
                    raise self._unreachable(OSError(errno.EAGAIN, _LOADS)) from None
                raise _refused("a command", reply)
        return replies

    def close(self) -> None:
        """Close the calling thread's connection; the next command opens another."""
        connection = self._connection
        if connection is not None:
            connection.sock.close()
            self._local.connection = None

    @property
    def _connection(self) -> _Connection | None:
        connection: _Connection | None = getattr(self._local, "connection", None)
        return connection if connection is not None and connection.owner == os.getpid() else None

    def _exchange(self, packed: bytes, count: int, timeout_s: float | None) -> list[Any]:
        connection = self._connection or self._open()
        self._local.connection = None  # a failure in the middle leaves replies that nobody waits for
        replies = connection.exchange(packed, count, timeout_s or self._timeout_s)
        self._local.connection = connection
        return replies

    def _open(self) -> _Connection:
        connection = _Connection(self._connect())
        try:
            if self._url.password:
                user = (unquote(self._url.username),) if self._url.username else ()
                self._hello(connection, "AUTH", *user, unquote(self._url.password))
            db = self._url.path.strip("/") if self._url.scheme != "unix" else ""
            if db and db != "0":
                self._hello(connection, "SELECT", db)
            self._greeting.check(self._hello(connection, *self._greeting.words))
        except BaseException:
            connection.sock.close()
            raise
        return connection

    @staticmethod
    def _hello(connection: _Connection, *words: str) -> Any:
        (reply,) = connection.exchange(hiredis.pack_command(cast("Any", words)), 1, _CONNECT_S)
        if isinstance(reply, hiredis.HiredisError):
            if _loads(reply):
                raise OSError(errno.EAGAIN, _LOADS)
            raise _refused(words[0], reply)
        return reply

    def _connect(self) -> socket.socket:
        if self._url.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_CONNECT_S)
            try:
                sock.connect(self._url.path)
            except OSError:
                sock.close()
                raise
            return sock
        host = self._url.hostname or "127.0.0.1"
        sock = socket.create_connection((host, self._url.port or 6379), _CONNECT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._url.scheme == "rediss":
            import ssl

            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        return sock

    def _unreachable(self, error: OSError) -> Unreachable:
        where = self._url.path if self._url.scheme == "unix" else self._url.hostname
        return Unreachable(
            self._code, f"Redis at {where} does not answer: {error.strerror or error}",
            hint="is the stack up? see: mvm status",
        )  # fmt: skip


def _loads(reply: hiredis.HiredisError) -> bool:
    """It was just started and is not there yet: nothing is wrong with what was asked."""
    return str(reply).startswith("LOADING")


def _refused(what: str, reply: hiredis.HiredisError) -> Failed:
    if "No space left" in str(reply):
        return Failed("disk.full", "Redis has no space left for its data", hint="free some space on its disk")
    return Failed("redis.refused", f"Redis refused {what}: {reply}", hint="look at the log of Redis")
