"""What a line of the log looks like, and which lines there are."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from mvm.errors import InvalidInput
from mvm.settings import load_settings
from mvm.telemetry.logging import bind_job, configure, parse_filter, without_passwords
from tests.support.make import job


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("mvm.noisy", "mvm.quiet"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def start(log: str = "info", log_format: str = "json") -> io.StringIO:
    out = io.StringIO()
    configure(load_settings(log=log, log_format=log_format), out)
    return out


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_both_kinds_of_loggers_give_one_kind_of_line() -> None:
    out = start()
    structlog.get_logger("mvm.a").info("made", count=3)
    logging.getLogger("celery.b").warning("lost %s", "it", extra={"where": "there"})
    first, second = lines(out)
    assert (first["event"], first["logger"], first["level"], first["count"]) == ("made", "mvm.a", "info", 3)
    assert (second["event"], second["logger"], second["where"]) == ("lost it", "celery.b", "there")
    assert first["timestamp"].endswith("Z")


def test_filter_by_logger() -> None:
    out = start("warning,mvm.noisy=debug,mvm.quiet=error")
    for name in ("mvm.noisy", "mvm.quiet", "other"):
        for say in (structlog.get_logger(name), logging.getLogger(name)):
            say.debug("d")
            say.warning("w")
            say.error("e")
    seen = [(line["logger"], line["event"]) for line in lines(out)]
    assert seen == [
        *[("mvm.noisy", event) for event in "dwedwe"],
        *[("mvm.quiet", "e")] * 2,
        *[("other", event) for event in "wewe"],
    ]


def test_celery_tells_of_each_task_only_when_asked() -> None:
    for log, told in (("info", []), ("debug", []), ("info,celery.app.trace=info", ["t"])):
        out = start(log)
        logging.getLogger("celery.app.trace").info("t")
        assert [line["event"] for line in lines(out)] == told


@pytest.mark.parametrize("text", ["loud", "a=loud", "=info", "a=b=", "info;debug"])
def test_a_bad_filter_is_named(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_filter(text)
    assert caught.value.fields["field"] == "MVM_LOG"


def test_filters() -> None:
    assert parse_filter("") == {"": 20}
    assert parse_filter("debug") == {"": 10}
    assert parse_filter(" mvm = Debug , error") == {"": 40, "mvm": 10}


def test_lines_within_a_job_name_it() -> None:
    out, work = start(), job()
    with bind_job(work):
        logging.getLogger("x").info("inside")
    structlog.get_logger("x").info("outside")
    inside, outside = lines(out)
    assert (inside["job_id"], inside["verb"], inside["subject"]) == (work.job_id, "instance.start", work.subject)
    assert "job_id" not in outside


def test_secrets_are_not_shown() -> None:
    for log_format in ("json", "text"):
        out = start(log_format=log_format)
        structlog.get_logger("x").info(
            "joined redis://u:hunter2@h/0",
            password="hunter2",
            deep={"api_token": "hunter2", "urls": ["a://:hunter2@b"]},
        )
        try:
            raise ValueError("amqp://u:hunter2@h is down")
        except ValueError:
            structlog.get_logger("x").exception("failed")
        assert "hunter2" not in out.getvalue()
        assert "redis://u:***@h/0" in out.getvalue()


def test_text_is_for_people() -> None:
    out = start(log_format="text")
    structlog.get_logger("mvm.a").info("made", count=3)
    assert "made" in out.getvalue()
    assert "count=3" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_url_is_shown_without_its_password() -> None:
    assert without_passwords("redis://u:p%40ss@h/0 unix:///s/redis.sock") == "redis://u:***@h/0 unix:///s/redis.sock"
