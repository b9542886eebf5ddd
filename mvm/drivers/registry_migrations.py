"""The versions of what the registry keeps in Redis. Each migration is sent as one transaction with its number."""

from __future__ import annotations

from collections.abc import Sequence

from mvm.domain.layout import STATE_VERSION
from mvm.domain.migration import Migration, due, refuse_newer
from mvm.drivers.redis_link import RedisLink

VERSION_KEY = "mvm:version"
_FIRST = 1  # registries that were written before they had a number

Commands = list[Sequence[str | int]]


class RegistryDraft:
    """What a migration reads (`link`), and the `commands` that it wants to be sent."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.commands: Commands = []


REGISTRY: tuple[Migration[RegistryDraft], ...] = (Migration(2, "its version's number", lambda _: None),)


def migrate(link: RedisLink, *, unnumbered: int | None = None) -> None:
    """What is there is of this mvm's version; what has no number is of version `unnumbered`, the first if not given.

    Raises `NotAllowed` (``state.version``) when it is of a newer one, and what `RedisLink.command` does.
    """
    number, used = link.pipeline([("GET", VERSION_KEY), ("EXISTS", "mvm:nodes", "mvm:tenants", "mvm:jobs")])
    if number is None:
        found = (unnumbered or _FIRST) if used else STATE_VERSION
    else:
        found = int(number) if number.isdigit() else STATE_VERSION + 1
    refuse_newer("the registry", found)
    for migration in due(REGISTRY, found):
        draft = RegistryDraft(link)
        migration.apply(draft)
        link.pipeline([("MULTI",), *draft.commands, ("SET", VERSION_KEY, migration.to), ("EXEC",)])
    if number is None or found < STATE_VERSION:
        link.command("SET", VERSION_KEY, STATE_VERSION)
