"""``net.apply``: what one change of the rules costs at 500 tenants against at 10; bar 1.5 times.

A change is what a start and a stop need: a guest of a pool with an egress list is let in, and shut out again. Each
tenant has such a pool and two guests. Both nodes are network namespaces of their own and take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path

from mvm.domain.addressing import TenantNetwork
from mvm.domain.egress import EgressPolicy
from mvm.domain.firewall import Change, GuestPort, Plan, guest_elements, ruleset
from mvm.domain.ids import PoolId
from mvm.drivers import netns
from mvm.drivers.nftables import Nftables
from mvm.drivers.shell import LocalShell
from tests.benchmarks.bench_stack import Bench
from tests.benchmarks.result import Result, at_most_ratio
from tests.support.namespace import unique_name

_RUNS = 41
_FEW, _MANY = 10, 500
_WEB, _PLAN = PoolId("web"), Plan("up0")
_LIST = EgressPolicy.from_dict({"policy": "allow", "allow": ["192.0.2.0/24:443/tcp", "198.51.100.0/24"]})


def apply(_bench: Bench) -> Result:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        few, many = (_node(stack, directory / str(count), count) for count in (_FEW, _MANY))
        samples: tuple[list[float], list[float]] = [], []
        for _ in range(_RUNS):
            for change, taken in zip((few, many), samples, strict=True):
                taken.append(change() * 1000)
    return at_most_ratio("net.apply", "ms", f"at {_FEW} tenants; ours: at {_MANY}", *samples, 1.5)


def _node(stack: ExitStack, mark: Path, tenants: int) -> Callable[[], float]:
    shell, name = LocalShell(), unique_name()
    stack.callback(netns.delete, shell, name)
    netns.create(shell, name)
    networks = [
        TenantNetwork(n, IPv4Network((int(IPv4Network("10.240.0.0/12").network_address) + (n << 8), 24)))
        for n in range(tenants)
    ]
    packets, inside = Nftables(shell, mark), netns.path_of(name)
    guests = [GuestPort(network, offset, _WEB, _LIST) for network in networks for offset in (3, 4)]
    with netns.entered(inside):
        packets.apply(ruleset(_PLAN, networks, [(network, _WEB, _LIST) for network in networks], guests))
    more = guest_elements(_PLAN, GuestPort(networks[-1], 5, _WEB, _LIST))

    def change() -> float:
        with netns.entered(inside):
            began = time.perf_counter()
            packets.change(Change(more))
            packets.change(Change(removed=more))
            return (time.perf_counter() - began) / 2

    return change
