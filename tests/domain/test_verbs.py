"""Every verb can be delivered, and every sweep is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from beat.schedule import schedule
from mvm.domain.calls import WORDS
from mvm.domain.job import JobVerb
from mvm.settings import Settings

WORKERS = Path(__file__).resolve().parents[2] / "workers"


def test_every_verb_has_a_task() -> None:
    named = [n for path in WORKERS.glob("*.py") for n in re.findall(r"job_task\(JobVerb\.(\w+)\)", path.read_text())]
    assert sorted(named) == sorted(verb.name for verb in JobVerb if verb is not JobVerb.BULK)


def test_every_verb_but_sweeps_can_be_called() -> None:
    assert set(WORDS) == {verb for verb in JobVerb if not verb.is_sweep and verb is not JobVerb.BULK}


def test_every_sweep_has_a_period(tmp_path: Path) -> None:
    assert set(schedule(Settings(state_dir=tmp_path))) == {verb.value for verb in JobVerb if verb.is_sweep}
