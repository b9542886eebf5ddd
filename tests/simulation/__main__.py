"""``scripts/simulate``: runs until told, one run told in full, or a planted bug looked for."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import count, islice
from multiprocessing import get_context

from tests.simulation.bases import simulated
from tests.simulation.planted import PLANTED
from tests.simulation.runs import Result, run, shortest

_PIECE = 100  # runs that a process does before it tells of them
_SHRUNK = 3  # failing seeds that are shrunk at the end


def some(seeds: Sequence[int], plant: str | None) -> tuple[int, list[Result]]:
    """Run these seeds: how many events that were, and what failed."""
    events, failed = 0, []
    with simulated(), PLANTED[plant]() if plant else nullcontext():
        for seed in seeds:
            result = run(seed)
            events += len(result.events)
            if result.breaches:
                failed.append(result)
    gc.collect()
    return events, failed


def prepare() -> None:
    """What every run begins with is made, and not looked through for garbage again and again."""
    with simulated():
        pass
    gc.freeze()
    gc.disable()


def pieces(first: int, runs: int | None) -> Iterator[range]:
    """Seeds from `first` on, in pieces."""
    for start in count(first, _PIECE):
        if runs is not None and start >= first + runs:
            return
        yield range(start, start + _PIECE if runs is None else min(start + _PIECE, first + runs))


def many(options: argparse.Namespace) -> int:
    """Run many seeds; 1 if any failed."""
    began, done, events, failed = time.monotonic(), 0, 0, list[Result]()
    todo = pieces(options.seed or 0, options.runs)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork"), initializer=prepare) as pool:
        waiting = {pool.submit(some, piece, options.plant): len(piece) for piece in islice(todo, 2 * options.jobs)}
        while waiting:
            future = next(iter(waiting))
            took, bad = future.result()
            done, events, failed = done + waiting.pop(future), events + took, failed + bad
            seconds = time.monotonic() - began
            for result in bad:
                print(f"seed {result.seed}: {result.breaches[0]}", flush=True)
            rate = f"{done} runs, {events} events, {len(failed)} failed, {seconds:.0f} s, {done / seconds:.1f} runs/s"
            print(rate, end="\n" if not sys.stderr.isatty() else "\r", file=sys.stderr)
            stop = (options.seconds and seconds >= options.seconds) or len(failed) >= options.failures
            for piece in islice(todo, 0 if stop else 1):
                waiting[pool.submit(some, piece, options.plant)] = len(piece)
    print(rate)
    for result in failed[:_SHRUNK]:
        one(result.seed, options.plant)
    return 1 if failed else 0


def one(seed: int, plant: str | None, *, shrinks: bool = True) -> int:
    """One run, told in full; when it fails, with as few events as still make it fail."""
    with simulated(), PLANTED[plant]() if plant else nullcontext():
        result = run(seed, trace=True)
        if result.breaches and shrinks:
            result = shortest(result)
    print(f"--- seed {seed}, {len(result.events)} events" + (f", planted: {plant}" if plant else ""))
    print(*result.trace, sep="\n")
    for breach in result.breaches:
        print(f"BREACH {breach}")
    return 1 if result.breaches else 0


def main() -> int:
    """The exit code: 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--runs", type=int, help="how many seeds; without it, and without --seconds, 1000")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="the first one; alone: that run, told in full")
    parser.add_argument("--whole", action="store_true", help="with --seed: do not look for fewer events")
    parser.add_argument("--plant", choices=sorted(PLANTED), help="with this bug put in")
    parser.add_argument("--failures", type=int, default=20, help="stop after so many")
    options = parser.parse_args()
    if options.runs is None and options.seconds is None:
        if options.seed is not None:
            return one(options.seed, options.plant, shrinks=not options.whole)
        options.runs = 1000
    return many(options)


if __name__ == "__main__":
    sys.exit(main())
