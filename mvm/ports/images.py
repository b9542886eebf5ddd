"""Building images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mvm.domain.ids import Revision
from mvm.domain.pool import ImageSource

ProgressReport = Callable[[str], None]
"""Told the name of what is being done now, such as ``download kernel``."""


Admission = Callable[[], None]
"""Asked before anything large is written; raises what forbids it."""


def admitted() -> None:
    """Everything is."""


class ImageBuilder(Protocol):
    """Builds a source to a revision under the node's image directory.

    The revision is the sha256 of the canonical manifest, which holds the sha256 of each file: the same inputs give
    the same bytes and so the same revision. A finished revision appears by rename, read-only; an interrupted or
    failed build leaves nothing. Raises `Failed`: ``disk.full``, ``image.fetch_failed``, ``image.build_failed``.
    """

    def build(self, source: ImageSource, report: ProgressReport, admit: Admission = admitted) -> Revision:
        """Build; when the result exists already it is kept, and `admit` is not asked."""
        ...
