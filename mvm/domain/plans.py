"""A plan as a value: kept, shown as a diff, and refused once the world has moved. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from itertools import groupby
from typing import Any

from mvm.domain.actions import (
    Action,
    Build,
    Change,
    Create,
    CreatePool,
    CreateTenant,
    DestroyPool,
    DestroyTenant,
    Request,
    UpdatePool,
    UpdateTenant,
    plain,
)  # fmt: skip
from mvm.domain.desired import DesiredPool, DesiredState, digest
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import TRANSITIONS
from mvm.domain.planner import Observed, decide
from mvm.domain.pool import ImageSource
from mvm.domain.remarks import Remark, told
from mvm.errors import NotAllowed

_SHOWN = 20  # instances of one pool that are asked for the same


def fingerprint(desired: DesiredState, observed: Observed) -> str:
    """Names a document and the state it meets: another one when anything that a plan goes by has changed."""
    hashed = sha256(digest(desired).encode())
    for tenant in sorted(observed.tenants, key=lambda t: t.id):
        hashed.update(repr(tenant).encode())
    for pool in sorted(observed.pools, key=lambda p: p.ref):
        hashed.update(repr(pool).encode())
    scaled_at = {pool.ref: pool.scaled_at for pool in observed.pools}
    for instance in sorted(observed.instances, key=lambda i: i.ref):
        hashed.update(_row(instance, observed, scaled_at.get(instance.ref.pool_ref)).encode())
    for verb, subject in sorted(observed.jobs):
        hashed.update(f"job {verb} {subject}\n".encode())
    for verb, subject in sorted(observed.resting):
        hashed.update(f"rests {verb} {subject}\n".encode())
    hashed.update(f"{observed.uplink} {observed.host_mib} {observed.can_build}\n".encode())
    return hashed.hexdigest()


def _row(instance: Instance, observed: Observed, scaled_at: datetime | None) -> str:
    held = instance.held_until(observed.now, scaled_at) is not None
    job = instance.in_flight.job_id if instance.in_flight else "-"
    well = instance.ref not in observed.unhealthy
    able = instance.ref not in observed.sleepless
    proven = instance.ref not in observed.unproven
    failed = instance.last_error is not None
    return f"{instance.ref} {instance.status} {instance.revision} {job} {failed} {held} {well} {able} {proven}\n"


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done to which state."""

    fingerprint: str
    actions: tuple[Action, ...]
    remarks: tuple[Remark, ...] = ()
    rolling: int = 0

    @classmethod
    def make(cls, desired: DesiredState, observed: Observed) -> Plan:
        """The plan for now."""
        outcome = decide(desired, observed)
        return cls(fingerprint(desired, observed), outcome.actions, outcome.remarks, outcome.rolling)

    @property
    def news(self) -> tuple[Remark, ...]:
        """What people should know of it: not that work takes its time."""
        return told(self.remarks)

    def check_current(self, expected: str) -> None:
        """Raises `NotAllowed` (``desired.plan_outdated``) unless `expected` is the fingerprint of this plan."""
        if self.fingerprint != expected:
            raise NotAllowed(
                "desired.plan_outdated", "the node or the desired state has changed since the plan was made",
                hint="plan again: mvm agent reconcile --desired F --plan", expected=expected, found=self.fingerprint,
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for people and programs; it is not read back but for the fingerprint."""
        return {
            "fingerprint": self.fingerprint,
            "actions": [_action(action) for action in self.actions],
            "remarks": [{**remark.to_dict(), "remark": remark.text} for remark in self.news],
        }

    def to_text(self) -> str:
        """A diff: ``+`` comes, ``-`` goes, ``~`` changes."""
        lines = list(_lines(self.actions))
        lines += [f"! {remark}" for remark in self.news]
        return "\n".join(lines) if lines else "nothing to do"


def _lines(actions: tuple[Action, ...]) -> Iterator[str]:
    for key, group in groupby(actions, key=_alike):
        same = list(group)
        if key is not None:
            for action in same[:_SHOWN]:
                yield _line(action)
            if len(same) > _SHOWN:
                yield f"{_line(same[0])[0]} {key}: and {len(same) - _SHOWN} more alike"
        else:
            for action in same:
                yield from _line(action).splitlines()


def _alike(action: Action) -> str | None:
    """What requests that can be told together have in common."""
    return f"{action.ref.pool_ref} {action.verb}, {action.why}" if isinstance(action, Request) else None


def _line(action: Action) -> str:
    match action:
        case CreateTenant(tenant):
            network = tenant.network
            return f"+ tenant {tenant.id}  net id {network.net_id}, {network.subnet}"
        case UpdateTenant(tenant, before, quota):
            old, new = asdict(before), asdict(quota)
            changes = [_change(Change(name, old[name], new[name])) for name in new if old[name] != new[name]]
            return "\n".join([f"~ tenant {tenant}", *changes])
        case CreatePool(pool):
            return f"+ pool {pool.ref}  {_source(pool.source)}, {_wanted(pool)}"
        case UpdatePool(pool, changes):
            return "\n".join([f"~ pool {pool}", *map(_change, changes)])
        case Build(pool, source):
            return f"+ image of {pool}  {_source(source)}"
        case Create(pool, count):
            return f"+ {count} instance{'s' * (count > 1)} of {pool}  -> running"
        case Request(ref, verb, status, why):
            return f"{'-' if verb == 'destroy' else '~'} {ref}  {status} -> {TRANSITIONS[status, verb]}  ({why})"
        case DestroyPool(pool):
            return f"- pool {pool}"
        case DestroyTenant(tenant):
            return f"- tenant {tenant}"


def _change(change: Change) -> str:
    return f"    {change.name}: {_value(change.before)} -> {_value(change.after)}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} {_value(inner)}" for name, inner in value.items()) + "}"
    return "not set" if value is None else str(value)


def _source(source: ImageSource) -> str:
    return f"{source.flake_ref} {source.profile}"


def _wanted(pool: DesiredPool) -> str:
    shape = pool.resources
    return f"{shape.vcpus} vCPU, {shape.mem_mib} MiB"


def _action(action: Action) -> dict[str, Any]:
    """Its words as JSON."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(action).__name__).lstrip("_")
    match action:
        case CreateTenant(tenant):
            return {"do": name, "tenant": tenant.id, "net_id": tenant.network.net_id,
                    "subnet": str(tenant.network.subnet), "quota": asdict(tenant.quota)}  # fmt: skip
        case UpdateTenant(tenant, before, quota):
            return {"do": name, "tenant": tenant, "before": asdict(before), "after": asdict(quota)}
        case CreatePool(pool):
            return {"do": name, "pool": str(pool.ref), "source": plain(pool.source), "resources": plain(pool.resources)}
        case UpdatePool(pool, changes):
            return {"do": name, "pool": str(pool), "changes": [asdict(change) for change in changes]}
        case Build(pool, source):
            return {"do": name, "pool": str(pool), "source": plain(source)}
        case Create(pool, count):
            return {"do": name, "pool": str(pool), "count": count}
        case Request(ref, verb, status, why):
            return {"do": verb.value, "instance": str(ref), "status": status.value, "why": why.value}
        case DestroyPool(pool):
            return {"do": name, "pool": str(pool)}
        case DestroyTenant(tenant):
            return {"do": name, "tenant": tenant}
