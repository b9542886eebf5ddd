"""A worker process over a shared fake host, to be stopped in the middle of a job.

``python -m tests.support.stoppable DIR JOB MOMENT``: runs the job (JSON), says ``at MOMENT`` once it is there, reads a
line, goes on (or fails there, when the line says so) and prints its record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mvm.domain.job import Job
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake.shared import SharedFakeHost
from mvm.drivers.locks import FileLocks
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import GuestSilent
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node


def open_worker(root: Path, *, takeover_s: float) -> tuple[NodeServices, SharedFakeHost]:
    """One of the processes of a node whose store, host and locks are below `root`."""
    clock = SystemClock()
    host = SharedFakeHost(clock, root / "fake-host")
    ports = NodePorts(
        SqliteStore(root / "node.db"), MemoryRegistry(clock), MemoryQueue(clock),
        FileLocks(root / "locks", takeover_s=takeover_s), clock, host.vmm, host.guest, host.network, host.packets, None,
        host.storage, host.images, host.memory, host.audit, host.cgroups, host.secrets,
    )  # fmt: skip
    settings = Settings(state_dir=root, node_id="n1", driver="fake", job_attempts=1)
    return build_node(ports, settings, authorized_key=""), host


def _main() -> None:
    root, job, moment = Path(sys.argv[1]), Job.from_dict(json.loads(sys.argv[2])), sys.argv[3]
    node, host = open_worker(root, takeover_s=600)
    name, method = moment.split(".")
    part = getattr(host, name)
    real = getattr(part, method)

    def stop_here(*args: Any, **kwargs: Any) -> Any:
        setattr(part, method, real)
        print(f"at {moment}", flush=True)
        if "fail" in sys.stdin.readline():
            raise GuestSilent("guest.silent", "not a word")
        return real(*args, **kwargs)

    setattr(part, method, stop_here)
    print(json.dumps(node.runner.run(job).to_dict()), flush=True)


if __name__ == "__main__":
    _main()
