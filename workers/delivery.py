"""What kombu's Redis transport needs so that a message is neither run twice at once nor left lying.

Measured on celery and kombu 5.7.0; each guard has a test against a real Redis and real workers.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import redis
import structlog
from celery import Celery, bootsteps
from kombu.transport.redis import Channel

from mvm.errors import NotAllowed

log = structlog.get_logger("mvm.delivery")

_GATHER_S = 0.2
_CLAIM_S = 12


class SoleWorker(bootsteps.StartStopStep):  # type: ignore[misc]
    """Claims this worker's unacknowledged set, before anything of it is touched, and keeps it claimed.

    A lock in the state directory refuses a second worker there; this refuses that of another state directory, perhaps
    on another host, which has the same node id at the same broker. `owner` names the state directory.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    owner = ""

    def start(self, consumer: Any) -> None:
        """Celery's hook: the consumer is connected. Waits for the claim of a worker that has just ended."""
        channel = consumer.task_consumer.channel
        end = time.monotonic() + _CLAIM_S + 2
        while not self._claim(channel):
            if time.monotonic() > end:
                self._refuse(channel)
            threading.Event().wait(0.5)
        self._timer = consumer.timer.call_repeatedly(_CLAIM_S / 4, self._renew, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Celery's hook: the connection is lost or the worker ends."""
        timer = getattr(self, "_timer", None)
        if timer is not None:
            timer.cancel()

    def _claim(self, channel: Any) -> bool:
        """Whether the set is ours, for `_CLAIM_S` from now."""
        key = f"{channel.unacked_key}:owner"
        with channel.conn_or_acquire() as client:
            if client.set(key, self.owner, nx=True, ex=_CLAIM_S):
                return True
            if client.get(key) != self.owner.encode():
                return False
            client.expire(key, _CLAIM_S)
            return True

    def _renew(self, consumer: Any) -> None:
        if consumer.task_consumer is None:
            return
        channel = consumer.task_consumer.channel
        try:
            if not self._claim(channel):
                self._refuse(channel)
        except channel.connection_errors as error:
            log.warning("could not keep the claim", error=str(error))

    def _refuse(self, channel: Any) -> None:
        error = NotAllowed(
            "worker.already_running",
            f"another state directory has a worker for {channel.unacked_key.removeprefix('mvm:unacked:')}",
            hint="two nodes need two ids: MVM_NODE_ID",
        )
        log.error("ends", code=error.code, error=error.message)
        raise SystemExit(str(error))


class AdoptUnacked(bootsteps.StartStopStep):  # type: ignore[misc]
    """Puts back at once, and first in line, what this worker's killed predecessor had taken and not acknowledged.

    The unacknowledged set is this worker's own (see `workers.app`) and one worker has it at a time, so at the first
    start of a process everything in it is left over. Without this a killed worker's jobs wait out the visibility
    timeout.
    """

    requires = (SoleWorker,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._done = getattr(consumer.controller, "mvm_adopted", False)

    def start(self, consumer: Any) -> None:
        """Celery's hook: the consumer is connected."""
        if self._done:
            return  # a reconnect: what is in there is our own, in flight
        channel = consumer.task_consumer.channel
        with channel.conn_or_acquire() as client:
            tags = [tag.decode() if isinstance(tag, bytes) else tag for tag in client.hkeys(channel.unacked_key)]
        for tag in tags:
            channel.qos.restore_by_tag(tag)
        consumer.controller.mvm_adopted = True
        if tags:
            log.warning("took over what a killed worker left", messages=len(tags))


class VisibilityHeartbeat(bootsteps.StartStopStep):  # type: ignore[misc]
    """Keeps what is in flight invisible, however long it takes.

    Otherwise a job longer than the visibility timeout is delivered a second time while it runs.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Celery's hook: the consumer is connected."""
        timeout = consumer.app.conf.broker_transport_options["visibility_timeout"]
        self._timer = consumer.timer.call_repeatedly(timeout / 4, self._touch, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Celery's hook: the connection is lost or the worker ends."""
        timer = getattr(self, "_timer", None)
        if timer is not None:
            timer.cancel()

    def _touch(self, consumer: Any) -> None:
        if consumer.task_consumer is None:
            return
        channel = consumer.task_consumer.channel
        tags = list(channel.qos._delivered)
        if not tags:
            return
        try:
            with channel.conn_or_acquire() as client:
                now = time.time()
                client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)
        except channel.connection_errors as error:
            log.warning("could not keep messages invisible", error=str(error))


class GatherEvents(bootsteps.StartStopStep):  # type: ignore[misc]
    """What happens to tasks within `_GATHER_S` goes to Flower as one message.

    Celery sends it at the next turn of its loop: with jobs that take a moment, that is a message for each event.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._consumer = consumer
        self._asked = False
        consumer.on_send_event_buffered = self._soon

    def stop(self, consumer: Any) -> None:
        """Celery's hook: the connection is lost or the worker ends."""
        self._flush()

    def _soon(self) -> None:
        """By any thread; the loop's timers are for its own."""
        if not self._asked:
            self._asked = True
            self._consumer.hub.call_soon(self._consumer.hub.call_later, _GATHER_S, self._flush)

    def _flush(self) -> None:
        self._asked = False  # before: an event that comes meanwhile asks anew
        self._consumer._flush_events()


def install_steps(app: Celery, owner: str) -> None:
    """Add the steps to the app's consumers; `owner` names the state directory, however its path is spelt."""
    SoleWorker.owner = owner
    app.steps["consumer"].update((SoleWorker, AdoptUnacked, VisibilityHeartbeat, GatherEvents))


def keep_clients() -> None:
    """A channel has one Redis client for all that it sends and acknowledges; a client is for many threads.

    kombu 5.7.0 makes one for each command, which costs more than the command.
    """
    original = Channel._create_client

    def _create_client(self: Any, asynchronous: bool = False) -> Any:
        if asynchronous:
            return original(self, asynchronous)
        pool, kept = self.pool, self.__dict__.get("mvm_client")
        if kept is None or kept.connection_pool is not pool:  # a new pool after its connection was lost
            kept = self.mvm_client = original(self)
        return kept

    Channel._create_client = _create_client


def guard_detached_channels() -> None:
    """A channel whose connection is gone raises a connection error, which the worker recovers from.

    In kombu 5.7.0 it raises `AttributeError`, which ends a partly busy worker when Redis restarts.
    """
    original = Channel._connparams

    def _connparams(self: Any, asynchronous: bool = False) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise redis.exceptions.ConnectionError("the channel has lost its connection")
        return original(self, asynchronous)

    Channel._connparams = _connparams
