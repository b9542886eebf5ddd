"""What of a plan a pass asks for, and what it lets rest since that has just failed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from mvm.domain.actions import Action, Create, DestroyPool, Errand, Request, errand, scope, waits_for
from mvm.domain.ids import InstanceRef, PoolRef, TenantId
from mvm.domain.remarks import Cause, Failure, Remark


@dataclass(frozen=True, slots=True)
class Rest:
    """What was asked for last has failed with `code`, and is not asked for again before `until`."""

    code: str
    until: datetime


@dataclass(slots=True)
class _Group:
    """Instances of one pool that the same is told of: some by name, and how many that are still to be made."""

    refs: list[InstanceRef] = field(default_factory=list)
    unnamed: int = 0

    @property
    def count(self) -> int:
        return len(self.refs) + self.unnamed


def without_rests(
    actions: Sequence[Action], resting: Mapping[Errand, Rest]
) -> tuple[tuple[Action, ...], tuple[Remark, ...]]:
    """`actions` without those that rest and those that need one of these done first; and remarks that name all of
    them, each with the failure that it waits for.
    """
    rests = [(action, resting[errand(action)]) for action in actions if errand(action) in resting] if resting else []
    if not rests:
        return tuple(actions), ()
    going = [action for action in actions if errand(action) not in resting]
    waits = waits_for([action for action, _ in rests])
    waiting = [action for action in going if waits(action)]
    remarks = [remark for action, rest in rests for remark in _failed(action, rest, waiting)]
    return tuple(action for action in going if not waits(action)), tuple(remarks)


def _failed(failed: Action, rest: Rest, waiting: Sequence[Action]) -> Iterator[Remark]:
    """One for what `failed` is about, and one for each pool of which something is `waiting` for that."""
    verb, subject = errand(failed)
    waits = waits_for([failed])
    groups = _by_pool([failed, *(action for action in waiting if waits(action))])
    for about, group in {scope(failed): _Group(), **groups}.items():
        failure = Failure(verb, subject, rest.code)
        yield Remark(about, Cause.FAILED, group.count, tuple(group.refs), rest.until, failure=failure)


def coming(actions: Iterable[Action]) -> tuple[Remark, ...]:
    """That the next pass asks for `actions`, by the pools that they bring to their counts."""
    return tuple(
        Remark(pool, Cause.NEXT_PASS, group.count, tuple(group.refs)) for pool, group in _by_pool(actions).items()
    )


def begun(remarks: Iterable[Remark], tried: Iterable[Action], instances: Iterable[InstanceRef]) -> tuple[Remark, ...]:
    """`remarks` of a plan once a pass has `tried` some of its actions, and asked for jobs of these `instances`: what
    the next pass was to ask for is under way.
    """
    tried = list(tried)
    pools = set(_by_pool(tried))
    asked: dict[TenantId | PoolRef, list[InstanceRef]] = {a.pool: [] for a in tried if isinstance(a, DestroyPool)}
    for ref in instances:
        asked.setdefault(ref.pool_ref, []).append(ref)
    kept: list[Remark] = []
    for remark in remarks:
        if remark.cause is Cause.UNDER_WAY and remark.subject in asked:
            asked[remark.subject] += remark.refs
        elif remark.cause is not Cause.NEXT_PASS or remark.subject not in pools:
            kept.append(remark)
    return (*kept, *(Remark(pool, Cause.UNDER_WAY, len(refs), tuple(refs)) for pool, refs in asked.items()))


def _by_pool(actions: Iterable[Action]) -> dict[TenantId | PoolRef, _Group]:
    """Of those `actions` that make, move or remove instances, and pools with them."""
    groups: dict[TenantId | PoolRef, _Group] = {}
    for action in actions:
        if not isinstance(action, Request | Create | DestroyPool):
            continue
        group = groups.setdefault(scope(action), _Group())
        if isinstance(action, Request):
            group.refs.append(action.ref)
        elif isinstance(action, Create):
            group.unnamed += action.count
    return groups
