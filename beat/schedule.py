"""The schedule, and how a tick becomes a job on every live node and only there."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import celery.schedules
import structlog
from celery.beat import PersistentScheduler, ScheduleEntry
from celery.schedules import schedstate

from mvm.domain.job import JobVerb
from mvm.errors import MvmError
from mvm.services.jobs import Jobs
from mvm.settings import Settings, load_settings
from mvm.wiring import open_jobs

log = structlog.get_logger("mvm.beat")


def schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Celery's ``beat_schedule``: each sweep with its period."""
    periods = {
        JobVerb.SWEEP_STALE_PIDS: settings.stale_pid_sweep_s,
        JobVerb.SWEEP_RECONCILE: settings.reconcile_sweep_s,
        JobVerb.SWEEP_ORPHANS: settings.orphan_sweep_s,
        JobVerb.SWEEP_IDLENESS: settings.idleness_sweep_s,
        JobVerb.SWEEP_DISK: settings.disk_sweep_s,
        JobVerb.SWEEP_HEALTH: settings.health_sweep_s,
    }
    return {
        verb.value: {"task": verb.task_name, "schedule": Ticks(timedelta(seconds=period))}
        for verb, period in periods.items()
    }


class Ticks(celery.schedules.schedule):  # type: ignore[misc]
    """Due at the beginning of each period since 1970, so that all Beats mean the same ticks."""

    def is_due(self, last_run_at: datetime) -> Any:
        """Celery's hook: whether it is due, and in how many seconds to ask again."""
        every, now = self.seconds, self.now().timestamp()
        last = self.maybe_make_aware(last_run_at).timestamp()
        return schedstate(now // every != last // every, every - now % every)


class FleetScheduler(PersistentScheduler):  # type: ignore[misc]
    """Fans each due entry out to the live nodes. There may be several Beats, on one machine or many: any may die.

    A node that still has this sweep queued or running gets no second one, and a message nobody takes expires: so
    nothing piles up when a node is slow or away.
    """

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's hook: fire what is due. Says that Beat lives, for whoever asks how the stack does."""
        self._alive.touch()
        return super().tick(*args, **kwargs)

    @cached_property
    def _alive(self) -> Path:
        return load_settings().layout.beat_alive

    @cached_property
    def _jobs(self) -> Jobs:
        return open_jobs(load_settings())

    def apply_async(self, entry: ScheduleEntry, producer: Any = None, advance: bool = True, **_: Any) -> None:
        """Send `entry` to every live node."""
        if advance:
            self.reserve(entry)
        verb = JobVerb(entry.task.removeprefix("mvm."))
        try:
            sent = self._jobs.sweep(verb, every_s=entry.schedule.run_every.total_seconds())
        except MvmError as error:
            log.warning("could not send", sweep=verb.value, code=error.code, error=error.message)
            return
        log.debug("sent", sweep=verb.value, nodes=[str(job.node_id) for job in sent])
