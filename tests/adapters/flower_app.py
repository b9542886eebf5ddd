"""A Celery app for Flower to watch, and Flower over it: what ``python -m workers.flower`` does with the real one."""

from __future__ import annotations

from celery import Celery

from mvm.drivers.listeners import loopback_listeners
from mvm.settings import load_settings
from workers.flower import serve

if __name__ == "__main__":
    settings = load_settings()
    app = Celery("watched", broker=settings.broker)
    serve(app, settings, loopback_listeners(settings.flower_port, namespaced=settings.namespace is not None))
