"""Worker pools: one image, one shape, desired counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from mvm.domain.egress import NO_EGRESS, EgressPolicy
from mvm.domain.ids import NodeId, PoolRef, Revision
from mvm.domain.snapshot import Compression
from mvm.domain.vmm import OnExit
from mvm.errors import InvalidInput

MAX_COUNT = 10_000
MAX_POLICY_S = 31_536_000
MAX_USER_DATA = 16 << 10
MAX_REVISIONS = 32  # that a pool remembers


class Profile(StrEnum):
    """The built-in builder's profiles; ``baseline`` is ``minimal`` by its older name."""

    MINIMAL = "minimal"
    BASELINE = "baseline"
    PYTHON = "python"


BUILTIN = "builtin:"


class StartMode(StrEnum):
    """How a pool's instances start: as clones of its template, or each by a boot of its own."""

    CLONE = "clone"
    COLD = "cold"


class SeccompPolicy(StrEnum):
    """Which system calls a VMM may make: all but the dangerous ones, or only what its devices need."""

    BASELINE = "baseline"
    STRICT = "strict"

    @classmethod
    def parse(cls, text: object) -> SeccompPolicy:
        """Raises `InvalidInput` (``pool.invalid_seccomp``)."""
        if text not in tuple(cls):
            raise InvalidInput(
                "pool.invalid_seccomp", f"there is no seccomp policy {str(text)[:80]!r}",
                hint=f"allowed: {', '.join(cls)}", field="seccomp_policy", value=str(text)[:80],
            )  # fmt: skip
        return cls(str(text))


@dataclass(frozen=True, slots=True)
class ImageSource:
    """What an image is built from."""

    flake_ref: str
    profile: str

    def __post_init__(self) -> None:
        if self.flake_ref != BUILTIN:
            raise InvalidInput(
                "pool.unsupported_flake", f"flake {self.flake_ref!r} cannot be built here",
                hint="allowed: builtin:", field="flake", value=self.flake_ref[:200],
            )  # fmt: skip
        if self.profile not in tuple(Profile):
            raise InvalidInput(
                "pool.unknown_profile", f"{BUILTIN} has no profile {self.profile!r}",
                hint=f"allowed: {', '.join(Profile)}", field="profile", value=self.profile[:80],
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstanceResources:
    """One instance's shape. Memory and the data disk are in MiB; no data disk when 0."""

    vcpus: int = 1
    mem_mib: int = 256
    data_disk_mib: int = 0

    def __post_init__(self) -> None:
        self._within("vcpus", "cpus", 1, 64)
        self._within("mem_mib", "mem", 96, 262_144)  # a Linux guest needs 80, measured
        if self.data_disk_mib:
            self._within("data_disk_mib", "data-disk", 4, 1_048_576)

    def _within(self, name: str, flag: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise InvalidInput(
                "pool.invalid_resources", f"--{flag} is {value}", hint=f"allowed: {low} to {high}",
                field=name, value=value,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DesiredCounts:
    """How many instances a pool should have up.

    When only `running` is given, it is how many are up, be they running, warm or sleeping: which, the sleep policy
    says. A number for `warm` or `sleeping` is exact, `running` is then what runs, and the policy leaves the pool alone.
    """

    running: int = 0
    warm: int | None = None
    sleeping: int | None = None

    @property
    def total(self) -> int:
        """How many are up in all."""
        return self.running + (self.warm or 0) + (self.sleeping or 0)

    @property
    def exact(self) -> bool:
        """Whether it says where each instance is."""
        return self.warm is not None or self.sleeping is not None

    @property
    def flags(self) -> str:
        """As they are given to ``mvm pool scale``."""
        return " ".join(f"--{name} {count}" for name, count in self._given.items())

    @property
    def _given(self) -> dict[str, int]:
        counts = {"running": self.running, "warm": self.warm, "sleeping": self.sleeping}
        return {name: count for name, count in counts.items() if count is not None}

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in self._given.items())

    def __post_init__(self) -> None:
        for name in ("running", "warm", "sleeping"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_COUNT:
                raise InvalidInput(
                    "pool.invalid_count", f"--{name} is {value}", hint=f"allowed: 0 to {MAX_COUNT}",
                    field=name, value=value,
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SleepPolicy:
    """When idle instances are put away, in seconds; 0 means never.

    A running instance is made warm after `warm_after_s` of idleness and put to sleep after `sleep_after_s`, but not
    before it has run `min_running_s` since it was started or woken.
    """

    warm_after_s: int = 300
    sleep_after_s: int = 900
    min_running_s: int = 60

    def __post_init__(self) -> None:
        for name in ("warm_after_s", "sleep_after_s", "min_running_s"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_POLICY_S:
                raise _invalid_policy(name, value, f"allowed: 0 (never) to {MAX_POLICY_S}")
        if 0 < self.sleep_after_s < self.warm_after_s:
            raise _invalid_policy(
                "sleep_after_s", self.sleep_after_s, f"at least --warm-after, {self.warm_after_s}, or 0 (never)"
            )


def checked_user_data(content: bytes) -> str:
    """`content` as the text it must be; raises `InvalidInput` (``pool.invalid_user_data``)."""
    try:
        if len(content) <= MAX_USER_DATA and "\0" not in (text := content.decode()):
            return text
        what = "is too large, or holds a zero byte"
    except UnicodeDecodeError:
        what = "is not UTF-8"
    raise InvalidInput(
        "pool.invalid_user_data", f"the user data {what}", hint=f"allowed: at most {MAX_USER_DATA} bytes of UTF-8 text",
        field="user_data",
    )  # fmt: skip


def _invalid_policy(name: str, value: object, hint: str) -> InvalidInput:
    flag = name.removesuffix("_s").replace("_", "-")
    return InvalidInput("pool.invalid_policy", f"--{flag} is {value}", hint=hint, field=name, value=value)


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """A pool on its node. `desired` is None until somebody scales it: reconcile then leaves it alone.

    The sleep policy leaves the instances of `pinned` and `critical` pools alone. `user_data` is what its guests find
    at the metadata address, which they can ask unless it is not `metadata_enabled`. `built` is what `revision` was
    built from, which `source` need no longer be; `former` are those of before, newest first. A person last scaled
    it at `scaled_at`. `on_exit` says what becomes of those whose guests end by themselves.
    """

    ref: PoolRef
    source: ImageSource
    resources: InstanceResources
    node_id: NodeId
    created_at: datetime
    desired: DesiredCounts | None = None
    start: StartMode = StartMode.CLONE
    compression: Compression = Compression.ZSTD
    revision: Revision | None = None
    sleep_policy: SleepPolicy = SleepPolicy()
    pinned: bool = False
    critical: bool = False
    seccomp_policy: SeccompPolicy = SeccompPolicy.BASELINE
    egress: EgressPolicy = NO_EGRESS
    metadata_enabled: bool = True
    user_data: str = ""
    built: ImageSource | None = None
    former: tuple[Revision, ...] = ()
    scaled_at: datetime | None = None
    on_exit: OnExit = OnExit.RESTART

    @property
    def revisions(self) -> tuple[Revision, ...]:
        """Those it was built to, the newest first."""
        return (self.revision, *self.former) if self.revision else ()

    def at(self, revision: Revision, source: ImageSource) -> WorkerPool:
        """A copy whose instances start from `revision`, which was built from `source`."""
        former = tuple(each for each in self.revisions if each != revision)[: MAX_REVISIONS - 1]
        return replace(self, revision=revision, built=source, former=former)

    @property
    def protected(self) -> str | None:
        """Why the sleep policy leaves it alone, in a word."""
        if self.desired and self.desired.exact:
            return "scaled exactly"
        return "pinned" if self.pinned else "critical" if self.critical else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored and exchanged."""
        return {
            "ref": str(self.ref),
            "flake_ref": self.source.flake_ref,
            "profile": self.source.profile,
            "resources": asdict(self.resources),
            "node_id": str(self.node_id),
            "created_at": self.created_at.isoformat(),
            "desired": asdict(self.desired) if self.desired else None,
            "start": self.start.value,
            "compression": self.compression.value,
            "revision": self.revision,
            "sleep_policy": asdict(self.sleep_policy),
            "pinned": self.pinned,
            "critical": self.critical,
            "seccomp_policy": self.seccomp_policy.value,
            "egress": self.egress.to_dict(),
            "metadata_enabled": self.metadata_enabled,
            "user_data": self.user_data,
            "built": [self.built.flake_ref, self.built.profile] if self.built else None,
            "former": list(self.former),
            "scaled_at": self.scaled_at.isoformat() if self.scaled_at else None,
            "on_exit": self.on_exit.value,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkerPool:
        """Inverse of `to_dict`."""
        return cls(
            ref=PoolRef.parse(data["ref"]),
            source=ImageSource(data["flake_ref"], data["profile"]),
            resources=InstanceResources(**data["resources"]),
            node_id=NodeId(data["node_id"]),
            created_at=datetime.fromisoformat(data["created_at"]),
            desired=DesiredCounts(**data["desired"]) if data["desired"] else None,
            start=StartMode(data.get("start", StartMode.CLONE)),
            compression=Compression(data.get("compression", Compression.ZSTD)),
            revision=Revision(data["revision"]) if data["revision"] else None,
            sleep_policy=SleepPolicy(**data.get("sleep_policy", {})),
            pinned=data.get("pinned", False),
            critical=data.get("critical", False),
            seccomp_policy=SeccompPolicy(data.get("seccomp_policy", SeccompPolicy.BASELINE)),
            egress=EgressPolicy.from_dict(data.get("egress", {})),
            metadata_enabled=data.get("metadata_enabled", True),
            user_data=data.get("user_data", ""),
            built=ImageSource(*data["built"]) if data.get("built") else None,
            former=tuple(map(Revision, data.get("former", ()))),
            scaled_at=datetime.fromisoformat(data["scaled_at"]) if data.get("scaled_at") else None,
            on_exit=OnExit(data.get("on_exit", OnExit.RESTART)),
        )
