"""Names of things, validated where they enter.

A name is a `str` (or prints as one), so it can be logged, stored and compared as it is; only text that passed
its rule can become one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from mvm.errors import InvalidInput


class _Name(str):
    """A `str` that matched its rule. Raises `InvalidInput` naming the rule otherwise."""

    __slots__ = ()
    rule: ClassVar[re.Pattern[str]]
    what: ClassVar[str]
    allowed: ClassVar[str]

    def __new__(cls, text: str) -> Self:
        if not cls.rule.fullmatch(text):
            raise InvalidInput(
                f"{cls.what}.invalid_id",
                f"{text!r} is not the id of {_a(cls.what)}",
                hint=f"allowed: {cls.allowed}",
                field=cls.what,
                value=text[:80],
            )
        return super().__new__(cls, text)


_SLUG = re.compile(r"[a-z](?:[a-z0-9]|-(?=[a-z0-9])){0,31}")
_SLUG_TEXT = "1 to 32 of a-z, 0-9 and single hyphens, beginning with a letter and not ending with a hyphen"


class TenantId(_Name):
    """``acme``."""

    __slots__ = ()
    rule, what, allowed = _SLUG, "tenant", _SLUG_TEXT


class PoolId(_Name):
    """The part of a pool's ref after the slash."""

    __slots__ = ()
    rule, what, allowed = _SLUG, "pool", _SLUG_TEXT


class NodeId(_Name):
    """A node's name; also part of its queue's name ``node.<id>``."""

    __slots__ = ()
    rule = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){0,62}")
    what, allowed = "node", "1 to 63 of a-z, 0-9 and single inner hyphens"


class InstanceId(_Name):
    """``i-`` and 8 lower-case hex digits."""

    __slots__ = ()
    rule, what, allowed = re.compile(r"i-[0-9a-f]{8}"), "instance", "i- and 8 hex digits, such as i-7f2c91ab"

    @classmethod
    def from_bytes(cls, random: bytes) -> InstanceId:
        """From 4 random bytes, which the caller draws."""
        return cls("i-" + random[:4].hex())


class JobId(_Name):
    """``j-<12 hex: milliseconds since 1970>-<10 hex: random>``, or the UUID of a task that was called by Celery's ways.

    It is the Celery task id and the idempotency key of the operation.
    """

    __slots__ = ()
    rule = re.compile(r"j-[0-9a-f]{12}-[0-9a-f]{10}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    what, allowed = "job", "a job's id as printed, such as j-0193583f6c2a-9f3b7c21d4, or a UUID in lower case"

    @classmethod
    def make(cls, now_ms: int, random: bytes) -> JobId:
        """From the time in milliseconds and 5 random bytes."""
        return cls(f"j-{now_ms:012x}-{random[:5].hex()}")


class Revision(_Name):
    """An image revision: the sha256 of its canonical manifest, in hex."""

    __slots__ = ()
    rule, what, allowed = re.compile(r"[0-9a-f]{64}"), "revision", "64 hex digits"

    @property
    def short(self) -> str:
        """The first 12 digits, enough for people."""
        return self[:12]


@dataclass(frozen=True, slots=True, order=True)
class PoolRef:
    """A pool's address, ``acme/web``."""

    tenant: TenantId
    pool: PoolId

    @classmethod
    def parse(cls, text: str) -> PoolRef:
        """Raises `InvalidInput` unless `text` is ``TENANT/POOL``."""
        parts = text.split("/")
        if len(parts) != 2:
            raise InvalidInput(
                "pool.invalid_ref", f"{text!r} is not a pool", hint="write TENANT/POOL, such as acme/web",
                field="pool", value=text[:80],
            )  # fmt: skip
        return cls(TenantId(parts[0]), PoolId(parts[1]))

    def __str__(self) -> str:
        return f"{self.tenant}/{self.pool}"

    def instance(self, instance: InstanceId) -> InstanceRef:
        """The ref of this pool's `instance`."""
        return InstanceRef(self.tenant, self.pool, instance)


@dataclass(frozen=True, slots=True, order=True)
class InstanceRef:
    """An instance's address, ``acme/web/i-7f2c91ab``."""

    tenant: TenantId
    pool: PoolId
    instance: InstanceId

    @classmethod
    def parse(cls, text: str) -> InstanceRef:
        """Raises `InvalidInput` unless `text` is ``TENANT/POOL/INSTANCE``."""
        parts = text.split("/")
        if len(parts) != 3:
            raise InvalidInput(
                "instance.invalid_ref", f"{text!r} is not an instance",
                hint="write TENANT/POOL/INSTANCE, such as acme/web/i-7f2c91ab", field="instance", value=text[:80],
            )  # fmt: skip
        return cls(TenantId(parts[0]), PoolId(parts[1]), InstanceId(parts[2]))

    def __str__(self) -> str:
        return f"{self.tenant}/{self.pool}/{self.instance}"

    @property
    def pool_ref(self) -> PoolRef:
        """The pool that owns it."""
        return PoolRef(self.tenant, self.pool)


def _a(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def node_id_from_hostname(hostname: str) -> NodeId:
    """The default node id: the host's short name, made to fit the rule."""
    slug = re.sub(r"[^a-z0-9]+", "-", hostname.lower().split(".")[0]).strip("-")
    return NodeId(slug[:63].strip("-") or "node")
