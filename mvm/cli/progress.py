"""Progress on stderr: one line that is redrawn on a terminal, elsewhere a line per change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from types import TracebackType

import click

from mvm.cli.render import clean
from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobState, JobVerb

_BAR = 24


class Progress:
    """Shows the jobs `ids` as they change; a context manager that ends the line."""

    def __init__(self, ids: Sequence[JobId]) -> None:
        self._jobs: dict[JobId, Job] = {}
        self._total = len(ids)
        self._terminal = sys.stderr.isatty()
        self._shown = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._shown:
            click.echo(err=True)

    def show(self, job: Job) -> None:
        """`job` is like this now."""
        self._jobs[job.job_id] = job
        text = clean(job_line(job) if self._total == 1 else self._summary())
        if text == self._shown:
            return
        self._shown = text
        if self._terminal:
            click.echo(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", nl=False, err=True)
        else:
            click.echo(text, err=True)

    def note(self, text: str) -> None:
        """A remark on a line of its own."""
        if self._terminal and self._shown:
            click.echo(err=True)
            self._shown = ""  # to be drawn again below the remark
        click.echo(f"note: {clean(text)}", err=True)

    def _summary(self) -> str:
        ended = [job.state for job in self._jobs.values() if job.state.final]
        failed = sum(state is not JobState.SUCCEEDED for state in ended)
        return f"{self._total} jobs: {bar(len(ended), self._total, failed)}"


def job_line(job: Job) -> str:
    """One job in one line: what it does now, or how it ended."""
    what = job.params.get("verb", job.verb.value) if job.verb is JobVerb.BULK else job.verb.value
    return f"{what} {job.subject}: {_state(job)}"


def _state(job: Job) -> str:
    progress = job.progress
    if job.state.final:
        since = job.started_at or job.submitted_at
        took = f" after {(job.finished_at - since).total_seconds():.1f} s" if job.finished_at else ""
        failed = f" ({progress.failed} of {progress.total})" if progress.failed else ""
        return f"{job.state}{failed}{took}"
    if job.verb is JobVerb.BULK:
        return bar(progress.done, progress.total, progress.failed)
    if job.step is None:
        return job.state.value
    # `done` steps are behind us, so this is the next one
    return f"{job.step} ({min(progress.done + 1, progress.total)}/{progress.total})" if progress.total else job.step


def bar(done: int, total: int, failed: int) -> str:
    """``[####....] 4/8, 1 failed``."""
    filled = _BAR * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}" + (f", {failed} failed" if failed else "")
