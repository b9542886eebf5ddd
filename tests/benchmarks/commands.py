"""``cli.*``: what a command costs as a whole process.

``cli.help``: ``mvm --help`` from its spawn to its end; bar 100 ms. ``cli.list``: ``mvm instance list`` of three
instances over a running stack, asked of the agent over QUIC; bar 400 ms. For both the bar is a time, and the baseline,
a bare ``python -c pass``, tells how much of it is the interpreter.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.benchmarks.bench_stack import COMMAND, Bench
from tests.benchmarks.result import Result, at_most

_RUNS = 15
_BARE = (sys.executable, "-c", "pass")


def cli_help(_bench: Bench) -> Result:
    bare, ours = _interleaved(lambda: _process(_BARE), lambda: _process((COMMAND, "--help")))
    return at_most("cli.help", "ms", "python -c pass", bare, ours, 100)


def cli_list(bench: Bench) -> Result:
    stack = bench.stack
    refs = stack.mvm("instance", "create", "bench/web", "--count", "3").split()
    listing = (COMMAND, "instance", "list")
    bare, ours = _interleaved(lambda: _process(_BARE), lambda: _process(listing, stack.env))
    stack.mvm("instance", "destroy", "-y", *refs)
    return at_most("cli.list", "ms", "python -c pass", bare, ours, 400)


def _interleaved(bare: Callable[[], float], ours: Callable[[], float]) -> tuple[list[float], list[float]]:
    bare(), ours()  # files come into the page cache
    pairs = [(bare(), ours()) for _ in range(_RUNS)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _process(argv: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Milliseconds from spawn to exit."""
    began = time.perf_counter()
    subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1000
