"""Who gets what of something that all use at once, when there is not enough of it. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

_SOURCES = 4096  # that an `Allowance` remembers


class Holder(NamedTuple):
    """One place taken: by whom, and since when."""

    source: Hashable
    since: float


def gives_way(holders: Sequence[Holder]) -> int:
    """Which of `holders`, by index, makes room: the longest of the source that holds most, or of those that do.

    So whoever takes many places loses its own, and among equals it is the one that had time enough.
    """
    counts = Counter(holder.source for holder in holders)
    most = max(counts.values())
    among = [at for at, holder in enumerate(holders) if counts[holder.source] == most]
    return min(among, key=lambda at: holders[at].since)


class Allowance:
    """At most `rate` a second from each source, but for a `burst`; of many sources the latest are remembered."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, source: Hashable, now: float) -> bool:
        """Whether one more may be had at `now`, in seconds that only grow."""
        left, at = self._left.pop(source, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self._rate)
        granted = left >= 1
        self._left[source] = (left - 1 if granted else left, now)
        if len(self._left) > _SOURCES:
            self._left.popitem(last=False)
        return granted
