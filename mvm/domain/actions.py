"""What reconcile can do, as values, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum, StrEnum
from typing import Any

from mvm.domain.desired import DesiredPool, DesiredTenant
from mvm.domain.egress import EgressPolicy
from mvm.domain.ids import InstanceRef, PoolRef, TenantId
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.pool import ImageSource
from mvm.domain.tenant import Quota


class Why(StrEnum):
    """Why an instance is asked for something: a clause for people."""

    TOO_FEW = "too few"
    TOO_MANY = "too many"
    PLACE = "more are wanted there"
    UNHEALTHY = "its guest is not well"
    ROLLOUT = "it has another revision"
    UNLISTED = "its pool is not asked for"
    REBOOTED = "its guest rebooted"


@dataclass(frozen=True, slots=True)
class CreateTenant:
    """Create a tenant with its network and quota."""

    tenant: DesiredTenant


@dataclass(frozen=True, slots=True)
class UpdateTenant:
    """Give a tenant another quota."""

    tenant: TenantId
    before: Quota
    quota: Quota


@dataclass(frozen=True, slots=True)
class CreatePool:
    """Create a pool."""

    pool: DesiredPool


@dataclass(frozen=True, slots=True)
class Change:
    """A field of a pool, and the JSON value that it has and should have."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class UpdatePool:
    """Change fields of a pool."""

    pool: PoolRef
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Build:
    """Build a pool's image; `first` when it has none yet, so that nothing can start before."""

    pool: PoolRef
    source: ImageSource
    first: bool


@dataclass(frozen=True, slots=True)
class Create:
    """Create `count` instances in `pool` and start them."""

    pool: PoolRef
    count: int


@dataclass(frozen=True, slots=True)
class Request:
    """Ask `verb` of one instance that is `status`."""

    ref: InstanceRef
    verb: Verb
    status: Status
    why: Why


@dataclass(frozen=True, slots=True)
class DestroyPool:
    """Destroy a pool that has no instances any more."""

    pool: PoolRef


@dataclass(frozen=True, slots=True)
class DestroyTenant:
    """Destroy a tenant that has no pools any more."""

    tenant: TenantId


Action = CreateTenant | UpdateTenant | CreatePool | UpdatePool | Build | Create | Request | DestroyPool | DestroyTenant

_ORDER: Sequence[tuple[Any, ...]] = (
    (CreateTenant,), (UpdateTenant,), (CreatePool,), (UpdatePool,), (Build,),
    (Verb.WAKE, Status.SLEEPING), (Verb.WAKE, Status.WARM), (Verb.START,), (Create,),
    (Verb.STOP,), (Verb.WARM,), (Verb.SLEEP,), (Verb.DESTROY,), (DestroyPool,), (DestroyTenant,),
)  # fmt: skip
_RANK = {kind: rank for rank, kind in enumerate(_ORDER)}
_INSTANCES = (Create, Request)


def rank(action: Action) -> int:
    """Its place in a plan: what makes things first, then wake, resume, start, create, stop, warm, sleep, destroy."""
    if isinstance(action, Request):
        return _RANK[(action.verb, action.status) if action.verb is Verb.WAKE else (action.verb,)]
    return _RANK[(type(action),)]


def scope(action: Action) -> TenantId | PoolRef:
    """The tenant or pool that it is about."""
    match action:
        case CreateTenant(tenant):
            return tenant.id
        case UpdateTenant(tenant=id) | DestroyTenant(tenant=id):
            return id
        case CreatePool(wanted):
            return wanted.ref
        case Request(ref=ref):
            return ref.pool_ref
        case UpdatePool(pool=pool) | Build(pool=pool) | Create(pool=pool) | DestroyPool(pool=pool):
            return pool


Errand = tuple[JobVerb, str]
"""A job's verb and its subject."""


def errand(action: Action) -> Errand:
    """The job that does what `action` says. `Create` has one for each instance, of which none has a name yet: it is
    told as that of its pool.
    """
    match action:
        case CreateTenant(tenant):
            return JobVerb.TENANT_CREATE, tenant.id
        case UpdateTenant(tenant=id):
            return JobVerb.TENANT_UPDATE, id
        case DestroyTenant(tenant=id):
            return JobVerb.TENANT_DESTROY, id
        case CreatePool(wanted):
            return JobVerb.POOL_CREATE, str(wanted.ref)
        case UpdatePool(pool=pool):
            return JobVerb.POOL_UPDATE, str(pool)
        case Build(pool=pool):
            return JobVerb.POOL_BUILD, str(pool)
        case DestroyPool(pool):
            return JobVerb.POOL_DESTROY, str(pool)
        case Create(pool=pool):
            return JobVerb.INSTANCE_CREATE, str(pool)
        case Request(ref, verb):
            return JobVerb(f"instance.{verb}"), str(ref)


def ready(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Those that can be done now. The others need one of these first: plan again once they are done."""
    waits = waits_for(actions)
    return tuple(action for action in actions if not waits(action))


def waits_for(first: Sequence[Action]) -> Callable[[Action], bool]:
    """Whether an action needs one of `first` done before it."""
    tenants = {scope(a) for a in first if isinstance(a, CreateTenant | UpdateTenant)}
    pools = {scope(a) for a in first if isinstance(a, CreatePool | UpdatePool)}
    unbuilt = {a.pool for a in first if isinstance(a, Build) and a.first}
    inhabited = {scope(a) for a in first if isinstance(a, _INSTANCES)}
    owners = {_tenant(a) for a in first if not isinstance(a, DestroyTenant)}

    def waits(action: Action) -> bool:
        match action:
            case CreateTenant() | UpdateTenant():
                return False
            case DestroyTenant(tenant):
                return tenant in owners
            case CreatePool() | UpdatePool():
                return _tenant(action) in tenants
            case Build():
                return _tenant(action) in tenants or action.pool in pools
            case DestroyPool(pool):
                return pool in inhabited
            case Create() | Request():
                return _tenant(action) in tenants or scope(action) in pools | unbuilt

    return waits


def ordered(actions: Iterable[Action]) -> tuple[Action, ...]:
    """In the order of a plan; equals stay as they come."""
    return tuple(sorted(actions, key=rank))


def _tenant(action: Action) -> TenantId:
    about = scope(action)
    return about.tenant if isinstance(about, PoolRef) else about


def plain(value: Any) -> Any:
    """A field of a pool as a JSON value, as jobs carry it."""
    if isinstance(value, EgressPolicy):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
