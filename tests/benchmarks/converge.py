"""``reconcile.*``: what it costs a node to keep to its desired state.

A node in memory over a real store (SQLite) and a real registry (Redis): tenants of 5 pools with 100 instances each,
where 60 run, 20 are warm and 20 sleep.

``reconcile.noop_1k`` and ``reconcile.noop_10k``: one pass, as a whole job, that finds nothing to do: it reads the
document and all records, asks the registry for open jobs, and plans. Bars 0.3 s and 3 s. The baseline of the first is
reading the same rows out of SQLite and decoding their JSON; that of the second is ten passes over 1,000 instances, so
that its ratio is 1 when the cost grows linearly.

``reconcile.plan_10k``: ``mvm agent reconcile --plan`` on the node's side: a document for 10,000 instances, all of which
are stopped, from its bytes to the plan of 10,000 actions and its diff. Bar 5 s; against a pass with nothing to do.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from mvm.domain.addressing import FIRST_OFFSET, TenantNetwork
from mvm.domain.desired import DesiredTenant, parse
from mvm.domain.ids import InstanceId, NodeId, Revision
from mvm.domain.instance import Instance
from mvm.domain.job import JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.domain.pool import WorkerPool
from mvm.domain.tenant import Tenant
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import FakeHost
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.settings import Settings
from mvm.telemetry.logging import configure
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.benchmarks.bench_stack import Bench
from tests.benchmarks.result import Result, at_most
from tests.support.redis_server import RedisServer

_NODE = NodeId("n1")
_RUNS = 5
_POOLS, _COUNTS = 5, {"running": 60, "warm": 20, "sleeping": 20}
_PER_TENANT = _POOLS * sum(_COUNTS.values())
_REVISION = Revision("a" * 64)
_PLACES = (*[Status.RUNNING] * 60, *[Status.WARM] * 20, *[Status.SLEEPING] * 20)
_STOPPED = (Status.STOPPED,) * 100


@dataclass
class Fleet:
    """A node with as many instances as its document asks for."""

    database: Path
    document: bytes
    services: NodeServices

    def pass_over(self) -> float:
        """The seconds of one reconcile job that finds nothing to do."""
        job = self.services.jobs.new(JobVerb.SWEEP_RECONCILE, _NODE, _NODE, reason=Reason.SWEEP, actor="bench")
        took, final = _timed(lambda: self.services.runner.run(job))
        assert final.result is not None, final.error
        assert final.result["changed"] is False, final.result
        assert final.result["waiting"] == 0
        return took

    def read(self) -> float:
        """The seconds in which SQLite and a JSON decoder give what there is."""

        def rows() -> list[Any]:
            with closing(sqlite3.connect(self.database)) as db:
                return [json.loads(doc) for (doc,) in db.execute("SELECT doc FROM instances ORDER BY ref")]

        return _timed(rows)[0]

    def plan(self, count: int) -> float:
        """The seconds of a plan that starts `count` instances."""

        def told() -> int:
            plan = self.services.view.desired_plan(self.document, prune=False)
            assert plan.to_text()
            assert plan.to_dict()
            return len(plan.actions)

        took, actions = _timed(told)
        assert actions == count
        return took


@contextmanager
def fleet(count: int, places: tuple[Status, ...]) -> Iterator[Fleet]:
    """`count` instances, whose statuses in each pool are `places`."""
    value = _document(count // _PER_TENANT)
    server, host, clock = RedisServer(), FakeHost(SystemClock()), SystemClock()
    link = RedisLink(server.url, code="registry.unreachable")
    with tempfile.TemporaryDirectory(prefix="mvm-bench-") as root:
        store = SqliteStore(Path(root) / "node.db")
        try:
            with store.transaction():
                store.put_desired(value)
                for tenant in parse(value).tenants:
                    _fill(store, tenant, places)
            ports = NodePorts(
                store, RedisRegistry(link), MemoryQueue(clock), host.locks, clock, host.vmm, host.guest, host.network,
                host.packets, None, host.storage, host.images, host.memory, host.audit, host.cgroups, host.secrets,
            )  # fmt: skip
            settings = Settings(state_dir=Path(root) / "s", node_id=_NODE, log="warning")
            configure(settings)
            yield Fleet(
                Path(root) / "node.db", json.dumps(value).encode(), build_node(ports, settings, authorized_key="")
            )
        finally:
            store.close()
            link.close()
            server.close()


def _document(tenants: int) -> dict[str, Any]:
    quota = dict.fromkeys(
        ("max_running", "max_warm", "max_vcpus", "max_mem_mib", "max_instances_per_pool", "max_pools"), 1_000_000
    )
    pools = [
        {"pool_id": f"p{n}", "flake_ref": "builtin:", "profile": "minimal", "desired_counts": _COUNTS}
        for n in range(_POOLS)
    ]
    return {
        "schema_version": 1, "node_id": str(_NODE), "generation": 1,
        "tenants": [
            {"tenant_id": f"t{n}", "quotas": quota, "pools": pools,
             "network": {"tenant_net_id": n, "ipv4_subnet": f"10.240.{4 * n}.0/22"}}
            for n in range(tenants)
        ],
    }  # fmt: skip


def _fill(store: SqliteStore, wanted: DesiredTenant, places: tuple[Status, ...]) -> None:
    """The tenant as its document wants it, with instances that are where `places` says."""
    now = SystemClock().now()
    network = TenantNetwork(wanted.network.net_id, IPv4Network(wanted.network.subnet))
    store.put_tenant(Tenant(wanted.id, network, wanted.quota, now))
    offset = FIRST_OFFSET
    for pool in wanted.pools:
        store.put_pool(WorkerPool(
            ref=pool.ref, node_id=_NODE, source=pool.source, resources=pool.resources, created_at=now,
            desired=pool.desired, revision=_REVISION, built=pool.source,
        ))  # fmt: skip
        for status in places:
            ref = pool.ref.instance(InstanceId.from_bytes(offset.to_bytes(4, "big")))
            store.insert_instance(Instance(
                ref, _NODE, offset, status, now, revision=_REVISION, last_started_at=now
            ))  # fmt: skip
            offset += 1


def noop_1k(bench: Bench) -> Result:
    with fleet(1_000, _PLACES) as small:
        bare, ours = _alternating(bench, "reconcile.noop_1k", small.read, small.pass_over)
    return at_most("reconcile.noop_1k", "s", "reading the rows", bare, ours, 0.3)


def noop_10k(bench: Bench) -> Result:
    bare, ours = _of_both(bench)
    return at_most("reconcile.noop_10k", "s", "10 passes over 1,000", bare, ours, 3)


def plan_10k(bench: Bench) -> Result:
    with fleet(10_000, _STOPPED) as stopped:
        ours = [stopped.plan(10_000) for _ in range(_RUNS + 1)][1:]
    return at_most("reconcile.plan_10k", "s", "nothing to do", _of_both(bench)[1], ours, 5)


@cache
def _of_both(bench: Bench) -> tuple[list[float], list[float]]:
    """Ten passes over 1,000 instances, against one over 10,000."""
    with fleet(1_000, _PLACES) as small, fleet(10_000, _PLACES) as large:
        return _alternating(
            bench, "reconcile.noop_10k", lambda: sum(small.pass_over() for _ in range(10)), large.pass_over
        )


def _alternating(
    bench: Bench, name: str, bare: Callable[[], float], ours: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """The first of each is not counted."""
    pairs = [(bare(), ours()) for _ in range(_RUNS + 1)][1:]
    bench.say(f"{name}: {', '.join(f'{pair[1]:.3f}' for pair in pairs)} s")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result
