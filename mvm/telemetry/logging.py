"""Logs: structlog in front, the standard library's loggers routed through the same formatter.

Text for people, one JSON object a line for services. Everything goes to stderr; whoever starts us keeps it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from mvm.domain.job import Job
from mvm.errors import InvalidInput
from mvm.settings import Settings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_SECRET_NAME = re.compile(r"password|passwd|secret|token|private|authorization|credential", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s:/@]*):[^\s@/]+@")
_HIDDEN = "***"

_QUIET = {"celery.worker.strategy": logging.WARNING, "celery.app.trace": logging.WARNING}
"""Celery's two lines for each task say less than ours of its job, and cost a tenth of what a short job does."""


def parse_filter(text: str) -> dict[str, int]:
    """``info``, or ``logger=level`` pairs: the level per logger, the root's under the empty name.

    The root's level is ``info`` unless a bare level is among the pairs. Raises `InvalidInput` (``log.invalid_filter``).
    """
    levels = {"": logging.INFO}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, level = item.rpartition("=")
        number = _LEVELS.get(level.strip().lower())
        if number is None or (equals and not name.strip()):
            raise InvalidInput(
                "log.invalid_filter", f"MVM_LOG: {item!r} is no filter",
                hint=f"a level ({', '.join(_LEVELS)}) or LOGGER=LEVEL, separated by commas", field="MVM_LOG",
            )  # fmt: skip
        levels[name.strip()] = number
    return levels


def configure(settings: Settings, stream: IO[str] | None = None) -> None:
    """Route everything that is logged in this process, as the settings say; may be called again."""
    levels = parse_filter(settings.log)
    out = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if settings.log_format == "json":
        render: list[structlog.typing.Processor] = [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            _hide_secrets,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        render = [
            structlog.processors.format_exc_info,
            _hide_secrets,
            structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback),
        ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name, level in {**_QUIET, **levels}.items():
        logging.getLogger(name or None).setLevel(level)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@contextmanager
def bind_job(job: Job) -> Iterator[None]:
    """Every line logged within (by this thread) names the job."""
    with structlog.contextvars.bound_contextvars(
        job_id=str(job.job_id), verb=job.verb.value, subject=job.subject, node=str(job.node_id), actor=job.actor
    ):
        yield


def _hide_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A net below the rule that nobody logs secrets: fields named like one, and passwords in URLs."""
    for key, value in event.items():
        event[key] = _HIDDEN if _is_secret(key) else _clean(value)
    return event


@lru_cache(1024)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def without_passwords(text: str) -> str:
    """`text` with the passwords in its URLs hidden."""
    return _URL_PASSWORD.sub(rf"\1:{_HIDDEN}@", text) if "://" in text else text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_passwords(value)
    if isinstance(value, dict):
        return {k: _HIDDEN if _is_secret(str(k)) else _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
