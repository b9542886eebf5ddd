"""The agent's life: prove that strangers are refused, serve, and stop in good order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from time import monotonic

import structlog

from mvm.agent.dispatch import Dispatcher
from mvm.agent.endpoint import Endpoint
from mvm.agent.methods import Method
from mvm.agent.renewal import Renewal
from mvm.drivers.quic.client import open_connection
from mvm.drivers.quic.frames import encode
from mvm.drivers.quic.identity import Credentials
from mvm.errors import Failed, Forbidden, TimedOut, Unreachable

log = structlog.get_logger(__name__)

BUFFER_BYTES = 4 << 20
GRACE_S = 5.0  # for requests at work when the agent stops
_CERTIFICATE_REQUIRED = 116  # the TLS alert


def listen(host: str, port: int) -> socket.socket:
    """The agent's UDP socket. Raises `Failed` (``agent.cannot_listen``)."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # the kernel may give less
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        sock.setblocking(False)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise Failed(
            "agent.cannot_listen", f"{host}:{port}: {error.strerror}",
            hint="set MVM_AGENT_HOST or MVM_AGENT_PORT", address=f"{host}:{port}",
        ) from None  # fmt: skip
    return sock


async def serve(sock: socket.socket, certs_dir: Path, methods: Mapping[str, Method], stop: asyncio.Event) -> None:
    """Serve on a bound socket, which is closed at the end, until `stop` is set.

    Raises before the first request is answered: what `load_credentials` raises, and `Failed`:
    ``agent.bad_certificate`` when clients would refuse this node, ``agent.not_secure`` when a client without a
    certificate is not refused.
    """
    with sock:
        renewal = Renewal(certs_dir)
        dispatcher = Dispatcher(methods)
        transport, endpoint = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Endpoint(renewal, dispatcher, sock), sock=sock
        )
        host, port = sock.getsockname()
        try:
            own = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            await asyncio.to_thread(refuses_strangers, own, renewal.credentials)
            log.info("agent.ready", node=renewal.node, address=f"{host}:{port}")
            await stop.wait()
            log.info("agent.stopping", connections=len(endpoint.connections), requests=len(endpoint.answering))
            await endpoint.drain(grace_s=GRACE_S)
        finally:
            transport.close()
            dispatcher.close()


def refuses_strangers(address: str, credentials: Credentials) -> None:
    """Ask the agent at `address` without a certificate; anything but the right refusal raises `Failed`."""
    connection = open_connection(address, Credentials(credentials.authorities))
    try:
        request = encode({"id": "self-test", "method": "node.ping", "params": {}})
        for _ in connection.request(request, monotonic() + 5.0):
            raise Failed("agent.not_secure", "a client without a certificate was answered")
        outcome = "the request ended without an answer"
    except Forbidden as error:
        if error.fields.get("alert") == _CERTIFICATE_REQUIRED:
            return
        outcome = error.message
    except (Unreachable, TimedOut) as error:
        outcome = error.message
    finally:
        connection.close()
    raise Failed("agent.not_secure", f"whether a client without a certificate is refused is unknown: {outcome}")
