"""The metadata service over real bridges: two tenants' guests are namespaces here."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.ids import NodeId, PoolId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.pool import ImageSource, InstanceResources, WorkerPool
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers import netns, state_dir
from mvm.drivers.linux_network import LinuxNetwork
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.metadata.server import HEADER_BYTES, PER_GUEST, REQUEST_S
from mvm.settings import Settings
from tests.support.make import instance_ref
from tests.support.namespace import own_namespace, unique_name
from tests.support.waiting import until

pytestmark = pytest.mark.root

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ADDRESS = ("169.254.169.254", 80)
TTL, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds: 60", "X-aws-ec2-metadata-token"
NODE = NodeId("n1")


def pool_ref(tenant: TenantId) -> PoolRef:
    return PoolRef(tenant, PoolId("web"))


@dataclass
class Guest:
    """A namespace behind a bridge that stands for a guest."""

    namespace: str
    instance_id: str
    address: str

    def connect(self) -> socket.socket:
        sock = netns.socket_in(netns.path_of(self.namespace), socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(8)
        sock.connect(ADDRESS)
        return sock

    def raw(self, request: bytes) -> bytes:
        """All that is answered until the other side closes."""
        with self.connect() as sock:
            answer = b""
            try:
                sock.sendall(request)
                while data := sock.recv(65536):
                    answer += data
            except ConnectionError:
                pass
            return answer

    def ask(self, method: str, path: str, *headers: str) -> tuple[int, str]:
        lines = [f"{method} {path} HTTP/1.1", "Host: 169.254.169.254", "Connection: close", *headers, "", ""]
        head, _, body = self.raw("\r\n".join(lines).encode()).decode().partition("\r\n\r\n")
        return (int(head.split()[1]) if head else 0), body

    def token(self) -> str:
        status, given = self.ask("PUT", "/latest/api/token", TTL)
        assert status == 200, given
        return given

    def who(self) -> str:
        return self.ask("GET", "/latest/meta-data/instance-id", f"{TOKEN}: {self.token()}")[1]


@dataclass
class Host:
    """The node's namespace with the service running in it."""

    settings: Settings
    store: SqliteStore
    network: LinuxNetwork
    shell: LocalShell
    namespace: str
    closing: ExitStack

    def tenant(self, number: int) -> TenantNetwork:
        network = TenantNetwork(number, parse_subnet(f"10.240.{number}.0/24"))
        tenant = TenantId(f"t{number}")
        self.store.put_tenant(Tenant(tenant, network, Quota(), NOW))
        pool = WorkerPool(pool_ref(tenant), ImageSource("builtin:", "minimal"), InstanceResources(), NODE, NOW)
        self.store.put_pool(pool)
        self.network.ensure_bridge(network)
        return network

    def guest(self, network: TenantNetwork, offset: int) -> Guest:
        """With its own address and a way to the gateway, as a guest has them."""
        ref = instance_ref(offset, pool_ref(TenantId(f"t{network.net_id}")))
        self.store.insert_instance(Instance(ref, NODE, offset, Status.RUNNING, NOW))
        return self.link(network, offset, str(ref.instance))

    def link(self, network: TenantNetwork, offset: int, name: str) -> Guest:
        namespace, veth, ip = unique_name(), f"v{network.net_id}o{offset}", str(network.ip(offset))
        netns.create(self.shell, namespace)
        self.closing.callback(netns.delete, self.shell, namespace)
        run = self.shell.run
        run(["ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", namespace])
        run(["ip", "link", "set", veth, "master", network.bridge, "up"])
        run(["ip", "-n", namespace, "link", "set", "eth0", "up"])
        run(["ip", "-n", namespace, "addr", "add", f"{ip}/24", "dev", "eth0"])
        run(["ip", "-n", namespace, "route", "add", "default", "via", str(network.gateway)])
        return Guest(namespace, name, ip)

    def health(self) -> int:
        """On how many bridges it listens; -1 while it is not there."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self.settings.layout.metadata_socket))
                return int(json.loads(sock.recv(4096))["bridges"])
        except (ConnectionError, FileNotFoundError, ValueError):
            return -1


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = Settings(state_dir=tmp_path_factory.mktemp("m") / "s", node_id="n1")
    state_dir.prepare(settings.layout)
    shell = LocalShell()
    with own_namespace() as namespace, ExitStack() as closing:
        store = SqliteStore(settings.layout.database)
        host = Host(settings, store, LinuxNetwork(shell), shell, namespace, closing)
        env = {**os.environ, **settings.environment()}
        service = subprocess.Popen([sys.executable, "-m", "mvm.metadata"], env=env)
        try:
            until(lambda: host.health() == 0, 60, "the service is there")
            yield host
        finally:
            service.terminate()
            assert service.wait(60) == 0
            store.close()


@pytest.fixture(scope="module")
def guests(host: Host) -> tuple[Guest, Guest, Guest]:
    """Two of one tenant, and another's."""
    first, second = host.tenant(1), host.tenant(2)
    made = host.guest(first, 3), host.guest(first, 4), host.guest(second, 3)
    until(lambda: host.health() == 2, 60, "it listens on both bridges")
    return made


def test_each_guest_is_told_of_itself(guests: tuple[Guest, Guest, Guest]) -> None:
    assert [guest.who() for guest in guests] == [guest.instance_id for guest in guests]


def test_who_lies_in_headers_is_still_known(guests: tuple[Guest, Guest, Guest]) -> None:
    one, two, other = guests
    lies = [f"{name}: {one.address}" for name in ("Host2", "X-Forwarded-For", "X-Real-IP", "Forwarded", "Client-IP")]
    for thief in (two, other):
        stolen = f"{TOKEN}: {one.token()}"
        assert thief.ask("GET", "/latest/meta-data/instance-id", stolen, *lies)[0] == 401
        own = f"{TOKEN}: {thief.token()}"
        assert thief.ask("GET", "/latest/meta-data/instance-id", own, *lies) == (200, thief.instance_id)


def test_an_address_that_is_no_guests_is_told_nothing(host: Host, guests: tuple[Guest, Guest, Guest]) -> None:
    first = host.store.tenant(TenantId("t1")).network
    stranger = host.link(first, 77, "nobody")
    assert stranger.ask("PUT", "/latest/api/token", TTL)[0] == 403


def test_another_tenants_address_behind_the_wrong_bridge_reaches_nobody(
    host: Host, guests: tuple[Guest, Guest, Guest]
) -> None:
    first = host.store.tenant(TenantId("t1")).network
    liar = host.link(first, 78, "liar")
    host.shell.run(["ip", "-n", liar.namespace, "addr", "flush", "dev", "eth0"])
    host.shell.run(["ip", "-n", liar.namespace, "addr", "add", "10.240.2.3/24", "dev", "eth0"])
    host.shell.run(["ip", "-n", liar.namespace, "route", "add", "169.254.169.254", "dev", "eth0"])
    answer = b""
    with suppress(OSError):  # what is sent to that address goes to its own bridge
        answer = liar.raw(f"PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n{TTL}\r\n\r\n".encode())
    assert not answer or b" 403 " in answer


def test_nothing_is_sent_further_than_one_hop(guests: tuple[Guest, Guest, Guest]) -> None:
    """Seen on the wire by the guest."""
    guest = guests[0]
    with netns.entered(netns.path_of(guest.namespace)):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with wire:
        wire.settimeout(5)
        guest.token()
        seen = set()
        for _ in range(20):
            packet = wire.recv(65536)
            if socket.inet_ntoa(packet[12:16]) == ADDRESS[0]:
                seen.add(packet[8])
                if packet[20 + 13] & 0x01:  # FIN: the last one
                    break
        assert seen == {1}


def test_headers_without_end_are_refused(guests: tuple[Guest, Guest, Guest]) -> None:
    bad, good = guests[0], guests[2]
    for request in (
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (1 << 20),
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(100_000)) + b"\r\n",
    ):
        answer = bad.raw(request)
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
    assert bad.raw(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (HEADER_BYTES + 1)).startswith(b"HTTP/1.1 431 ")
    assert good.who() == good.instance_id


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\0\1\2\3 garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", b"413"),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"413"),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (
            (
                b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n"
                b"X-aws-ec2-metadata-token-ttl-seconds: 60\r\n"
                b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            b"400",
        ),
    ],
)
def test_what_is_no_request_is_refused(guests: tuple[Guest, Guest, Guest], request_: bytes, status: bytes) -> None:
    assert guests[0].raw(request_).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("name", ["evil.example", "169.254.169.254.evil.example", "localhost", "10.240.1.1", "[::1]"])
def test_another_name_that_leads_here_is_refused(guests: tuple[Guest, Guest, Guest], name: str) -> None:
    """A page in a guest's browser reaches every address, by a name of its own (DNS rebinding), and can set headers."""
    request = f"PUT /latest/api/token HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n{TTL}\r\n\r\n"
    assert guests[0].raw(request.encode()).startswith(b"HTTP/1.1 421 ")


def test_who_speaks_http_1_0_names_no_host(guests: tuple[Guest, Guest, Guest]) -> None:
    assert guests[0].raw(f"PUT /latest/api/token HTTP/1.0\r\n{TTL}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")


def test_one_connection_serves_several_requests(guests: tuple[Guest, Guest, Guest]) -> None:
    guest = guests[0]
    shown = guest.token()
    with guest.connect() as sock:
        for _ in range(3):
            asked = f"GET /latest/meta-data/tenant HTTP/1.1\r\nHost: {ADDRESS[0]}:80\r\n{TOKEN}: {shown}\r\n\r\n"
            sock.sendall(asked.encode())
            assert sock.recv(65536).endswith(b"\r\n\r\nt1")


def test_who_is_slow_or_many_is_cut_off_and_others_are_served(guests: tuple[Guest, Guest, Guest]) -> None:
    bad, neighbour, good = guests
    with ExitStack() as stack:
        held = [stack.enter_context(bad.connect()) for _ in range(PER_GUEST + 20)]
        for sock in held:
            try:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            except ConnectionError:
                continue
        began = time.monotonic()
        assert good.who() == good.instance_id
        assert neighbour.who() == neighbour.instance_id
        assert time.monotonic() - began < REQUEST_S
        open_ = 0
        for sock in held:
            try:
                open_ += sock.recv(1, socket.MSG_DONTWAIT) != b""
            except BlockingIOError:
                open_ += 1
            except ConnectionError:
                continue
        assert open_ <= PER_GUEST
        for sock in held:
            try:
                assert sock.recv(65536) == b""  # after REQUEST_S
            except ConnectionError:
                continue
    assert bad.who() == bad.instance_id


def test_a_flood_of_one_tenant_is_felt_by_it_alone(guests: tuple[Guest, Guest, Guest]) -> None:
    bad, _, good = guests
    end, sent = time.monotonic() + 3, 0
    path = netns.path_of(bad.namespace)
    slowest = 0.0
    with ExitStack() as stack:
        while time.monotonic() < end:
            for _ in range(20):
                sock = netns.socket_in(path, socket.AF_INET, socket.SOCK_STREAM)
                stack.callback(sock.close)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.setblocking(False)
                sock.connect_ex(ADDRESS)
                sent += 1
            began = time.monotonic()
            assert good.who() == good.instance_id
            slowest = max(slowest, time.monotonic() - began)
    assert sent > 100
    assert slowest < REQUEST_S


def test_bridges_come_and_go(host: Host, guests: tuple[Guest, Guest, Guest]) -> None:
    before = host.health()
    network = host.tenant(9)
    guest = host.guest(network, 5)
    until(lambda: host.health() == before + 1, 60, "it listens on the new one")
    assert guest.who() == guest.instance_id
    host.network.remove_bridges(frozenset({network.bridge}))
    until(lambda: host.health() == before, 60, "it has let it go")
    host.network.ensure_bridge(network)
    host.shell.run(["ip", "link", "set", "v9o5", "master", network.bridge])
    until(lambda: host.health() == before + 1, 60, "it listens on the one made anew")
    assert guest.who() == guest.instance_id


def test_a_pool_can_have_none(host: Host, guests: tuple[Guest, Guest, Guest]) -> None:
    from dataclasses import replace

    pool = host.store.pool(pool_ref(TenantId("t2")))
    host.store.put_pool(replace(pool, metadata_enabled=False))
    assert guests[2].ask("PUT", "/latest/api/token", TTL)[0] == 403
    host.store.put_pool(replace(pool, user_data="hello\n"))
    assert guests[2].ask("GET", "/latest/user-data", f"{TOKEN}: {guests[2].token()}") == (200, "hello\n")


def test_nobody_else_is_served(host: Host, guests: tuple[Guest, Guest, Guest]) -> None:
    """Nor at another address of the bridge; the host itself is nobody."""
    with socket.socket() as sock:
        sock.settimeout(5)
        sock.connect(ADDRESS)
        sock.sendall(f"PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n{TTL}\r\n\r\n".encode())
        assert b" 403 " in sock.recv(4096)
    with netns.socket_in(netns.path_of(guests[0].namespace), socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        with pytest.raises(OSError):
            sock.connect(("10.240.1.1", 80))
    assert not Path("/proc/self/net/tcp6").read_text().count(":0050 ")
