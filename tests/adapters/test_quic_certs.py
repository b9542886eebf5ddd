"""Certificates on disk: made once, kept while usable, never readable by others."""

from __future__ import annotations

import errno
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mvm.domain.ids import NodeId
from mvm.domain.layout import StateLayout
from mvm.drivers import files
from mvm.drivers.quic import certs
from mvm.drivers.quic.authority import Issued, issue
from mvm.drivers.quic.identity import load_certificates, load_key
from mvm.errors import Failed, InvalidInput
from tests.support.quic_agent import NODE, coordinator, days_from_now, make_certs, node

NAMES = ("ca.key", "ca.pem", "coordinator.key", "coordinator.pem", "node.key", "node.pem")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def problems(root: Path, node_id: NodeId | None = NODE) -> dict[str, str]:
    return {row["name"]: row["problem"] for row in certs.status(StateLayout(root), node_id)}


def put(directory: Path, name: str, issued: Issued) -> None:
    key = issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / f"{name}.key").write_bytes(key)
    (directory / f"{name}.pem").write_bytes(issued.certificate.public_bytes(Encoding.PEM))


def bundle(path: Path, issued: Issued) -> Path:
    key = issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(issued.certificate.public_bytes(Encoding.PEM) + key)
    return path


def ca_of(directory: Path) -> Issued:
    return Issued(load_certificates(directory / "ca.pem")[0], load_key(directory / "ca.key"))


def test_a_new_set_is_whole_private_and_kept(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    assert sorted(contents(directory)) == list(NAMES)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    first = contents(directory)
    make_certs(tmp_path)
    assert contents(directory) == first

    rows = certs.status(StateLayout(tmp_path), NODE)
    assert [(row["name"], row["ok"], row["problem"]) for row in rows] == [
        ("ca", True, ""), ("node", True, ""), ("coordinator", True, ""),
    ]  # fmt: skip
    assert rows[1]["sans"] == ["node-a.node.mvm", "spiffe://mvm/node/node-a"]
    assert rows[2]["sans"] == ["spiffe://mvm/coordinator"]
    assert 360 < rows[1]["days_left"] <= 365
    assert "PRIVATE" not in str(rows)


def test_status_of_nothing(tmp_path: Path) -> None:
    rows = certs.status(StateLayout(tmp_path))
    assert [row["ok"] for row in rows] == [False] * 3
    assert all("does not exist" in row["problem"] for row in rows)


@pytest.mark.parametrize("name", ["node", "coordinator"])
@pytest.mark.parametrize(
    "damage", ["cert gone", "key gone", "cert garbage", "key garbage", "readable", "old", "soon", "stranger", "swapped"]
)
def test_what_cannot_be_used_is_reported_and_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    directory = make_certs(tmp_path)
    make = {"node": node, "coordinator": coordinator}[name]
    ca = ca_of(directory)
    match damage:
        case "cert gone" | "key gone":
            (directory / f"{name}.{'pem' if 'cert' in damage else 'key'}").unlink()
        case "cert garbage" | "key garbage":
            (directory / f"{name}.{'pem' if 'cert' in damage else 'key'}").write_text("garbage")
        case "readable":
            (directory / f"{name}.key").chmod(0o644)
        case "old":
            put(directory, name, make(ca, not_before=days_from_now(-3), days=1))
        case "soon":
            put(directory, name, make(ca, days=certs.RENEW_DAYS - 1))
        case "stranger":
            put(directory, name, make(issue(None, "elsewhere", days=90)))
        case "swapped":
            put(directory, name, Issued(make(ca).certificate, make(ca).key))
    assert bool(problems(tmp_path)[name]) is (damage != "soon")
    before = contents(directory)
    make_certs(tmp_path)
    after = contents(directory)
    assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
    assert after[f"{name}.pem"] != before.get(f"{name}.pem")
    assert after["ca.pem"] == before["ca.pem"]
    assert (directory / f"{name}.key").stat().st_mode & 0o777 == 0o600


def test_another_node_gets_a_certificate_of_its_own(tmp_path: Path) -> None:
    make_certs(tmp_path)
    assert problems(tmp_path, NodeId("node-b"))["node"] == "the certificate is for node/node-a"
    make_certs(tmp_path, NodeId("node-b"))
    assert problems(tmp_path, NodeId("node-b"))["node"] == ""


def test_a_ca_that_cannot_be_used_is_not_replaced(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    put(directory, "ca", issue(None, "old", not_before=days_from_now(-9), days=1))
    before = contents(directory)
    with pytest.raises(InvalidInput) as caught:
        make_certs(tmp_path)
    assert caught.value.code == "certs.damaged"
    assert contents(directory) == before


def test_a_ca_without_its_key_keeps_what_it_issued(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    (directory / "ca.key").unlink()
    make_certs(tmp_path)
    assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
    (directory / "node.pem").unlink()
    with pytest.raises(Failed) as caught:
        make_certs(tmp_path)
    assert caught.value.code == "certs.no_ca_key"


def test_a_given_ca_issues_and_what_was_issued_before_goes(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    own = issue(None, "our own", days=90)
    given = bundle(tmp_path / "ca-bundle.pem", own)
    certs.init(StateLayout(tmp_path), NODE, given)
    assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
    assert load_certificates(directory / "ca.pem") == (own.certificate,)
    assert not (directory / "ca.key").exists(), "a CA's key is not kept on a node that was given it"
    first = contents(directory)
    certs.init(StateLayout(tmp_path), NODE, given)
    assert contents(directory) == first


def test_a_given_ca_must_be_one(tmp_path: Path) -> None:
    ca = issue(None, "ca", days=90)
    other = issue(None, "other", days=90)
    bad = {
        "leaf": coordinator(ca),
        "mismatch": Issued(ca.certificate, other.key),
        "expired": issue(None, "ca", not_before=days_from_now(-9), days=1),
    }
    for name, issued in bad.items():
        with pytest.raises(InvalidInput) as caught:
            certs.init(StateLayout(tmp_path), NODE, bundle(tmp_path / name, issued))
        assert caught.value.code == "certs.damaged"
    (tmp_path / "no-key").write_bytes(ca.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(InvalidInput):
        certs.init(StateLayout(tmp_path), NODE, tmp_path / "no-key")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed) as caught:
        make_certs(tmp_path / "file")
    assert caught.value.code == "certs.unwritable"


# --- on a file system that cannot exchange two directories
class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture
def plain_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(other))

    monkeypatch.setattr(files, "exchange", cannot)
    monkeypatch.setattr(certs, "exchange", cannot, raising=False)


@pytest.mark.usefixtures("plain_renames")
def test_a_set_is_made_and_replaced_there_too(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    before = contents(directory)
    (directory / "node.pem").unlink()
    make_certs(tmp_path)
    assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
    assert contents(directory)["ca.pem"] == before["ca.pem"]
    assert [path.name for path in tmp_path.iterdir()] == ["certs"]


@pytest.mark.usefixtures("plain_renames")
@pytest.mark.parametrize("way", ["plain", "link"])
def test_killed_at_any_rename_it_has_the_ca_that_others_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (tmp_path / "certs").symlink_to(tmp_path / "elsewhere")
    directory = make_certs(tmp_path)
    ca = (directory / "ca.pem").read_bytes()
    (directory / "note.txt").write_text("not ours")
    survived = []
    for number in range(1, 6):
        (directory / "node.pem").unlink()
        survived.append(_killed_at(tmp_path, number, monkeypatch))
        make_certs(tmp_path)
        assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
        assert (directory / "ca.pem").read_bytes() == ca
        assert (directory / "note.txt").read_text() == "not ours"
        assert len(list(tmp_path.iterdir())) == (2 if way == "link" else 1), "nothing is left over"
    assert survived[0] is False
    assert survived[-1] is True


def _killed_at(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it went through although it was to be killed before its rename `number`."""
    left, real = [number], Path.rename

    def rename(self: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            patch.setattr(certs.shutil, "rmtree", lambda *_, **__: None)  # who is killed tidies nothing up
        if left[0] <= 0:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        try:
            make_certs(root)
        except Killed:
            return False
    return True


def test_many_at_once_make_one_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_certs(tmp_path), range(8)))
    assert problems(tmp_path) == {"ca": "", "node": "", "coordinator": ""}
    assert sorted(contents(tmp_path / "certs")) == list(NAMES)


def test_the_client_imports_nothing_heavy_and_deferral_is_transparent(tmp_path: Path) -> None:
    script = """
import sys
import mvm.drivers.quic.client
heavy = ("aioquic", "asyncio", "cryptography", "pydantic", "OpenSSL", "service_identity", "certifi")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
from mvm.drivers.quic.quick_import import heavy_imports_deferred
with heavy_imports_deferred():
    import aioquic.tls
assert not [name for name in ("OpenSSL", "service_identity", "certifi", "asyncio") if name in sys.modules]
assert aioquic.tls.certifi.where().endswith(".pem")
assert aioquic.tls.crypto.X509Store().__class__.__module__ == "OpenSSL.crypto"
import OpenSSL.SSL, service_identity
assert aioquic.tls.service_identity.VerificationError is service_identity.VerificationError
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path.cwd())
