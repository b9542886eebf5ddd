"""The node's Celery app. Which worker this process is, `MVM_WORKER_ROLE` says: ``main`` or ``urgent``.

A process that is neither, such as ``celery -A workers status``, has the settings that the stack was started with.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from mvm.settings import Settings, load_settings
from workers.calls import JobsApp
from workers.config import celery_settings
from workers.delivery import guard_detached_channels, install_steps, keep_clients
from workers.foreign import guard_deliveries


def _settings(role: str | None) -> Settings:
    settings = load_settings()
    if role is not None:
        return settings
    from mvm.drivers.stack import running_settings

    return running_settings(settings)


def _owner(settings: Settings) -> str:
    """The state directory, known by this boot of the host and its place on a disk."""
    try:
        place = settings.state_dir.stat()
    except OSError:  # a program beside the workers, which claims nothing
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{place.st_dev}:{place.st_ino}"


_role = os.environ.get("MVM_WORKER_ROLE")
role = _role or "main"
settings = _settings(_role)
app = JobsApp(
    "mvm",
    include=["workers.instances", "workers.pools", "workers.tenants", "workers.sweeps", "workers.node"],
    settings=settings,
)


@lru_cache(maxsize=1)
def _task_names() -> frozenset[str]:
    """What may be delivered: jobs, and the one task of Celery's own that a chord needs."""
    return frozenset(name for name in app.tasks if name.startswith("mvm.")) | {"celery.chord_unlock"}


app.conf.update(celery_settings(settings, role), result_backend="workers.results:JobResults")
guard_detached_channels()
guard_deliveries(_task_names, app.refuse)
keep_clients()
install_steps(app, _owner(settings))
