"""A task that is called takes what a command gives: one job, asked for in two ways."""

from __future__ import annotations

from pathlib import Path

from mvm.domain.calls import WORDS, read_call
from mvm.domain.job import JobVerb
from tests.services.conftest import Node
from tests.support.command_line import CommandLine

_WAYS = (
    "--no-cold --compression zstd --seccomp baseline --pinned --critical --on-exit stop --warm-after 60 "
    "--sleep-after 600 --min-running 10 --egress none --metadata"
)


def test_a_task_takes_every_word_that_the_command_gives(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    node.pool()
    text = tmp_path / "user-data"
    text.write_text("hello")
    done = mvm("pool", "update", "acme/web", *_WAYS.split(), "--user-data", str(text))
    assert done.exit_code == 0, done.output
    [given] = [job for job in node.registry.jobs() if job.verb is JobVerb.POOL_UPDATE]
    assert set(WORDS[JobVerb.POOL_UPDATE].fields) == set(given.params), "each has an option, and each option is one"
    assert read_call(JobVerb.POOL_UPDATE, ["acme/web"], dict(given.params)).params == given.params
