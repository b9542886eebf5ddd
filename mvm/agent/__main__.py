"""``python -m mvm.agent``: this node's agent, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading

import structlog

from mvm.agent.methods import NodeApi, method_table
from mvm.agent.server import listen, serve
from mvm.drivers.listeners import loopback_listeners
from mvm.errors import MvmError
from mvm.settings import Settings, load_settings
from mvm.telemetry.logging import configure

# How long a thread that computes may keep the others waiting. An answer takes some twenty turns of the event loop and
# its thread; with Python's own 5 ms each, one reader of a large document made everybody's commands 80 ms slower.
TURN_S = 0.0005


async def run(settings: Settings, api: NodeApi) -> None:
    """Serve `api` at the address in the settings; errors as `mvm.agent.server.serve`."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(listen(settings.agent_host, settings.agent_port), settings.layout.certs, method_table(api), stop)


def main() -> int:
    """The exit code: 0 after a signal, else the error's."""
    sys.setswitchinterval(TURN_S)
    try:
        settings = load_settings()
        configure(settings)
        from mvm.telemetry import metrics
        from mvm.wiring import open_node

        listeners = loopback_listeners(settings.metrics_port, namespaced=settings.namespace is not None)
        stop_metrics = metrics.serve(listeners)
        try:
            node = open_node(settings)
            threading.Thread(target=node.urgent.take_up, daemon=True).start()  # beside whoever asks already
            asyncio.run(run(settings, node.view))
        finally:
            stop_metrics()
    except MvmError as error:
        structlog.get_logger(__name__).error("agent.failed", **error.to_dict())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
