"""What happens in a run, as values: a seed gives them, shrinking drops some, and what is left means the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_ANY = 1 << 16

WORK = {
    "ask": 16, "deliver": 30, "go": 16, "beat": 9, "time": 9, "wake": 3, "apply": 1, "secrets": 1, "cancel": 2,
    "busy": 1,
}  # fmt: skip
"""What a fleet's day is made of, and how often."""
FAULTS = {
    "crash": 5, "restart": 3, "reboot": 1, "redis": 3, "lose": 3, "duplicate": 4, "delay": 3, "fail": 4, "full": 2,
    "silence": 3, "vmm": 4, "clock": 2, "low": 3, "memory": 3, "untap": 2,
    "end": 3, "still": 3, "lie": 2,
}  # fmt: skip
RESTORES = 0.15
"""The part of the runs in which the node is restored from a backup."""

RESTARTS = 0.25
"""The part of the runs in which the stack goes down and up again."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens. `pick` says to whom, `value` which way, each taken modulo what there is.

    `calls` is how many calls of its ports what begins or goes on here may make before it stands still; None means as
    many as it will.
    """

    name: str
    pick: int = 0
    value: int = 0
    calls: int | None = None

    def __str__(self) -> str:
        return f"Event({self.name!r}, {self.pick}, {self.value}, {self.calls})"


def events_of(seed: int) -> list[Event]:
    """The run that `seed` means. Each has some kinds of faults only: what many kinds hide, few may show."""
    random = Random(seed)
    kinds = {name for name in FAULTS if random.random() < 0.4}
    weights = WORK | {name: FAULTS[name] for name in sorted(kinds)}
    if "crash" in kinds:
        weights["restart"] = FAULTS["restart"]
    events = list(_drawn(random, list(weights), list(weights.values())))
    return _restarted(Random(f"stack {seed}"), _restored(Random(~seed), events))


def _restored(random: Random, events: list[Event]) -> list[Event]:
    """Some runs are taken back to a backup on a new host. Drawn apart, so that all other runs stay what they mean."""
    if random.random() >= RESTORES:
        return events
    taken, restored = sorted(random.sample(range(len(events)), 2))
    return [*events[:taken], Event("backup"), *events[taken:restored], Event("restore"), *events[restored:]]


def _restarted(random: Random, events: list[Event]) -> list[Event]:
    """In some runs the stack goes down and up again, once or twice. Drawn apart as well."""
    if random.random() >= RESTARTS:
        return events
    for _ in range(random.choice((1, 1, 2))):
        at, pick = random.randrange(len(events) + 1), random.randrange(3)
        events.insert(at, Event("stack", pick))
    return events


def _drawn(random: Random, names: list[str], weights: list[int]) -> Iterator[Event]:
    cut = random.choice((0.1, 0.3, 0.6))  # how often work stands still on its way
    picks = [random.randrange(_ANY) for _ in range(random.choice((2, 4, 64)))]  # few: much happens to the same
    for name in random.choices(names, weights, k=random.randrange(8, 40)):
        calls = random.randrange(random.choice((4, 20, 60))) if random.random() < cut else None
        yield Event(name, random.choice(picks), random.randrange(_ANY), calls)
