"""A job as a Celery user asks for it: a task's arguments to what the job needs, or everything that is wrong with them.

One positional argument, the subject, and the job's words by name: ``start.delay("acme/web/i-7f2c91ab", force=True)``.
Pure; the table below says which words each verb takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

from mvm.domain.addressing import parse_subnet
from mvm.domain.desired_schema import POOL
from mvm.domain.document import Boolean, Choice, Field, Integer, Object, Problem, Text
from mvm.domain.ids import InstanceRef, NodeId, PoolRef, TenantId
from mvm.domain.job import JobVerb, Lane, Reason
from mvm.domain.pool import MAX_COUNT, StartMode, checked_user_data
from mvm.domain.tenant import Quota
from mvm.errors import InvalidInput

_MOST_INSTANCES = 10_000


class Call(NamedTuple):
    """What is asked of whom. `node`, `actor` and `lane` are None where the caller leaves them open."""

    verb: JobVerb
    subject: str
    params: Mapping[str, Any]
    node: NodeId | None = None
    actor: str | None = None
    lane: Lane | None = None


def _optional(**kinds: Any) -> dict[str, Field]:
    return {name: Field(kind, "", None) for name, kind in kinds.items()}


_POOL = POOL.fields
_FORCE = _optional(force=Boolean())
_QUOTA = _optional(quota=Object(_optional(**{name: Integer(0, 1_000_000) for name in asdict(Quota())})))
_COUNT = Integer(0, MAX_COUNT)
_WAYS = _optional(
    start=Choice(StartMode),
    compression=_POOL["snapshot_compression"].kind,
    seccomp_policy=_POOL["seccomp_policy"].kind,
    pinned=Boolean(),
    critical=Boolean(),
    on_exit=_POOL["on_exit"].kind,
    metadata_enabled=Boolean(),
    user_data=Text(lambda text: checked_user_data(text.encode(errors="surrogatepass"))),
    sleep_policy=_POOL["sleep_policy"].kind,
    egress=_POOL["egress"].kind,
)
WORDS: Mapping[JobVerb, Object] = MappingProxyType(
    {
        JobVerb.TENANT_CREATE: Object(_optional(net_id=Integer(0, 4095), subnet=Text(parse_subnet)) | _QUOTA),
        JobVerb.TENANT_UPDATE: Object(_QUOTA),
        JobVerb.TENANT_DESTROY: Object({}),
        JobVerb.TENANT_SECRETS: Object(_optional(rotate=Boolean())),
        JobVerb.POOL_CREATE: Object(
            {name: _POOL[name] for name in ("flake_ref", "profile")}
            | _optional(resources=_POOL["instance_resources"].kind)
            | _WAYS
        ),
        JobVerb.POOL_UPDATE: Object(_WAYS),
        JobVerb.POOL_BUILD: Object({}),
        JobVerb.POOL_SCALE: Object(_optional(running=_COUNT, warm=_COUNT, sleeping=_COUNT)),
        JobVerb.POOL_DESTROY: Object({}),
        JobVerb.INSTANCE_CREATE: Object(_optional(count=Integer(1, _MOST_INSTANCES))),
        JobVerb.INSTANCE_START: Object(_FORCE),
        JobVerb.INSTANCE_STOP: Object(_FORCE),
        JobVerb.INSTANCE_WARM: Object({}),
        JobVerb.INSTANCE_SLEEP: Object(_FORCE),
        JobVerb.INSTANCE_WAKE: Object({}),
        JobVerb.INSTANCE_DESTROY: Object({}),
        JobVerb.NODE_RECONCILE: Object(_optional(prune=Boolean())),
        JobVerb.NODE_CLEAN: Object(_optional(keep=Integer(1, 32), dry_run=Boolean())),
    }
)
"""The words of each verb that may be asked for; sweeps are Beat's, a bulk job has no task."""


def read_call(verb: JobVerb, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Raises `InvalidInput` (``job.invalid_arguments``), or the error of a malformed subject."""
    if verb not in WORDS:
        raise _refused(verb, "nobody asks for it: Beat does")
    words = dict(kwargs)
    subject = _subject(verb, args, words)
    node = words.pop("node", None)
    actor = words.pop("actor", None)
    if actor is not None and not (isinstance(actor, str) and 0 < len(actor) <= 64 and actor.isprintable()):
        raise _refused(verb, f"{str(actor)[:80]!r} is no actor")
    lane = words.pop("lane", None)
    if lane is not None and lane not in tuple(Lane):
        raise _refused(verb, f"{str(lane)[:80]!r} is no lane: {', '.join(Lane)}")
    if words.pop("reason", Reason.MANUAL.value) != Reason.MANUAL.value:
        raise _refused(verb, "whoever calls a task asks by hand: reason is manual")
    params = _params(verb, words)
    return Call(verb, subject, params, NodeId(str(node)) if node is not None else None, actor, lane and Lane(lane))


def _subject(verb: JobVerb, args: Sequence[Any], words: dict[str, Any]) -> str:
    """What the job is about, checked. What a chain hands over, its last link's result, comes before it."""
    given = list(args)
    if len(given) > (0 if "subject" in words else 1) and isinstance(given[0], dict | list | None.__class__):
        given = given[1:]
    if "subject" in words:
        given.append(words.pop("subject"))
    if len(given) != 1 or not isinstance(given[0], str):
        raise _refused(verb, f"its subject alone is expected, such as {_EXAMPLES[_kind(verb)]!r}")
    return str(_KINDS[_kind(verb)](given[0]))


def _params(verb: JobVerb, words: dict[str, Any]) -> dict[str, Any]:
    """The job's words; ``params`` may hold them, too."""
    held = words.pop("params", None) or {}
    if not isinstance(held, dict) or held.keys() & words.keys():
        raise _refused(verb, "params is an object of the job's words, each given once")
    params = {**held, **words}
    problems: list[Problem] = []
    WORDS[verb].read(params, "$", problems)
    if problems:
        raise _refused(verb, "; ".join(map(str, problems[:10])))
    return params


def _kind(verb: JobVerb) -> str:
    return "pool" if verb is JobVerb.INSTANCE_CREATE else verb.value.partition(".")[0]


_KINDS: Mapping[str, Any] = {
    "tenant": TenantId,
    "pool": PoolRef.parse,
    "instance": InstanceRef.parse,
    "node": NodeId,
}
_EXAMPLES = {"tenant": "acme", "pool": "acme/web", "instance": "acme/web/i-7f2c91ab", "node": "n1"}


def _refused(verb: JobVerb, why: str) -> InvalidInput:
    return InvalidInput(
        "job.invalid_arguments", f"{verb.task_name}: {why}", hint="see docs/celery.md: Calling a task", verb=verb.value
    )
