"""The node's Celery workers: thin tasks. ``celery -A workers ...`` finds their app here."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Celery looks for ``celery``; it is imported when it is wanted."""
    if name != "celery":
        raise AttributeError(name)
    from workers.app import app

    return app
