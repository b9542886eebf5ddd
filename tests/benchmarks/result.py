"""What a benchmark found, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of `runs` runs each; `ratio` is value by baseline. `bar` is what `ok` was held against, if anything."""

    name: str
    unit: str
    baseline: str
    baseline_value: float
    value: float
    ratio: float
    bar: float | None
    runs: int
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()}


def at_most_ratio(name: str, unit: str, baseline: str, bare: Sequence[float], ours: Sequence[float],
                  bar: float) -> Result:  # fmt: skip
    """A benchmark whose bar is a multiple of its baseline."""
    result = informal(name, unit, baseline, bare, ours)
    return _with_bar(result, bar, result.ratio <= bar)


def at_least_ratio(name: str, unit: str, baseline: str, bare: Sequence[float], ours: Sequence[float],
                   bar: float) -> Result:  # fmt: skip
    """A benchmark of a rate, whose bar is a part of its baseline's."""
    result = informal(name, unit, baseline, bare, ours)
    return _with_bar(result, bar, result.ratio >= bar)


def at_most(name: str, unit: str, baseline: str, bare: Sequence[float], ours: Sequence[float], bar: float) -> Result:
    """A benchmark whose bar is a value in its own unit; the baseline says what of it nobody can avoid."""
    result = informal(name, unit, baseline, bare, ours)
    return _with_bar(result, bar, result.value <= bar)


def informal(name: str, unit: str, baseline: str, bare: Sequence[float], ours: Sequence[float]) -> Result:
    """A benchmark without a bar."""
    low, value = median(bare), median(ours)
    return Result(name, unit, baseline, low, value, value / low, None, len(ours), ok=True)


def _with_bar(result: Result, bar: float, ok: bool) -> Result:
    return Result(**{**asdict(result), "bar": bar, "ok": ok})


def table(results: Sequence[Result]) -> str:
    """One line each."""
    rows = [("NAME", "VALUE", "BASELINE", "UNIT", "RATIO", "BAR", "RUNS", "OK", "AGAINST")]
    for r in results:
        bar = "-" if r.bar is None else f"{r.bar:g}"
        values = f"{r.value:.4g}", f"{r.baseline_value:.4g}"
        rows.append((r.name, *values, r.unit, f"{r.ratio:.2f}", bar, str(r.runs), "yes" if r.ok else "NO", r.baseline))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
