"""Celery by itself: a node's worker with the settings of ours, and a task that does nothing. Nothing of it is ours."""

from __future__ import annotations

from celery import Celery

from mvm.settings import load_settings
from workers.config import celery_settings

app = Celery("bare")
app.conf.update(celery_settings(load_settings(), "main"))


@app.task(name="bench.noop", ignore_result=True)
def noop(**_: object) -> None:
    """Nothing."""
