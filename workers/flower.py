"""Flower, configured: ``python -m workers.flower``.

It shows jobs and changes nothing (read-only), asks for the generated password of user ``mvm``, remembers its
tasks over restarts, and listens on loopback in the stack's namespace and in the host's.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from socket import socket
from typing import Any

from mvm.drivers.listeners import loopback_listeners
from mvm.settings import Settings, load_settings
from mvm.telemetry.logging import configure

_SAVE_EVERY_MS = 30_000
_MAX_TASKS = 20_000
_COLUMNS = "name,kwargs,state,received,runtime,worker,uuid"  # what was asked of whom, before anything else


def serve(app: Any, settings: Settings, sockets: Sequence[socket]) -> None:
    """Run Flower over Celery's `app` on these listening sockets until SIGTERM or SIGINT."""
    # Flower reads tornado's global options while it is imported; values follow, the password never in argv.
    from flower.app import Flower
    from flower.options import options
    from flower.urls import settings as web
    from tornado.httpserver import HTTPServer
    from tornado.ioloop import IOLoop

    options.basic_auth = [f"mvm:{settings.layout.flower_password.read_text().strip()}"]
    options.read_only = True
    options.persistent = True
    options.db = str(settings.layout.root / "flower.db")
    options.state_save_interval = _SAVE_EVERY_MS
    options.max_tasks = _MAX_TASKS
    options.purge_offline_workers = 3600
    options.tasks_columns = _COLUMNS
    asyncio.set_event_loop(asyncio.new_event_loop())
    flower = Flower(capp=app, options=options, io_loop=IOLoop.current(), **web)
    server = HTTPServer(flower)
    server.add_sockets(sockets)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: flower.io_loop.add_callback_from_signal(flower.io_loop.stop))
    logging.getLogger(__name__).info("flower listens on %s", [s.getsockname() for s in sockets])
    try:
        flower.start()
    finally:
        server.stop()
        flower.stop()


def main() -> None:
    """Run it with the settings of the environment."""
    from workers.app import app

    settings = load_settings()
    configure(settings)
    namespaced = settings.namespace is not None
    serve(app, settings, loopback_listeners(settings.flower_port, namespaced=namespaced))


if __name__ == "__main__":
    main()
