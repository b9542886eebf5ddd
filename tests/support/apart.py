"""A node whose networks are real and whose guests are not: tenants in a namespace of its own, and an outside."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from mvm.domain import frames
from mvm.domain.egress import Egress
from mvm.domain.firewall import TENANT_FLOWS, Change, GuestPort, Ruleset, guest_elements
from mvm.domain.ids import NodeId
from mvm.domain.isolation import greetings, probes, ways_out
from mvm.domain.job import JobState, JobVerb
from mvm.domain.probes import PORT, Party, Probe, Tokens
from mvm.drivers import netns
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import FakeHost
from mvm.drivers.linux_network import LinuxNetwork
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.nftables import Nftables
from mvm.drivers.sqlite_store import SqliteStore
from mvm.drivers.veth_probes import PacketWire, VethProbes
from mvm.ports.probing import Wire
from mvm.services.network_check import NetworkCheck
from mvm.services.network_proof import NetworkProof, called, probe_ports, run
from mvm.services.networks import Networks
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.support.namespace import own_namespace, unique_name
from tests.support.shell import RecordingShell

UPLINK, UPLINK_MAC = "up0", "02:6f:00:00:00:01"
OUTSIDE_MAC = "02:6f:00:00:00:02"
NODE_IP, OUTSIDE_IP = "198.51.100.1", "198.51.100.2"
LAN, LAN_OTHER = "lan0", "192.168.77.2"
NODE = NodeId("n1")


@dataclass
class Apart:
    """The node. The test's thread is in its namespace."""

    host: FakeHost
    shell: RecordingShell
    network: LinuxNetwork
    packets: Nftables
    probing: VethProbes
    services: NodeServices
    networks: Networks
    check: NetworkCheck
    proof: NetworkProof
    queue: MemoryQueue
    outside: str

    def ok(self, verb: JobVerb, subject: str, **params: Any) -> Mapping[str, Any]:
        job = self.services.jobs.submit(verb, subject, NODE, params=params, actor="test")
        self.queue.drain(self.services.runner.run)
        job = self.services.jobs.job(job.job_id)
        assert job.state is JobState.SUCCEEDED, job.error
        return job.result or {}

    def tenants(self, count: int, egress: Sequence[Mapping[str, Any]] = ()) -> None:
        """`count` of them, each with a pool for each of its policies; the policies go round."""
        for number in range(count):
            self.ok(JobVerb.TENANT_CREATE, f"t{number}")
            for policy in egress[number % len(egress) : number % len(egress) + 1] if egress else ():
                self.ok(JobVerb.POOL_CREATE, f"t{number}/web", flake_ref="builtin:", profile="minimal", egress=policy)

    def probe_names(self) -> list[str]:
        """Namespaces of probes of the namespace that we are in."""
        return netns.names(f"mvm-probe-{Path('/proc/thread-self/ns/net').stat().st_ino}-")

    def nft(self, text: str) -> None:
        self.shell.run(["nft", "-f", "-"], stdin=text)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Probes in place, with what `net verify` has not: a hand outside, and one on another interface."""
        parties, plan = self.proof.parties(), self.networks.plan
        places = [
            *(GuestPort(p.one.network, p.one.offset, *p.policies[0]) for p in parties),
            *(GuestPort(p.two.network, p.two.offset) for p in parties),
        ]  # fmt: skip
        with ExitStack() as stack:
            stack.enter_context(self._echo())
            stack.enter_context(self.networks.probing(places))
            wires = dict(stack.enter_context(self.probing.attached(probe_ports(parties), plan.uplink)))
            for name, wire in (
                ("outside", PacketWire(netns.path_of(self.outside), "eth0")),
                (LAN, PacketWire(None, LAN, leaving=True)),
            ):
                stack.callback(wire.close)
                wires[name] = wire
            change = Change(tuple(e for place in places for e in guest_elements(plan, place)))
            yield Trial(self, parties, wires, self.networks.expected().changed_by(change))

    @contextmanager
    def _echo(self) -> Iterator[None]:
        """UDP port 7 outside answers."""
        ended = threading.Event()
        with netns.socket_in(netns.path_of(self.outside), socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OUTSIDE_IP, 7))
            sock.settimeout(0.1)

            def serve() -> None:
                while not ended.is_set():
                    try:
                        data, who = sock.recvfrom(2048)
                    except TimeoutError:
                        continue
                    with suppress(OSError):  # a guest that was not masqueraded is nowhere to be found
                        sock.sendto(data, who)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()


@dataclass
class Trial:
    """All probes, ready to be run against whatever rules are there; `rules` are the right ones."""

    node: Apart
    parties: Sequence[Party]
    wires: Mapping[str, Wire]
    rules: Ruleset
    runs: int = 0

    def probes(self) -> list[Probe]:
        """All there are; new ones each time, so that no connection is known from the last."""
        self.runs += 1
        parties, plan, tokens = self.parties, self.node.networks.plan, Tokens(f"trial {self.runs}".encode())
        taken = [p.one.network for p in parties]
        return [
            *greetings(parties, tokens),
            *probes(parties, plan, tokens, metadata=True),
            *(x for p in parties for x in ways_out(p, p.policies[0][1], plan, tokens, taken)),
            *(x for p in parties for x in _from_outside(p, tokens)),
        ]  # fmt: skip

    def rows(self, *, patience_s: float = 2.0, settle_s: float = 0.3) -> list[dict[str, Any]]:
        rows = run(
            SystemClock(), self.node.probing, self.wires, self.probes(), settle_s=settle_s, patience_s=patience_s
        )  # fmt: skip
        return rows + [called(self.node.probing, p.name, p.one) for p in self.parties]


def _from_outside(party: Party, tokens: Tokens) -> Iterator[Probe]:
    a, sign, kind = party.one, tokens.next(), party.policies[0][1].kind
    out = a.by_gateway(frames.udp(a.ip, IPv4Address(OUTSIDE_IP), sign, port=7, sport=tokens.sport()))
    yield Probe("answer from outside", a.wire, "outside", kind is Egress.NAT, out, a.wire, sign)
    sign = tokens.next()
    packet = frames.udp(IPv4Address(OUTSIDE_IP), a.ip, sign, port=PORT, sport=tokens.sport())
    stranger = frames.ethernet(UPLINK_MAC, OUTSIDE_MAC, frames.IP, packet)
    yield Probe("new from outside", "outside", f"{party.name} {a.ip}", False, stranger, a.wire, sign)
    sign = tokens.next()
    out = a.by_gateway(frames.udp(a.ip, IPv4Address(LAN_OTHER), sign, port=PORT, sport=tokens.sport()))
    yield Probe("out by another interface", a.wire, LAN_OTHER, False, out, LAN, sign)


@contextmanager
def apart(
    tmp_path: Path, *, host_ports: str = "", never: str = "", flows: int = TENANT_FLOWS, bridge_netfilter: bool = False
) -> Iterator[Apart]:
    """The node, and outside it a host at the other end of its uplink. Nothing leaves the two namespaces.

    With `bridge_netfilter` IP's rules see what stays in a bridge, too, as on a host that runs containers.
    """
    shell, outside = RecordingShell(), unique_name()
    with own_namespace():
        if bridge_netfilter:
            Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("1")
        netns.create(shell, outside)
        try:
            shell.run(["ip", "-batch", "-"], stdin=f"""
link add {UPLINK} address {UPLINK_MAC} type veth peer name eth0 address {OUTSIDE_MAC} netns {outside}
addr add {NODE_IP}/24 dev {UPLINK}
link set {UPLINK} up
addr add 169.254.169.254/32 dev lo
link add {LAN} type veth peer name eth1 netns {outside}
addr add 192.168.77.1/24 dev {LAN}
link set {LAN} up
neigh add {LAN_OTHER} lladdr 02:6f:00:00:00:09 dev {LAN}
""")  # fmt: skip
            shell.run(
                ["ip", "-n", outside, "-batch", "-"],
                stdin=f"addr add {OUTSIDE_IP}/24 dev eth0\nlink set eth0 up\nlink set eth1 up\n",
            )
            shell.run(["ip", "route", "add", "default", "via", OUTSIDE_IP])
            settings = Settings(
                state_dir=tmp_path / "state", node_id="n1", uplink=UPLINK, host_ports=host_ports, egress_never=never,
                orphan_grace_s=0, tenant_flows=flows,
            )  # fmt: skip
            settings.layout.root.mkdir(exist_ok=True)
            host, clock = FakeHost(SystemClock()), SystemClock()
            registry, queue = MemoryRegistry(clock), MemoryQueue(clock)
            store = SqliteStore(tmp_path / "node.db")
            network, packets = LinuxNetwork(shell), Nftables(shell, settings.layout.uplink_mark)
            probing = VethProbes(shell)
            ports = NodePorts(
                store, registry, queue, host.locks, clock, host.vmm, host.guest, network, packets, probing,
                host.storage, host.images, host.memory, host.audit, host.cgroups, host.secrets,
            )  # fmt: skip
            services = build_node(ports, settings, authorized_key="ssh-ed25519 AAAA test")
            plan = settings.plan
            networks = Networks(store, host.locks, network, packets, plan)
            proof = NetworkProof(
                store=store, clock=clock, network=network, networks=networks, probing=probing, guest=host.guest,
                storage=host.storage,
            )  # fmt: skip
            check = NetworkCheck(
                store=store, registry=registry, clock=clock, network=network, packets=packets, networks=networks,
                proof=proof, node_id=NODE,
            )  # fmt: skip
            yield Apart(host, shell, network, packets, probing, services, networks, check, proof, queue, outside)
            store.close()
        finally:
            netns.delete(shell, outside)
