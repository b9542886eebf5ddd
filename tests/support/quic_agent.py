"""A running agent over a stub node, certificates good and bad, and a client without scruples."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from mvm.agent.methods import method_table
from mvm.agent.server import listen, serve
from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart
from mvm.domain.ids import InstanceRef, NodeId, PoolRef, TenantId
from mvm.domain.layout import StateLayout
from mvm.domain.lifecycle import Status
from mvm.drivers.quic import certs
from mvm.drivers.quic.authority import Issued, issue
from mvm.drivers.quic.client import Connection, QuicAgents, open_connection
from mvm.drivers.quic.identity import COORDINATOR_URI, Credentials, load_certificates, load_key, node_dns, node_uri

NODE = NodeId("node-a")
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
REF = "acme/web/i-7f2c91ab"


class StubNode:
    """Counts what reaches it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.many = 3
        self.gate = threading.Event()
        self.log_begun = threading.Event()
        self.log_closed = threading.Event()
        self.log_text = "line\n"
        self.command_begun = threading.Event()
        self.command_ended = threading.Event()
        self.report_begun = threading.Event()
        self.report_ended = threading.Event()

    def node_info(self) -> Mapping[str, Any]:
        self.calls.append("node_info")
        return {"node_id": str(NODE)}

    def node_stats(self) -> Mapping[str, Any]:
        self.calls.append("node_stats")
        raise ZeroDivisionError("a secret of the node")

    def verify_network(self, *, active: bool, check: Callable[[], None] = lambda: None) -> Mapping[str, Any]:
        self.calls.append("verify_network")
        try:
            self.report_begun.set()
            while not self.gate.wait(0.05):
                check()
            return {"clean": True, "bridges": [], "findings": [], "probes": []}
        finally:
            self.report_ended.set()

    def tenants(self) -> Sequence[Mapping[str, Any]]:
        self.calls.append("tenants")
        return [{"tenant_id": "acme"}]

    def pools(self, tenant: TenantId | None) -> Sequence[Mapping[str, Any]]:
        self.calls.append("pools")
        self.gate.wait(20)
        return []

    def instances(
        self, tenant: TenantId | None, pool: PoolRef | None, status: Status | None
    ) -> Sequence[Mapping[str, Any]]:
        self.calls.append("instances")
        return [{"ref": f"acme/web/i-{n:08x}", "status": status} for n in range(self.many)]

    def instance(self, ref: InstanceRef) -> Mapping[str, Any]:
        self.calls.append("instance")
        return {"ref": str(ref)}

    def run(self, ref: InstanceRef, command: bytes, *, deadline_s: float) -> Generator[ExecPart, None, None]:
        self.calls.append("run")
        if command == b"sleep":
            try:
                yield ExecOutput(b"here")
                self.command_begun.set()
                while True:
                    self.gate.wait(0.05)
                    yield ExecOutput()
            finally:
                self.command_ended.set()
        yield ExecOutput(command * 7, b"e" * (1 << 20))
        yield ExecEnd(3, truncated=True)

    def wake(self, ref: InstanceRef, actor: str) -> Mapping[str, Any]:
        self.calls.append("wake")
        return {"ref": str(ref)}

    def logs(self, ref: InstanceRef, *, follow: bool) -> Generator[str, None, None]:
        self.calls.append("logs")
        try:
            self.log_begun.set()
            yield self.log_text
            while follow:
                self.gate.wait(0.02)
                yield self.log_text if self.gate.is_set() else ""
        finally:
            self.log_closed.set()


@dataclass
class Agent:
    """The agent's thread, its stub and its certificates."""

    address: str
    certs_dir: Path
    node: StubNode
    agents: QuicAgents = field(init=False)

    def __post_init__(self) -> None:
        self.agents = QuicAgents(self.certs_dir)

    @property
    def ca(self) -> Issued:
        return Issued(load_certificates(self.certs_dir / "ca.pem")[0], load_key(self.certs_dir / "ca.key"))

    def connect(self, who: Issued | None) -> Connection:
        return connect(self.address, self.ca, who)


def connect(address: str, ca: Issued, who: Issued | None) -> Connection:
    """A raw connection with any certificate, or none."""
    own = Credentials((ca.certificate,), *((who.certificate, (), who.key) if who else ()))
    return open_connection(address, own)


def make_certs(root: Path, node: NodeId = NODE) -> Path:
    layout = StateLayout(root)
    certs.init(layout, node)
    return layout.certs


@contextmanager
def running_agent(certs_dir: Path, node: StubNode | None = None, *, port: int = 0) -> Iterator[Agent]:
    """An agent in a thread with an event loop of its own; a failure to start or stop is raised here."""
    node = node or StubNode()
    sock = listen("127.0.0.1", port)
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve(sock, certs_dir, method_table(node), stop))

    address = f"127.0.0.1:{sock.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(run)
        try:
            yield Agent(address, certs_dir, node)
        finally:
            with suppress(RuntimeError):  # it did not start; the result says why
                loop.call_soon_threadsafe(stop.set)
            serving.result(60)


def coordinator(ca: Issued | None, **changes: Any) -> Issued:
    """A coordinator's certificate but for `changes`."""
    options: dict[str, Any] = {
        "sans": [x509.UniformResourceIdentifier(COORDINATOR_URI)], "usages": [CLIENT], "days": 30,
    }  # fmt: skip
    return issue(ca, "coordinator", **options | changes)


def node(ca: Issued, **changes: Any) -> Issued:
    """A node's certificate but for `changes`."""
    names = [x509.DNSName(node_dns(NODE)), x509.UniformResourceIdentifier(node_uri(NODE))]
    return issue(ca, NODE, **{"sans": names, "usages": [SERVER, CLIENT], "days": 30} | changes)


def days_from_now(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
