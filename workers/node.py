"""What a worker process does beside tasks: logging, and the node's heartbeat."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import structlog
from celery import signals

from mvm.domain import lock_names
from mvm.drivers.locks import FileLocks
from mvm.errors import MvmError, NotAllowed, TimedOut
from mvm.telemetry.metrics import show_instances
from workers.app import role, settings
from workers.base import cancel, services

log = structlog.get_logger("mvm.node")
_leaving = threading.Event()
_kept = ExitStack()  # until the process ends
_PREDECESSOR_S = 3.0  # in which one that was told to end may still be at it


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    from mvm.telemetry.logging import configure

    configure(settings)


@signals.worker_init.connect
def _alone(**_: Any) -> None:
    """There is one worker of each role: a second one would take over what the first has in flight."""
    try:
        _kept.enter_context(FileLocks(settings.layout.locks).hold(lock_names.worker(role), deadline_s=_PREDECESSOR_S))
    except TimedOut:
        error = NotAllowed(
            "worker.already_running", f"the {role} worker of node {settings.node} runs already", hint="see: mvm status"
        )
        log.error("not started", code=error.code, error=error.message)
        raise SystemExit(str(error)) from None


@signals.task_revoked.connect
def _revoked(request: Any = None, **_: Any) -> None:
    """Celery has thrown its message away: so that nobody sends it again, its job ends."""
    if request is not None and request.id:
        cancel(request.id)


@signals.worker_ready.connect
def _ready(**_: Any) -> None:
    # What a killed predecessor had taken and not noted is in no queue any more.
    threading.Thread(target=_send_lost, name="send lost", daemon=True).start()
    if role == "main":
        threading.Thread(target=_rule, name="rules", daemon=True).start()
        threading.Thread(target=_beat, name="heartbeat", daemon=True).start()


def _send_lost() -> None:
    try:
        lost = services().jobs.send_lost(settings.node, older_than_s=0)
    except MvmError as error:  # the next sweep does it
        log.warning("lost messages not looked for", code=error.code, error=error.message)
        return
    if lost:
        log.warning("sent again what was lost", jobs=[str(job.job_id) for job in lost])


def _rule() -> None:
    """The packet filter is as it should be from the start; a namespace that was just made has none."""
    try:
        lines = services().networks.repair()
    except MvmError as error:  # every start of an instance says so, too
        log.error("no packet filter", code=error.code, error=error.message)
        return
    if lines:
        log.info("packet filter set up", lines=len(lines))


def _beat() -> None:
    node = services()
    while True:
        try:
            node.heartbeat.beat()
            show_instances(node.view.node_info()["instances"])
        except MvmError as error:
            log.warning("no heartbeat", code=error.code, error=error.message)
        if _leaving.wait(settings.heartbeat_s):
            return


@signals.worker_shutdown.connect
def _shutdown(**_: Any) -> None:
    _leaving.set()
