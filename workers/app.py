"""The node's Celery app. Which worker this process is, `MVM_WORKER_ROLE` says: ``main`` or ``urgent``."""

from __future__ import annotations

import os

from celery import Celery

from mvm.settings import load_settings
from workers.config import celery_settings
from workers.delivery import guard_detached_channels, install_steps, keep_clients

settings = load_settings()
role = os.environ.get("MVM_WORKER_ROLE", "main")

app = Celery(
    "mvm",
    include=["workers.instances", "workers.pools", "workers.tenants", "workers.sweeps", "workers.node"],
)
app.conf.update(celery_settings(settings, role))
guard_detached_channels()
keep_clients()
install_steps(app)
