"""How one tenant fares while another is at full throttle: its exec, its metadata, and new connections to the agent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from mvm.domain.addressing import BUILDER_OFFSET, METADATA
from mvm.domain.firewall import GuestPort
from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.lifecycle import Status
from mvm.domain.probes import Stand
from mvm.drivers import netns
from mvm.drivers.shell import LocalShell
from mvm.drivers.stack import running_settings
from mvm.drivers.veth_probes import VethProbes
from mvm.errors import MvmError
from mvm.ports.probing import ProbePort
from mvm.settings import Settings
from mvm.wiring import Client, open_client, open_node
from tests.support.stack import Stack

ANSWER_S = 60.0  # nobody waits so long; on a machine that does other work, what counts is that it comes
_REQUEST = b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n"


@dataclass
class Fare:
    """Milliseconds of what went well, by what was asked, and how often it did not."""

    times: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    pieces: int = 0

    def take(self, name: str, ask: Callable[[], object]) -> None:
        """One sample."""
        began = time.perf_counter()
        try:
            ask()
        except (MvmError, OSError, AssertionError) as error:
            self.failures.append(f"{name}: {error}")
        else:
            self.times.setdefault(name, []).append((time.perf_counter() - began) * 1000)

    def medians(self) -> dict[str, float]:
        """In milliseconds."""
        return {name: median(times) for name, times in self.times.items()}


@dataclass
class Crowd:
    """Two tenants of a stack, with a place of ours in each."""

    client: Client
    stack: Stack
    good: InstanceRef
    bad: InstanceRef
    homes: Mapping[str, str]
    places: Mapping[str, Stand]

    @contextmanager
    def throttled(self, what: str, seconds: float, fare: Fare) -> Iterator[None]:
        """Within it the bad tenant does `what`."""
        stand = self.places[self.bad.tenant]
        words = [what, str(seconds), self.stack.layout.root, self.bad, self.homes[self.bad.tenant],
                 stand.network.net_id, stand.network.subnet, stand.offset]  # fmt: skip
        argv = [sys.executable, "-m", "tests.support.throttle", *map(str, words)]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env=self.stack.env | {"PATH": os.environ["PATH"]},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n", process.stderr and process.stderr.read()
            yield
            told, errors = process.communicate("\n", timeout=seconds + 120)
            assert process.returncode == 0, errors
            fare.pieces = int(told)

    def sample(self, fare: Fare) -> None:
        """Everything once."""
        fare.take("exec", self._execute)
        fare.take("metadata", self._metadata)
        fare.take("connection", self._connect)

    def _execute(self) -> None:
        params = {"ref": str(self.good), "command_b64": b64encode(b"true").decode(), "deadline_s": ANSWER_S}
        answer = self.client.agents.call(self._address, "instance.exec", params, deadline_s=ANSWER_S)
        assert answer["exit_code"] == 0, answer

    def _connect(self) -> None:
        assert self.client.agents.call(self._address, "node.ping", {}, deadline_s=ANSWER_S) == {}

    def _metadata(self) -> None:
        home = netns.path_of(self.homes[self.good.tenant])
        with netns.socket_in(home, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect((str(METADATA), 80))
            sock.sendall(_REQUEST)
            assert sock.recv(64).startswith((b"HTTP/1.1 401", b"HTTP/1.1 403"))  # nobody lives at our place

    @property
    def _address(self) -> str:
        return str(self.client.connection["agent_address"])


@contextmanager
def crowd(stack: Stack, good: str, bad: str) -> Iterator[Crowd]:
    """The places are those of `net verify`, which waits meanwhile."""
    client = open_client(json.loads(stack.layout.connection.read_text()), stack.layout)
    namespace = client.connection["netns"]
    with netns.entered(netns.path_of(namespace)), ExitStack() as held:
        node = open_node(running_settings(Settings(state_dir=stack.layout.root)))
        places = {tenant: Stand(node.store.tenant(TenantId(tenant)).network, BUILDER_OFFSET) for tenant in (good, bad)}
        ports = [
            ProbePort(p.wire, p.network.bridge, p.mac, f"{p.ip}/{p.network.subnet.prefixlen}", str(p.network.gateway))
            for p in places.values()
        ]
        guests = [
            GuestPort(places[t].network, BUILDER_OFFSET, *_way_out(node.store.pools(TenantId(t)))) for t in places
        ]
        held.enter_context(node.networks.proving())
        held.enter_context(node.networks.probing(guests))
        held.enter_context(VethProbes(LocalShell()).attached(ports, ""))
        prefix = f"mvm-probe-{Path('/proc/thread-self/ns/net').stat().st_ino}-"
        homes = {tenant: f"{prefix}{number}" for number, tenant in enumerate(places)}
        running = [i.ref for i in node.store.instances() if i.status is Status.RUNNING]
        first = {tenant: next(ref for ref in running if ref.tenant == tenant) for tenant in places}
        yield Crowd(client, stack, first[good], first[bad], homes, places)


def _way_out(pools: object) -> tuple[object, object]:
    pool = next(p for p in pools)  # type: ignore[attr-defined]
    return pool.ref.pool, pool.egress


def table(base: Fare, fares: Mapping[str, Fare]) -> str:
    """A row for each thing that was done; ratios are to those of `base`."""
    own = base.medians()
    lines = [f"{'at full throttle':<18}{'pieces':>9}" + "".join(f"{name:>12}{'x':>7}" for name in own) + "  failed"]
    for what, fare in {"processors": base, **fares}.items():
        cells = "".join(
            f"{value:>9.1f} ms{value / own[name]:>7.2f}" for name, value in fare.medians().items() if name in own
        )
        lines.append(f"{what:<18}{fare.pieces:>9}{cells}  {len(fare.failures)}")
    return "\n".join(lines) + "\n"
