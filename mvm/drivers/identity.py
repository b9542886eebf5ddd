"""The identity that a state directory keeps within itself: found, made, adopted from former versions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from pathlib import Path

from mvm.domain.identity import Identity, id_of_path, mark_of
from mvm.domain.ids import NodeId
from mvm.domain.layout import StateLayout
from mvm.drivers import store_glance
from mvm.drivers.files import write_private
from mvm.errors import Failed
from mvm.settings import Settings, place_of, remembered

_ID_BYTES = 6


def mark(layout: StateLayout) -> str:
    """What marks the VMMs and control groups of this state directory. Raises as `remembered` does."""
    known = remembered(layout)
    return known.mark if known else mark_of(id_of_path(_former_path(layout) or layout.root))


def settle(settings: Settings) -> Identity:
    """The state directory, which is there, has an identity, and `settings` are those of its node.

    One that a former version made keeps the mark that its VMMs have; a copy becomes a directory of its own. For whoever
    holds the directory. Raises `NotAllowed` (``node.renamed``) for another node's, and what `store_glance` does when a
    former version's store cannot be read: whose the directory is is written down for good.
    """
    layout = settings.layout
    known = remembered(layout) or _first(settings)
    if settings.node_id:  # else it is the node's that it was
        known.check_node(settings.node)
    if is_copy(layout):
        layout.made_netns.unlink(missing_ok=True)  # the original has made it
    text = json.dumps(known.to_dict())
    if not layout.identity.exists() or layout.identity.read_text() != text:
        write_private(layout.identity, text.encode())
    return known


def check_node(settings: Settings) -> None:
    """Raises `NotAllowed` (``node.renamed``) when the state directory is another node's than `settings` say."""
    known = remembered(settings.layout)
    if known:
        known.check_node(settings.node)


def is_copy(layout: StateLayout) -> bool:
    """Whether it is another's copy that has not become a directory of its own yet. Raises as `remembered` does."""
    if remembered(layout) is None:
        return layout.settings.exists() and _former_path(layout) is None
    kept = Identity.from_dict(json.loads(layout.identity.read_text()))
    return kept.place != place_of(layout)


def default_netns(layout: StateLayout) -> str:
    """The network namespace of the directory's stack where nothing else is said."""
    known = remembered(layout)
    return known.netns if known else StateLayout(_former_path(layout) or layout.root).default_netns


def _first(settings: Settings) -> Identity:
    layout = settings.layout
    former = _former_path(layout)
    own = id_of_path(former) if former else secrets.token_hex(_ID_BYTES)
    node = _former_node(settings.node, store_glance.nodes(layout.database))
    return Identity(own, node, default_netns(layout), place_of(layout))


def _former_path(layout: StateLayout) -> Path | None:
    """By which path a former version last started a stack here, as it was spelled; None when none did.

    Raises `Failed` (``state.damaged``): its VMMs are marked by that path, and are not to be lost by a guess.
    """
    try:
        former = Path(json.loads(layout.settings.read_text())["state_dir"])
        return former if former.samefile(layout.root) else None  # not so of a copy
    except (FileNotFoundError, NotADirectoryError, PermissionError, KeyError, TypeError):
        return None
    except (OSError, ValueError) as error:
        raise Failed(
            "state.damaged", f"{layout.settings} cannot be read: {error}",
            hint="where no microVM of this state directory runs, remove it", path=str(layout.settings),
        ) from None  # fmt: skip


def _former_node(now: NodeId, recorded: Collection[NodeId]) -> NodeId:
    """Whose the directory of a former version is: the node's that its pools are placed on."""
    return now if not recorded or now in recorded else min(recorded)
