"""Benchmarks are called what their readers know them by."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.benchmarks.__main__ import BENCHMARKS

# What scripts and dashboards select by. A benchmark more is nobody's harm, a renamed one is.
KNOWN = """
    start.cold start.clone_vs_cold start.clone_vs_bare cli.help cli.list wake.idle wake.backlog warm.resume sleep.size
    sleep.time clone.pss net.apply cage.start reconcile.noop_1k reconcile.noop_10k reconcile.plan_10k enqueue.single
    enqueue.bulk execute.noop
"""
MAKERS = {"at_most", "at_most_ratio", "at_least_ratio", "informal"}


def results_named() -> set[str]:
    """The names that results are given, in `build/bench.json` and in the table."""
    found = set()
    for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    found.add(str(name.value))
    return found


def test_every_known_name_selects_a_benchmark() -> None:
    assert set(KNOWN.split()) - set(BENCHMARKS) == set()


def test_a_result_is_called_what_its_benchmark_is_selected_by() -> None:
    assert results_named() == set(BENCHMARKS)
