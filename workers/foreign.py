"""Foreign messages harm nothing: what is no message of ours is set aside before Celery sees it.

kombu and Celery trust what they find in a queue: text that is no JSON, an object without a field, ends the worker, and
all that it had in flight. Each of kombu's ways to take a message is closed here; a test sends every kind of wrong one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from typing import Any

import structlog
from kombu.transport.redis import Channel, Empty, QoS
from kombu.utils.encoding import bytes_to_str

from mvm.domain.messages import ForeignMessage, check_envelope, read_envelope, read_task
from mvm.ports.queue import queue_owner
from mvm.telemetry.metrics import FOREIGN_MESSAGES

log = structlog.get_logger("mvm.foreign")

SET_ASIDE_KEY = "mvm:foreign"
KEPT = 100
_KEPT_S = 7 * 86400
_SHOWN_BYTES = 4096

Report = Callable[[ForeignMessage], None]


def guard_deliveries(tasks: Callable[[], Collection[str]], report: Report) -> None:
    """From now on every channel of this process hands on what `read_task` takes alone.

    The rest is kept for whoever asks (``mvm:foreign``), counted, and told to `report`: once, as it is taken.
    """

    def _brpop_read(self: Any, **options: Any) -> bool:
        """kombu's own, but for what it does with what came."""
        try:
            found = _popped(self, options)
            if not found:
                raise Empty
            queue, raw = bytes_to_str(found[0]).rsplit(self.sep, 1)[0], found[1]
            self._queue_cycle.rotate(queue)
            try:
                # Where nodes take their jobs, a job is expected; replies of remote control have queues of their own.
                envelope = read_task(raw, tasks()) if queue_owner(queue) else read_envelope(raw)
            except ForeignMessage as error:
                _set_aside(self, queue, raw, error)
                report(error)
            else:
                self.connection._deliver(envelope, queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    Channel._brpop_read = _brpop_read
    _guard_broadcasts()
    _guard_restoring()


def _popped(channel: Any, options: dict[str, Any]) -> Any:
    try:
        return channel.client.parse_response(channel.client.connection, "BRPOP", **options)
    except channel.connection_errors:
        channel.client.connection.disconnect()  # the next turn connects anew
        raise


def _guard_broadcasts() -> None:
    """Remote control and events: what kombu could not make a message of is dropped."""
    original = Channel._deliver_fanout_message

    def _deliver_fanout_message(self: Any, message: Any, exchange: str) -> Any:
        try:
            check_envelope(message)
        except ForeignMessage as error:
            _count(f"broadcast {exchange}", error)
            return True
        return original(self, message, exchange)

    Channel._deliver_fanout_message = _deliver_fanout_message


def _guard_restoring() -> None:
    """What lies among the unacknowledged messages and is none is set aside, too: it would end each next worker."""
    original = QoS.restore_by_tag

    def restore_by_tag(self: Any, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        with self.channel.conn_or_acquire(client) as connected:
            raw = connected.hget(self.unacked_key, tag)
            try:
                _check_unacked(raw)
            except ForeignMessage as error:
                self._remove_from_indices(tag).execute()
                _set_aside(self.channel, self.unacked_key, raw, error)
                return
            original(self, tag, connected, leftmost)

    QoS.restore_by_tag = restore_by_tag


def _check_unacked(raw: bytes | None) -> None:
    """Raises `ForeignMessage` unless it is a message, its exchange and its routing key."""
    if raw is None:  # acknowledged meanwhile
        return
    try:
        message, _, _ = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        message = None
    check_envelope(message)


def _set_aside(channel: Any, queue: str, raw: bytes, error: ForeignMessage) -> None:
    _count(queue, error)
    note = {
        "at": time.time(),
        "queue": queue,
        "why": error.why.value,
        "message": error.message,
        "bytes": len(raw),
        "text": raw[:_SHOWN_BYTES].decode(errors="backslashreplace"),
    }
    with channel.conn_or_acquire() as client:
        pipe = client.pipeline()
        pipe.lpush(SET_ASIDE_KEY, json.dumps(note)).ltrim(SET_ASIDE_KEY, 0, KEPT - 1).expire(SET_ASIDE_KEY, _KEPT_S)
        pipe.execute()


def _count(queue: str, error: ForeignMessage) -> None:
    FOREIGN_MESSAGES.labels(error.why.value).inc()
    log.warning("foreign message set aside", queue=queue, why=error.why.value, error=error.message)
