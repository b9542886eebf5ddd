"""Celery's settings, of every worker alike."""

from __future__ import annotations

from typing import Any

from kombu import Queue

from mvm.domain.job import JobVerb, Lane, lane_of
from mvm.drivers.celery_queue import PRIORITY_SEPARATOR, PRIORITY_STEPS, unacked_key
from mvm.ports.queue import node_queue
from mvm.settings import Settings


def celery_settings(settings: Settings, role: str) -> dict[str, Any]:
    """Of the worker ``main`` or ``urgent`` of the node."""
    queues = {lane: node_queue(settings.node, lane) for lane in (Lane.NORMAL, Lane.URGENT)}
    return {
        "broker_url": settings.broker,
        # Delivery: the job's record is the truth, so a message is only ever a reminder.
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_enable_remote_control": True,
        # Threads, because a job waits for other processes; deadlines and cancelling are the operation's own.
        "worker_pool": "threads",
        "task_queues": [Queue(name, routing_key=name) for name in queues.values()],
        "task_create_missing_queues": False,
        "task_default_queue": queues[Lane.NORMAL],
        "task_default_routing_key": queues[Lane.NORMAL],
        "task_routes": {
            verb.task_name: {"queue": queues[lane], "routing_key": queues[lane]}
            for verb in JobVerb
            for lane in (lane_of(verb, bulk=False),)
        },
        # Flower sees every job.
        "worker_send_task_events": True,
        "task_track_started": True,
        # A broker that restarts is waited for.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "priority",
            "unacked_key": unacked_key(settings.node, role),
            "unacked_index_key": f"mvm:unacked_index:{settings.node}:{role}",
            "unacked_mutex_key": f"mvm:unacked_mutex:{settings.node}:{role}",
        },
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
    }
