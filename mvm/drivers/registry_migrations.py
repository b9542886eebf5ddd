"""The versions of what the registry keeps in Redis. Each migration is sent as one transaction with its number."""

from __future__ import annotations

from collections.abc import Sequence

from mvm.domain.layout import STATE_VERSION
from mvm.domain.migration import Migration, due, refuse_newer
from mvm.drivers.redis_link import Greeting, RedisLink
from mvm.errors import NotAllowed

VERSION_KEY = "mvm:version"
_FIRST = 1  # registries that were written before they had a number

Commands = list[Sequence[str | int]]


class RegistryDraft:
    """What a migration reads (`link`), and the `commands` that it wants to be sent."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.commands: Commands = []


REGISTRY: tuple[Migration[RegistryDraft], ...] = (Migration(2, "its version's number", lambda _: None),)


def registry_link(url: str) -> RedisLink:
    """Commands to a registry's Redis. Each connection asks for the number with its first command, at no further cost.

    It raises `NotAllowed` (``state.version``) for a registry of a newer mvm, or of an older one that is to be migrated.
    """
    return RedisLink(url, code="registry.unreachable", greeting=Greeting(("GET", VERSION_KEY), _check))


def _check(number: bytes | None) -> None:
    if number is None:  # it is new, or from before they had numbers: ``mvm up`` gives it one
        return
    found = _version(number)
    refuse_newer("the registry", found)
    if due(REGISTRY, found):
        raise NotAllowed(
            "state.version", f"the registry is of version {found}; this mvm needs version {STATE_VERSION}",
            hint="mvm down, then mvm up: that brings it up to date", found=found, expected=STATE_VERSION,
        )  # fmt: skip


def _version(number: bytes) -> int:
    return int(number) if number.isdigit() else STATE_VERSION + 1


def migrate(link: RedisLink, *, unnumbered: int | None = None) -> None:
    """What is there is of this mvm's version; what has no number is of version `unnumbered`, the first if not given.

    Raises `NotAllowed` (``state.version``) when it is of a newer one, and what `RedisLink.command` does.
    """
    while True:
        _, number, used = link.pipeline(
            [("WATCH", VERSION_KEY), ("GET", VERSION_KEY), ("EXISTS", "mvm:nodes", "mvm:tenants", "mvm:jobs")]
        )
        unset = (unnumbered or _FIRST) if used else STATE_VERSION
        found = unset if number is None else _version(number)
        refuse_newer("the registry", found)
        if number is not None and found == STATE_VERSION:
            link.command("UNWATCH")
            return
        draft, to = RegistryDraft(link), STATE_VERSION
        for migration in due(REGISTRY, found)[:1]:
            migration.apply(draft)
            to = migration.to
        # Nothing is done where another node was faster: it is looked at again.
        link.pipeline([("MULTI",), *draft.commands, ("SET", VERSION_KEY, to), ("EXEC",)])
