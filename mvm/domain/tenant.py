"""Tenants: the boundary of security, quota and network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from ipaddress import IPv4Network
from typing import Any

from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import TenantId
from mvm.errors import InvalidInput, QuotaExceeded


@dataclass(frozen=True, slots=True)
class Quota:
    """Upper limits of one tenant. vCPUs and memory count running and warm instances, disk all data disks."""

    max_vcpus: int = 64
    max_mem_mib: int = 65536
    max_running: int = 64
    max_warm: int = 64
    max_pools: int = 32
    max_instances_per_pool: int = 128
    max_disk_gib: int = 256

    def to_dict(self) -> dict[str, int]:
        """JSON form."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1_000_000:
                raise InvalidInput(
                    "tenant.invalid_quota", f"{field.name} is {value}", hint="allowed: 0 to 1000000",
                    field=field.name, value=value,
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant holds now, in the quota's units (disk in MiB, because data disks are)."""

    vcpus: int = 0
    mem_mib: int = 0
    running: int = 0
    warm: int = 0
    pools: int = 0
    instances: int = 0
    disk_mib: int = 0


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit checked: using `used`, wanting `wanted` more, of at most `limit`."""

    name: str
    used: int
    wanted: int
    limit: int


def check_quota(tenant: TenantId, limits: Iterable[Limit]) -> None:
    """Raises `QuotaExceeded` for the first limit that `used + wanted` would pass."""
    for limit in limits:
        if limit.used + limit.wanted > limit.limit:
            raise QuotaExceeded(
                "quota.exceeded",
                f"tenant {tenant}: {limit.name} is {limit.limit}, {limit.used} in use, {limit.wanted} more wanted",
                hint=f"raise it with: mvm tenant update {tenant} --{_flag(limit.name)} N",
                field=limit.name, limit=limit.limit, used=limit.used, wanted=limit.wanted,
            )  # fmt: skip


def _flag(name: str) -> str:
    return {"max_mem_mib": "max-mem", "max_disk_gib": "max-disk"}.get(name, name.replace("_", "-"))


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with its quota and the network the coordinator gave it; `secrets_epoch` is 0 if it never had any."""

    id: TenantId
    network: TenantNetwork
    quota: Quota
    created_at: datetime
    secrets_epoch: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored and exchanged."""
        return {
            "tenant_id": str(self.id),
            "net_id": self.network.net_id,
            "subnet": str(self.network.subnet),
            "quota": self.quota.to_dict(),
            "created_at": self.created_at.isoformat(),
            "secrets_epoch": self.secrets_epoch,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tenant:
        """Inverse of `to_dict`."""
        return cls(
            TenantId(data["tenant_id"]),
            TenantNetwork(data["net_id"], IPv4Network(data["subnet"])),
            Quota(**data["quota"]),
            datetime.fromisoformat(data["created_at"]),
            data.get("secrets_epoch", 0),
        )
