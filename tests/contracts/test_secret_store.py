"""ports/secrets.py."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import JobId, TenantId
from mvm.domain.layout import StateLayout
from mvm.domain.secrets import Secrets
from mvm.drivers import state_dir
from mvm.drivers.fake import FakeHost
from mvm.drivers.secret_files import SecretFiles
from mvm.errors import Failed
from mvm.ports.secrets import SecretStore

ACME, BOLT = TenantId("acme"), TenantId("bolt")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ONE = Secrets(1, NOW, {"PASSWORD": "hush", "key": "two\nlines ü"})


@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    layout = StateLayout(tmp_path / "s")
    state_dir.prepare(layout)
    return layout


@pytest.fixture(params=["fake", "files"])
def store(request: pytest.FixtureRequest, layout: StateLayout) -> SecretStore:
    return FakeHost().secrets if request.param == "fake" else SecretFiles(layout)


def test_what_is_saved_is_loaded_until_it_is_removed(store: SecretStore) -> None:
    assert store.load(ACME) is None
    store.save(ACME, ONE)
    assert store.load(ACME) == ONE
    assert store.load(BOLT) is None
    two = Secrets(2, NOW, {"A": "x"}, JobId("j-019b76daa846-e629fa6598"))
    store.save(ACME, two)
    assert store.load(ACME) == two
    for _ in range(2):
        store.remove(ACME)
        assert store.load(ACME) is None


def test_no_value_is_told_by_accident() -> None:
    assert "hush" not in repr(ONE)
    assert "hush" not in str(ONE)


# --- at rest
def test_files_are_private_and_tell_nothing(layout: StateLayout) -> None:
    files = SecretFiles(layout)
    files.save(ACME, ONE)
    first = layout.secrets_of(ACME).read_bytes()
    assert b"hush" not in first
    assert b"PASSWORD" not in first
    for path in (layout.secrets_key, layout.secrets_of(ACME)):
        assert path.stat().st_mode & 0o777 == 0o600
    assert layout.secrets.stat().st_mode & 0o777 == 0o700
    files.save(ACME, ONE)
    assert json.loads(first)["salt"] != json.loads(layout.secrets_of(ACME).read_bytes())["salt"], "a key of its own"
    assert [path.name for path in layout.secrets.iterdir()] == ["acme"]


def said(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["said"].__setitem__(name, value)


def flip(name: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        data = bytearray(b64decode(document[name]))
        data[len(data) // 2] ^= 1
        document[name] = b64encode(data).decode()

    return change


@pytest.mark.parametrize(
    "tamper",
    [said("epoch", 7), said("tenant", "bolt"), said("set_at", "2027-01-01T00:00:00+00:00"), said("format", 2),
     flip("salt"), flip("nonce"), flip("sealed"), lambda document: document.pop("sealed"),
     lambda document: document.update(nonce="")],
)  # fmt: skip
def test_what_was_tampered_with_is_refused(layout: StateLayout, tamper: Callable[[dict[str, Any]], None]) -> None:
    files, path = SecretFiles(layout), layout.secrets_of(ACME)
    files.save(ACME, ONE)
    document = json.loads(path.read_bytes())
    tamper(document)
    path.write_text(json.dumps(document))
    with pytest.raises(Failed) as refused:
        files.load(ACME)
    assert refused.value.code == "secrets.damaged"
    assert "acme" in refused.value.message
    assert "secrets set acme" in refused.value.hint


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"\xff", b"[1]"])
def test_what_is_no_such_file_is_refused(layout: StateLayout, content: bytes) -> None:
    layout.secrets_of(ACME).write_bytes(content)
    with pytest.raises(Failed) as refused:
        SecretFiles(layout).load(ACME)
    assert refused.value.code == "secrets.damaged"


def test_anothers_secrets_and_anothers_key_are_refused(layout: StateLayout) -> None:
    files = SecretFiles(layout)
    files.save(ACME, ONE)
    os.link(layout.secrets_of(ACME), layout.secrets_of(BOLT))
    with pytest.raises(Failed, match=r"secrets\.damaged"):
        files.load(BOLT)
    layout.secrets_key.write_bytes(os.urandom(32))
    with pytest.raises(Failed, match=r"secrets\.damaged"):
        files.load(ACME)
    layout.secrets_key.unlink()
    for attempt in (lambda: files.load(ACME), lambda: files.save(ACME, ONE)):
        with pytest.raises(Failed, match=r"secrets\.no_key"):
            attempt()


def test_a_newer_format_is_told_from_damage(layout: StateLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("mvm.drivers.secret_files._FORMAT", 2)
        SecretFiles(layout).save(ACME, ONE)
    with pytest.raises(Failed) as caught:
        SecretFiles(layout).load(ACME)
    assert caught.value.code == "secrets.other_format"
