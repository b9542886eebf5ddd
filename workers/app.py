"""The node's Celery app. Which worker this process is, `MVM_WORKER_ROLE` says: ``main`` or ``urgent``."""

from __future__ import annotations

import os

from celery import Celery
from kombu import Queue

from mvm.domain.job import Lane
from mvm.drivers.celery_queue import PRIORITY_SEPARATOR, PRIORITY_STEPS
from mvm.ports.queue import node_queue
from mvm.settings import load_settings
from workers.delivery import guard_detached_channels, install_steps, keep_clients

settings = load_settings()
role = os.environ.get("MVM_WORKER_ROLE", "main")
_queues = {"main": node_queue(settings.node), "urgent": node_queue(settings.node, Lane.URGENT)}

app = Celery(
    "mvm",
    broker=settings.broker,
    include=["workers.instances", "workers.pools", "workers.tenants", "workers.sweeps", "workers.node"],
)
app.conf.update(
    # Delivery: the job's record is the truth, so a message is only ever a reminder.
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_serializer="json",
    accept_content=["json"],
    worker_enable_remote_control=True,
    # Threads, because a job waits for other processes; deadlines and cancelling are the operation's own.
    worker_pool="threads",
    task_queues=[Queue(name) for name in _queues.values()],
    task_create_missing_queues=False,
    # Flower sees every job.
    worker_send_task_events=True,
    task_track_started=True,
    # A broker that restarts is waited for.
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        "visibility_timeout": settings.visibility_timeout_s,
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "priority_steps": list(PRIORITY_STEPS),
        "sep": PRIORITY_SEPARATOR,
        "queue_order_strategy": "priority",
        # Of this worker alone, so that its successor can take over at once what it left.
        "unacked_key": f"mvm:unacked:{settings.node}:{role}",
        "unacked_index_key": f"mvm:unacked_index:{settings.node}:{role}",
        "unacked_mutex_key": f"mvm:unacked_mutex:{settings.node}:{role}",
    },
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
)  # fmt: skip
guard_detached_channels()
keep_clients()
install_steps(app)
