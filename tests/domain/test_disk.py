"""What lies on the disk and what of it nobody needs, as values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mvm.domain.disk import Kind, Level, Row, Stored, Watermarks, checked_keep, cleaning, rows, size, users
from mvm.domain.ids import JobId, PoolId, PoolRef, Revision, TenantId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.pool import MAX_REVISIONS, ImageSource, InstanceResources, WorkerPool
from mvm.errors import InvalidInput
from tests.support.make import ACME, NODE, START, WEB, instance_ref

SOURCE = ImageSource("builtin:", "minimal")
A, B, C, D = (Revision(letter * 64) for letter in "abcd")
DB = PoolRef(ACME, PoolId("db"))
OTHER = PoolRef(TenantId("beta"), PoolId("web"))
JOB = JobId("j-01a20b5fcc50-c5e7511ae5")


def pool(*built: Revision, ref: PoolRef = WEB) -> WorkerPool:
    """A pool that was built to these, the last one now."""
    made = WorkerPool(ref, SOURCE, InstanceResources(), NODE, START)
    for revision in built:
        made = made.at(revision, SOURCE)
    return made


def instance(status: Status, revision: Revision | None = None, **changes: Any) -> Instance:
    return replace(Instance(instance_ref(), NODE, 3, status, START, revision=revision), **changes)


def test_a_pool_remembers_its_revisions_newest_first() -> None:
    assert pool().revisions == ()
    assert pool(A, B, C).revisions == (C, B, A)
    assert pool(A, B, A).revisions == (A, B)
    assert pool(A, A).revisions == (A,)
    many = pool(*(Revision(f"{n:064x}") for n in range(MAX_REVISIONS + 5)))
    assert len(many.revisions) == MAX_REVISIONS
    assert WorkerPool.from_dict(many.to_dict()) == many
    old = {name: value for name, value in pool(A).to_dict().items() if name != "former"}
    assert WorkerPool.from_dict(old).revisions == (A,)


@pytest.mark.parametrize(("keep", "gone"), [(1, (A, B)), (2, (A,)), (3, ()), (32, ())])
def test_the_newest_stay_and_templates_go_with_their_revisions(keep: int, gone: tuple[Revision, ...]) -> None:
    found = cleaning([pool(A, B, C)], [], {A, B, C}, {(WEB, A), (WEB, C)}, keep=keep, building=False)
    assert found.revisions == gone
    assert found.templates == (((WEB, A),) if A in gone else ())
    assert found.kept[C] == f"pool {WEB} starts from it"


@pytest.mark.parametrize("status", [Status.RUNNING, Status.WARM, Status.SLEEPING])
def test_what_an_instance_runs_or_sleeps_on_stays_with_its_template(status: Status) -> None:
    found = cleaning(
        [pool(A, B, C)], [instance(status, A, cloned=True)], {A, B, C}, {(WEB, A), (WEB, B)}, keep=1, building=False
    )
    assert (found.revisions, found.templates) == ((B,), ((WEB, B),))
    assert found.kept[A] == f"{instance_ref()} is {status} on it"


@pytest.mark.parametrize("status", [Status.STOPPED, Status.READY])
def test_what_a_stopped_one_ran_does_not_stay(status: Status) -> None:
    assert cleaning([pool(A, B)], [instance(status, A)], {A, B}, set(), keep=1, building=False).revisions == (A,)


def test_while_an_instance_has_a_job_its_pool_keeps_all() -> None:
    starting = instance(Status.STOPPED, in_flight=InFlight(JOB, Verb.START))
    assert cleaning([pool(A, B, C)], [starting], {A, B, C}, {(WEB, A)}, keep=1, building=False).revisions == ()


def test_revisions_of_other_pools_and_of_none() -> None:
    pools = [pool(A, B), pool(A, ref=DB)]
    found = cleaning(pools, [], {A, B, C}, {(WEB, A), (DB, A), (OTHER, B)}, keep=1, building=False)
    assert found.revisions == (C,)
    assert found.templates == ((WEB, A), (OTHER, B))
    assert cleaning(pools, [], {A, B, C}, set(), keep=1, building=True).kept[C] == "an image is being built"


def test_what_one_pool_uses_is_its_own_and_what_several_use_is_counted_once() -> None:
    stored = [
        Stored(Kind.REVISION, A, 100, revision=A),
        Stored(Kind.REVISION, B, 10, 5, revision=B),
        Stored(Kind.REVISION, C, 1, revision=C),
        Stored(Kind.REVISION, D, 7, revision=D),
        Stored(Kind.OVERLAY, "x", 3, pool=WEB),
        Stored(Kind.OVERLAY, "y", 4, pool=WEB),
    ]
    named = users([pool(A, B), pool(A, ref=OTHER), pool(C, ref=DB)], [instance(Status.RUNNING, C)])
    assert rows(stored, named) == (
        Row(None, None, Kind.REVISION, 2, 107, 0),
        Row(ACME, None, Kind.REVISION, 1, 1, 0),
        Row(ACME, WEB, Kind.OVERLAY, 2, 7, 0),
        Row(ACME, WEB, Kind.REVISION, 1, 10, 5),
    )


def test_watermarks() -> None:
    marks = Watermarks(low=100, reserve=10)
    assert [marks.level(free) for free in (100, 99, 10, 9)] == [Level.OK, Level.LOW, Level.LOW, Level.FULL]


@pytest.mark.parametrize("value", [0, -1, 33, 10**9, "3", 1.5, True, None])
def test_keep_is_a_small_number(value: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        checked_keep(value)
    assert (refused.value.code, refused.value.fields["field"]) == ("disk.invalid_keep", "keep")
    assert checked_keep(32) == 32


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 19, 5 << 30, 3 << 40)] == [
        "0B", "1023B", "1.0K", "1.5M", "5.0G", "3072.0G",
    ]  # fmt: skip
