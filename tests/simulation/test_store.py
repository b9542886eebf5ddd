"""The store without a disk does what SQLite does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.domain.audit import Link
from mvm.domain.ids import PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import JobState
from mvm.domain.lifecycle import Status
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import MvmError
from mvm.ports.store import NodeStore, Note
from tests.simulation.store import MemoryStore
from tests.support import make
from tests.support.fleets import network
from tests.support.make import ACME, NODE, START, WEB, instance_ref

S = Status
REFS = [instance_ref(n, pool) for pool in (WEB, PoolRef(TenantId("bolt"), WEB.pool)) for n in range(3)]
JOBS = [make.job(subject=str(REFS[n % 2])) for n in range(4)]
TENANTS = [Tenant(TenantId(name), network(at), Quota(), START) for at, name in enumerate(("acme", "bolt"))]

Act = Callable[[NodeStore], Any]
numbers = st.integers(0, 5)


def _insert(n: int) -> Act:
    return lambda store: store.insert_instance(Instance(REFS[n], NODE, 3 + n, S.CREATED, START))


def _save(n: int, status: Status, late: bool) -> Act:
    def act(store: NodeStore) -> Instance:
        seen = store.instance(REFS[n])
        return store.save_instance(replace(seen, status=status, generation=seen.generation - late, lease=n))

    return act


def _job(n: int, state: JobState, deaths: int) -> Act:
    return lambda store: store.put_job(JOBS[n].with_(state=state, deaths=deaths))


def _audit(n: int) -> Act:
    def act(store: NodeStore) -> None:
        head = store.audit_head(ACME) or Link(0, "")
        store.put_audit(ACME, f"line {head.seq + 1}", Link(head.seq + 1, str(n)))

    return act


acts = st.one_of(
    st.builds(_insert, numbers),
    st.builds(_save, numbers, st.sampled_from(Status), st.booleans()),
    st.builds(lambda n: lambda store: store.delete_instance(REFS[n]), numbers),
    st.builds(lambda n: lambda store: store.put_note(REFS[n], Note.SLEPT, {"n": n}), numbers),
    st.builds(_job, st.integers(0, 3), st.sampled_from(JobState), st.integers(0, 2)),
    st.builds(_audit, numbers),
    st.builds(lambda n: lambda store: store.drop_audit(ACME, n), numbers),
    st.builds(lambda n: lambda store: store.forget_jobs(keep=n), numbers),
    st.builds(lambda n: lambda store: store.put_tenant(TENANTS[n % 2]), numbers),
    st.builds(lambda n: lambda store: store.delete_tenant(TENANTS[n % 2].id), numbers),
    st.builds(lambda n: lambda store: store.put_desired({"n": n}), numbers),
)


def told(act: Act, store: NodeStore) -> Any:
    try:
        return act(store)
    except MvmError as error:
        return error.code


def all_of(store: NodeStore) -> list[Any]:
    return [
        store.tenants(), store.given_net_ids(), store.pools(), store.instances(), store.instances(tenant=ACME),
        store.instances(pool=WEB), [store.lease(ref) for ref in REFS], store.notes(Note.SLEPT), store.desired(),
        [store.job(job.job_id) for job in JOBS], store.unfinished_jobs(), store.last_job(str(REFS[0])),
        store.last_job(str(REFS[1]), state=JobState.FAILED), store.audit_head(ACME), store.pending_audit(ACME),
        store.unwritten_trails(),
    ]  # fmt: skip


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Callable[[], SqliteStore]]:
    made: list[SqliteStore] = []

    def fresh() -> SqliteStore:
        made.append(SqliteStore(tmp_path / f"{len(made)}.db"))
        return made[-1]

    yield fresh
    for store in made:
        store.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(acts, max_size=5), st.sampled_from(["plain", "whole", "broken off"])), max_size=5))
def test_it_does_what_sqlite_does(sqlite: Callable[[], SqliteStore], steps: list[tuple[list[Act], str]]) -> None:
    stores: list[NodeStore] = [sqlite(), MemoryStore()]
    for acts_, how in steps:
        answers = []
        for store in stores:
            if how == "plain":
                answers.append([told(act, store) for act in acts_])
                continue
            with pytest.raises(ZeroDivisionError) if how == "broken off" else store.transaction():
                if how == "broken off":
                    with store.transaction():
                        answers.append([told(act, store) for act in acts_])
                        raise ZeroDivisionError
                answers.append([told(act, store) for act in acts_])
        assert answers[0] == answers[1]
        assert all_of(stores[0]) == all_of(stores[1])
