"""``python -m tests.benchmarks [PREFIX]``: those whose name begins so; a table, and ``build/bench.json``.

Exits 1 when a bar is missed, 2 when no name begins so, 7 without root. Whatever it started is gone when it ends, also
on Ctrl-C. ``MVM_TEST_IMAGE_CACHE`` names a directory that keeps packages and images from one run to the next.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from tests.benchmarks import cage, commands, converge, delivery, net, sleep, start
from tests.benchmarks.bench_stack import Bench
from tests.benchmarks.result import Result, table

OUTPUT = Path(__file__).parents[2] / "build" / "bench.json"
BENCHMARKS: Mapping[str, Callable[[Bench], Result]] = {
    "start.cold": start.cold,
    "start.clone_vs_cold": start.clone_vs_cold,
    "start.clone_vs_bare": start.clone_vs_bare,
    "wake.idle": sleep.wake_idle,
    "warm.resume": sleep.warm_resume,
    "sleep.size": sleep.sleep_size,
    "sleep.time": sleep.sleep_time,
    "clone.pss": sleep.clone_pss,
    "cage.start": cage.start,
    "net.apply": net.apply,
    "cli.help": commands.cli_help,
    "cli.list": commands.cli_list,
    "reconcile.noop_1k": converge.noop_1k,
    "reconcile.noop_10k": converge.noop_10k,
    "reconcile.plan_10k": converge.plan_10k,
    "enqueue.single": delivery.enqueue_single,
    "enqueue.bulk": delivery.enqueue_bulk,
    "execute.noop": delivery.execute_noop,
    "execute.wake": delivery.execute_wake,
    "wake.backlog": sleep.wake_backlog,  # last: it leaves a registry with tens of thousands of ended jobs
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(words: Sequence[str]) -> int:
    prefix = words[0] if words else ""
    chosen = {name: run for name, run in BENCHMARKS.items() if name.startswith(prefix)}
    if not chosen:
        say(f"no benchmark begins with {prefix!r}; there are: {', '.join(BENCHMARKS)}")
        return 2
    if os.geteuid() != 0:
        say("network namespaces and microVMs need root")
        return 7
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    with ExitStack() as cleanup:
        bench = Bench(cleanup, say)
        results: list[Result] = []
        cleanup.callback(_show, results)  # also when one of them cannot be measured
        for name, run in chosen.items():
            say(f"{name} ...")
            results.append(run(bench))
    return 0 if all(result.ok for result in results) else 1


def _show(results: Sequence[Result]) -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
    print(table(results), flush=True)


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """The first signal ends the run; cleaning up is not interrupted, nor are the commands that it runs."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of libraries; the tests make them errors
    sys.exit(main(sys.argv[1:]))
