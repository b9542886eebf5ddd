"""Slow is not dead: how long to wait for an answer, and what the lack of one means."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 15.0  # nobody is waited for longer than so many times the ordinary


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether somebody answers, and what people should know of it: what is wrong, or that it took long."""

    well: bool
    note: str | None = None


def patience_s(ordinary_s: float, load: float, cpus: int) -> float:
    """How long to wait for what takes at most `ordinary_s` on a machine at rest, with `load` processes for `cpus`."""
    return ordinary_s * min(max(load / max(cpus, 1), 1.0), _MOST)


def judge(problem: str | None, took_s: float, ordinary_s: float) -> Answer:
    """What an answer, or a `problem` instead of one, after `took_s` seconds says."""
    if problem is not None:
        waited = f" (waited {took_s:.0f} s)" if took_s > ordinary_s else ""
        return Answer(False, problem + waited)
    return Answer(True, f"slow: answered after {took_s:.1f} s" if took_s > ordinary_s else None)
