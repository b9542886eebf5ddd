"""Numbered migrations: what brings that which an older mvm has written up to date, one version after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mvm.domain.layout import STATE_VERSION
from mvm.errors import NotAllowed

T = TypeVar("T")
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Migration(Generic[T]):
    """`apply` makes version `to` of what is of version ``to - 1``; `what` says for people what it does.

    A migration that has been released is never changed: what was wrong with it is put right by the next one.
    """

    to: int
    what: str
    apply: Callable[[T], object]


def due(migrations: Sequence[Migration[T]], found: int, *, newest: int = STATE_VERSION) -> tuple[Migration[T], ...]:
    """Those that what is of version `found` still needs, in their order; a version without one changes nothing.

    Raises `NotAllowed` (``state.version``) when `found` is newer than this mvm.
    """
    refuse_newer("the state", found, newest=newest)
    wanted = (migration for migration in migrations if found < migration.to <= newest)
    return tuple(sorted(wanted, key=lambda migration: migration.to))


def refuse_newer(what: object, found: int | str, *, newest: int = STATE_VERSION) -> None:
    """Raise `NotAllowed` (``state.version``) unless `found` is a version that this mvm knows the way from."""
    if isinstance(found, int) and 0 <= found <= newest:
        return
    raise NotAllowed(
        "state.version",
        f"{what} is of version {found!r}; this mvm knows versions up to {newest}",
        hint="a newer mvm has written it: use that one, or another MVM_STATE_DIR",
        found=found,
        expected=newest,
    )


SETTINGS: tuple[Migration[Document], ...] = ()
"""Of the settings that the stack was started with. A setting that is new has its default, one that is gone is left
out, without a migration."""


def settings_of(saved: Mapping[str, Any], found: int, known: Sequence[str]) -> Document:
    """The settings that an mvm of version `found` saved, as this one knows them."""
    document = dict(saved)
    for migration in due(SETTINGS, found):
        migration.apply(document)
    return {name: value for name, value in document.items() if name in known}
