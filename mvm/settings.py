"""Settings: ``MVM_*`` variables over one TOML file over defaults, read once by the process that starts things.

Commands that only talk to a running stack read the small connection file that ``mvm up`` wrote instead.
"""

from __future__ import annotations

import json
import os
import socket
import tomllib
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mvm.domain.firewall import TENANT_FLOWS, Plan, parse_host_ports
from mvm.domain.identity import Identity, Place
from mvm.domain.ids import NodeId, node_id_from_hostname
from mvm.domain.layout import DEFAULT_STATE_DIR, MAX_ROOT_BYTES, StateLayout
from mvm.domain.tries import TryPolicy, parse_deadlines
from mvm.errors import Failed, InvalidInput


class _TomlFile(PydanticBaseSettingsSource):
    """The file named by ``MVM_CONFIG``, if any."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise AssertionError("this source answers as a whole")

    def __call__(self) -> dict[str, Any]:
        config = os.environ.get("MVM_CONFIG")
        if not config:
            return {}
        try:
            return tomllib.loads(Path(config).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise InvalidInput(
                "settings.unreadable", f"{config}: {why}", hint="correct the file, or unset MVM_CONFIG",
                field="MVM_CONFIG",
            ) from None  # fmt: skip


class Settings(BaseSettings):
    """Everything that can be set. Durations are in seconds."""

    model_config = SettingsConfigDict(env_prefix="MVM_", extra="forbid", frozen=True)

    state_dir: Path = DEFAULT_STATE_DIR
    redis_url: str = ""
    broker_url: str = ""
    node_id: str = ""
    netns: str = ""  # "host" keeps everything in the caller's namespace
    driver: Literal["qemu", "fake"] = "qemu"
    log: str = "info"
    log_format: Literal["text", "json"] = "json"
    agent_host: str = "127.0.0.1"
    agent_port: int = Field(4433, ge=1, le=65535)
    flower_port: int = Field(5555, ge=1, le=65535)
    metrics_port: int = Field(9464, ge=1, le=65535)
    uplink: str = Field("", max_length=15, pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$")
    host_ports: str = ""
    egress_never: str = ""
    tenant_flows: int = Field(TENANT_FLOWS, ge=16, le=1 << 20)
    worker_threads: int = Field(16, ge=1, le=256)
    urgent_threads: int = Field(4, ge=1, le=64)
    parallel_boots: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, le=1024)
    boot_deadline_s: float = Field(30.0, gt=0, le=600)
    sleep_deadline_s: float = Field(10.0, gt=0, le=600)
    stop_grace_s: float = Field(10.0, ge=0, le=600)
    visibility_timeout_s: int = Field(60, ge=5, le=86400)
    stale_pid_sweep_s: float = Field(10.0, ge=0.5, le=86400)
    orphan_sweep_s: float = Field(60.0, ge=0.5, le=86400)
    reconcile_sweep_s: float = Field(15.0, ge=0.5, le=86400)
    manual_hold_s: float = Field(600.0, ge=0, le=31_536_000)
    idleness_sweep_s: float = Field(30.0, ge=0.5, le=86400)
    memory_reserve_percent: float = Field(10.0, ge=0, le=90)
    health_sweep_s: float = Field(10.0, ge=0.5, le=86400)
    health_checks: int = Field(6, ge=1, le=1000)
    health_answer_s: float = Field(5.0, gt=0, le=600)
    disk_sweep_s: float = Field(300.0, ge=0.5, le=86400)
    disk_low_mib: int = Field(4096, ge=0, le=1 << 30)
    disk_reserve_mib: int = Field(1024, ge=0, le=1 << 30)
    keep_revisions: int = Field(3, ge=1, le=32)
    orphan_grace_s: float = Field(60.0, ge=0, le=86400)
    heartbeat_s: float = Field(3.0, ge=0.2, le=60)
    require_isolation: bool = False
    job_attempts: int = Field(3, ge=1, le=100)
    job_deadlines: str = ""
    job_expires_s: float = Field(86400.0, gt=0, le=31_536_000)
    job_worker_deaths: int = Field(5, ge=1, le=100)
    retry_base_s: float = Field(1.0, ge=0, le=3600)
    retry_cap_s: float = Field(60.0, ge=0, le=86400)
    takeover_s: float = Field(30.0, ge=1, le=3600)
    keep_jobs: int = Field(10_000, ge=100, le=1_000_000)

    @field_validator("state_dir")
    @classmethod
    def _one_spelling(cls, value: Path) -> Path:
        """Without links, for one may be turned elsewhere while a stack runs; unless only the link is short enough."""
        path = os.path.realpath(value)
        return Path(path) if len(os.fsencode(path)) <= MAX_ROOT_BYTES else value.absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What `load_settings` passes (command-line flags) over the environment over the TOML file."""
        return init_settings, env_settings, _TomlFile(settings_cls)

    @field_validator("uplink")
    @classmethod
    def _not_ours(cls, value: str) -> str:
        if value.startswith(("br-tenant-", "tn", "mvmtmpl")):
            raise ValueError("this name is kept for guests' interfaces")
        return value

    @field_validator("host_ports")
    @classmethod
    def _ports(cls, value: str) -> str:
        return ",".join(map(str, parse_host_ports(value)))

    @field_validator("egress_never")
    @classmethod
    def _networks(cls, value: str) -> str:
        return ",".join(str(IPv4Network(word)) for word in value.replace(",", " ").split())

    @field_validator("job_deadlines")
    @classmethod
    def _deadlines(cls, value: str) -> str:
        parse_deadlines(value)
        return value

    @property
    def tries(self) -> TryPolicy:
        """How jobs are tried again."""
        return TryPolicy(
            self.job_attempts, self.retry_base_s, self.retry_cap_s, self.job_worker_deaths,
            parse_deadlines(self.job_deadlines),
        )  # fmt: skip

    @property
    def plan(self) -> Plan:
        """What the node's packet filter is made from."""
        never = tuple(IPv4Network(word) for word in self.egress_never.split(",") if word)
        return Plan(self.uplink, parse_host_ports(self.host_ports), never, self.tenant_flows)

    @property
    def layout(self) -> StateLayout:
        """Paths below the state directory."""
        return StateLayout(self.state_dir)

    @property
    def node(self) -> NodeId:
        """This node's id; unless set, and for a state directory that has none yet, the host's short name."""
        return NodeId(self.node_id) if self.node_id else node_id_from_hostname(socket.gethostname())

    @property
    def namespace(self) -> str | None:
        """The network namespace's name; None for the caller's own."""
        if self.netns == "host":
            return None
        return self.netns or self.layout.default_netns

    @property
    def redis(self) -> str:
        """The registry's URL; the private Redis by default."""
        return self.redis_url or f"unix://{self.layout.redis_socket}"

    @property
    def broker(self) -> str:
        """The broker's URL in Celery's spelling; the registry's Redis by default."""
        url = self.broker_url or self.redis
        return url.replace("unix://", "redis+socket://", 1)

    def environment(self) -> dict[str, str]:
        """These settings as ``MVM_*`` variables, for the processes of the stack."""
        values = self.model_dump(mode="json")
        return {f"MVM_{name.upper()}": str(value) for name, value in values.items()}


def load_settings(**overrides: object) -> Settings:
    """Read the environment and the file named by ``MVM_CONFIG``; `overrides` (command-line flags) win.

    What is set nowhere and the state directory remembers is as it was: the node's id, and its network namespace.

    Raises `InvalidInput` (``settings.invalid``) that names the setting, and as `remembered` does.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "extra_forbidden":
            raise InvalidInput(
                "settings.unknown", f"there is no setting {name}",
                hint=f"in the file named by MVM_CONFIG; known are: {', '.join(Settings.model_fields)}", field=name,
            ) from None  # fmt: skip
        raise InvalidInput(
            "settings.invalid", f"setting {name}: {first['msg'].removeprefix('Value error, ')}",
            hint=f"set by MVM_{name.upper()} or in the file named by MVM_CONFIG", field=name,
        ) from None  # fmt: skip
    _ = settings.node  # an unusable id is refused here, not later
    known = remembered(settings.layout)
    if known is None:
        return settings
    return settings.model_copy(
        update={"node_id": settings.node_id or str(known.node_id), "netns": settings.netns or known.netns}
    )


def remembered(layout: StateLayout) -> Identity | None:
    """The identity that a state directory has where it lies now; None when it has none, or none that we may read.

    Raises `Failed` (``state.damaged``).
    """
    try:
        data = json.loads(layout.identity.read_text())
        return Identity.from_dict(data).at(place_of(layout), layout.default_netns)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
        raise Failed(
            "state.damaged", f"{layout.identity} cannot be read: {error}",
            hint="restore it from a backup; where no microVM of it runs, remove it and it is made anew",
            path=str(layout.identity),
        ) from None  # fmt: skip


def place_of(layout: StateLayout) -> Place:
    """Where the state directory lies."""
    found = layout.root.stat()
    return Place(found.st_dev, found.st_ino)
