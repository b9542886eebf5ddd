"""Everybody means the same lock by the same name."""

import ast
from collections.abc import Iterator
from pathlib import Path

from mvm.domain import lock_names
from mvm.domain.ids import JobId
from mvm.domain.job import JobVerb
from mvm.domain.pool import ImageSource
from tests.support.make import ACME, instance_ref

ROOT = Path(__file__).parents[2]


def spelled_out() -> Iterator[str]:
    """Where a lock is held, or waited for, under a name that is written there."""
    for path in [path for room in ("mvm", "workers", "beat") for path in (ROOT / room).rglob("*.py")]:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args)
        for call in calls:
            asks = isinstance(call.func, ast.Attribute) and call.func.attr in ("hold", "wait_free")
            if asks and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
                yield f"{path.relative_to(ROOT)}:{call.lineno}"


def test_no_room_spells_a_locks_name_by_itself() -> None:
    assert list(spelled_out()) == []


def test_a_name_is_what_an_older_mvm_means_by_it() -> None:
    ref, job_id = instance_ref(), JobId.make(1, b"12345")
    assert lock_names.instance(ref) == "instance acme/web/i-00000001"
    assert lock_names.job(job_id) == f"job {job_id}"
    assert lock_names.sweep(JobVerb.SWEEP_ORPHANS) == "sweep sweep.orphans"
    assert lock_names.build(ImageSource("builtin:", "minimal")) == "build builtin: minimal"
    assert (lock_names.secrets(ACME), lock_names.trail(ACME)) == ("secrets acme", "audit acme")
    assert lock_names.worker("normal") == "worker normal"
