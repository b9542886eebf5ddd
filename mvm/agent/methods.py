"""What the agent can be asked, by whom, and with which words: one table."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mvm.agent import places
from mvm.domain.commands import ExecEnd, ExecPart
from mvm.domain.ids import InstanceRef, PoolRef, TenantId
from mvm.domain.job import Job
from mvm.domain.lifecycle import Status
from mvm.domain.plans import Plan
from mvm.domain.secrets import MAX_BYTES
from mvm.domain.shares import Places
from mvm.drivers.packed import unpacked
from mvm.drivers.quic.frames import CHUNK
from mvm.drivers.quic.identity import Peer, Role
from mvm.errors import Forbidden, InvalidInput

_ABOUT = ("ref", "pool", "tenant")  # parameters that begin with a tenant
_ITEMS = 50  # of a list in one part of its answer: 20 KiB each fit into a frame
_CHARACTERS = 1 << 16  # of a text in one part; JSON needs up to 12 bytes for one
_BYTES = CHUNK // 4 * 3  # of a command's output in one part
_COMMAND_CHARACTERS = 256 * 1024
Parts = Generator[Mapping[str, Any] | None, None, None]  # of one answer; most have one. None: it goes on
Check = Callable[[], None]  # does nothing while somebody waits for the answer, and then raises what ends the work
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class NodeApi(Protocol):
    """This node, as its agent shows it. Mappings are ready for JSON; errors are `MvmError`. Called from threads."""

    def node_info(self) -> Mapping[str, Any]:
        """The node's fields as the command line prints them."""
        ...

    def node_stats(self) -> Mapping[str, Any]:
        """Load, memory, disk and counts, now."""
        ...

    def verify_network(self, *, active: bool, check: Check) -> Mapping[str, Any]:
        """A report for each tenant's bridge, the node's findings and, with `active`, a table of probes.

        `check` is called several times a second; what it raises ends all of it.
        """
        ...

    def disk_report(self) -> Mapping[str, Any]:
        """What lies on the disk: in ``items`` by tenant, pool and kind."""
        ...

    def tenants(self) -> Sequence[Mapping[str, Any]]:
        """All tenants on this node."""
        ...

    def pools(self, tenant: TenantId | None) -> Sequence[Mapping[str, Any]]:
        """Pools, of one tenant or all."""
        ...

    def instances(
        self, tenant: TenantId | None, pool: PoolRef | None, status: Status | None
    ) -> Sequence[Mapping[str, Any]]:
        """Instances, narrowed by what is given."""
        ...

    def instance(self, ref: InstanceRef) -> Mapping[str, Any]:
        """One instance."""
        ...

    def explain(self, ref: InstanceRef) -> Mapping[str, Any]:
        """Why an instance is as it is, and what comes next."""
        ...

    def stats(self, ref: InstanceRef) -> Mapping[str, Any]:
        """An instance's memory, snapshot and times."""
        ...

    def set_secrets(self, tenant: TenantId, content: bytes, actor: str) -> Mapping[str, Any]:
        """Keep the secrets in a secrets file; which epoch they are."""
        ...

    def wake(self, ref: InstanceRef, actor: str) -> Mapping[str, Any]:
        """Wake an instance now; what the job that did it says."""
        ...

    def run(self, ref: InstanceRef, command: bytes, *, deadline_s: float) -> Generator[ExecPart, None, None]:
        """Run a command in the guest: its output as it comes, then its end; see `GuestChannel.run`."""
        ...

    def logs(self, ref: InstanceRef, *, follow: bool) -> Generator[str, None, None]:
        """The console's text so far and, with `follow`, what comes.

        While nothing comes it yields an empty text several times a second: that is when a caller who has gone is
        noticed. Closing the generator ends it.
        """
        ...

    def audit_tail(
        self, tenant: TenantId, count: int, *, follow: bool
    ) -> Generator[Sequence[Mapping[str, Any]], None, None]:
        """A tenant's last audit entries and, with `follow`, what comes; empty lists as `logs`' empty texts."""
        ...

    def audit_verify(self, tenant: TenantId, *, check: Check) -> Mapping[str, Any]:
        """Whether a tenant's audit trail is whole, and in ``findings`` what is not; `check` as above."""
        ...

    def desired_plan(self, content: bytes, *, prune: bool) -> Plan:
        """What a desired-state document would do here."""
        ...

    def desired_apply(self, content: bytes, *, prune: bool, expect: str | None, actor: str) -> tuple[Plan, Job]:
        """Accept a desired-state document and begin with it."""
        ...


_Actor = Annotated[str, Field(min_length=1, max_length=64)]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Nothing(_Params):
    pass


class _Verify(_Params):
    active: bool = False


class _Pools(_Params):
    tenant: str | None = None


class _Instances(_Pools):
    pool: str | None = None
    status: str | None = None


class _Instance(_Params):
    ref: str


class _Wake(_Instance):
    actor: _Actor


class _Secrets(_Params):
    tenant: str
    actor: _Actor
    content: Annotated[str, Field(max_length=MAX_BYTES * 2, pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


class _Exec(_Instance):
    command_b64: Annotated[str, Field(min_length=1, max_length=_COMMAND_CHARACTERS)]
    deadline_s: Annotated[float, Field(gt=0, le=86400)]


class _Logs(_Instance):
    follow: bool = False


class _Tenant(_Params):
    tenant: str


class _Tail(_Tenant):
    count: Annotated[int, Field(ge=1, le=10_000)]
    follow: bool = False


class _Desired(_Params):
    document: str  # JSON, packed by zlib, in base64
    prune: bool = False


class _Apply(_Desired):
    expect: Annotated[str, Field(max_length=64)] | None = None
    actor: _Actor


class _Request(_Params):
    id: Annotated[str, Field(max_length=64, pattern=r"^[\w-]*$")]
    method: Annotated[str, Field(max_length=64)]
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """One row: who may call it, its parameters, the function that yields its answer in parts, and what places it takes.

    The parts of one that is `prompt` leave as they come; those of others may wait for the next.
    """

    roles: frozenset[Role]
    params: type[BaseModel]
    handler: Callable[[Any, Check], Parts]
    takes: Places = places.READS

    @property
    def prompt(self) -> bool:
        """Whether somebody waits for each part."""
        return self.takes in (places.COMMANDS, places.STREAMS)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that may run."""

    id: str
    name: str
    method: Method
    params: BaseModel

    def run(self, check: Check) -> Parts:
        """The answer's parts. What yields none for long calls `check` meanwhile."""
        return self.method.handler(self.params, check)

    @property
    def tenant(self) -> str:
        """Whose share it takes; "" when it is about no tenant alone."""
        about = next((value for name in _ABOUT if (value := getattr(self.params, name, None))), "")
        return str(about).partition("/")[0]


def accept(methods: Mapping[str, Method], peer: Peer, message: Mapping[str, Any]) -> Call:
    """The call that `message` asks for.

    Raises `InvalidInput` (``agent.bad_request``, ``agent.unknown_method``, ``agent.invalid_params``), which names
    the field, and `Forbidden` (``agent.forbidden``).
    """
    request = _validate(_Request, message, "agent.bad_request", "request")
    method = methods.get(request.method)
    if method is None:
        raise InvalidInput(
            "agent.unknown_method", f"this agent has no method {request.method!r}",
            hint="the agent may be older than its caller", field="method", value=request.method,
        )  # fmt: skip
    if peer.role not in method.roles:
        raise Forbidden(
            "agent.forbidden", f"{peer} may not call {request.method}", peer=str(peer), method=request.method
        )
    params = _validate(method.params, request.params, "agent.invalid_params", request.method)
    return Call(request.id, request.method, method, params)


def method_table(api: NodeApi) -> dict[str, Method]:
    """Every method of the agent over `api`. Roles match exactly: what is not listed is refused."""
    coordinator = frozenset({Role.COORDINATOR})

    def one(answer: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any, Check], Parts]:
        def parts(params: Any, check: Check) -> Parts:
            yield answer(params)

        return parts

    return {
        "node.ping": Method(coordinator, _Nothing, one(lambda _: {}), places.NODE),
        "node.info": Method(frozenset(Role), _Nothing, one(lambda _: api.node_info()), places.NODE),
        "node.stats": Method(coordinator, _Nothing, one(lambda _: api.node_stats()), places.NODE),
        "net.verify": Method(coordinator, _Verify, lambda p, check: _verified(api, p, check), places.REPORTS),
        "disk.report": Method(coordinator, _Nothing, lambda *_: _disk(api), places.REPORTS),
        "tenant.list": Method(coordinator, _Nothing, lambda *_: _items(api.tenants())),
        "tenant.set_secrets": Method(
            coordinator,
            _Secrets,
            one(lambda p: api.set_secrets(TenantId(p.tenant), _decoded(p.content, "content"), p.actor)),
        ),
        "pool.list": Method(coordinator, _Pools, lambda p, _: _items(api.pools(_maybe(TenantId, p.tenant)))),
        "instance.list": Method(coordinator, _Instances, lambda p, _: _items(_instances(api, p))),
        "instance.info": Method(coordinator, _Instance, one(lambda p: api.instance(InstanceRef.parse(p.ref)))),
        "instance.explain": Method(coordinator, _Instance, one(lambda p: api.explain(InstanceRef.parse(p.ref)))),
        "instance.stats": Method(coordinator, _Instance, one(lambda p: api.stats(InstanceRef.parse(p.ref)))),
        "instance.wake": Method(
            coordinator, _Wake, one(lambda p: api.wake(InstanceRef.parse(p.ref), p.actor)), places.WAKES
        ),
        "instance.exec": Method(coordinator, _Exec, lambda p, _: _execute(api, p), places.COMMANDS),
        "instance.logs": Method(coordinator, _Logs, lambda p, _: _logs(api, p), places.STREAMS),
        "audit.tail": Method(coordinator, _Tail, lambda p, _: _tail(api, p), places.STREAMS),
        "desired.plan": Method(coordinator, _Desired, lambda p, _: _plan(api, p), places.REPORTS),
        "desired.apply": Method(coordinator, _Apply, lambda p, _: _apply(api, p), places.REPORTS),
        "audit.verify": Method(coordinator, _Tenant, lambda p, check: _verify(api, p, check), places.REPORTS),
    }


def _instances(api: NodeApi, params: _Instances) -> Sequence[Mapping[str, Any]]:
    if params.status is not None and params.status not in set(Status):
        raise InvalidInput(
            "instance.invalid_status", f"{params.status!r} is not a status",
            hint=f"allowed: {', '.join(Status)}", field="status", value=params.status[:80],
        )  # fmt: skip
    return api.instances(
        _maybe(TenantId, params.tenant), _maybe(PoolRef.parse, params.pool), _maybe(Status, params.status)
    )


def _verified(api: NodeApi, params: _Verify, check: Check) -> Parts:
    report = dict(api.verify_network(active=params.active, check=check))
    lists = {name: report.pop(name) for name in ("bridges", "findings", "probes")}
    yield {**report, **{name: [] for name in lists}}
    for name, items in lists.items():
        for start in range(0, len(items), _ITEMS):
            yield {name: items[start : start + _ITEMS]}


def _disk(api: NodeApi) -> Parts:
    report = dict(api.disk_report())
    items = report.pop("items")
    yield report
    yield from _items(items)


def _decoded(text: str, field: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise InvalidInput("agent.invalid_params", f"{field} is no base64", field=field) from None


def _items(items: Sequence[Mapping[str, Any]]) -> Generator[Mapping[str, Any], None, None]:
    for start in range(0, max(len(items), 1), _ITEMS):
        yield {"items": list(items[start : start + _ITEMS])}


def _execute(api: NodeApi, params: _Exec) -> Parts:
    command = _decoded(params.command_b64, "command_b64")
    with closing(api.run(InstanceRef.parse(params.ref), command, deadline_s=params.deadline_s)) as parts:
        for part in parts:
            yield from _command_parts(part)


def _command_parts(part: ExecPart) -> Parts:
    if isinstance(part, ExecEnd):
        yield {"exit_code": part.exit_code, "truncated": part.truncated, "timed_out": part.timed_out}
        return
    if not part.stdout and not part.stderr:
        yield None
    for name, data in (("stdout_b64", part.stdout), ("stderr_b64", part.stderr)):
        for start in range(0, len(data), _BYTES):
            yield {name: b64encode(data[start : start + _BYTES]).decode()}


def _logs(api: NodeApi, params: _Logs) -> Parts:
    with closing(api.logs(InstanceRef.parse(params.ref), follow=params.follow)) as texts:
        for text in texts:
            if not text:
                yield None
            for start in range(0, len(text), _CHARACTERS):
                yield {"text": text[start : start + _CHARACTERS]}


def _tail(api: NodeApi, params: _Tail) -> Parts:
    with closing(api.audit_tail(TenantId(params.tenant), params.count, follow=params.follow)) as lists:
        for entries in lists:
            yield from _items(entries) if entries else (None,)


def _verify(api: NodeApi, params: _Tenant, check: Check) -> Parts:
    verdict = dict(api.audit_verify(TenantId(params.tenant), check=check))
    findings = verdict.pop("findings")
    yield verdict
    for part in _items(findings):
        yield {"findings": part["items"]}


def _plan(api: NodeApi, params: _Desired) -> Parts:
    yield from _told(api.desired_plan(unpacked(params.document), prune=params.prune))


def _apply(api: NodeApi, params: _Apply) -> Parts:
    plan, job = api.desired_apply(
        unpacked(params.document), prune=params.prune, expect=params.expect, actor=params.actor
    )
    yield from _told(plan)
    yield {"job": job.to_dict()}


def _told(plan: Plan) -> Parts:
    told, text = plan.to_dict(), plan.to_text()
    yield {"fingerprint": told["fingerprint"]}
    for name in ("actions", "remarks"):
        for part in _items(told[name]):
            yield {name: part["items"]}
    for start in range(0, len(text), _CHARACTERS):
        yield {"text": text[start : start + _CHARACTERS]}


def _maybe(parse: Callable[[str], T], text: str | None) -> T | None:
    return None if text is None else parse(text)


def _validate(model: type[M], data: Mapping[str, Any], code: str, what: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(code, f"{what}: {field}: {first['msg']}", field=field) from None
