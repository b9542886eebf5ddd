"""Celery Beat's app: ``celery -A beat.app beat``."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from beat.schedule import schedule
from mvm.settings import load_settings

settings = load_settings()
app = Celery("mvm-beat", broker=settings.broker)
app.conf.update(
    beat_schedule=schedule(settings),
    beat_scheduler="beat.schedule:FleetScheduler",
    beat_schedule_filename=str(settings.layout.run / "beat-schedule"),
    beat_max_loop_interval=1.0,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    from mvm.telemetry.logging import configure

    configure(settings)
