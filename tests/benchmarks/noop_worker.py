"""The node's worker as it is, over a fake host in its memory; its jobs ``tenant.update`` do nothing."""

from __future__ import annotations

from dataclasses import replace

import workers.base
from mvm.domain.job import JobVerb
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import FakeHost
from mvm.telemetry.metrics import observe_job
from mvm.wiring import NodeServices, build_node, open_ports
from workers.app import app, settings  # noqa: F401 - Celery looks for the app here


def _services() -> NodeServices:
    host = FakeHost(SystemClock())
    ports = replace(
        open_ports(settings), vmm=host.vmm, guest=host.guest, network=host.network, packets=host.packets,
        storage=host.storage, images=host.images, memory=host.memory, cgroups=host.cgroups, secrets=host.secrets,
    )  # fmt: skip
    services = build_node(ports, settings, authorized_key="", observers=(observe_job,))
    services.runner.register(JobVerb.TENANT_UPDATE, lambda _context: {})
    return services


workers.base._services = _services()
